"""Greedy k-center coresets: a few rows such that every other row is near one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from murf_fast import _fork, backends, reference
from murf_fast.annotations import Backend, Projection
from murf_fast.ops import _checks, _contract, _random_projection
from murf_fast.ops._library import register
from murf_fast.ops._rows import check_finite, contiguous_rows, matrix

OP = "k_center_greedy"
STARTS = ("random",)
# That are projected at once: shards that begin at a multiple of it have the projected rows of the whole, bit for bit.
ROWS = 1 << 13


def k_center_greedy(
    features: Tensor,
    *,
    count: int | None = None,
    fraction: float | None = None,
    start: int | Tensor | Literal["random"] = 0,
    include_start: bool = True,
    projection: Tensor | Projection | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    out: Tensor | None = None,
    nearest: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Select rows one by one, always the one farthest from all rows selected before: greedy k-center, a coreset.

    ``i_0 = start, i_t = argmax_i min_{s < t} |x_i - x_{i_s}|``, the lowest index among equals. Distance, minimum and
    maximum are one pass over the rows per step; distances that decide are computed in float64.

    Args:
        features: (N, D), floating point.
        count: Rows to select, at most N. Or
        fraction: in (0, 1]: ``int(fraction * N)`` rows, at least one.
        start: The first row; ``"random"`` draws it, as anomalib does. Or the rows (int64) that an earlier call
            selected: the selection goes on from there, with the result of one uninterrupted call (an earlier call with
            ``include_start=True``).
        include_start: Whether ``start`` is part of the result. ``False`` is anomalib's rule up to 2.3, True that of
            later versions.
        projection: (P, D): distances are those of ``features @ projection.T``, in float32 or wider. They take P / D of
            the time and memory; the selection is that of approximate distances. Or the name of a random one:
            ``"sparse"``, anomalib's, keeps distances within a factor 1 +- 0.9: P is
            ``int(4 ln N / (eps^2 / 2 - eps^3 / 3))`` with eps = 0.9 (341 for a million rows: more than narrow features
            have), and entries are 0 but for a share ``s = 1 / sqrt(D)``, which are ``+-1 / sqrt(s P)``.
            ``"linear"``, the original PatchCore's: P = 128, entries uniform in ``+-1 / sqrt(D)``.
        seed: For ``"random"``, ``"sparse"`` and ``"linear"``, at least 0. What is drawn depends on nothing but this and
            the shape of ``features``.
        progress: Called with (rows selected, rows wanted) now and then; the backend ``"reference"`` does not.
        out: (count,) int64 on the device of ``features``, which the result is written to row by row, beginning with -1
            everywhere else than in ``start``. What is there after Ctrl-C, which ends a call within a second, may be
            given as ``start``: ``start=out[out >= 0]``. Needs ``include_start=True``. The backend ``"reference"``
            writes at the end.
        nearest: (N,) float64 on the device of ``features``, updated in place: every row's squared distance to the
            nearest of the selected rows that it has met, infinite everywhere before the first call. With what an
            earlier call of the same backend and processor left here and in ``out``, finished or not, no row meets one
            again, and the result is, bit for bit, that of one uninterrupted call. It must be of these ``features``, of
            this ``projection`` and of the rows in ``start``, which is not found out where it is not so.
        backend: ``"reference"``, ``"native"`` or ``"triton"``; None chooses by device.

    Returns:
        (count,) indices in int64, in the order of selection.

    Raises:
        TypeError, ValueError: An argument is wrong; rows that are not finite are named.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: one byte per value and 32 bytes per row on a CPU; 2 MB and, while rows are sorted, about 48 bytes per row on
    a GPU; the projected rows (N, P) in float32, if any.
    float64: 8 bytes per row and blocks of 0.5 MB on a CPU, 32 MB elsewhere.

    Source: Sener & Savarese 2018; PatchCore (section 3.2) and its code; anomalib's KCenterGreedy and
    SparseRandomProjection (Li et al. 2006).
    """
    features = matrix(OP, "features", features)
    _checks.flag(OP, "include_start", include_start)
    if progress is not None and not callable(progress):
        raise TypeError(f"murf_fast.{OP}: `progress` must be callable, got {type(progress).__name__}")
    rows = len(features)
    if rows == 0:
        raise ValueError(f"murf_fast.{OP}: `features` must have rows, got shape {tuple(features.shape)}")
    count = _count(count, fraction, rows)
    seed = _checks.integer(OP, "seed", seed, 0)
    start = _start(start, rows, seed, features.device)
    if isinstance(projection, str):
        _checks.choice(OP, "projection", projection, _random_projection.PROJECTIONS)
        projection = _random_projection.projection(projection, rows, features.shape[1], seed).to(features.device)
    projection = None if projection is None else matrix(OP, "projection", projection)
    _checks.no_gradients(OP, "a selection", [features, projection])
    promoted = features.dtype if projection is None else torch.promote_types(features.dtype, torch.float32)
    backend = _checks.backend(backend, features, promoted)
    if projection is not None and (projection.shape[1] != features.shape[1] or projection.device != features.device):
        raise ValueError(
            f"murf_fast.{OP}: `projection` must be (P, {features.shape[1]}) on {features.device}, got "
            f"{tuple(projection.shape)} on {projection.device}"
        )
    if torch.compiler.is_compiling() and any(x is not None for x in (out, nearest, progress)):
        raise ValueError(f"murf_fast.{OP}: `out`, `nearest` and `progress` are of eager calls, no graph holds them")
    if out is not None:
        _checks.out(OP, out, (count,), [start], name="start")
        if not include_start:
            raise ValueError(f"murf_fast.{OP}: `out` needs include_start=True")
    if nearest is not None:
        _check_nearest(nearest, features)
    total = count + (0 if include_start else len(start))
    if total > rows:
        raise ValueError(f"murf_fast.{OP}: `count` must leave a row for `start`, got {count} of {rows}")
    if projection is not None and total > len(start):
        features = projected(features, projection.to(promoted))
    if progress is None and out is None and nearest is None and total > len(start) and backend != "reference":
        chosen = _k_center_greedy(features, start, total, backend)
    else:
        chosen = _selected(features, start, total, backend, out, nearest, progress)
    return chosen if include_start else chosen[len(start) :]


