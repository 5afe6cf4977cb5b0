"""Matrices whose rows are feature vectors: what their operations check."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.ops import _checks


def matrix(op: str, name: str, x: object) -> Tensor:
    """A floating-point (rows, columns) tensor; NumPy arrays, also memory-mapped, read-only ones, become one."""
    if isinstance(x, np.ndarray):
        with warnings.catch_warnings():
            # Nothing here writes to its inputs.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            x = torch.from_numpy(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"murf_fast.{op}: `{name}` must be a tensor, got {type(x).__name__}")
    if x.dtype not in _checks.DTYPES:
        raise TypeError(f"murf_fast.{op}: `{name}` must be floating point, got {x.dtype}")
    _checks.dense(op, name, x)
    if x.ndim != 2:
        raise ValueError(f"murf_fast.{op}: `{name}` must be (rows, columns), got shape {tuple(x.shape)}")
    _fork.keep_torch_to_calling_thread()
    # A lazy negation: prepared indices and selections read the memory as it is.
    return x.resolve_neg()


def contiguous_rows(x: Tensor) -> Tensor:
    """Rows whose entries are contiguous, which is all that the kernels walk."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def check_finite(op: str, name: str, x: Tensor) -> None:
    finite = [rows.isfinite().all(1) for rows in x.split(4096)]
    if not all(bool(f.all()) for f in finite):
        rows = (~torch.cat(finite)).nonzero().flatten().tolist()
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise ValueError(
            f"murf_fast.{op}: `{name}` must be finite with norms up to 1e18, rows {rows[:5]}{more} are not"
        )
