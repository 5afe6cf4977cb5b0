"""Greedy k-center on a GPU: one launch per step and no wait for the host.

Every program finds the newest center itself, from the farthest rows that the programs of the step before wrote down.
Differences and sums are float64: the rows' traffic takes longer, and the selection is that of the float64 definition.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels.launch import on_device_of

__all__ = ["k_center_greedy"]

BLOCK_ROWS = 32
BLOCK_COLUMNS = 64
# Candidates that every program reads; more programs than a GPU holds at once would not be faster.
PROGRAMS = 1024
# Launches between reports of progress, which wait for the device.
PIECE = 256


@triton.jit(do_not_specialize=["step"])
def _k_center_step(x, stride, nearest, centers, step, given, values_in, places_in, values_out, places_out, rows,
                   share, DIM: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                   BLOCK_COLUMNS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    if step < given:
        center = tl.load(centers + step)
    else:
        slots = tl.arange(0, PROGRAMS)
        values = tl.load(values_in + slots)
        places = tl.load(places_in + slots)
        center = tl.min(tl.where(values == tl.max(values, axis=0), places, 0x7FFFFFFFFFFFFFFF), axis=0)
        if program == 0:
            tl.store(centers + step, center)
    begin = program.to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    best = tl.full([BLOCK_ROWS], -1.0, dtype=tl.float64)
    place = tl.full([BLOCK_ROWS], 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    first = begin
    while first < end:
        r = first + tl.arange(0, BLOCK_ROWS)
        inside = r < end
        squared = tl.zeros([BLOCK_ROWS], dtype=tl.float64)
        for d in range(0, DIM, BLOCK_COLUMNS):
            c = d + tl.arange(0, BLOCK_COLUMNS)
            row = tl.load(x + (r * stride)[:, None] + c[None, :], mask=inside[:, None] & (c < DIM)[None, :], other=0.0)
            middle = tl.load(x + center * stride + c, mask=c < DIM, other=0.0)
            difference = row.to(tl.float64) - middle.to(tl.float64)[None, :]
            squared += tl.sum(difference * difference, axis=1)
        known = tl.load(nearest + r, mask=inside, other=-1.0)
        squared = tl.where(inside, tl.minimum(known, squared), -1.0)
        tl.store(nearest + r, squared, mask=inside)
        # Rows rise within a lane, so the first of equals stays.
        place = tl.where(squared > best, r, place)
        best = tl.maximum(best, squared)
        first += BLOCK_ROWS
    value = tl.max(best, axis=0)
    tl.store(values_out + program, value)
    tl.store(places_out + program, tl.min(tl.where(best == value, place, 0x7FFFFFFFFFFFFFFF), axis=0))


def k_center_greedy(features: Tensor, centers: Tensor, given: int, progress: Callable[[int, int], None] | None) -> None:
    rows, device = len(features), features.device
    share = triton.cdiv(triton.cdiv(rows, PROGRAMS), BLOCK_ROWS) * BLOCK_ROWS
    programs = triton.cdiv(rows, share)
    slots = triton.next_power_of_2(programs)
    nearest = torch.full((rows,), torch.inf, dtype=torch.float64, device=device)
    values = torch.full((2, slots), -2.0, dtype=torch.float64, device=device)
    places = torch.zeros((2, slots), dtype=torch.int64, device=device)
    with on_device_of(features):
        # The last step only reads what the one before found.
        for step in range(len(centers)):
            source, target = step % 2, (step + 1) % 2
            _k_center_step[(programs,)](
                features,
                features.stride(0),
                nearest,
                centers,
                step,
                given,
                values[source],
                places[source],
                values[target],
                places[target],
                rows,
                share,
                DIM=features.shape[1],
                PROGRAMS=slots,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_COLUMNS=BLOCK_COLUMNS,
            )
            if progress is not None and (step % PIECE == PIECE - 1 or step + 1 == len(centers)):
                if features.is_cuda:
                    torch.cuda.current_stream().synchronize()
                progress(step + 1, len(centers))
