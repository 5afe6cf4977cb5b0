"""Whether a tensor is still what it was when something was derived from it."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """A tensor and its version. Inference tensors have none."""

    tensor: weakref.ref[Tensor]
    place: int
    version: int
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor) -> State:
        return cls(weakref.ref(x), x.data_ptr(), x._version, x.shape)

    def is_of(self, x: Tensor) -> bool:
        return self.tensor() is x and self[1:] == (x.data_ptr(), x._version, x.shape)
