"""NAF: against the plain formula, the original's output, and its checkpoint."""

from __future__ import annotations

import math
import re

import originals
import pytest
import torch
import torch.nn.functional as F
from guided import LargestTensor, assert_close, assert_parity, draw, plain_encoder, seeded, tensors
from util import assert_gradient_within_budget, assert_within_budget, layouts

import murf_fast
from murf_fast import backends
from murf_fast.nn import NAF
from murf_fast.nn.guided import naf as naf_module
from murf_fast.ops import _naf_encoder


def window(out, grid, kernel):
    """Key of every step of every output's window: a run of a dilated group, shifted at the borders (NATTEN)."""
    dilation = out // grid
    nearest = F.interpolate(torch.arange(grid).double()[None, None], size=out, mode="nearest-exact")[0, 0].long()
    rows = []
    for y in range(out):
        group = list(range(y % dilation, out, dilation))
        start = min(max(group.index(y) - kernel // 2, 0), len(group) - kernel)
        rows.append(nearest[group[start : start + kernel]])
    return torch.stack(rows)


def plain_rope(x, periods, heads):
    angles = []
    for n, shape in zip(x.shape[2:], ((-1, 1, 1), (1, -1, 1)), strict=True):
        at = 2 * (torch.arange(n, dtype=x.dtype) + 0.5) / n - 1
        angles.append((2 * math.pi * at.view(shape) / periods).expand(*x.shape[2:], -1))
    angle = torch.cat([*angles, *angles], -1)
    x = x.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2)
    first, second = x.chunk(2, -1)
    turned = x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()
    return turned.permute(0, 1, 4, 2, 3).flatten(1, 2)


def plain_naf(model, image, features, size):
    p, heads, (h, w) = tensors(model), model.num_heads, features.shape[2:]
    if image.shape[2] > 4 * size[0] or image.shape[3] > 4 * size[1]:
        sides = [min(n, 4 * size[0], 4 * size[1]) for n in image.shape[2:]]
        image = F.interpolate(image, sides, mode="bilinear")
    names = ("image_encoder.encoder", "image_encoder.sem_encoder")
    encoded = torch.cat([plain_encoder(p, name, image, residual=False) for name in names], 1)
    q = plain_rope(F.adaptive_avg_pool2d(encoded, size), p["image_encoder.rope.periods"].to(image.dtype), heads)
    k = F.adaptive_avg_pool2d(q, (h, w))
    rows, columns = (window(o, n, model.kernel_size) for o, n in zip(size, (h, w), strict=True))
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, features))
    scores = torch.einsum("bndyx,bndyxij->bnyxij", q, k[:, :, :, rows, columns]) * q.shape[2] ** -0.5
    weights = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])
    return torch.einsum("bnyxij,bncyxij->bncyx", weights, v[:, :, :, rows, columns]).flatten(1, 2)


MODELS = (
    # arguments, image, channels and grid, output
    ({"dim": 32, "num_heads": 2, "kernel_size": 3}, (13, 11), (6, 4, 5), (13, 11)),
    ({"dim": 16, "num_heads": 1, "kernel_size": 4, "blocks": 1}, (9, 17), (5, 4, 6), (12, 19)),
    ({"dim": 48, "num_heads": 3, "kernel_size": 3}, (50, 20), (3, 3, 3), (7, 9)),
    ({"dim": 32, "num_heads": 4, "kernel_size": 5}, (23, 29), (8, 5, 6), (5, 6)),
    ({"dim": 32, "num_heads": 4, "kernel_size": 9}, (16, 16), (4, 9, 10), (29, 23)),
)


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_parity(case):
    arguments, image, features, size = case
    assert_parity(
        lambda model, image, features: model(image, features, size),
        lambda model, image, features: plain_naf(model, image, features, size),
        seeded(NAF(**arguments)),
        draw(2, 3, *image),
        draw(2, *features, seed=1),
    )


