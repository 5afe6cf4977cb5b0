"""Maps resized to one grid and summed: every value of the result is written once, in float32 arithmetic."""

from __future__ import annotations

from dataclasses import replace

import triton.language as tl
from torch import Tensor

from murf_fast._layout import is_channels_last
from murf_fast.kernels import launch, resample
from murf_fast.kernels.aligned_maps import aligned_maps
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.kept_rows import MOST_KEPT, nothing_kept, sum_of_kept
from murf_fast.kernels.resample import LONG, Axes, Taps, Tile, resampled_sum

__all__ = ["upsample_sum"]


def write_tile(maps: int, channels: int, width: int, channels_last: bool, taps: Taps) -> Tile:
    """Long runs along the contiguous dimension, and as many values a thread as its registers hold.

    256 channels (or 256 pixels of a planar row) are 512 bytes of a half dtype, four full sectors of a warp's store.
    2048 float32 sums of four warps leave registers for the loads of four taps in flight. Half of them where a value
    needs more, or they spilled when compiled: long sums, or pixels whose channels do not begin on 16 elements
    and are loaded one by one; and half again with several maps, whose loads the compiler brings together. Planar rows
    of several maps keep a table entry per pixel and map in registers: fewer pixels, more channels.
    """
    scalar = channels_last and channels % 16 > 0
    values = 1024 if scalar or LONG.value in (taps.y, taps.x) else 2048
    if maps > 1:
        values //= 2
    if channels_last:
        block = _run(channels, 256)
        return Tile(min(launch.power_of_two(width), values // block), block, 4, 168)
    block = _run(width, 256 if maps == 1 else 128)
    return Tile(block, min(launch.power_of_two(channels), values // block), 4, 168)


def kept_tile(maps: int, rows: int, channels: int, width: int, channels_last: bool) -> Tile:
    """As :func:`write_tile`, with registers for ``rows`` rows of every map beside the sums and the row in the making.
    Planar rows have a table entry and an address for each of a thread's pixels and channels: half as many of them.
    """
    values = 2048 if maps * rows <= 2 else 1024 if maps * rows <= 6 else 512
    if maps > 1 and not channels_last:
        values //= 2
    block = _run(channels if channels_last else width, 256 if channels_last or maps == 1 else 128)
    other = min(launch.power_of_two(width if channels_last else channels), values // block)
    return Tile(other, block, 4, 168) if channels_last else Tile(block, other, 4, 168)


def for_all(tile: Tile, rows: int, channels: int, width: int, channels_last: bool) -> Tile:
    """Smaller tiles where a small result of large maps, as pooling makes it, leaves multiprocessors without a program:
    448^2 pixels on 32^2 took 64 programs of 2048 values, each of which reads 196.
    """
    pixels, block = tile.pixels, tile.channels
    while pixels * block > 256 and rows * launch.cdiv(width, pixels) * launch.cdiv(channels, block) < 1056:
        if (pixels if channels_last else block) == 1:
            break
        pixels, block = (pixels // 2, block) if channels_last else (pixels, block // 2)
    return replace(tile, pixels=pixels, channels=block)


def rows_of_a_program(height: int, across: int) -> int:
    """Rows below each other: many resize few rows of the maps twice, but a GPU of 132 multiprocessors wants its 1056
    blocks of four warps first.
    """
    for rows in (32, 16, 8, 4):
        if across * launch.cdiv(height, rows) >= 1056:
            return rows
    return 2


def _run(n: int, most: int) -> int:
    """Elements of the contiguous dimension in a tile: up to ``most`` if at most a ninth of all tiles lies outside."""
    for block in (256, 128, 64, 32):
        if block <= most and 8 * block * launch.cdiv(n, block) <= 9 * n:
            return block
    return min(launch.power_of_two(n), 32)


@kernel(do_not_specialize=["heights", "rows_each"])
def _upsample_sum_kept(maps, readable, bias, bias_stride, out, channels, height, width, heights, rows_each,
                       CHANNELS_LAST: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                       TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    """``rows_each`` rows of the result, one below the other."""
    program = tl.program_id(0)
    x_tiles, y_tiles, c_tiles = tl.cdiv(width, BLOCK_X), tl.cdiv(height, rows_each), tl.cdiv(channels, BLOCK_C)
    # Programs that run together write neighbouring memory.
    if CHANNELS_LAST:
        c_tile, rest = program % c_tiles, program // c_tiles
        x_tile, rest = rest % x_tiles, rest // x_tiles
        y_tile, b = rest % y_tiles, rest // y_tiles
    else:
        x_tile, rest = program % x_tiles, program // x_tiles
        y_tile, rest = rest % y_tiles, rest // y_tiles
        c_tile, b = rest % c_tiles, rest // c_tiles
    x = x_tile * BLOCK_X + tl.arange(0, BLOCK_X)
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    x_inside, c_inside = x < width, c < channels
    c_readable = c < readable
    start = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
    if bias is not None:
        start += tl.load(bias + b.to(tl.int64) * bias_stride + c, mask=c_inside, other=0.0)[None, :]
    pixels = out.data + b.to(tl.int64) * out.stride_b
    pixels = pixels + (x.to(tl.int64) * out.stride_x)[:, None] + (c.to(tl.int64) * out.stride_c)[None, :]
    rows, following = nothing_kept(maps, BLOCK_X, BLOCK_C, TAPS_Y)
    y = y_tile * rows_each
    end = tl.minimum(y + rows_each, height)
    while y < end:
        total, rows, following = sum_of_kept(
            start, maps, heights, rows, following, b, y, x, c, x_inside, c_readable, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X
        )
        target = pixels + y.to(tl.int64) * out.stride_y
        tl.store(target, total.to(out.data.dtype.element_ty), mask=x_inside[:, None] & c_inside[None, :])
        y += 1


@kernel
def _upsample_sum(maps, readable, bias, bias_stride, out, channels, height, width, CHANNELS_LAST: tl.constexpr,
                  BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                  TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    x_tiles = tl.cdiv(width, BLOCK_X)
    c_tiles = tl.cdiv(channels, BLOCK_C)
    # Programs that run together write neighbouring memory.
    if CHANNELS_LAST:
        c_tile, rest = program % c_tiles, program // c_tiles
        x_tile, rest = rest % x_tiles, rest // x_tiles
        y, b = rest % height, rest // height
    else:
        x_tile, rest = program % x_tiles, program // x_tiles
        y, rest = rest % height, rest // height
        c_tile, b = rest % c_tiles, rest // c_tiles
    x = x_tile * BLOCK_X + tl.arange(0, BLOCK_X)
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    x_inside, c_inside = x < width, c < channels
    total = resampled_sum(
        maps, readable, bias, bias_stride, b, y, x, c, x_inside, c_inside, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X
    )
    row = out.data + b.to(tl.int64) * out.stride_b + y.to(tl.int64) * out.stride_y
    pointers = row + (x.to(tl.int64) * out.stride_x)[:, None] + (c.to(tl.int64) * out.stride_c)[None, :]
    tl.store(pointers, total.to(out.data.dtype.element_ty), mask=x_inside[:, None] & c_inside[None, :])


def upsample_sum(features: list[Tensor], axes: Axes, bias: Tensor | None, out: Tensor) -> None:
    """``out = sum_s U_s features[s] + bias``; any strides of ``out``: tiles follow its contiguous dimension."""
    batch, channels, height, width = out.shape
    channels_last, taps = is_channels_last(out), resample.taps_of(axes)
    rows = max(y.taps for y, _ in axes)
    keeps = rows <= MOST_KEPT
    if keeps:
        tile = kept_tile(len(features), rows, channels, width, channels_last)
    else:
        tile = write_tile(len(features), channels, width, channels_last, taps)
        tile = for_all(tile, batch * height, channels, width, channels_last)
    across = batch * launch.cdiv(width, tile.pixels) * launch.cdiv(channels, tile.channels)
    each = rows_of_a_program(height, across) if keeps else 1
    maps, readable = aligned_maps(features, height * width) if keeps and channels_last else (features, channels)
    arguments = (resample.resized_maps(maps, axes), readable, bias, resample.bias_stride(bias), launch.map_of(out))
    options = {"CHANNELS_LAST": channels_last, "BLOCK_X": tile.pixels, "BLOCK_C": tile.channels, "TAPS_X": taps.x}
    options |= {"num_warps": tile.warps, "maxnreg": tile.registers}
    grid = (across * launch.cdiv(height, each),)
    with launch.on_device_of(out):
        if keeps:
            heights = tuple(f.shape[2] for f in features)
            _upsample_sum_kept[grid](*arguments, channels, height, width, heights, each, TAPS_Y=rows, **options)
        else:
            _upsample_sum[grid](*arguments, channels, height, width, TAPS_Y=taps.y, **options)
