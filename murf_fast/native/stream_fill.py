"""The write rate that results are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, extension

__all__ = ["stream_fill"]


def stream_fill(out: Tensor) -> None:
    """Fills a dense float32 tensor with ones past the caches: the write rate that results are measured against."""
    extension.stream_fill(out=address(out, torch.float32, 0), bytes=out.nbytes, threads=_fork.threads())
