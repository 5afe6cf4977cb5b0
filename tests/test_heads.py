"""The heads against the original implementations (`tests/golden/`), and the checkpoints they load.

The golden arrays are float64 results of the originals, stored in float32. Budget: three times the error that the
original itself makes in float32 (recorded in `tests/golden/README.md`, whose authors ask for that much: another order
of the same sums is another error), plus one rounding.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from util import assert_within_budget, rounding

import murf_fast
from murf_fast.nn import NAF, DepthHead, SegmentationHead

GOLDEN = Path(__file__).parent / "golden"

# File, then quantity: the original's own float32 error, absolute; for gradients relative to the largest entry.
RECORDED = {
    "murf__segmentation_head": {"logits_grid": 2.0e-6, "logits": 7.7e-6, "loss": 1.7e-7, "gradients": 4.9e-7},
    "murf__depth_lin1_softmax": {"logits": 3.3e-6, "normalized_depth": 3.3e-6, "predicted_depth": 3.3e-6},
    "murf__depth_lin4_linear": {"logits": 3.0e-6, "normalized_depth": 1.2e-6, "predicted_depth": 1.5e-6},
    "dinov2_hub__depth_lin4": {"depth": 4.5e-5, "depth_head_grid": 5.2e-5},
}


class Golden:
    def __init__(self, name: str):
        self.name = name
        self.arrays = np.load(GOLDEN / f"{name}.npz")

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def state_dict(self, keys: dict[str, str]) -> dict[str, Tensor]:
        return {name: self[key] for name, key in keys.items()}

    def check(self, actual: Tensor, key: str, quantity: str | None = None) -> None:
        oracle = self[f"{key}.f64"].double()
        assert actual.shape == oracle.shape
        scale = oracle.abs().max() if quantity == "gradients" else 1.0
        allowed = 3 * RECORDED[self.name][quantity or key] * scale + rounding(oracle, torch.float32)
        error = (actual.detach().double() - oracle).abs()
        assert (error <= allowed).all(), f"{key}: error {float(error.max()):.3g}, allowed {float(allowed.min()):.3g}"


def token_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 1 + h w, C) with the CLS token first to a map that views it."""
    return tokens[:, 1:].mT.unflatten(2, grid)


