"""The one reader of image files: every Pillow mode, more than eight bits, orientation, frames, damage, size."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from murf_fast import _pillow
from murf_fast.anomaly import _images

COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
GRAY = np.arange(20 * 30).reshape(20, 30) % 256
SIXTEEN = np.linspace(0, 65535, 20 * 30).round().astype(np.uint16).reshape(20, 30)
# Pillow's own rounding of a conversion there and back: none in most modes, palettes and hue apart.
LOSSY = {"1": 255, "P": 60, "PA": 60, "HSV": 8, "LAB": 8, "YCbCr": 4}


def gray_rgb(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=2)


def in_mode(mode, pixels):
    """An image of `mode` that shows 8-bit gray `pixels`."""
    eight = Image.fromarray(pixels.astype(np.uint8))
    if mode.startswith("I;16"):
        order = ">" if mode == "I;16B" else "<"
        return Image.frombytes(mode, eight.size, (257 * pixels).astype(f"{order}u2").tobytes())
    if mode in ("La", "RGBa"):
        return eight.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    return (eight.convert("RGB") if mode == "LAB" else eight).convert(mode)


def test_every_mode():
    modes = set(Image.MODES) | {"I;16", "I;16L", "I;16B", "I;16N", "1", "LAB", "HSV", "PA", "La", "RGBa"}
    for mode in sorted(modes):
        pixels = np.where(GRAY >= 128, 255, 0) if mode == "1" else GRAY
        image = in_mode(mode, pixels)
        assert image.mode == mode
        found = _pillow.rgb(image)
        assert (found.dtype, found.shape) == (np.uint8, (20, 30, 3)), mode
        error = np.abs(found.astype(int) - gray_rgb(pixels)).max()
        assert error <= (0 if mode == "1" else LOSSY.get(mode, 0)), (mode, error)
        assert np.array_equal(_images.as_tensor(image)[0].permute(1, 2, 0).numpy(), found)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (SIXTEEN, SIXTEEN / 257),
        (SIXTEEN.astype(np.int32), SIXTEEN / 257),
        (GRAY.astype(np.int32), GRAY),
        (GRAY.astype(np.float32), GRAY),
        ((GRAY / 255).astype(np.float32), GRAY),
        (np.nextafter((GRAY / 255).astype(np.float32), 2), GRAY),
        (SIXTEEN.astype(np.float32), SIXTEEN / 257),
    ],
)
def test_more_than_eight_bits_in_memory_and_in_tiff(pixels, expected, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    for found in (_pillow.rgb(Image.fromarray(pixels)), _pillow.read(tmp_path / "a.tif")):
        assert np.abs(found - gray_rgb(expected)).max() <= 0.5 + 1e-6


def test_sixteen_bit_png_and_pnm(tmp_path):
    dark = SIXTEEN // 300  # below 255: a range that is read off the pixels would be wrong
    for pixels in (SIXTEEN, dark):
        Image.fromarray(pixels).save(tmp_path / "a.png")
        header = f"P5 {pixels.shape[1]} {pixels.shape[0]} 65535\n".encode()
        (tmp_path / "a.pgm").write_bytes(header + pixels.astype(">u2").tobytes())
        for name in ("a.png", "a.pgm"):
            assert np.abs(_pillow.read(tmp_path / name) - gray_rgb(pixels / 257)).max() <= 0.5 + 1e-6


def tiff(bits, data, width, height, photometric):
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data += b"\0" * (len(data) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_tiff_of_twelve_bits_and_white_as_zero(tmp_path):
    values = np.linspace(0, 4095, 600).round().astype(int)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2))
    (tmp_path / "a.tif").write_bytes(tiff(12, packed, 30, 20, 1))
    expected = gray_rgb(values.reshape(20, 30) * 255 / 4095)
    assert np.abs(_pillow.read(tmp_path / "a.tif") - expected).max() <= 0.5 + 1e-6
    (tmp_path / "a.tif").write_bytes(tiff(16, SIXTEEN.astype("<u2").tobytes(), 30, 20, 0))
    assert np.abs(_pillow.read(tmp_path / "a.tif") - gray_rgb(255 - SIXTEEN / 257)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.full((4, 4), np.nan, np.float32), "not finite"),
        (np.full((4, 4), 70000, np.int32), "pixels from 70000 to 70000"),
        (np.full((4, 4), -300, np.int32), "pixels from -300"),
        (np.full((4, 4), 1e9, np.float32), r"expected 0 \.\. 1"),
    ],
)
def test_values_without_a_meaning_are_refused(pixels, words):
    with pytest.raises(ValueError, match=words):
        _pillow.rgb(Image.fromarray(pixels))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pixels", [COLOURS, SIXTEEN], ids=["rgb", "sixteen"])
def test_orientation(orientation, pixels, tmp_path):
    undo = [
        lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.swapaxes(0, 1),
        lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).swapaxes(0, 1), lambda a: np.rot90(a, 1),
    ]  # fmt: skip
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = undo[orientation - 1](_pillow.rgb(Image.fromarray(pixels)))
    assert np.array_equal(_pillow.read(tmp_path / "a.png"), upright)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_with_a_warning(kind, tmp_path):
    frames = [Image.fromarray(np.full((8, 9, 3), value, np.uint8)) for value in (40, 200, 90)]
    path = tmp_path / f"a.{kind}"
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match="has 3 frames, the first is used"):
        found = _pillow.read(path)
    assert np.array_equal(found, np.full((8, 9, 3), 40))


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "tif", "webp", "gif", "ppm"])
def test_cut_and_foreign_files_are_one_error(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(COLOURS).save(path)
    whole = path.read_bytes()
    for length in (0, 3, 20, len(whole) // 2, len(whole) - 12):
        path.write_bytes(whole[:length])
        # Some formats do not need their end.
        tolerated = (
            contextlib.suppress(ValueError)
            if length == len(whole) - 12
            else pytest.raises(ValueError, match=r"damaged|not an image")
        )
        with tolerated as caught:
            _pillow.read(path)
        assert caught is None or str(path) in str(caught.value)
    path.write_text("no image at all")
    with pytest.raises(ValueError, match="not an image that Pillow"):
        _pillow.read(path)


def test_huge_images_are_refused_by_their_header(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    path = tmp_path / "huge.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(60001))))
    with pytest.raises(ValueError, match=r"huge\.png has more than 178,956,970 pixels"):
        _pillow.read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ValueError, match="is not a file"):
            _pillow.read(path)
    with pytest.raises(FileNotFoundError, match="No such file"):
        _pillow.read(tmp_path / "none.png")
