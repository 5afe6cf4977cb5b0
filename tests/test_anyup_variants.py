"""AnyUp as others have it: values split over the heads (Falcon Perception), other bases, keys without features."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from originals import golden
from test_anyup import DIRECTIONS, draw, seeded
from util import assert_gradient_within_budget, assert_within_budget, nudged, worst

import murf_fast
from murf_fast import backends, windows
from murf_fast.nn import AnyUp
from murf_fast.reference.anyup import anyup as dense

FALCON = {"num_heads": 4, "values": "split", "image_range": (-1, 1)}
MEAN, DEVIATION = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
VARIANTS = {
    "split": {"values": "split"},
    "split, images of a range": {"values": "split", "image_range": (-1, 1)},
    "images of 0..255": {"image_range": (0, 255)},
    "small basis": {"lfu_dim": 8},
    "large basis": {"lfu_dim": 48},
    "small basis, split": {"lfu_dim": 16, "values": "split", "image_range": (-1, 1)},
    "keys of the image": {"lfu_dim": 0},
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def built(name, dim=32):
    return seeded(AnyUp(dim, num_heads=4, **VARIANTS[name]))


def inputs(name, height=18, width=16, channels=12):
    low, high = VARIANTS[name].get("image_range") or (-2, 2)
    image = draw(2, 3, height, width).sigmoid() * (high - low) + low
    return image, draw(2, channels, 5, 4) * 2 + 1


def plain(model, image, features, size=None):
    """As the code of both is written."""
    size = tuple(size or image.shape[2:])
    if model.image_range is not None:
        low, high = model.image_range
        mean, deviation = (torch.tensor(x, dtype=image.dtype)[:, None, None] for x in (MEAN, DEVIATION))
        image = ((image - low) / (high - low) - mean) / deviation
    weights, rule = dict(model.named_parameters()), windows.ratio(size, tuple(features.shape[2:]), model.window_ratio)
    return dense(weights, image, features, rule, size, model.num_heads, model._values)


def in_float64(call, model, *arguments):
    result = call(model.double(), *(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
    model.float()
    return result


@every_variant
@pytest.mark.parametrize("size", [None, (13, 22)])
def test_parity(name, size):
    model, (image, features) = built(name), inputs(name)
    with torch.no_grad():
        oracle = in_float64(plain, model, image, features, size)
        same = worst([plain(model, nudged(image, i), nudged(features, i), size) for i in range(3)], oracle)
        assert_within_budget(model(image, features, size), oracle, same)
        exact = in_float64(lambda m, *a: m(*a), model, image, features, size)
        assert_within_budget(exact.float(), oracle, oracle.float())


def gradients(call, model, dtype, image, features):
    """Of the result in random directions."""
    model = model.to(dtype)
    leaves = {"image": image, "features": features}
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    result = call(model, *leaves.values())
    leaves |= {n: p for n, p in model.named_parameters() if p.requires_grad and not n.endswith("in_proj_bias")}
    found = []
    for seed in range(DIRECTIONS):
        direction = draw(*result.shape, seed=seed).to(dtype)
        found.append(torch.autograd.grad(result, [*leaves.values()], direction, retain_graph=True))
    model.float()
    return {name: torch.stack(g) for name, g in zip(leaves, zip(*found, strict=True), strict=True)}


@pytest.mark.parametrize("name", ["split, images of a range", "small basis", "keys of the image"])
def test_gradients(name):
    model, (image, features) = built(name), inputs(name)
    oracle = gradients(plain, model, torch.float64, image, features)
    theirs = [gradients(plain, model, torch.float32, nudged(image, i), nudged(features, i)) for i in range(4)]
    for key, value in gradients(lambda m, *a: m(*a), model, torch.float32, image, features).items():
        assert_gradient_within_budget(value, oracle[key], worst([t[key] for t in theirs], oracle[key]), key)


@pytest.mark.parametrize("name", ["split, images of a range", "keys of the image"])
def test_all_calls(name):
    """A head, other values, regions and statistics are those of the whole result."""
    model, (image, features) = built(name).requires_grad_(False), inputs(name)
    heads, weight, bias = model.num_heads if model._values == "split" else 1, draw(5, 12), draw(5)
    mixing = torch.block_diag(*(draw(2, 12 // heads, seed=i) for i in range(heads)))
    oracle, same = in_float64(plain, model, image, features), plain(model, image, features)

    def mixed(matrix, x):
        return torch.einsum("kc,bchw->bkhw", matrix.to(x.dtype), x)

    logits = model.predict(image, features, weight, bias)
    expected = [mixed(weight, x) + bias[:, None, None] for x in (oracle, same)]
    assert_within_budget(logits, *expected)
    assert torch.equal(model.predict(image, features, weight, bias, reduce="argmax"), logits.argmax(1))
    values = mixed(mixing, features)
    assert_within_budget(model(image, features, values=values), *(mixed(mixing, x) for x in (oracle, same)))
    region, inside = (3, 2, 9, 7), (..., slice(3, 12), slice(2, 9))
    statistics = model.statistics(image, grids=[features])
    for encoded in (image, model.encode_image(image, region=region, statistics=statistics)):
        assert_within_budget(model(encoded, features, region=region), oracle[inside], same[inside])


@pytest.mark.skipif(
    bool(backends.reasons_against("triton", "cpu")), reason="; ".join(backends.reasons_against("triton", "cpu"))
)
def test_triton():
    model = seeded(AnyUp(16, num_heads=2, lfu_dim=8, values="split", image_range=(-1, 1)))
    image, features = draw(1, 3, 9, 8).tanh(), draw(1, 4, 3, 2)
    with torch.no_grad():
        oracle, same = in_float64(plain, model, image, features), plain(model, image, features)
        with murf_fast.use_backend("triton"):
            assert_within_budget(model(image, features), oracle, same)


def falcon():
    data = golden("falcon__anyup")
    data = {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}
    return data, {n.removeprefix("param."): p for n, p in data.items() if n.startswith("param.")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["same", "half"])
def test_falcon_perception(case, dtype):
    """Its output, which its own float32 misses by at most 8.0e-6; see tests/golden/README.md."""
    data, weights = falcon()
    model = AnyUp.from_checkpoint(weights, **FALCON).to(dtype)
    assert model.qk_dim == 16
    assert not model.training
    expected = data[f"{case}.output.f64"]
    with torch.no_grad():
        result = model(data["image"].to(dtype), data["features"].to(dtype), tuple(expected.shape[2:]))
    stored = torch.finfo(torch.float32).eps * float(expected.abs().max())
    allowed = stored if dtype == torch.float64 else 2 * 8.1e-6
    assert float((result.double() - expected.double()).abs().max()) <= allowed


def test_falcon_perception_must_be_said():
    _, weights = falcon()
    words = 'has no cross_decode.cross_attn.attention.out_proj, as Falcon Perception\'s, .* say `values="split"`'
    with pytest.raises(ValueError, match=words):
        AnyUp.from_checkpoint(weights)
    model = AnyUp.from_checkpoint(weights, **FALCON)
    image, features = draw(1, 3, 9, 9), draw(1, 6, 3, 3)
    for call in (lambda: model(image, features), lambda: model.predict(image, features, torch.ones(2, 6))):
        with pytest.raises(ValueError, match="`features` must have a multiple of 4 channels, got 6"):
            call()
    # Features that only give the attention may have any.
    assert model(image, features, values=features[:, :4]).shape == (1, 4, 9, 9)


@pytest.mark.parametrize("lfu_dim", [0, 8, 32, 48])
def test_checkpoints_tell_the_basis(lfu_dim):
    expected = seeded(AnyUp(32, lfu_dim=lfu_dim, kernel_size_lfu=3))
    weights = expected.state_dict()
    assert ("key_features_encoder.1.shortcut.weight" in weights) == (lfu_dim not in (0, 32))
    model, (image, features) = AnyUp.from_checkpoint(weights), inputs("small basis")
    with torch.no_grad():
        assert model.lfu_dim == lfu_dim
        assert torch.equal(model(image, features), expected(image, features))


def test_features_left_out_of_a_checkpoint():
    """Keys are said to be the image's by all of the weights, or they do not fit."""
    weights = {n: w for n, w in AnyUp(32).state_dict().items() if not n.startswith("key_features_encoder")}
    with pytest.raises(ValueError, match=r"missing keys: key_features_encoder\.0\.basis, key_features_encoder\.1"):
        AnyUp.from_checkpoint(weights)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"values": "sum"}, ValueError, "`values` must be one of ('mean', 'split'), got 'sum'"),
        ({"lfu_dim": 12}, ValueError, "`lfu_dim` must be a multiple of 8, got 12"),
        ({"lfu_dim": -8}, ValueError, "`lfu_dim` must be at least 0, got -8"),
        ({"image_range": (1, -1)}, ValueError, "must be (low, high) with low < high, got (1, -1)"),
        ({"image_range": 255}, TypeError, "`image_range` must be a sequence of numbers, got 255"),
        ({"image_range": (0, 1), "input_dim": 4}, ValueError, "needs images of 3 channels, got `input_dim` 4"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        AnyUp(**arguments)
