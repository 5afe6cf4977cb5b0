"""The one reader of image files, and what every Pillow mode means as RGB pixels.

Imports nothing of ours: the readers of `murf_fast.data` load it by itself, without torch.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# A photo of 13,000 x 13,000 pixels is half a gigabyte as RGB; more is refused by its header, before it is decoded.
LARGEST_PIXELS = 178_956_970
SHOWN_FRAME = {"MPO"}  # camera formats whose further frames are previews or the other eye
# Floating-point pixels in [0, 1] or in 0 .. 255 may pass their range by a rounding.
SLACK = 1e-3
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


def read(path: str | os.PathLike[str]) -> np.ndarray:
    """The upright RGB pixels of an image file: (H, W, 3), uint8. See :func:`rgb` for what modes mean.

    Of a file with several frames or pages the first is taken, with a warning.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no image, is damaged or cut, or has more than ``LARGEST_PIXELS`` pixels.
    """
    path = Path(path)
    with _opened(path) as image:
        return _decoded(image, str(path))


def decode(data: bytes, name: str) -> np.ndarray:
    """:func:`read` of the bytes of an image file, which messages call ``name``.

    Raises:
        ValueError: As for :func:`read`.
    """
    with _image(io.BytesIO(data), name) as image:
        return _decoded(image, name)


def nonzero(path: str | Path) -> np.ndarray:
    """(H, W), bool: the pixels of an upright mask that are not black; of 16 bits and floats every value but 0."""
    path = Path(path)
    with _opened(path) as image:
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is damaged or cut: {error}") from error
        if image.mode == "F" or image.mode.startswith("I"):
            return np.asarray(_upright(image)) != 0
        return np.asarray(rgb(image, str(path)).any(axis=2))


def size(path: str | Path) -> tuple[int, int]:
    """(height, width) by the file's header, as stored; with the errors of :func:`read` but for damaged pixels."""
    with _opened(Path(path)) as image:
        return image.height, image.width


def survey(paths: Iterable[str | Path], *, decode: bool = True) -> list[tuple[int, int] | OSError | ValueError]:
    """The (height, width) of every image file, upright, or what :func:`read` raises for it.

    Every file is decoded: of most formats nothing less says that all pixels are there. Several are at a time, on as
    many threads as there are cores, up to 4. Without ``decode`` only headers are read, as by :func:`size`.
    """

    def looked_at(path: str | Path) -> tuple[int, int] | OSError | ValueError:
        try:
            return read(path).shape[:2] if decode else size(path)
        except (OSError, ValueError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        return list(threads.map(looked_at, paths))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a file")
    with path.open("rb") as file, _image(file, str(path)) as image:
        yield image


@contextlib.contextmanager
def _image(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """The image by its header alone."""
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged headers raise anything
        raise ValueError(f"{name} is not an image that Pillow {Image.__version__} can read") from error  # type: ignore[attr-defined]
    if image.width * image.height > LARGEST_PIXELS:
        raise _too_large(name)
    yield image


def _decoded(image: Image.Image, name: str) -> np.ndarray:
    try:
        frames = 1 if image.format in SHOWN_FRAME else getattr(image, "n_frames", 1)
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} is damaged or cut: {error}") from error
    if frames > 1:
        warnings.warn(f"{name} has {frames} frames, the first is used", stacklevel=3)
    return rgb(image, name)


def rgb(image: Image.Image, name: str = "the image") -> np.ndarray:
    """The pixels of a Pillow image, turned upright by its EXIF orientation: (H, W, 3), uint8.

    8-bit and palette modes are Pillow's conversion to RGB; an alpha channel is dropped, premultiplied colours are
    divided by it first. 16-bit gray (``I;16`` and its byte orders) is divided by 257, TIFF's 9 to 15 bits by their
    own range. 32-bit integers (``I``) and floats (``F``) do not say their range, so it is the smallest of 0 .. 1
    (floats only), 0 .. 255 and 0 .. 65535 that holds all pixels; PNG and PNM have 0 .. 65535.

    Raises:
        ValueError: Integers or floats that are in none of the ranges, not finite, or a mode that Pillow cannot convert.
    """
    upright = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        gray = np.asarray(upright).astype(np.float64)
        if not np.isfinite(gray).all():
            raise ValueError(f"{name} has pixels that are not finite")
        white = _white(image, gray, name)
        if image.mode.startswith("I;16") and _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO:
            gray = white - gray
        eight = np.rint(gray.clip(0, white) * (255 / white)).astype(np.uint8)
        return np.repeat(eight[..., None], 3, axis=2)
    try:
        return np.array(upright.convert(PREMULTIPLIED.get(image.mode, image.mode)).convert("RGB"))
    except ValueError as error:
        raise ValueError(f"{name} has the mode {image.mode!r}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF raises anything, and says nothing about the orientation
        return image


def _white(image: Image.Image, gray: np.ndarray, name: str) -> float:
    """The value that is white."""
    if image.mode.startswith("I;16"):
        return float(2 ** (_tag(image, BITS_PER_SAMPLE) or 16) - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535.0
    low, high = (float(gray.min()), float(gray.max())) if gray.size else (0.0, 0.0)
    for white in (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0):
        if low >= -SLACK * white and high <= white * (1 + SLACK):
            return white
    raise ValueError(
        f"{name} has pixels from {low:g} to {high:g}; expected 0 .. 1 (floats only), 0 .. 255 or 0 .. 65535"
    )


def _tag(image: Image.Image, number: int) -> int | None:
    """A TIFF tag that holds one small integer."""
    value = getattr(image, "tag_v2", {}).get(number)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) and 0 <= value <= 16 else None


def _too_large(name: str) -> ValueError:
    return ValueError(f"{name} has more than {LARGEST_PIXELS:,} pixels; make it smaller first")
