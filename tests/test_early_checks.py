"""What can be known is checked before the backbone's first product: resolutions, images, heads, options of results."""

from __future__ import annotations

import functools
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multi_resolution_encoder import MEAN, SIZES, STD, dinov2, model_of, siglip

import murf_fast
from murf_fast.nn import S2, DepthHead, MultiResolutionEncoder, SegmentationHead, multi_scale_target
from murf_fast.nn.vit import _blocks

WIDTH, PATCH = 24, 4
IMAGES = torch.rand(1, 3, 30, 26)
NORMALIZED = {"mean": MEAN, "std": STD}


@pytest.fixture(scope="module")
def model():
    return model_of(dinov2)


@pytest.fixture
def idle(monkeypatch):
    """No block may run."""
    monkeypatch.setattr(_blocks, "run", lambda *_, **__: pytest.fail("the backbone ran"))


def murf_of(model, head=None, **options):
    return murf_fast.MuRF(model, SIZES, head, **{**NORMALIZED, **options})


@settings(max_examples=200, deadline=None)
@given(
    scale=st.fractions(min_value=Fraction(1, 20), max_value=3, max_denominator=1000),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    kind=st.sampled_from([float, np.float64, np.float32, Fraction]),
)
def test_scales_are_the_numbers_that_were_written(scale, height, width, kind):
    """floor of the exact product, whatever number carries the scale; or the scale is named that leaves no patch."""
    encoder = scaled(kind(scale))
    exact = [int(n * scale) for n in (height, width)]
    if min(exact) < PATCH:
        with pytest.raises(ValueError, match=f"{height} x {width} pixels at scale {float(scale):g} .*patch of 4 x 4"):
            encoder.sizes_for(height, width)
    else:
        assert encoder.sizes_for(height, width) == [tuple(n // PATCH * PATCH for n in exact)]
        ceiled = scaled(kind(scale), rounding="murf")
        assert ceiled.sizes_for(height, width) == [tuple(-(-n * scale // 1) for n in (height, width))]


@functools.cache
def encoder_with(rounding):
    return MultiResolutionEncoder(model_of(dinov2), scales=[1.0], rounding=rounding)


def scaled(scale, rounding="floor"):
    """An encoder with one scale; all draws share its model."""
    encoder = encoder_with(rounding)
    encoder._set_resolutions(None, [scale], None, "drop")
    return encoder


def test_s2_multiplies_exactly():
    seen = []
    s2 = S2(lambda x: seen.append(tuple(x.shape[2:])) or torch.zeros(len(x), 1, 2), [1.15, 2 / 3], max_split_size=9999)
    s2(torch.rand(1, 3, 420, 420))
    assert sorted(seen) == [(280, 280), (483, 483)]


def test_one_integer_is_one_square(model):
    assert MultiResolutionEncoder(model, 24).sizes == [(24, 24)]
    assert murf_fast.MuRF(model, np.int64(24)).encoder.sizes == [(24, 24)]
    assert MultiResolutionEncoder(model, scales=0.5).scales == [0.5]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sizes": 24.0}, TypeError, "`sizes` must be"),
        ({"sizes": True}, TypeError, "`sizes` must be"),
        ({"sizes": "266"}, TypeError, "`sizes` must be a list"),
        ({"sizes": []}, ValueError, "at least one resolution"),
        ({"sizes": [3]}, ValueError, "hold a patch of 4 pixels"),
        ({"sizes": [30]}, ValueError, "multiple of 4 pixels"),
        ({"sizes": [24], "tiles": [1, 2]}, ValueError, "`tiles` must hold one"),
        ({"sizes": [24], "tiles": [0]}, ValueError, "`tiles` must be at least 1"),
        ({"sizes": [28], "tiles": [2]}, ValueError, "multiple of 8 pixels"),
        ({"sizes": [24], "remainder": "keep"}, ValueError, "`remainder`"),
        ({"sizes": [24], "mode": "cubic"}, ValueError, "`mode`"),
        ({"sizes": [24], "mode": "area", "antialias": True}, ValueError, "`antialias=True` needs"),
        ({"sizes": [24], "mean": 0.5}, ValueError, "`mean` must be three numbers"),
        ({"sizes": [24], "std": (1, 1, 0)}, ValueError, "`std` must be three numbers > 0"),
        ({"sizes": [24], "std": (1, 1, float("nan"))}, ValueError, "`std` must be three numbers > 0"),
        ({"sizes": [24], "layers": [True]}, TypeError, "`layers`"),
        ({"sizes": [24], "layers": 2}, TypeError, "`layers`"),
        ({"scales": []}, ValueError, "at least one resolution"),
        ({"scales": ["0.5"]}, TypeError, "`scales` must be numbers"),
        ({"scales": [True]}, TypeError, "`scales` must be numbers"),
        ({"scales": [float("nan")]}, ValueError, "`scales` must be > 0"),
        ({"scales": [float("inf")]}, ValueError, "`scales` must be > 0"),
    ],
)
def test_bad_resolutions_and_options(model, options, error, words):
    with pytest.raises(error, match=words):
        MultiResolutionEncoder(model, **options)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ("photo.png", TypeError, "`images` must be a tensor, got str"),
        ((IMAGES * 255).int(), TypeError, "`images` must be uint8 .* got torch.int32"),
        (IMAGES > 0.5, TypeError, "`images` must be uint8 .* got torch.bool"),
        (IMAGES.to(torch.complex64), TypeError, "`images` must be uint8 .* got torch.complex64"),
        (IMAGES[0], ValueError, r"`images` must be \(B, 3, H, W\)"),
        (IMAGES[:, :2], ValueError, r"`images` must be \(B, 3, H, W\)"),
        (IMAGES.to("meta"), ValueError, "`images` must be on the device of `model`, cpu, got meta"),
    ],
)
def test_bad_images(model, idle, images, error, words):
    for call in (murf_of(model).features, murf_of(model).tokens, murf_of(model).pca, murf_of(model).encode):
        with pytest.raises(error, match=words):
            call(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_values_that_no_image_has(model, dtype, layout):
    """0..255 as floats is refused, with and without normalization; normalized images, black ones and NaN are not."""
    pixels = torch.rand(2, 3, 200, 70, generator=torch.Generator().manual_seed(0))
    pixels = pixels if layout == "channels first" else pixels.permute(0, 2, 3, 1).contiguous()
    unnormalized, normalized = MultiResolutionEncoder(model, 24), MultiResolutionEncoder(model, 24, **NORMALIZED)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for encoder in (unnormalized, normalized):
            with pytest.raises(ValueError, match=r"`images` must be in 0..1, .* from 0\.?\S* to 25\d"):
                encoder((255 * pixels).to(dtype))
            for fine in (pixels, 0 * pixels, torch.where(pixels < 0.1, torch.nan, pixels)):
                encoder(fine.to(dtype))
        unnormalized((5.3 * pixels - 2.6).to(dtype))
        MultiResolutionEncoder(model, 24, mean=(124, 116, 104), std=(58, 57, 57))((255 * pixels).to(dtype))
    with pytest.raises(ValueError, match="`mean` and `std` must be in the unit of pixels divided by 255"):
        MultiResolutionEncoder(model, 24, mean=(124, 116, 104), std=(58, 57, 57))((255 * pixels).byte())


@pytest.mark.parametrize("images", [IMAGES, (255 * IMAGES).byte()], ids=["float", "uint8"])
@pytest.mark.parametrize("build", [dinov2, siglip], ids=lambda f: f.__name__)
def test_images_that_nobody_normalized_are_warned_of_once(build, images):
    model = model_of(build)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MultiResolutionEncoder(model, 24, **NORMALIZED)(images)
        MultiResolutionEncoder(model, 24)(4 * IMAGES - 2)
    with pytest.warns(UserWarning, match=rf"{type(model).__name__} without `mean` and `std`"):
        MultiResolutionEncoder(model, 24)(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MultiResolutionEncoder(model, 12)(images)
        multi_scale_target(model, images, (1,), size=24)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"grid": "big"}, TypeError, "`grid` must be"),
        ({"grid": (0, 3)}, ValueError, "`grid` must be positive"),
        ({"mode": "cubic"}, ValueError, "`mode` must be one of"),
        ({"mode": "nearest", "antialias": True}, ValueError, "`antialias=True` needs"),
        ({"via": "big"}, TypeError, "`via` must be"),
        ({"memory_format": torch.channels_last_3d}, ValueError, "`memory_format` must be"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of"),
        ({"out": torch.empty(1, 72, 8, 8)}, ValueError, r"`out` must have shape \(1, 72, 8, 7\)"),
        ({"out": torch.empty(1, 72, 8, 7).double()}, TypeError, "`out` must have the dtype"),
        ({"sise": 3}, TypeError, "sise"),
    ],
)
def test_options_of_features(model, idle, options, error, words):
    with torch.no_grad(), pytest.raises(error, match=words):
        murf_of(model)(IMAGES, **options)


