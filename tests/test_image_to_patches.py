from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import check_opcheck, for_triton
from util import assert_within_budget

import murf_fast
from murf_fast.ops.image_to_patches import padded_patches

GOLDEN = np.load(Path(__file__).parent / "golden" / "murf__segmentation_head.npz")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RULES = [("bilinear", False), ("bilinear", True), ("bicubic", False), ("bicubic", True), ("nearest", False)]


def images(kind, height=23, width=31, batch=2):
    pixels = torch.randint(0, 256, (batch, height, width, 3), generator=torch.Generator().manual_seed(1))
    values = pixels.to(torch.uint8) if kind.startswith("uint8") else pixels.to(torch.float32) / 255
    if kind.endswith("chw"):
        return values.permute(0, 3, 1, 2).contiguous()
    if kind.endswith("sliced"):
        padded = torch.zeros(batch, height + 2, width + 3, 3, dtype=values.dtype)
        padded[:, 1:-1, 2:-1] = values
        return padded[:, 1:-1, 2:-1]
    if kind.endswith("strided"):
        return torch.stack([values, values], dim=3)[:, :, :, 0].permute(0, 3, 1, 2)
    return values


KINDS = ["uint8 hwc", "uint8 chw", "uint8 sliced", "uint8 strided", "float chw", "float hwc", "float sliced"]


def check(x, sizes, patch, backend="native", dtype=torch.float32, **options):
    options = {"mean": MEAN, "std": STD, **options}
    oracle = murf_fast.image_to_patches(x, sizes, patch, dtype=torch.float64, **options)
    if dtype == torch.float32:
        same = murf_fast.image_to_patches(x, sizes, patch, dtype=dtype, backend="reference", **options)
    else:
        # People who want half patches resize in float32 and round once.
        same = [o.to(dtype) for o in oracle]
    actual = murf_fast.image_to_patches(x, sizes, patch, dtype=dtype, backend=backend, **options)
    assert len(actual) == len(sizes)
    for a, o, ref in zip(actual, oracle, same, strict=True):
        assert a.dtype == dtype
        assert a.is_contiguous()
        # white / std and mean / std, whose difference a small value is
        terms = max(max(1, m) / s for m, s in zip(options["mean"], options["std"], strict=True))
        assert_within_budget(a, o, ref, terms=terms if a.dtype == torch.float32 else 0.0)
    return actual


