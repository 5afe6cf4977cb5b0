"""JAFAR: against the plain formula, the original's output, and its checkpoint."""

from __future__ import annotations

import re

import originals
import pytest
import torch
import torch.nn.functional as F
from guided import LargestTensor, assert_close, assert_parity, draw, plain_encoder, seeded, tensors
from torch import nn
from util import assert_within_budget, layouts

import murf_fast
from murf_fast import backends
from murf_fast.nn import JAFAR
from murf_fast.nn.guided import jafar as jafar_module
from murf_fast.ops._image_encoders import image_queries


def plain_rope(x, freqs):
    y, x_ = torch.meshgrid(*(torch.linspace(0, 1, n, dtype=x.dtype) for n in x.shape[2:]), indexing="ij")
    angle = torch.einsum("fyx,fc->cyx", torch.stack([y, x_]), freqs)
    first, second = x.chunk(2, 1)
    return x * angle.cos() + torch.cat([-second, first], 1) * angle.sin()


def plain_jafar(model, image, features, size):
    p, heads = tensors(model), model.num_heads
    encoded = plain_rope(plain_encoder(p, "image_encoder", image, residual=True), p["rope.freqs"])
    q = F.adaptive_avg_pool2d(plain_encoder(p, "query_encoder", encoded, residual=True), size)
    q = F.conv2d(F.group_norm(q, 8), p["cross_decode.conv2d.weight"], padding=1)
    k = F.adaptive_avg_pool2d(plain_encoder(p, "key_encoder", encoded, residual=True), features.shape[2:])
    known = plain_encoder(p, "key_features_encoder", F.normalize(features, dim=1), residual=True)
    gamma, beta = (F.conv2d(known, p[f"sft_key.{name}.weight"]) for name in ("gamma", "beta"))
    k = gamma * F.group_norm(k, 8) + beta
    projected = []
    for i, (name, x) in enumerate((("q", q), ("k", k))):
        x = x.flatten(2).mT
        x = x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()
        x = x * p[f"cross_decode.cross_attn.norm_{name}.weight"]
        matrix = p[f"cross_decode.cross_attn.attention.{name}_proj_weight"]
        bias = p["cross_decode.cross_attn.attention.in_proj_bias"].chunk(3)[i]
        projected.append((x @ matrix.T + bias).unflatten(2, (heads, -1)))
    q, k = projected
    weights = (torch.einsum("bqnd,bknd->bnqk", q, k) * q.shape[3] ** -0.5).softmax(-1).mean(1)
    return (weights @ features.flatten(2).mT).mT.unflatten(2, size)


MODELS = (
    # arguments, image, grid, output
    ({"v_dim": 6, "qk_dim": 16, "num_heads": 2}, (13, 11), (4, 5), (13, 11)),
    ({"v_dim": 5, "qk_dim": 24, "num_heads": 3, "kernel_size": 3}, (17, 9), (3, 7), (7, 8)),
    ({"v_dim": 24, "qk_dim": 24, "num_heads": 1}, (6, 7), (2, 3), (11, 19)),
    ({"v_dim": 3, "qk_dim": 16, "num_heads": 4}, (5, 4), (9, 8), (3, 2)),
)


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_parity(case):
    arguments, image, grid, size = case
    assert_parity(
        lambda model, image, features: model(image, features, size),
        lambda model, image, features: plain_jafar(model, image, features, size),
        seeded(JAFAR(**arguments)),
        draw(2, 3, *image),
        draw(2, arguments["v_dim"], *grid, seed=1),
    )