@pytest.mark.parametrize("method", ["segment", "depth"])
@pytest.mark.parametrize(
    ("columns", "size", "error", "words"),
    [
        (72, "big", TypeError, "`size` must be"),
        (72, (0, 3), ValueError, "`size` must be positive"),
        (73, None, ValueError, "`head` must have 72 columns, or twice as many with CLS tokens, for 3 maps, it has 73"),
    ],
)
def test_sizes_and_heads(model, idle, method, columns, size, error, words):
    head = SegmentationHead(columns, 3) if method == "segment" else DepthHead(columns, 3, depth_range=(1, 2))
    with pytest.raises(error, match=words):
        getattr(murf_of(model, head), method)(IMAGES, size)


def test_heads_of_another_dtype_or_model(model, idle):
    with pytest.raises(TypeError, match="`head` must have the dtype of `model`"):
        murf_of(model, SegmentationHead(72, 3).bfloat16()).segment(IMAGES)
    with pytest.raises(ValueError, match="`head` must be on the device of `model`, cpu, got meta"):
        murf_of(model, SegmentationHead(72, 3).to("meta")).segment(IMAGES)
    with pytest.raises(ValueError, match="`head` must have 72 columns for 3 maps, it has 144"):
        murf_of(model_of(siglip), SegmentationHead(144, 3)).segment(IMAGES)


