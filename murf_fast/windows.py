"""Which keys every query of a grid attends to: windows that are separable into rows and columns.

A window rule names, for each output row, the key rows it reads (and likewise for columns); a query attends to all
pairs. Rules are small frozen values, so that operations can be traced with them; the tables they stand for, four bytes
per output and key of its window, are built once per size by :func:`axis_window`.

Sizes ``out`` and ``grid`` are (height, width) in pixels of the output and in keys; one integer is a square. Wrong
arguments raise TypeError or ValueError, which name them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from murf_fast import _arguments
from murf_fast.annotations import Size

Pair = tuple[int, int]

# In the place of a neighborhood's dilation: outputs per key, whatever the sizes.
_STEP = 0

# Tables given by the user, by the digest that stands for them in a rule. A compiled graph may hold the digest for as
# long as the process lives, so nothing is ever dropped.
_given: dict[str, AxisWindow] = {}


@dataclass(frozen=True, eq=False)
class AxisWindow:
    """One axis: output i reads the keys ``index[i, :count[i]]`` of ``size`` ones; a key that repeats counts as often.

    Attributes:
        index: (out, taps) int32, padded with the row's first key.
        count: (out,) int32, at least 1.
        size: Keys of the axis.
    """

    index: np.ndarray
    count: np.ndarray
    size: int

    @property
    def out_size(self) -> int:
        """Outputs of the axis."""
        return len(self.count)

    @property
    def taps(self) -> int:
        """Keys of the largest window."""
        return self.index.shape[1]

    def multiplicity(self) -> np.ndarray:
        """(out, size) float32: how often output i counts key j."""
        used = np.arange(self.taps)[None] < self.count[:, None]
        table = np.zeros((self.out_size, self.size), np.float32)
        np.add.at(table, (np.nonzero(used)[0], self.index[used]), 1)
        return table


@dataclass(frozen=True)
class Windows:
    """A window rule of both axes, made by the functions of this module.

    Attributes:
        rows, columns: What :func:`axis_window` makes each axis's table of.
        out, grid: The sizes that the rule was made for; None: it fits any.
    """

    rows: str
    columns: str
    out: Pair | None = None
    grid: Pair | None = None

    def tables(self, out: Size | None = None, grid: Size | None = None) -> tuple[AxisWindow, ...]:
        """The tables of rows and columns for an output (H, W) and a key grid (h, w); None: the rule's own.

        Raises:
            ValueError: A size is needed and not given, or the rule leaves an output without a key.
        """
        out, grid = (
            size if given is None else _arguments.pair("windows.Windows.tables", name, given)
            for name, given, size in (("out", out, self.out), ("grid", grid, self.grid))
        )
        if out is None or grid is None:
            raise ValueError("murf_fast.windows: this rule fits any size: `out` and `grid` must be given")
        return axis_window(self.rows, out[0], grid[0]), axis_window(self.columns, out[1], grid[1])

    def crop(self, top: int, left: int, height: int, width: int, *, out: Size | None = None) -> Windows:
        """The rule of the outputs ``top .. top + height - 1`` by ``left .. left + width - 1``: each reads what it read.

        Args:
            top, left, height, width: A rectangle within the output, in its pixels.
            out: (height, width) of the whole output, for a rule that fits any.

        Raises:
            ValueError: The rectangle leaves the output, or ``out`` is needed and not given, or is not the rule's own.
        """
        what = "windows.Windows.crop"
        whole = self.out if out is None else _arguments.pair(what, "out", out)
        if whole is None:
            raise ValueError("murf_fast.windows: this rule fits any size: `out` must be given to crop it")
        if self.out not in (None, whole):
            raise ValueError(f"murf_fast.{what}: `out` must be the rule's own, {self.out}, got {whole}")
        specs = []
        for spec, n, begin, length, names in (
            (self.rows, whole[0], top, height, ("top", "height")),
            (self.columns, whole[1], left, width, ("left", "width")),
        ):
            begin = _arguments.integer(what, names[0], begin, 0)
            length = _arguments.integer(what, names[1], length, 1)
            if begin + length > n:
                raise ValueError(
                    f"murf_fast.{what}: `{names[0]}` and `{names[1]}` must stay within the {n} pixels of the output, "
                    f"got {begin} and {length}"
                )
            specs.append(_cropped_spec(spec, begin, n))
        # A radius is a rule for outputs and keys on one grid.
        grid = whole if self.grid is None and any("clamped" in spec for spec in specs) else self.grid
        return Windows(specs[0], specs[1], (height, width), grid)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickling and copying: tables that the user gave travel with the rule."""
        given = [_given[spec.split()[-1]] for spec in (self.rows, self.columns) if "given" in spec.split()]
        return _restored, (self.rows, self.columns, self.out, self.grid, given)


