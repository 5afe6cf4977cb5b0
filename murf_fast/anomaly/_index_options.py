"""What ``**options`` of a sharded index hold."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch

from murf_fast.annotations import Backend, Precision


class IndexOptions(TypedDict, total=False):
    """Of :class:`murf_fast.NearestIndex`, all but its bank."""

    cosine: bool
    ip: bool
    cells: int | Literal["auto"] | None
    precision: Precision
    device: torch.device | str | None
    backend: Backend | None
