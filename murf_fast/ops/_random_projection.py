"""The random projections of two PatchCores, and first rows, drawn from a seed alone: on every device the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from murf_fast._constant import constant_while_compiling

PROJECTIONS = ("sparse", "linear")
# Distortion that anomalib allows, and columns of the original.
EPS, LINEAR_COLUMNS = 0.9, 128


@constant_while_compiling
def projection(name: str, rows: int, dim: int, seed: int) -> Tensor:
    """(P, ``dim``), float32, on the CPU, for ``rows`` rows; see :func:`murf_fast.k_center_greedy`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    if name == "linear":
        uniform = torch.rand(LINEAR_COLUMNS, dim, generator=generator, device="cpu", dtype=torch.float64)
        return ((2 * uniform - 1) / math.sqrt(dim)).float()
    columns = components(rows)
    uniform = torch.rand(columns, dim, generator=generator, device="cpu", dtype=torch.float64)
    density = 1 / math.sqrt(dim)
    signs = (uniform < density / 2).double() - (uniform >= 1 - density / 2).double()
    return (signs / math.sqrt(density * columns)).float()


def components(rows: int) -> int:
    """Columns that keep distances between ``rows`` rows within a factor 1 +- EPS (Johnson-Lindenstrauss)."""
    return max(1, int(4 * math.log(rows) / (EPS**2 / 2 - EPS**3 / 3)))


@constant_while_compiling
def first_row(rows: int, seed: int) -> Tensor:
    """(1,), int64, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(rows, (1,), generator=generator, dtype=torch.int64, device="cpu")