def test_a_backend_of_the_environment(model, idle, monkeypatch):
    monkeypatch.setenv("MURF_FAST_BACKEND", "foo")
    with pytest.raises(ValueError, match="environment variable MURF_FAST_BACKEND must be one of"):
        murf_of(model).features(IMAGES)


@pytest.mark.parametrize("components", [True, "3", None])
def test_components(model, idle, components):
    with pytest.raises(TypeError, match="`components` must be an integer"):
        murf_of(model).pca(IMAGES, components=components)


# Right arguments of the constructors that take no model.
CONSTRUCTORS = {
    "AnyUp": {
        "qk_dim": 32,
        "num_heads": 4,
        "input_dim": 3,
        "kernel_size": 1,
        "kernel_size_lfu": 5,
        "window_ratio": 0.1,
        "windows": "dense",
        "lfu_dim": 16,
        "values": "split",
        "image_range": (-1, 1),
    },
    "FixedJBU": {"sigma_spatial": 1.0, "sigma_range": 0.1, "radius": 2},
    "GuidedFilter": {"radius": 2, "eps": 0.1},
    "NAF": {"dim": 64, "num_heads": 4, "kernel_size": 3, "blocks": 1},
    "JAFAR": {"v_dim": 8, "qk_dim": 32, "num_heads": 4, "kernel_size": 1},
    "JBULevel": {"radius": 2, "guides": 3, "keys": 4, "mode": "bicubic", "fixup": True, "dropout": 0.1},
    "JBUStack": {"dim": 8, "shared": True, "radius": 2, "norm": False, "guides": 3},
    "FeatSharpJBU": {"factor": 2, "guides": 3},
    "SegmentationHead": {"columns": 8, "classes": 3, "norm": True, "grid": "largest", "dropout": 0.1},
    "DepthHead": {
        "columns": 8,
        "bins": 4,
        "depth_range": (0.1, 10.0),
        "rule": "midpoint",
        "upsample": 1,
        "clamp": True,
    },
}
PAIR = (1, 2)  # which some integers may be
PAIRS = {("FeatSharpJBU", "factor")}
WRONG = {
    int: ("x", 1.5, -1, True, PAIR, object()),
    float: ("x", float("nan"), True, PAIR, object()),
    str: ("x", 3, True, object()),
    bool: ("x", 3, object()),
    tuple: ("x", 3, (1,), (1, "x")),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_name_the_argument(name):
    right, kind = CONSTRUCTORS[name], getattr(murf_fast.nn, name)
    kind(**right)
    for argument, value in right.items():
        for wrong in WRONG[type(value)]:
            if wrong == PAIR and (name, argument) in PAIRS:
                continue
            with pytest.raises((TypeError, ValueError), match=f"murf_fast.*`{argument}`"):
                kind(**{**right, argument: wrong})