@pytest.mark.parametrize("layout", ["cyx", "yxc"])
@pytest.mark.parametrize(("mode", "antialias"), RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, mode, antialias, layout):
    check(images(kind), [(28, 35), 14, (7, 9)], 7, mode=mode, antialias=antialias, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_level(level, dtype):
    for kind in KINDS:
        check(images(kind), [(28, 35), (9, 14)], 7, dtype=dtype, antialias=True)
        check(images(kind), [(28, 35), (9, 14)], 7, dtype=dtype, layout="yxc")


@pytest.mark.parametrize("layout", ["cyx", "yxc"])
@pytest.mark.parametrize("kind", KINDS)
def test_triton(kind, layout, device):
    for mode, antialias in for_triton(RULES[:2], RULES[2:]):
        options = {"mode": mode, "antialias": antialias, "layout": layout}
        check(images(kind, 9, 7).to(device), [(7, 10), 4], 3, backend="triton", **options)
        check(images(kind, 9, 7).to(device), [(7, 10)], 3, backend="triton", dtype=torch.float16, **options)


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_rows_that_end_in_zeros(backend, device):
    if backend == "native" and device != "cpu":
        pytest.skip("the C++ kernels run on CPUs")
    x = images("uint8 hwc", 9, 7).to(device)
    options = {
        "mean": MEAN,
        "std": STD,
        "layout": "cyx",
        "mode": "bilinear",
        "antialias": False,
        "dtype": torch.float32,
    }
    (rows,) = padded_patches(x, [(7, 10)], 3, 8, **options, backend=backend)
    assert rows.shape == (2, 2 * 3, 32)
    assert not rows[..., 27:].any()
    assert torch.equal(rows[..., :27], murf_fast.image_to_patches(x, [(7, 10)], 3, **options, backend=backend)[0])


@pytest.mark.parametrize("shape", [(700, 2), (2, 700)], ids=str)
def test_triton_long_taps(shape, device):
    """A mean of many pixels that are one: float32 terms one by one are off by 72 units in the last place."""
    images = torch.ones(1, 3, *shape, device=device)
    (rows,) = murf_fast.image_to_patches(images, [1], 1, mode="area", backend="triton")
    assert (rows - 1).abs().max() <= 8 * torch.finfo(torch.float32).eps


def test_triton_large_patches(device):
    """Of more values than one program has."""
    check(images("uint8 hwc", 9, 7, 1).to(device), [(23, 22)], 21, backend="triton")


def test_triton_wide_images(device, monkeypatch):
    """Images of more elements than 32 bits can count have wide addresses."""
    kernels = pytest.importorskip("murf_fast.kernels.image_to_patches")
    monkeypatch.setattr(kernels, "_reach", lambda image: 2**31)
    check(images("uint8 strided", 9, 7, 1).to(device), [(7, 10)], 3, backend="triton", antialias=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_images(dtype):
    x = images("float chw").to(dtype)
    check(x, [(28, 35)], 7)
    assert murf_fast.image_to_patches(x, [28], 7)[0].dtype == dtype


@given(
    image=st.tuples(st.integers(1, 40), st.integers(4, 40)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    data=st.data(),
    kind=st.sampled_from(KINDS),
    rule=st.sampled_from(RULES),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(image, size, data, kind, rule):
    patch = data.draw(st.integers(1, min(size)))
    check(images(kind, *image), [size], patch, mode=rule[0], antialias=rule[1])


def test_rows_are_what_a_convolution_sees():
    x = images("float chw", 28, 42)
    conv = torch.nn.Conv2d(3, 5, 14, 14)
    rows = murf_fast.image_to_patches(x, [(28, 42)], 14)[0]
    actual = rows @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(actual, conv(x).flatten(2).mT)


def test_murf_pyramid_of_the_original():
    """MuRF's own resized inputs; torch's float32 coordinates are off by 2.5e-5 there."""
    x = torch.from_numpy(GOLDEN["image"])
    for size in (70, 126, 168):
        rows = murf_fast.image_to_patches(x, [size], 14)[0]
        last = torch.nn.functional.unfold(torch.from_numpy(GOLDEN[f"resized{size}"]), 14, stride=14).mT
        assert (rows[:1, -last.shape[1] :] - last).abs().max() <= 2 * 2.5e-5


def test_registration():
    op = torch.ops.murf_fast.image_to_patches.default
    for kind in ("uint8 hwc", "float chw"):
        x = images(kind)
        x = x if x.shape[1] == 3 else x.permute(0, 3, 1, 2)
        check_opcheck(op, x, [28, 35], 7, "bilinear", False, [1.0] * 3, [0.0] * 3, True, 152, "bfloat16", "native")


def test_compile():
    x = images("uint8 hwc")

    def function(x):
        return murf_fast.image_to_patches(x, [28, 14], 7, mean=MEAN, std=STD)[1] * 2

    assert torch.equal(torch.compile(function, fullgraph=True)(x), function(x))


def test_threads():
    x = images("uint8 hwc", 90, 80)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(murf_fast.image_to_patches(x, [98], 7)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": torch.zeros(1, 8, 8, 3, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"images": torch.zeros(1, 8, 8, 4)}, ValueError, r"got \(1, 8, 8, 4\)"),
        ({"images": torch.zeros(8, 8, 3)}, ValueError, r"got \(8, 8, 3\)"),
        ({"images": torch.zeros(1, 3, 8, 8, requires_grad=True)}, ValueError, "`images` has no gradient"),
        ({"sizes": []}, TypeError, "`sizes` must be a non-empty list"),
        ({"sizes": [8, (8, -8)]}, ValueError, r"`sizes\[1\]` must be positive"),
        ({"sizes": [8, 3]}, ValueError, r"`sizes\[1\]` must hold a patch of 4 pixels, got \[3, 3\]"),
        ({"patch_size": 0}, ValueError, "`patch_size` must be at least 1, got 0"),
        ({"mean": (1.0, 2.0)}, ValueError, "`mean` must be 3 numbers, got"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "`std` must be three numbers, all > 0, got"),
        ({"layout": "xyc"}, ValueError, "`layout` must be one of"),
        ({"dtype": torch.int8}, TypeError, "`dtype` must be float32, bfloat16 or float16, got torch.int8"),
        ({"mode": "lanczos"}, ValueError, "`mode` must be one of"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"images": torch.zeros(1, 8, 8, 3), "sizes": [8], "patch_size": 4, **change}
    with pytest.raises(error, match=words):
        murf_fast.image_to_patches(**arguments)