def _selected(
    features: Tensor,
    start: Tensor,
    total: int,
    backend: str,
    out: Tensor | None,
    nearest: Tensor | None,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    _check_values(features, start)
    already = 0 if nearest is None else met(nearest, start)
    chosen = _empty(features, start, total, backend) if out is None else out
    # `start` first: whatever ends the call, `out` has no fewer rows than `nearest` has met.
    chosen[: len(start)] = start[:total]
    chosen[len(start) :] = -1
    if total <= len(start):
        return chosen
    if backend == "reference":
        known = None if nearest is None else nearest.clone()
        chosen.copy_(reference.k_center_greedy(features, total, start, known, already))
        if known is not None and nearest is not None:
            nearest.copy_(known)
        return chosen
    with _fork.calling_thread_only():
        _select(features, chosen, len(start), backend, nearest, already, progress)
    return chosen


def _check_nearest(nearest: object, features: Tensor) -> None:
    if not isinstance(nearest, Tensor):
        raise TypeError(f"murf_fast.{OP}: `nearest` must be a tensor, got {type(nearest).__name__}")
    _checks.dense(OP, "nearest", nearest)
    if nearest.dtype != torch.float64:
        raise TypeError(f"murf_fast.{OP}: `nearest` must be torch.float64, got {nearest.dtype}")
    if nearest.shape != features.shape[:1] or nearest.device != features.device or not nearest.is_contiguous():
        raise ValueError(
            f"murf_fast.{OP}: `nearest` must be contiguous ({len(features)},) on {features.device}, got "
            f"{tuple(nearest.shape)} on {nearest.device}"
        )
    if not bool((nearest >= 0).all()):
        raise ValueError(f"murf_fast.{OP}: `nearest` must be squared distances, not below 0 and no NaN")


def met(nearest: Tensor, start: Tensor) -> int:
    """How many of ``start``, counted from its first, all rows have met; the last one is met again.

    At 0 from those met is who has been met himself, or equals one of them, so that meeting him changes nothing.
    """
    others = (nearest[start] != 0).nonzero().flatten().tolist()
    met = others[0] if others else len(start)
    if met == 0 and not bool(nearest.isinf().all()):
        raise ValueError(f"murf_fast.{OP}: `nearest` must be infinite or of `start`, whose first row it has not met")
    return min(met, len(start) - 1)


def projected(features: Tensor, projection: Tensor) -> Tensor:
    """The product (N, P), in the dtype of ``projection``, block by block of ``ROWS`` rows."""
    found = features.new_empty((len(features), len(projection)), dtype=projection.dtype)
    for rows, own in zip(features.split(ROWS), found.split(ROWS), strict=True):
        torch.mm(rows.to(projection.dtype), projection.T, out=own)
    return found


def _count(count: int | None, fraction: float | None, rows: int) -> int:
    if (count is None) == (fraction is None):
        raise ValueError(f"murf_fast.{OP}: give either `count` or `fraction`")
    if fraction is not None:
        fraction = _checks.number(OP, "fraction", fraction)
        if not 0 < fraction <= 1:
            raise ValueError(f"murf_fast.{OP}: `fraction` must be in (0, 1], got {fraction!r}")
        return max(1, int(fraction * rows))
    count = _checks.integer(OP, "count", count, 1)
    if count > rows:
        raise ValueError(f"murf_fast.{OP}: `count` must be at most the {rows} rows, got {count}")
    return count


def _start(start: int | Tensor | str, rows: int, seed: int, device: torch.device) -> Tensor:
    if isinstance(start, str):
        _checks.choice(OP, "start", start, STARTS)
        start = _random_projection.first_row(rows, seed).to(device)
    if isinstance(start, Tensor):
        _checks.dense(OP, "start", start)
        if start.dtype != torch.int64 or start.ndim != 1 or len(start) == 0:
            raise TypeError(
                f"murf_fast.{OP}: `start` must be an integer or int64 indices, got {start.dtype} {tuple(start.shape)}"
            )
    else:
        start = torch.full((1,), _checks.integer(OP, "start", start, 0), dtype=torch.int64, device=device)
    return start


def _check_values(features: Tensor, start: Tensor) -> None:
    rows = len(features)
    if not bool(((start >= 0) & (start < rows)).all()):
        raise ValueError(f"murf_fast.{OP}: `start` must be in 0 .. {rows - 1}, got {start.tolist()}")
    check_finite(OP, "features", features)


def _requires(op, features, start, count, backend) -> None:
    _contract.tensor(op, "features", features, features, (None, None), _contract.DTYPES)
    _contract.backend(op, backend, features)
    _contract.tensor(op, "start", start, features, (None,), (torch.int64,))
    if not 1 <= len(start) <= count <= len(features):
        raise ValueError(
            f"murf_fast.{op}: needs 1 <= rows of `start` <= `count` <= rows of `features`, got {len(start)}, {count}, "
            f"{len(features)}"
        )


def _empty(features, start, count, backend) -> Tensor:
    return start.new_empty(count)


def _launch(features, start, count, backend, centers) -> None:
    _check_values(features, start)
    centers[: len(start)] = start
    _select(features, centers, len(start), backend)


def _select(features, centers, given, backend, nearest=None, met=0, progress=None) -> None:
    if nearest is None:
        nearest = torch.full((len(features),), torch.inf, dtype=torch.float64, device=features.device)
    backends.launcher(backend).k_center_greedy(contiguous_rows(features), centers, given, nearest, met, progress)


def _reference(features, start, count, backend) -> Tensor:
    _check_values(features, start)
    return reference.k_center_greedy(features, count, start)


_k_center_greedy = register(
    "k_center_greedy(Tensor features, Tensor start, SymInt count, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    reference=_reference,
)
