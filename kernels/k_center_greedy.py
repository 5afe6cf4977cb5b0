"""Greedy k-center on a GPU: one launch per step and no wait for the host.

Every program finds the newest center itself, from the farthest rows that the programs of the step before wrote down.
Which step it is stands on the device, too, so that launches differ in nothing but the side they read from: a piece of
them is captured once as a CUDA graph and replayed. Differences and sums are float64: the rows' traffic takes longer,
and the selection is that of the float64 definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.launch import cdiv, on_device_of, power_of_two

__all__ = ["k_center_greedy"]

BLOCK_ROWS = 32
BLOCK_COLUMNS = 64
# Candidates that every program reads; more programs than a GPU holds at once would not be faster.
PROGRAMS = 1024
# Launches of a graph, and between reports of progress, which wait for the device. Even, as steps alternate.
PIECE = 256
# Replays that are worth a capture, which takes the host as long as launching a piece does.
REPLAYS = 2


class Farthest(NamedTuple):
    """What a step leaves: the number of the next, and of every program the largest distance and its row."""

    step: Tensor
    distances: Tensor
    rows: Tensor


@kernel
def _k_center_step(x, stride, nearest, centers, given, before, after, rows, share, DIM: tl.constexpr,
                   PROGRAMS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    step = tl.load(before.step)
    if step < given:
        center = tl.load(centers + step)
    else:
        slots = tl.arange(0, PROGRAMS)
        values = tl.load(before.distances + slots)
        places = tl.load(before.rows + slots)
        center = tl.min(tl.where(values == tl.max(values, axis=0), places, 0x7FFFFFFFFFFFFFFF), axis=0)
        if program == 0:
            tl.store(centers + step, center)
    if program == 0:
        tl.store(after.step, step + 1)
    begin = program.to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    best = tl.full([BLOCK_ROWS], -1.0, dtype=tl.float64)
    place = tl.full([BLOCK_ROWS], 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    first = begin
    while first < end:
        r = first + tl.arange(0, BLOCK_ROWS)
        inside = r < end
        squares = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float64)
        for d in range(0, DIM, BLOCK_COLUMNS):
            c = d + tl.arange(0, BLOCK_COLUMNS)
            row = tl.load(x + (r * stride)[:, None] + c[None, :], mask=inside[:, None] & (c < DIM)[None, :], other=0.0)
            middle = tl.load(x + center * stride + c, mask=c < DIM, other=0.0)
            difference = row.to(tl.float64) - middle.to(tl.float64)[None, :]
            squares += difference * difference
        known = tl.load(nearest + r, mask=inside, other=-1.0)
        squared = tl.where(inside, tl.minimum(known, tl.sum(squares, axis=1)), -1.0)
        tl.store(nearest + r, squared, mask=inside)
        # Rows rise within a lane, so the first of equals stays.
        place = tl.where(squared > best, r, place)
        best = tl.maximum(best, squared)
        first += BLOCK_ROWS
    value = tl.max(best, axis=0)
    tl.store(after.distances + program, value)
    tl.store(after.rows + program, tl.min(tl.where(best == value, place, 0x7FFFFFFFFFFFFFFF), axis=0))


def k_center_greedy(features: Tensor, centers: Tensor, given: int, progress: Callable[[int, int], None] | None) -> None:
    total = len(centers)
    with on_device_of(features):
        steps = _steps(features, centers, given)
        graph = None
        # The last step only reads what the one before found.
        for begin in range(0, total, PIECE):
            count = min(PIECE, total - begin)
            # Not before the first piece: what is captured has been compiled.
            if graph is None and begin and (total - begin) // PIECE >= REPLAYS and _may_capture(features):
                graph = _captured(steps)
            if graph is not None and count == PIECE:
                graph.replay()
            else:
                steps(count)
            if progress is not None:
                _wait_for(features)
                progress(begin + count, total)
        if graph is not None:
            # It must not go away while it runs.
            _wait_for(features)


def _steps(features: Tensor, centers: Tensor, given: int) -> Callable[[int], None]:
    """A function that launches so many steps, from one whose number is even."""
    rows, device = len(features), features.device
    share = cdiv(cdiv(rows, PROGRAMS), BLOCK_ROWS) * BLOCK_ROWS
    programs = cdiv(rows, share)
    # Both sides begin at multiples of 16 bytes, or there would be a kernel for each.
    slots = power_of_two(max(2, programs))
    nearest = torch.full((rows,), torch.inf, dtype=torch.float64, device=device)
    numbers = torch.zeros((2, 2), dtype=torch.int64, device=device)
    values = torch.full((2, slots), -2.0, dtype=torch.float64, device=device)
    places = torch.zeros((2, slots), dtype=torch.int64, device=device)
    sides = [Farthest(numbers[i, :1], values[i], places[i]) for i in range(2)]
    kernel = _k_center_step[(programs,)]

    def launch(count: int) -> None:
        for step in range(count):
            kernel(
                features,
                features.stride(0),
                nearest,
                centers,
                given,
                sides[step % 2],
                sides[(step + 1) % 2],
                rows,
                share,
                DIM=features.shape[1],
                PROGRAMS=slots,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_COLUMNS=BLOCK_COLUMNS,
            )

    return launch


def _may_capture(features: Tensor) -> bool:
    """Not within the capture of somebody else, whose graph takes the launches themselves."""
    return features.is_cuda and not torch.cuda.is_current_stream_capturing()


def _captured(steps: Callable[[int], None]) -> torch.cuda.CUDAGraph:
    """A piece as a graph. :func:`torch.cuda.graph` would empty the caches of the whole process first."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            steps(PIECE)
        finally:
            graph.capture_end()
    return graph


def _wait_for(features: Tensor) -> None:
    if features.is_cuda:
        torch.cuda.current_stream().synchronize()
