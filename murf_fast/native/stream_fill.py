"""The write rate that results are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.native._address import address

__all__ = ["stream_fill"]


def stream_fill(out: Tensor) -> None:
    """Fills a dense float32 tensor with ones past the caches: the write rate that results are measured against."""
    module().stream_fill(address(out, torch.float32, 0), out.numel() * out.element_size(), _fork.threads())