def ratio(out: Size, grid: Size, ratio: float = 0.1) -> Windows:
    """AnyUp's dense rule: keys within ``ratio`` of the map's size around the query; borders shrink the window.

    With ``p = (i + 0.5) / out``: keys ``floor(clamp(p - ratio, 0, 1) n) .. ceil(clamp(p + ratio, 0, 1) n) - 1``, in
    float32 and in this order, because at some sizes the rounding decides. A ratio of zero or less is no restriction;
    one so small that a query would have no key raises ValueError where the rule is used.

    Source: AnyUp (Wimmer et al., arXiv 2510.12764), the attention without ``use_natten``.
    """
    out, grid = _arguments.pair("windows.ratio", "out", out), _arguments.pair("windows.ratio", "grid", grid)
    ratio = _arguments.number("windows.ratio", "ratio", ratio)
    spec = f"ratio {ratio!r}" if ratio > 0 else "full"
    return Windows(spec, spec, out, grid)


def neighborhood(
    out: Size,
    grid: Size,
    kernel_size: Size,
    *,
    stride: Size = 1,
    dilation: Size | None = None,
) -> Windows:
    """NATTEN's rule: windows of a constant number of keys around the query, shifted at the borders.

    Positions are those of the output grid: output i lies in group ``i mod dilation``, and its window is a run of
    ``kernel_size`` members of that group; with ``stride`` the queries of a run of so many share the window of the
    middle one. Where the keys have a grid of their own, a position stands for the key ``floor((i + 0.5) n / out)``
    (nearest-exact upsampling; at a ratio that is not an integer a key can repeat and then counts as often), and
    ``dilation`` is ``out // n`` unless given (AnyUp's ``use_natten``, NAF).

    Args:
        out: (height, width) of the output.
        grid: (height, width) of the keys.
        kernel_size: Keys of a window per axis, at least 1; with the dilation they must fit the output:
            ``kernel_size * dilation <= out``.
        stride: Queries that share a window, per axis, 1 to ``kernel_size``.
        dilation: Outputs from one member of a window to the next, per axis.

    Source: NATTEN (Hassani et al., Neighborhood Attention Transformer; Generalized Neighborhood Attention for strides).
    """
    op = "windows.neighborhood"
    out, grid = _arguments.pair(op, "out", out), _arguments.pair(op, "grid", grid)
    kernel, strides = _arguments.pair(op, "kernel_size", kernel_size), _arguments.pair(op, "stride", stride)
    steps = tuple(max(1, o // n) for o, n in zip(out, grid, strict=True))
    steps = steps if dilation is None else _arguments.pair(op, "dilation", dilation)
    specs = []
    for axis, o, k, s, d in zip(("height", "width"), out, kernel, strides, steps, strict=True):
        if k * d > o:
            raise ValueError(
                f"murf_fast.{op}: `kernel_size` times `dilation` must fit the {axis} of the output, {o}, got {k} * {d}"
            )
        if s > k:
            raise ValueError(f"murf_fast.{op}: `stride` must be at most `kernel_size`, {k}, got {s}")
        # A rule is text, and part of a graph: where sizes are open, the step is found when they are known.
        if dilation is None and isinstance(d, torch.SymInt):
            d = _STEP
        for name, value in (("kernel_size", k), ("stride", s), ("dilation", d)):
            _known(op, name, value)
        specs.append(f"neighborhood {k} {s} {d}")
    return Windows(specs[0], specs[1], out, grid)


def clamped(radius: Size) -> Windows:
    """Keys at most ``radius`` rows and columns from the query, fewer at the borders; one grid for both (FeatSharp)."""
    rows, columns = _arguments.pair("windows.clamped", "radius", radius, 0)
    return Windows(f"clamped {rows}", f"clamped {columns}")


def full() -> Windows:
    """Every key."""
    return Windows("full", "full")


def ranges(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], grid: Size) -> Windows:
    """Windows given by their first key and their end, which is excluded.

    Args:
        rows: (start, end), int32 tensors (H,) each, ``0 <= start < end <= h``; on any device, copied.
        columns: The same of the output's width and the keys' columns.
        grid: (height, width) of the keys.
    """
    grid = _arguments.pair("windows.ranges", "grid", grid)
    axes = []
    for name, pair, n in (("rows", rows, grid[0]), ("columns", columns, grid[1])):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"murf_fast.windows.ranges: `{name}` must be a pair (start, end) of int32 tensors")
        start, end = (_table("ranges", name, t, 1) for t in pair)
        if start.shape != end.shape:
            raise ValueError(f"murf_fast.windows.ranges: `{name}`: start has length {len(start)}, end {len(end)}")
        bad = np.nonzero((start < 0) | (end > n) | (end <= start))[0]
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"murf_fast.windows.ranges: `{name}` must hold non-empty windows within 0..{n}, got "
                f"{start[i]}..{end[i]} at {i} (and {len(bad) - 1} more)"
            )
        axes.append(_from_ranges(start, end, n))
    return _custom(axes, grid)