def small(**arguments):
    return seeded(NAF(32, **{"num_heads": 2, "kernel_size": 3, **arguments}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden(dtype):
    """Allowed errors: what the file's authors state for float32."""
    arrays = originals.golden("naf__model")
    data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    model = NAF.from_checkpoint({k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")})
    assert not model.training
    model = model.to(dtype)
    image, features = data["image"].to(dtype), data["features"].to(dtype)
    size = tuple(data["output_size"].tolist())
    with torch.no_grad():
        assert_close(model.image_encoder(image, size), data["q"], 3e-6)
        assert_close(model(image, features, size), data["output"], 9e-7)


def test_the_releases_parameters():
    """Names and number of the released checkpoint (shared facts: 662,528 parameters, 16 periods)."""
    model = NAF()
    assert sum(p.numel() for p in model.parameters()) == 662_528
    periods = model.state_dict()["image_encoder.rope.periods"]
    assert_close(periods, 100 ** (torch.arange(16).double() / 16), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_features(dtype):
    """Parameters in float32: queries and keys are rounded once."""
    model, image, features = small().requires_grad_(False), draw(1, 3, 16, 15), draw(1, 6, 4, 5).to(dtype)
    result = model(image, features, (16, 15))
    assert result.dtype == dtype
    oracle = plain_naf(model.double(), image.double(), features.double(), (16, 15))
    same = plain_naf(model.float(), image, features.float(), (16, 15))
    rounded = plain_naf(model.to(dtype), image.to(dtype), features, (16, 15))
    assert float((result.double() - oracle).abs().max()) < float((rounded.double() - oracle).abs().max())
    assert float((same.double() - oracle).abs().max()) < float((result.double() - oracle).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters(dtype):
    model, image, features = small(), draw(1, 3, 16, 15).to(dtype), draw(1, 6, 4, 5).to(dtype)
    same = plain_naf(model.to(dtype), image, features, (16, 15))
    result = model(image, features, (16, 15))
    assert result.dtype == dtype
    assert_within_budget(result, plain_naf(model.double(), image.double(), features.double(), (16, 15)), same)


def test_autocast():
    model, image, features = small().requires_grad_(False), draw(1, 3, 16, 15), draw(1, 6, 4, 5)
    expected = model(image, features)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(image, features)
    assert result.dtype == torch.float32
    assert not torch.equal(result, expected)
    assert float((result - expected).abs().max()) < 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens", "sliced"])
def test_layouts(layout):
    model, image, features = small(), draw(2, 3, 14, 13), draw(2, 6, 4, 5)
    result = model(layouts(image)[layout], layouts(features)[layout])
    assert_close(result, model(image, features), 1e-6)
    channels_last = layout in ("channels_last", "tokens")
    assert result.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_output_size():
    model, image, features = small(), draw(1, 3, 14, 13), draw(1, 6, 4, 5)
    assert torch.equal(model(image, features), model(image, features, (14, 13)))
    assert torch.equal(model(image, features, 17), model(image, features, output_size=[17, 17]))


def path_taken(model, *inputs):
    """Which of the two ways a call goes: "pixels", or "modules" that are called."""
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        own = naf_module.naf_queries
        patch.setattr(naf_module, "naf_queries", lambda *a: calls.append(a) or own(*a))
        model(*inputs)
    return "pixels" if calls else "modules"


def test_which_path_is_taken():
    image, features = draw(1, 3, 14, 13), draw(1, 6, 4, 5)
    assert path_taken(small(), image, features) == "modules"  # its parameters want gradients
    frozen = small().requires_grad_(False)
    assert path_taken(frozen, image, features) == "pixels"
    assert path_taken(frozen, image, features.requires_grad_()) == "pixels"
    assert path_taken(frozen, image.clone().requires_grad_(), features) == "modules"
    assert path_taken(small().requires_grad_(False).double(), image.double(), features.double()) == "modules"
    with torch.autocast("cpu", torch.bfloat16):
        assert path_taken(frozen, image, features) == "modules"
    frozen.image_encoder.sem_encoder[1].norm2.register_forward_hook(lambda *_: None)
    assert path_taken(frozen, image, features) == "modules"


@pytest.mark.parametrize("case", MODELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels(case, dtype, level):
    """The encoders as passes over the pixels."""
    arguments, image, features, size = case
    model = seeded(NAF(**arguments)).requires_grad_(False).to(dtype)
    image, features = draw(2, 3, *image).to(dtype), draw(2, *features, seed=1).to(dtype)
    result, same = model(image, features, size), plain_naf(model, image, features, size)
    assert_within_budget(result, plain_naf(model.double(), image.double(), features.double(), size), same)


def test_features_alone_need_gradients():
    """Then the image still takes the fast way, and the gradient is that of the slow one."""
    model, image, features = small().requires_grad_(False), draw(1, 3, 14, 13), draw(1, 6, 4, 5)

    def gradient(call, dtype):
        leaf = features.to(dtype).requires_grad_()
        result = call(model.to(dtype), image.to(dtype), leaf, (14, 13))
        return torch.autograd.grad(result.square().sum(), leaf)[0]

    oracle, same = gradient(plain_naf, torch.float64), gradient(plain_naf, torch.float32)
    assert_gradient_within_budget(gradient(lambda m, *a: m(*a), torch.float32), oracle, same)


@pytest.mark.skipif(
    bool(backends.reasons_against("triton", "cpu")), reason="; ".join(backends.reasons_against("triton", "cpu"))
)
@pytest.mark.parametrize("size", [(9, 8), (7, 6)])
def test_triton(size):
    model = seeded(NAF(16, num_heads=1, kernel_size=2)).requires_grad_(False)
    image, features = draw(1, 3, 9, 8), draw(1, 2, 3, 2)
    with murf_fast.use_backend("triton"):
        result = model(image, features, size)
    same = plain_naf(model, image, features, size)
    assert_within_budget(result, plain_naf(model.double(), image.double(), features.double(), size), same)


def test_opcheck():
    model = small().requires_grad_(False)
    calls = []
    op = _naf_encoder._naf_queries
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_naf_encoder, "_naf_queries", lambda *a: calls.append(a) or op(*a))
        model(draw(1, 3, 9, 8), draw(1, 4, 3, 3))
    torch.library.opcheck(torch.ops.murf_fast.naf_queries.default, calls[0])


def training(**arguments):
    return NAF(32, num_heads=2, kernel_size=3, **arguments).train()


def factor_of(model, size):
    rope = model.image_encoder.rope
    turns, rope.training = rope.turns(size), False
    plain, rope.training = rope.turns(size), True
    return [float((a / b).nanmedian()) for a, b in zip(turns, plain, strict=True)]


def test_coordinates_are_scaled_in_training():
    """By one factor for both axes, log-uniform between 1/2 and 2, from torch's generator."""
    factors = []
    for seed in range(20):
        model = training()
        torch.manual_seed(seed)
        expected = float(torch.empty(1).uniform_(-math.log(2), math.log(2)).exp())
        torch.manual_seed(seed)
        assert factor_of(model, (6, 5)) == pytest.approx([expected, expected], rel=1e-6)
        factors.append(expected)
    assert 0.5 <= min(factors) < 0.7 < 1.4 < max(factors) <= 2


def test_factors_are_drawn_anew_for_another_size():
    model, image, features = training(), draw(1, 3, 14, 13), draw(1, 6, 4, 5)
    first = factor_of(model, (6, 5))
    assert factor_of(model, (6, 5)) == first
    second = factor_of(model, (5, 6))
    assert second != first
    assert factor_of(model, (6, 5)) != first
    evaluated = model.eval()(image, features)
    assert_within_budget(evaluated, *(plain_naf(model.to(d), image.to(d), features.to(d), (14, 13))
                                      for d in (torch.float64, torch.float32)))  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
def test_the_factor_reaches_the_result(grad):
    """On both paths: scaled coordinates are periods divided by the factor."""
    image, features = draw(1, 3, 14, 13), draw(1, 6, 4, 5)
    model = seeded(training()).train().requires_grad_(grad)
    result, (factor, _) = model(image, features), factor_of(model, (14, 13))
    assert factor != 1
    model.image_encoder.rope.periods /= factor
    model.eval()
    expected = model(image, features)
    torch.testing.assert_close(result, expected)
    model.image_encoder.rope.periods *= factor
    assert not torch.allclose(result, model(image, features))


def test_unscaled_training():
    image, features = draw(1, 3, 14, 13), draw(1, 6, 4, 5)
    model = seeded(training(rope_rescale=None)).train()
    state = torch.get_rng_state()
    result = model(image, features)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(result, model.eval()(image, features))


def test_empty_batch():
    assert small()(draw(0, 3, 14, 13), draw(0, 6, 4, 5), (9, 20)).shape == (0, 6, 9, 20)


def test_memory():
    """No scores and no upsampled keys or values: nothing larger than the queries or the result."""
    model = small()
    with LargestTensor() as largest, torch.no_grad():
        model(draw(1, 3, 64, 64), draw(1, 40, 8, 8))
    assert largest.elements <= 40 * 64 * 64


def test_compile():
    model, image, features = small(), draw(1, 3, 14, 13), draw(1, 6, 4, 5)
    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(model, fullgraph=True)(image, features, (14, 13))
        same = plain_naf(model, image, features, (14, 13))
        assert_within_budget(result, plain_naf(model.double(), image.double(), features.double(), (14, 13)), same)


def test_checkpoint_files(tmp_path):
    expected = small(blocks=3)
    image, features = draw(1, 3, 14, 13), draw(1, 6, 4, 5)
    torch.save(expected.state_dict(), tmp_path / "naf_release.pth")
    model = NAF.from_checkpoint(tmp_path / "naf_release.pth", kernel_size=3)
    assert torch.equal(model(image, features), expected(image, features))


def test_checkpoints_that_do_not_fit():
    weights = small().state_dict()
    weights["image_encoder.encoder.3.conv1.bias"] = weights.pop("image_encoder.encoder.2.conv1.bias")
    weights["image_encoder.sem_encoder.0.weight"] = torch.zeros(16, 3, 5, 5)
    words = (
        "missing keys: image_encoder.encoder.2.conv1.bias; unexpected keys: image_encoder.encoder.3.conv1.bias; wrong "
        "shapes: image_encoder.sem_encoder.0.weight (16, 3, 5, 5) (expected (16, 3, 3, 3))"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        NAF.from_checkpoint(weights)
    with pytest.raises(ValueError, match=r"must hold image_encoder.encoder.0.weight .* got the keys head.weight"):
        NAF.from_checkpoint({"head.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"image": torch.ones(3, 9, 9)}, ValueError, r"`image` must be \(B, C, H, W\)"),
        ({"image": torch.ones(1, 4, 9, 9)}, ValueError, "`image` must have 3 channels, got 4"),
        ({"image": torch.ones(1, 3, 9, 1)}, ValueError, r"`image` must have at least 2 rows and columns, got \(9, 1\)"),
        ({"image": torch.ones(1, 3, 9, 9).half()}, TypeError, "`image` must have the dtype of `the parameters`"),
        ({"image": torch.ones(1, 3, 9, 9).byte()}, TypeError, "`image` must have one of the dtypes"),
        ({"features": torch.ones(2, 6, 4, 5)}, ValueError, "`features` must have the batch size of `image`, 1, got 2"),
        ({"features": torch.ones(1, 5, 4, 5)}, ValueError, "`features` must have a multiple of 2 channels, got 5"),
        ({"features": "map"}, TypeError, "`features` must be a tensor, got str"),
        ({"output_size": (0, 9)}, ValueError, r"`output_size` must be positive, got \(0, 9\)"),
        ({"output_size": (9, 9.0)}, TypeError, "`output_size` must be .height, width. in pixels"),
        ({"features": torch.ones(1, 6, 2, 4)}, ValueError, "windows of 3 .* height 2 and `output_size` of 9 leave st"),
        ({"output_size": (9, 2)}, ValueError, "windows of 3 .* width 5 and `output_size` of 2"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"image": torch.ones(1, 3, 9, 9), "features": torch.ones(1, 6, 4, 5), "output_size": (9, 9), **change}
    with pytest.raises(error, match=words):
        NAF(32, num_heads=2, kernel_size=3)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dim": 40}, "`dim` must be a multiple of 16 and of four times the heads, 16, got 40"),
        ({"dim": 48, "num_heads": 8}, "four times the heads, 32, got 48"),
        ({"kernel_size": 0}, "`kernel_size` must be at least 1, got 0"),
        ({"blocks": 0}, "`blocks` must be at least 1, got 0"),
        ({"rope_rescale": 0.5}, "`rope_rescale` must be at least 1, got 0.5"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        NAF(**arguments)
