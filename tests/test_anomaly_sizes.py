"""The size that images are brought to before they are encoded: MRF-AD's Table 5, and what holds for all others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from murf_fast.anomaly._images import prescaled_size

# Height and width of MVTec AD 2's images and, by Table 5, of those that are encoded.
TABLE = {
    "can": ((1024, 2232), (1536, 3348)),
    "fabric": ((2048, 2448), (2048, 2448)),
    "fruit_jelly": ((1520, 2100), (1900, 2625)),
    "rice": ((2048, 2448), (2048, 2448)),
    "sheet_metal": ((1056, 4224), (1056, 4224)),
    "vial": ((1900, 1400), (2470, 1820)),
    "wallplugs": ((2048, 2448), (2048, 2448)),
    "walnuts": ((2048, 2448), (2048, 2448)),
}


@pytest.mark.parametrize("category", TABLE)
def test_sizes_of_the_paper(category):
    original, resized = TABLE[category]
    assert prescaled_size(*original, 5e6) == resized


@given(st.integers(1, 20000), st.integers(1, 20000), st.floats(100, 1e8))
def test_about_as_many_pixels_in_the_same_shape(height, width, pixels):
    h, w = prescaled_size(height, width, pixels)
    factor = (pixels / (height * width)) ** 0.5
    for n, side in ((h, height), (w, width)):
        assert (
            (1 - 1 / 8) ** 0.5 * factor * side - 0.501
            <= max(n, 1)
            <= max(1, (1 + 1 / 8) ** 0.5 * factor * side + 0.501)
        )
    assert (w, h) == prescaled_size(width, height, pixels)


@pytest.mark.parametrize("pixels", [1, 1e-300, 5e-324, 1e308])
def test_any_number_of_pixels_ends(pixels):
    assert min(prescaled_size(30, 40, pixels)) >= 1


def test_without_a_number_images_stay():
    assert prescaled_size(31, 17, None) == (31, 17)
