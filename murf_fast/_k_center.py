"""The CPU selection behind ``k_center_greedy``: codes once, then steps in pieces that can be interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from murf_fast import native

# Between pieces Python sees signals and progress is told.
SECONDS = 0.2


def select(features: Tensor, centers: Tensor, given: int, progress: Callable[[int, int], None] | None) -> None:
    """Fills ``centers`` from ``given`` on."""
    codes = native.KCenterCodes(features)
    nearest = native.empty((len(features),), torch.float64).fill_(torch.inf)
    done, piece, wanted = 0, 1, len(centers) - 1
    while done < wanted:
        until = min(wanted, done + piece)
        begin = time.monotonic()
        native.k_center_steps(features, codes, nearest, centers, given, done, until)
        seconds = time.monotonic() - begin
        piece = max(1, min(2 * piece, int(piece * SECONDS / max(seconds, 1e-6))))
        done = until
        if progress is not None:
            progress(done + 1, wanted + 1)
