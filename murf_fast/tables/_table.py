"""What the tables have in common: a copy in the extension and copies on devices, each made once.

A captured CUDA graph reads the device copies whose addresses it has recorded, however often it is replayed, while the
caches of tables forget what has not been asked for lately. Nothing tells when a graph is gone, so what a launch takes
while its stream is capturing is kept for good (:func:`kept`), once for every content: memory is bounded by the
different tables that were ever captured, 12 to 24 bytes per pixel of an axis in the usual modes, however often graphs
are captured again. What only runs eagerly is forgotten as before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from murf_fast import _extension

_captured: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


Tensors = TypeVar("Tensors", bound="tuple[Any, ...]")


def kept(device: torch.device, key: tuple[Any, ...], tensors: Tensors) -> Tensors:
    """``tensors``; while the stream of ``device`` is capturing, those that the first capture with this ``key`` took.

    ``key`` says what they hold.
    """
    return cast("Tensors", _captured.setdefault((device, *key), tensors)) if is_capturing(device) else tensors


class Table:
    """A frozen dataclass of sizes and arrays. The extension has a class of its name, with the fields as keywords."""

    @cached_property
    def native(self) -> Any:
        """The table as the C++ extension holds it."""
        of_extension = getattr(_extension.module(), type(self).__name__)
        return of_extension(**{field.name: getattr(self, field.name) for field in fields(self)})  # type: ignore[arg-type]  # subclasses are dataclasses

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The arrays that Triton kernels take (:meth:`device_arrays`) as tensors on ``device``, copied there once."""
        copies = self._device_copies
        if device not in copies:
            copies[device] = tuple(torch.from_numpy(array).to(device) for array in self.device_arrays())
        return kept(device, self._content, copies[device]) if is_capturing(device) else copies[device]

    @cached_property
    def _content(self) -> tuple[Any, ...]:
        """Type, shapes and a digest of what is copied to devices."""
        arrays: Sequence[np.ndarray] = self.device_arrays()
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest()
        return type(self), tuple((array.shape, array.dtype.str) for array in arrays), digest

    def device_arrays(self) -> tuple[np.ndarray, ...]:
        raise NotImplementedError

    @cached_property
    def _device_copies(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}