def small(**arguments):
    return seeded(JAFAR(6, qk_dim=16, **{"num_heads": 2, **arguments}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden(dtype):
    """Allowed errors: what the file's authors state, 2e-5 in float32 at a scale of 2."""
    arrays = originals.golden("jafar__model")
    data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    model = JAFAR.from_checkpoint({k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")})
    assert not model.training
    model = model.to(dtype)
    with torch.no_grad():
        result = model(data["image"].to(dtype), data["features"].to(dtype), tuple(data["output_size"].tolist()))
    assert_close(result, data["output.f64"], 2e-5 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_features(dtype):
    """Parameters in float32: queries and keys are rounded once."""
    model, image, features = small().requires_grad_(False), draw(1, 3, 16, 15), draw(1, 6, 4, 5).to(dtype)
    result = model(image, features)
    assert result.dtype == dtype
    oracle = plain_jafar(model.double(), image.double(), features.double(), (16, 15))
    rounded = plain_jafar(model.to(dtype), image.to(dtype), features, (16, 15))
    assert float((result.double() - oracle).abs().max()) < float((rounded.double() - oracle).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters(dtype):
    model, image, features = small(), draw(1, 3, 16, 15).to(dtype), draw(1, 6, 4, 5).to(dtype)
    same = plain_jafar(model.to(dtype), image, features, (16, 15))
    result = model(image, features)
    assert result.dtype == dtype
    assert_within_budget(result, plain_jafar(model.double(), image.double(), features.double(), (16, 15)), same)


def test_autocast():
    model, image, features = small().requires_grad_(False), draw(1, 3, 16, 15), draw(1, 6, 4, 5)
    expected = model(image, features)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(image, features)
    assert result.dtype == torch.float32
    assert not torch.equal(result, expected)
    assert float((result - expected).abs().max()) < 0.2 * float(expected.abs().max())


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


@pytest.mark.parametrize("case", MODELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels(case, dtype, level):
    """The encoders as passes over the pixels."""
    arguments, image, grid, size = case
    model = seeded(JAFAR(**arguments)).requires_grad_(False).to(dtype)
    image, features = draw(2, 3, *image).to(dtype), draw(2, arguments["v_dim"], *grid, seed=1).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr(jafar_module, "image_queries", lambda *a, **o: calls.append(a) or image_queries(*a, **o))
        result = model(image, features, size)
    assert len(calls) == 1
    same = plain_jafar(model, image, features, size)
    assert_within_budget(result, plain_jafar(model.double(), image.double(), features.double(), size), same)


@pytest.mark.skipif(
    bool(backends.reasons_against("triton", "cpu")), reason="; ".join(backends.reasons_against("triton", "cpu"))
)
@pytest.mark.parametrize(("size", "kernel_size"), [((9, 8), 1), ((6, 11), 3)])
def test_triton(size, kernel_size):
    model = small(kernel_size=kernel_size).requires_grad_(False)
    image, features = draw(1, 3, 9, 8), draw(1, 6, 3, 2)
    with murf_fast.use_backend("triton"):
        result = model(image, features, size)
    same = plain_jafar(model, image, features, size)
    assert_within_budget(result, plain_jafar(model.double(), image.double(), features.double(), size), same)


def test_empty_batch():
    assert small()(draw(0, 3, 14, 13), draw(0, 6, 4, 5), (9, 20)).shape == (0, 6, 9, 20)


def test_one_pixel():
    assert small()(draw(1, 3, 1, 1), draw(1, 6, 1, 1), (3, 2)).shape == (1, 6, 3, 2)


def test_memory():
    """No scores: nothing larger than an encoder's map."""
    model = small()
    with LargestTensor() as largest, torch.no_grad():
        model(draw(1, 3, 64, 64), draw(1, 6, 8, 8))
    assert largest.elements <= 16 * 64 * 64


def test_compile():
    model, image, features = small(), draw(1, 3, 14, 13), draw(1, 6, 4, 5)
    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(model, fullgraph=True)(image, features, (14, 13))
        same = plain_jafar(model, image, features, (14, 13))
        assert_within_budget(result, plain_jafar(model.double(), image.double(), features.double(), (14, 13)), same)


def test_released_layout(tmp_path):
    """An entry ``jafar``, and parameters that have no influence."""
    expected = small(kernel_size=3)
    prefix = "cross_decode.cross_attn."
    dead = nn.MultiheadAttention(16, 2, vdim=6).state_dict(prefix=f"{prefix}attention.")
    weights = {**dead, f"{prefix}norm_v.weight": torch.ones(6), **expected.state_dict()}
    assert f"{prefix}attention.v_proj_weight" in weights
    torch.save({"jafar": weights}, tmp_path / "vit_small.pth")
    model = JAFAR.from_checkpoint(tmp_path / "vit_small.pth", num_heads=2)
    image, features = draw(1, 3, 14, 13), draw(1, 6, 4, 5)
    assert torch.equal(model(image, features), expected(image, features))
    assert not small(kernel_size=3).load_state_dict(weights).unexpected_keys


def test_values_as_wide_as_keys():
    """There torch's attention keeps its three matrices in one."""
    expected = seeded(JAFAR(16, qk_dim=16, num_heads=2))
    name = "cross_decode.cross_attn.attention.{}_proj_weight"
    weights = expected.state_dict()
    weights[name.format("in")] = torch.cat([*(weights.pop(name.format(x)) for x in "qk"), torch.ones(16, 16)])
    model = JAFAR.from_checkpoint(weights, num_heads=2)
    image, features = draw(1, 3, 14, 13), draw(1, 16, 4, 5)
    assert torch.equal(model(image, features), expected(image, features))


def test_checkpoints_that_do_not_fit():
    weights = small().state_dict()
    weights["query_encoder.3.norm1.bias"] = weights.pop("query_encoder.2.norm1.bias")
    weights["rope.freqs"] = torch.zeros(2, 8)
    words = (
        "missing keys: query_encoder.2.norm1.bias; unexpected keys: query_encoder.3.norm1.bias; wrong shapes: "
        "rope.freqs (2, 8) (expected (2, 16))"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        JAFAR.from_checkpoint(weights)
    with pytest.raises(ValueError, match=r"must hold image_encoder.0.weight .* got the keys head.weight"):
        JAFAR.from_checkpoint({"head.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"image": torch.ones(3, 9, 9)}, ValueError, r"`image` must be \(B, C, H, W\)"),
        ({"image": torch.ones(1, 1, 9, 9)}, ValueError, "`image` must have 3 channels, got 1"),
        ({"image": torch.ones(1, 3, 1, 9)}, ValueError, r"`image` must have at least 2 rows and columns, got \(1, 9\)"),
        ({"image": torch.ones(1, 3, 9, 9).half()}, TypeError, "`image` must have the dtype of `the parameters`"),
        ({"features": torch.ones(2, 6, 4, 5)}, ValueError, "`features` must have the batch size of `image`, 1, got 2"),
        ({"features": torch.ones(1, 5, 4, 5)}, ValueError, "`features` must have 6 channels, got 5"),
        ({"features": None}, TypeError, "`features` must be a tensor, got NoneType"),
        ({"output_size": (9, 0)}, ValueError, r"`output_size` must be positive, got \(9, 0\)"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"image": torch.ones(1, 3, 9, 9), "features": torch.ones(1, 6, 4, 5), "output_size": (9, 9), **change}
    with pytest.raises(error, match=words):
        JAFAR(6, qk_dim=16, kernel_size=3)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"qk_dim": 20}, "`qk_dim` must be a multiple of 8 and of the 4 heads, got 20"),
        ({"num_heads": 3}, "of the 3 heads, got 128"),
        ({"kernel_size": 5}, "`kernel_size` must be 1 or 3, got 5"),
        ({"v_dim": 0}, "`v_dim` must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        JAFAR(**arguments)
