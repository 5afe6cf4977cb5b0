"""What a folder of features holds: arrays of one shape for every image, in shards of so many images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from murf_fast._files import is_name

DTYPES = {
    name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "uint8", "int16", "int32")
}
LARGEST_AXIS = 1 << 31


@dataclass(frozen=True)
class Array:
    """One result of an image: its name, its shape without a batch, and its dtype by name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes_per_image(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    """The arrays, how many images were planned, how many of a shard, and which configuration they are of."""

    arrays: tuple[Array, ...]
    images: int
    shard: int
    fingerprint: str

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard)

    @property
    def bytes_per_image(self) -> int:
        return sum(array.bytes_per_image for array in self.arrays)

    def planned(self, shard: int) -> int:
        """Images of a shard; the last may have fewer."""
        return min(self.shard, self.images - shard * self.shard)

    def as_json(self) -> dict[str, Any]:
        arrays = [{"name": a.name, "shape": list(a.shape), "dtype": a.dtype} for a in self.arrays]
        return {"arrays": arrays, "images": self.images, "shard": self.shard, "fingerprint": self.fingerprint}

    @classmethod
    def of_json(cls, told: Mapping[str, Any]) -> Layout:
        """Raises a ValueError, KeyError or TypeError where it is none."""
        arrays = tuple(Array(a["name"], tuple(a["shape"]), a["dtype"]) for a in told["arrays"])
        good = arrays and all(is_name(a.name) and a.dtype in DTYPES for a in arrays)
        numbers = [told["shard"], told["images"], *(n for a in arrays for n in a.shape)]
        if not good or not all(type(n) is int and 0 < n < LARGEST_AXIS for n in numbers):
            raise ValueError("its arrays are none that were extracted")
        if len({a.name for a in arrays}) != len(arrays) or not isinstance(told["fingerprint"], str):
            raise ValueError("its arrays are none that were extracted")
        return cls(arrays, told["images"], told["shard"], told["fingerprint"])


@dataclass(frozen=True)
class Content:
    """What is written of a shard.

    Attributes:
        arrays: By name, (M, ...) on the CPU, contiguous.
        names: Of the M images that have features.
        positions: Of these within the shard, as planned: 0 for its first image.
    """

    arrays: Mapping[str, Tensor]
    names: Sequence[str]
    positions: Sequence[int]
