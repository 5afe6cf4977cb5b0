"""Images of a fit or of many scores as tensors, files read while those before them are worked on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from murf_fast.anomaly import _images

AHEAD = 2  # images that are read, or being read, while one is worked on


def read_ahead(images: Iterable[Any]) -> Iterator[tuple[str, Tensor, bool]]:
    """What to call each image in messages, the image (1, 3, H, W), and whether it was a file.

    Files are decoded in a thread. ``images`` itself is gone through in the caller's, and an image in memory is not
    waited with for the next. An error of ``images``, or of one of them, is raised when those before it were given out.
    """
    with ThreadPoolExecutor(1, "murf_fast-reading") as thread:
        waiting: deque[Any] = deque()
        numbered, error = enumerate(images), None
        while True:
            try:
                i, image = next(numbered)
            except StopIteration:
                break
            except Exception as found:
                error = found
                break
            name = f"`images[{i}]`"
            if isinstance(image, (str, os.PathLike)):
                waiting.append((name, thread.submit(_images.as_tensor, image, name)))
                if len(waiting) > AHEAD:
                    yield _read(waiting)
                continue
            while waiting:
                yield _read(waiting)
            yield name, _images.as_tensor(image, name), False
        while waiting:
            yield _read(waiting)
        if error is not None:
            raise error


def _read(waiting: deque[Any]) -> tuple[str, Tensor, bool]:
    name, image = waiting.popleft()
    return name, image.result(), True