def tables(rows: Tensor, columns: Tensor, grid: Size) -> Windows:
    """Windows given key by key; a key that repeats counts as often.

    Args:
        rows: (H, taps) int32, the key rows of every output row, in 0..h - 1; on any device, copied.
        columns: (W, taps) int32, likewise; not necessarily as many taps.
        grid: (height, width) of the keys.
    """
    grid = _arguments.pair("windows.tables", "grid", grid)
    axes = []
    for name, table, n in (("rows", rows, grid[0]), ("columns", columns, grid[1])):
        index = _table("tables", name, table, 2)
        bad = np.nonzero(((index < 0) | (index >= n)).any(1))[0]
        if index.shape[1] < 1:
            raise ValueError(
                f"murf_fast.windows.tables: `{name}` must hold at least one key per row, got {index.shape}"
            )
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"murf_fast.windows.tables: `{name}` must hold indices within 0..{n - 1}, got {index[i].tolist()} in "
                f"row {i} (and {len(bad) - 1} more)"
            )
        axes.append(AxisWindow(index, np.full(len(index), index.shape[1], np.int32), n))
    return _custom(axes, grid)


@functools.lru_cache(256)
def axis_window(spec: str, out: int, size: int) -> AxisWindow:
    """The table that one axis of a rule stands for; the 256 latest are kept.

    Args:
        spec: ``Windows.rows`` or ``Windows.columns``.
        out, size: Outputs and keys of the axis.

    Raises:
        ValueError: The rule leaves an output without a key, or its table was given in another process.
    """
    kind, *arguments = spec.split()
    if kind == "given":
        if arguments[0] not in _given:
            raise ValueError(
                "murf_fast.windows: this rule's table was given in another process, and only its name came over; "
                "pickle the rule itself, or make it again with `tables` or `ranges`"
            )
        return _given[arguments[0]]
    if kind == "crop":
        begin, whole, inner = spec.split(maxsplit=3)[1:]
        return _cropped(axis_window(inner, int(whole), size), int(begin), out)
    if kind == "full":
        return _from_ranges(np.zeros(out, np.int32), np.full(out, size, np.int32), size)
    if kind == "ratio":
        return _ratio_axis(out, size, float(arguments[0]))
    if kind == "clamped":
        at, radius = np.arange(out), int(arguments[0])
        return _from_ranges(np.maximum(at - radius, 0), np.minimum(at + radius + 1, size), size)
    kernel, stride, dilation = map(int, arguments)
    return _neighborhood_axis(out, size, kernel, stride, max(1, out // size) if dilation == _STEP else dilation)


def _known(what: str, name: str, value: object) -> None:
    """Refuses a size that a graph leaves open where a rule's text would hold it."""
    if isinstance(value, torch.SymInt):
        raise ValueError(
            f"murf_fast.{what}: `{name}` must be known when a graph is exported, as it is part of the rule, got "
            f"{value}; export with static sizes"
        )


def _cropped_spec(spec: str, begin: int, whole: int | str) -> str:
    """The rule of an axis of ``whole`` outputs from output ``begin`` on; one of a crop's crop has the first's whole."""
    kind = spec.split()[0]
    if kind == "full":
        return spec
    for name, value in (("begin", begin), ("out", whole)):
        _known("windows.Windows.crop", name, value)
    if kind == "crop":
        first, whole, spec = spec.split(maxsplit=3)[1:]
        begin += int(first)
    return f"crop {begin} {whole} {spec}"


def _cropped(axis: AxisWindow, begin: int, out: int) -> AxisWindow:
    count = axis.count[begin : begin + out]
    index = np.ascontiguousarray(axis.index[begin : begin + out, : count.max()])
    return AxisWindow(index, count, axis.size)


def _ratio_axis(out: int, size: int, ratio: float) -> AxisWindow:
    position = (torch.arange(out, dtype=torch.float32, device="cpu") + 0.5) / out
    start = ((position - ratio).clamp(0, 1) * size).floor().to(torch.int32)
    end = ((position + ratio).clamp(0, 1) * size).ceil().to(torch.int32)
    empty = (end <= start).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"murf_fast.windows.ratio: `ratio` must be so large that every query has a key, got {ratio!r}, with which "
            f"position {empty[0]} of {out} has none among {size} (and {len(empty) - 1} more)"
        )
    return _from_ranges(start.numpy(), end.numpy(), size)


def _neighborhood_axis(out: int, size: int, kernel: int, stride: int, dilation: int) -> AxisWindow:
    at = np.arange(out)
    group, position = at % dilation, at // dilation
    members = (out - group + dilation - 1) // dilation
    leader = np.minimum(position // stride * stride + stride // 2, members - 1)
    start = np.minimum(np.maximum(leader - kernel // 2, 0), members - kernel)
    reads = group[:, None] + dilation * (start[:, None] + np.arange(kernel))
    # nearest-exact in integers: floor((i + 0.5) n / out)
    index = ((2 * reads + 1) * size // (2 * out)).astype(np.int32)
    return AxisWindow(index, np.full(out, kernel, np.int32), size)


def _from_ranges(start: np.ndarray, end: np.ndarray, size: int) -> AxisWindow:
    count = (end - start).astype(np.int32)
    steps = np.arange(count.max())
    index = start[:, None] + np.where(steps[None] < count[:, None], steps[None], 0)
    return AxisWindow(index.astype(np.int32), count, size)


def _custom(axes: list[AxisWindow], grid: Pair) -> Windows:
    specs = []
    for axis in axes:
        digest = _digest(axis)
        _given.setdefault(digest, axis)
        specs.append(f"given {digest}")
    return Windows(specs[0], specs[1], (axes[0].out_size, axes[1].out_size), grid)


def _digest(axis: AxisWindow) -> str:
    digest = hashlib.sha256(repr((axis.size, axis.index.shape)).encode())
    digest.update(axis.index.tobytes() + axis.count.tobytes())
    return digest.hexdigest()


def _restored(rows: str, columns: str, out: Pair | None, grid: Pair | None, given: list[AxisWindow]) -> Windows:
    """A rule from a pickle, which brings the tables that were given for it."""
    for axis in given:
        _given.setdefault(_digest(axis), axis)
    return Windows(rows, columns, out, grid)


def _table(function: str, name: str, table: object, ndim: int) -> np.ndarray:
    if not isinstance(table, Tensor) or table.dtype != torch.int32:
        got = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"murf_fast.windows.{function}: `{name}` must be int32 tensors, got {got}")
    if table.ndim != ndim or table.shape[0] < 1:
        raise ValueError(
            f"murf_fast.windows.{function}: `{name}` must have {ndim} dimensions and at least one row, got shape "
            f"{tuple(table.shape)}"
        )
    _arguments.dense(f"windows.{function}", name, table)
    return table.detach().resolve_neg().cpu().contiguous().numpy().copy()