class Segmentation:
    """MuRF's segmentation model: tokens at three resolutions of square images."""

    def __init__(self):
        self.golden = Golden("murf__segmentation_head")
        names = ("weight", "bias", "running_mean", "running_var")
        keys = {f"seg_head.bn.{n}": f"head.bn.{n}" for n in names}
        keys |= {f"seg_head.classifier.{n}": f"head.classifier.{n}" for n in ("weight", "bias")}
        self.state_dict = {**self.golden.state_dict(keys), "seg_head.bn.num_batches_tracked": torch.tensor(0)}
        self.head = SegmentationHead.from_state_dict(self.state_dict).eval()
        self.tokens = [self.golden[f"tokens{i}"].requires_grad_() for i in range(3)]
        grids = [int(r) // 14 for r in self.golden["resolutions"]]
        self.maps = [token_map(t, (n, n)) for t, n in zip(self.tokens, grids, strict=True)]
        self.size = tuple(self.golden["labels"].shape[1:])


def test_murf_segmentation():
    s = Segmentation()
    s.golden.check(s.head(s.maps, (12, 12)), "logits_grid")
    s.golden.check(s.head(s.maps, s.size)[..., ::2, ::2], "logits")
    assert torch.equal(s.head.predict(s.maps, s.size), s.golden["argmax"])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fused", [False, True])
def test_murf_segmentation_gradients(mode, fused):
    s = Segmentation()
    s.head.train(mode == "train")
    target = s.golden["labels"].long()
    if fused:
        loss = s.head.loss(s.maps, target, ignore_index=255)
    else:
        loss = F.cross_entropy(s.head(s.maps, s.size), target, ignore_index=255)
    s.golden.check(loss, "train.loss" if mode == "train" else "loss", "loss")
    loss.backward()
    for i, tokens in enumerate(s.tokens):
        s.golden.check(tokens.grad, f"{mode}.grad_tokens{i}", "gradients")
    for name, module in (("bn", s.head.norm), ("classifier", s.head.classifier)):
        for parameter in ("weight", "bias"):
            s.golden.check(getattr(module, parameter).grad, f"{mode}.grad.{name}.{parameter}", "gradients")


def test_murf_segmentation_in_training_mode():
    s = Segmentation()
    s.golden.check(s.head.train()(s.maps, (12, 12)), "train.logits_grid", "logits_grid")
    assert s.head.norm.num_batches_tracked == 1


class Depth:
    """MuRF's depth model: hidden states of several layers at three scales, each with its CLS token."""

    def __init__(self, name: str, norm: str):
        self.golden = Golden(name)
        keys = {f"depth_estimation_head.head.{n}": f"head.{n}" for n in ("weight", "bias")}
        self.head = DepthHead.from_state_dict(self.golden.state_dict(keys), norm=norm)
        self.maps, self.cls = [], []
        for scale in range(3):
            grid = tuple(int(n) for n in self.golden[f"grid{scale}"])
            for layer in self.golden["out_indices"]:
                hidden = self.golden[f"hidden{layer}.scale{scale}"]
                self.maps.append(token_map(hidden, grid))
                self.cls.append(hidden[:, 0])
        self.size = tuple(self.golden["size"].tolist())


@pytest.mark.parametrize(
    ("name", "norm"), [("murf__depth_lin1_softmax", "softmax"), ("murf__depth_lin4_linear", "linear")]
)
def test_murf_depth(name, norm):
    d = Depth(name, norm)
    weight, bias = d.head.classifier.weight, d.head.classifier.bias
    logits = murf_fast.linear_head(d.maps, weight, bias, size=(10, 8), cls=d.cls)
    # With the linear norm the original returns its logits after relu + 0.1.
    d.golden.check(logits if norm == "softmax" else logits.relu() + 0.1, "logits")
    d.golden.check(d.head.depth_on_head_grid(d.maps, d.cls), "normalized_depth")
    d.golden.check(d.head(d.maps, d.size, d.cls), "predicted_depth")
    assert torch.equal(d.head.predict(d.maps, d.size, d.cls), d.head(d.maps, d.size, d.cls))
    torch.testing.assert_close(d.head.values(), d.golden["bin_centers"], rtol=1e-7, atol=1e-6)


def test_dinov2_hub_depth():
    golden = Golden("dinov2_hub__depth_lin4")
    keys = {f"decode_head.conv_depth.{n}": f"conv_depth.{n}" for n in ("weight", "bias")}
    head = DepthHead.from_state_dict(golden.state_dict(keys))
    maps, cls = [golden[f"patch{i}"] for i in range(4)], [golden[f"cls{i}"] for i in range(4)]
    golden.check(head.depth_on_head_grid(maps, cls)[:, None], "depth_head_grid")
    golden.check(head(maps, tuple(golden["size"].tolist()), cls)[:, None], "depth")


GENERATOR = torch.Generator().manual_seed(5)
MAPS = [torch.randn(2, c, h, w, generator=GENERATOR) for c, h, w in ((5, 4, 6), (3, 7, 5), (4, 4, 6))]
CLS = [torch.randn(2, 2, generator=GENERATOR), None, torch.randn(2, 3, generator=GENERATOR)]
COLUMNS, CLASSES, SIZE = 17, 6, (23, 29)


def state_dict(convolution: str, norm: str | None, columns: int = COLUMNS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    tensors = {
        f"{convolution}.weight": torch.randn(CLASSES, columns, 1, 1, generator=generator),
        f"{convolution}.bias": torch.randn(CLASSES, generator=generator),
    }
    if norm is not None:
        for name in ("weight", "bias", "running_mean"):
            tensors[f"{norm}.{name}"] = torch.randn(columns, generator=generator)
        tensors[f"{norm}.running_var"] = torch.rand(columns, generator=generator) + 0.5
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(3)
    return tensors


SEGMENTATION_NAMES = [
    ("classifier", "norm", (7, 6)),
    ("classifier", None, (7, 6)),
    ("seg_head.classifier", "seg_head.bn", (7, 6)),
    ("decode_head.conv_seg", "decode_head.bn", (4, 6)),
    ("conv", "batchnorm_layer", (4, 6)),
    ("conv", None, (4, 6)),
]


def concatenated(grid: tuple[int, int], state: dict[str, Tensor], convolution: str, norm: str | None) -> Tensor:
    """Logits at the head's grid as every original computes them, in float64."""
    columns = []
    for feature, token in zip(MAPS, CLS, strict=True):
        columns.append(F.interpolate(feature.double(), grid, mode="bilinear"))
        if token is not None:
            columns.append(token.double()[:, :, None, None].expand(-1, -1, *grid))
    x = torch.cat(columns, dim=1)
    if norm is not None:
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *[state[f"{norm}.{name}"].double() for name in names])
    return F.conv2d(x, state[f"{convolution}.weight"].double(), state[f"{convolution}.bias"].double())


@pytest.mark.parametrize(("convolution", "norm", "grid"), SEGMENTATION_NAMES)
def test_segmentation_checkpoints(convolution, norm, grid):
    state = state_dict(convolution, norm)
    head = SegmentationHead.from_state_dict(state).eval()
    expected = F.interpolate(concatenated(grid, state, convolution, norm), SIZE, mode="bilinear")
    actual = head(MAPS, SIZE, CLS)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(head.predict(MAPS, SIZE, CLS), actual.argmax(1).to(torch.uint8))
    own = SegmentationHead.from_state_dict(head.state_dict(), grid=head.grid).eval()
    assert torch.equal(own(MAPS, SIZE, CLS), actual)


def test_segmentation_on_the_grid_of_the_image():
    state = state_dict("seg_head.classifier", "seg_head.bn")
    head = SegmentationHead.from_state_dict(state, grid="image").eval()
    expected = concatenated(SIZE, state, "seg_head.classifier", "seg_head.bn")
    torch.testing.assert_close(head(MAPS, SIZE, CLS).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(head.predict(MAPS, SIZE, CLS), head(MAPS, SIZE, CLS).argmax(1).to(torch.uint8))


DEPTH_NAMES = [
    ("classifier", "batch_norm", (7, 6), "softmax"),
    ("depth_estimation_head.head", None, (7, 6), "softmax"),
    ("decode_head.conv_depth", None, (16, 24), "linear"),
    ("conv_depth", "batchnorm_layer", (4, 6), "linear"),
    ("conv_depth", None, (4, 6), "linear"),
]


@pytest.mark.parametrize(("convolution", "norm", "grid", "distribution"), DEPTH_NAMES)
def test_depth_checkpoints(convolution, norm, grid, distribution):
    state = state_dict(convolution, norm)
    head = DepthHead.from_state_dict(state, depth_range=(0.5, 9.0)).eval()
    logits = concatenated(grid, state, convolution, norm)
    weights = logits.softmax(1) if distribution == "softmax" else logits.relu() + 0.1
    values = torch.linspace(0.5, 9.0, CLASSES) if distribution == "linear" else 0.5 + 8.5 * (torch.arange(6) + 0.5) / 6
    depth = (weights * values[:, None, None]).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    expected = F.interpolate(depth, SIZE, mode="bilinear")[:, 0]
    torch.testing.assert_close(head(MAPS, SIZE, CLS).double(), expected, rtol=1e-5, atol=1e-5)
    own = DepthHead.from_state_dict(
        head.state_dict(),
        **{n: getattr(head, n) for n in ("depth_range", "rule", "norm", "grid", "upsample", "clamp")},
    ).eval()
    assert torch.equal(own(MAPS, SIZE, CLS), head(MAPS, SIZE, CLS))


def test_depth_on_the_grid_of_the_image():
    head = DepthHead(COLUMNS, CLASSES, depth_range=(1, 2), grid="image")
    assert head(MAPS, SIZE, CLS).shape == (2, *SIZE)
    with pytest.raises(ValueError, match="`size` must be given"):
        head.depth_on_head_grid(MAPS, CLS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    maps, cls = [m.to(dtype) for m in MAPS], [None if t is None else t.to(dtype) for t in CLS]
    segmentation = SegmentationHead(COLUMNS, CLASSES).eval().to(dtype)
    assert segmentation(maps, SIZE, cls).dtype == dtype
    assert segmentation.predict(maps, SIZE, cls).dtype == torch.uint8
    depth = DepthHead(COLUMNS, CLASSES, depth_range=(1e-3, 10)).to(dtype)
    assert depth(maps, SIZE, cls).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_heads_compile():
    segmentation = SegmentationHead(COLUMNS, CLASSES).eval()
    depth = DepthHead(COLUMNS, CLASSES, depth_range=(1e-3, 10))
    torch.compiler.reset()
    for function in (segmentation, segmentation.predict, depth):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(MAPS, SIZE, CLS), function(MAPS, SIZE, CLS))


def test_predict_needs_no_gradient():
    maps = [m.clone().requires_grad_() for m in MAPS]
    assert not SegmentationHead(COLUMNS, CLASSES).predict(maps, SIZE, CLS).requires_grad
    depth = DepthHead(COLUMNS, CLASSES, depth_range=(1e-3, 10))
    assert not depth.predict(maps, SIZE, CLS).requires_grad
    assert depth(maps, SIZE, CLS).requires_grad


@pytest.mark.parametrize("fused", [False, True])
def test_a_linear_probe_learns(fused):
    torch.manual_seed(0)
    head = SegmentationHead(COLUMNS, CLASSES, dropout=0.1)
    target = torch.randint(0, CLASSES, (2, 2, 2)).repeat_interleave(12, 1).repeat_interleave(15, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = head.loss(MAPS, target, CLS) if fused else F.cross_entropy(head(MAPS, target.shape[1:], CLS), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert head.norm.num_batches_tracked == 30


def test_dropout_drops_channels_of_an_image():
    """As `nn.Dropout2d` on the concatenated maps: whole channels, in training only."""
    head = SegmentationHead.from_state_dict(state_dict("conv", None, 300))
    assert head.dropout == 0.1
    torch.nn.init.ones_(head.classifier.weight)
    torch.nn.init.zeros_(head.classifier.bias)
    logits = head.train()([torch.ones(2, 300, 3, 3)], SIZE)
    kept = logits.amax((2, 3)) * 0.9
    torch.testing.assert_close(kept.round(), kept, rtol=0, atol=1e-3)
    torch.testing.assert_close(logits.amin((2, 3)), logits.amax((2, 3)))
    assert (kept < 300).all()
    assert (head.eval()([torch.ones(2, 300, 3, 3)], SIZE) - 300).abs().max() < 1e-3


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("head", "state", "words"),
    [
        (SegmentationHead, {}, "must hold one of .*seg_head.classifier.weight.*got the keys none"),
        (SegmentationHead, {"head.weight": MAPS[0]}, "got the keys head.weight"),
        (SegmentationHead, without(state_dict("conv", None), "conv.bias"), "missing: conv.bias; unknown: none"),
        (SegmentationHead, state_dict("seg_head.classifier", None), "names of MuRF, .* missing: seg_head.bn.bias"),
        (
            SegmentationHead,
            without(state_dict("conv", "batchnorm_layer"), "batchnorm_layer.running_var"),
            "names of DINOv3, .* missing: batchnorm_layer.running_var",
        ),
        (
            SegmentationHead,
            {**state_dict("decode_head.conv_seg", "decode_head.bn"), "backbone.x": MAPS[0]},
            "unknown: backbone.x. Pass the entries of the head only",
        ),
        (SegmentationHead, {**state_dict("conv", None), "conv.bias": MAPS[0]}, r"`conv.bias` must have shape \(6,\)"),
        (
            SegmentationHead,
            {**state_dict("conv", None), "conv.weight": MAPS[0]},
            r"`conv.weight` must be \(K, D, 1, 1\)",
        ),
        (DepthHead, state_dict("seg_head.classifier", None), "must hold one of .*decode_head.conv_depth.weight"),
        (DepthHead, state_dict("conv_depth", None), "`depth_range` must be given for a checkpoint of DINOv3"),
    ],
)
def test_bad_checkpoints(head, state, words):
    with pytest.raises(ValueError, match=words):
        head.from_state_dict(state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": "smallest"}, "`grid` must be one of .*'smallest'"),
        ({"rule": "log"}, "`rule` must be one of .*'log'"),
        ({"norm": "sigmoid"}, "`norm` must be one of .*'sigmoid'"),
        ({"depth_range": (5, 1)}, r"`depth_range` must be \(nearest, farthest\), got \(5, 1\)"),
        ({"upsample": 0}, "`upsample` must be at least 1, got 0"),
        ({"bins": 1}, "`bins` must be at least 2, got 1"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        DepthHead(**{"columns": 3, "bins": 4, "depth_range": (1, 2), **options})


def test_bad_inputs():
    segmentation, depth = SegmentationHead(COLUMNS, CLASSES), DepthHead(COLUMNS, CLASSES, depth_range=(1, 2))
    for function in (segmentation, segmentation.predict, depth, depth.predict):
        with pytest.raises(ValueError, match=r"`weight` must have one column per channel .* = 12, got 17"):
            function(MAPS, SIZE)
        with pytest.raises(ValueError, match="`size` must be positive"):
            function(MAPS, (0, 3), CLS)
        with pytest.raises(TypeError, match="`features` must be a non-empty list"):
            function([], SIZE)


@pytest.mark.parametrize("norm", [True, False])
def test_a_folded_head_behind_an_upsampler(norm):
    """Labels and logits of upsampled features, as the head itself has them of those features."""
    torch.manual_seed(0)
    head, model = SegmentationHead(6, 4, norm=norm, grid="image").eval(), NAF(32, num_heads=2, kernel_size=3).eval()
    if norm:
        for buffer in (head.norm.running_mean, head.norm.running_var, head.norm.weight.data, head.norm.bias.data):
            buffer.uniform_(0.5, 2)
    image, features = torch.randn(1, 3, 12, 10), torch.randn(1, 6, 4, 3)

    def plain(dtype):
        own, naf = copy.deepcopy(head).to(dtype), copy.deepcopy(model).to(dtype)
        up = naf(image.to(dtype), features.to(dtype))
        return own.classifier(up if own.norm is None else own.norm(up))

    with torch.no_grad():
        oracle = plain(torch.float64)
        assert_within_budget(model.predict(image, features, *head.folded()), oracle, plain(torch.float32))
        assert torch.equal(model.predict(image, features, *head.folded(), reduce="argmax"), oracle.argmax(1).byte())
    if norm:
        with pytest.raises(ValueError, match="must be in eval mode"):
            head.train().folded()
