"""AnyUp's feature-agnostic layer and its gradients, pixel by pixel: no channels x filters maps.

The C M responses of a pixel are a product, its patches (C, K K) times the filters (K K, M). They are read as rows j,
which are averaged, of columns i, the outputs; every row has a softmax. In the paper, response (channel, filter) is row
channel, column filter. As released it is number i C + j in the order (channel, filter). Where the filters divide the
channels, as they do in all models, that is column channel // (C / M) of the row (channel % (C / M), filter): each
remainder is a product of its own, of all filters with the channels of the remainder. The kernels read a copy of the
features in which those lie beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import folded, launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.launch import map_of
from murf_fast.kernels.products import product
from murf_fast.kernels.resample import SHORT_SUM

__all__ = ["feature_unify", "feature_unify_backward"]

# What the rows of responses are: channels, filters times a remainder, or no product.
CHANNELS, FILTERS, MIXED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Pixels whose part of the gradient of the basis one program sums: the parts are smaller than two feature maps.
RUN = 16
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class UnifyTile:
    """Rows and columns of the responses of one pixel worked on at a time, warps, and registers a thread at most."""

    rows: int
    columns: int
    warps: int
    registers: int


def unify_tile(channels: int, filters: int, order: int) -> UnifyTile:
    """All columns, for the softmax goes over them. Products: 32 responses a thread, whose programs are more than those
    of 64 and hide each other's loads: 1.04 for 1.71 ms of 1024 channels in float32, 0.78 for 1.03 in bfloat16 (H200).
    Without a product each response has two addresses of its own: 16.
    """
    columns = max(launch.power_of_two(filters), 16)
    responses, registers = (2048, 168) if order == MIXED.value else (4096, 255)
    return UnifyTile(max(min(responses // columns, columns), 16), columns, 4, registers)


def gradients_tile(filters: int, order: int, architecture: int) -> UnifyTile:
    """64 channels and filters, what the tensor cores of Hopper multiply at once: with the softmax of every row known,
    its columns may be apart. Fewer where rows are channels, which spilled when compiled for sm_80 and sm_100, there in
    four warps still, and where responses have addresses of their own for all that is known of their rows.
    """
    rows, columns = {FILTERS.value: (64, 64), CHANNELS.value: (32, 32), MIXED.value: (16, 32)}[order]
    warps = 8 if order == CHANNELS.value and architecture >= 100 else 4
    return UnifyTile(rows, max(min(launch.power_of_two(filters), columns), 16), warps, 255)


class Softmax(NamedTuple):
    """What gradients need of every row's softmax, (B, h, w, C) float32: the largest response, times log2 e; one over
    the sum of exponentials and C; ``delta`` is the mean of the result's gradients under the softmax.
    """

    largest: Tensor
    weight: Tensor
    delta: Tensor


@triton.jit
def _place(pixel, height, width):
    """(image, y, x) of the number of a pixel."""
    return pixel // width // height, pixel // width % height, pixel % width


@triton.jit
def _at(map, b, y, x):
    """Pointer to channel 0."""
    return map.data + b.to(tl.int64) * map.stride_b + y.to(tl.int64) * map.stride_y + x.to(tl.int64) * map.stride_x


@triton.jit
def _neighbours(pixel, y, x, t, height, width, KERNEL: tl.constexpr):
    """Numbers of the pixels under taps t of the patch around a pixel, and whether they are inside the image."""
    up, right = t // KERNEL - KERNEL // 2, t % KERNEL - KERNEL // 2
    inside = (t < KERNEL * KERNEL) & (y + up >= 0) & (y + up < height) & (x + right >= 0) & (x + right < width)
    return pixel.to(tl.int64) + up.to(tl.int64) * width + right, inside


@triton.jit
def _share(y, x, height, width, KERNEL: tl.constexpr):
    """One over the number of taps inside the image."""
    rows = tl.minimum(y + KERNEL // 2, height - 1) - tl.maximum(y - KERNEL // 2, 0) + 1
    columns = tl.minimum(x + KERNEL // 2, width - 1) - tl.maximum(x - KERNEL // 2, 0) + 1
    return 1.0 / (rows * columns).to(tl.float32)


@triton.jit
def _filters(basis, m, t, COUNT: tl.constexpr, KERNEL: tl.constexpr):
    """Taps t of filters m, which are tensors of one rank."""
    inside = (m < COUNT) & (t < KERNEL * KERNEL)
    return tl.load(basis + m * (KERNEL * KERNEL) + t, mask=inside, other=0.0)


@triton.jit
def _patches(features, pixel, y, x, c, exist, t, channels, height, width, KERNEL: tl.constexpr):
    """Taps t of the patches of channels c of a pixel, which are tensors of one rank; 0 outside the image."""
    at, inside = _neighbours(pixel, y, x, t, height, width, KERNEL)
    return tl.load(features + at * channels + c, mask=inside & exist, other=0.0)


@triton.jit
def _chunk(chunk, channels, COUNT: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr):
    """Rows, or channels, of a chunk, which exist, and the first of their product."""
    if ORDER == FILTERS:
        PARTS: tl.constexpr = (COUNT + ROWS - 1) // ROWS
        first = chunk // PARTS * COUNT
        own = chunk % PARTS * ROWS + tl.arange(0, ROWS)
        return first + own, own < COUNT, first
    own = chunk * ROWS + tl.arange(0, ROWS)
    return own, own < channels, chunk * 0


@triton.jit
def _responses(features, basis, scale, pixel, y, x, rows, exist, first, channels, height, width,
               COUNT: tl.constexpr, ORDER: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``scale`` times the correlations of some rows of a pixel, (ROWS, COLUMNS); -inf in columns that do not exist."""
    i = tl.arange(0, COLUMNS)
    responses = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if ORDER == MIXED:
        flat = i[None, :] * channels + rows[:, None]
        c, m = flat // COUNT, flat % COUNT
        used = exist[:, None] & (i < COUNT)[None, :]
        t = pixel * 0
        while t < KERNEL * KERNEL:
            weights = tl.load(basis + m * (KERNEL * KERNEL) + t, mask=used, other=0.0) * scale
            patches = _patches(features, pixel, y, x, c, used, t, channels, height, width, KERNEL)
            responses += patches.to(tl.float32) * weights
            t += 1
    else:
        for start in tl.static_range(0, KERNEL * KERNEL, TAPS):
            t = start + tl.arange(0, TAPS)
            if ORDER == FILTERS:
                weights = _filters(basis, (rows - first)[:, None], t[None, :], COUNT, KERNEL) * scale
                patches = _patches(
                    features, pixel, y, x, (first + i)[None, :], (i < COUNT)[None, :], t[:, None],
                    channels, height, width, KERNEL,
                )  # fmt: skip
                responses = product(weights, patches, responses, PRECISION)
            else:
                weights = _filters(basis, i[None, :], t[:, None], COUNT, KERNEL) * scale
                patches = _patches(
                    features, pixel, y, x, rows[:, None], exist[:, None], t[None, :], channels, height, width, KERNEL
                )
                responses = product(patches, weights, responses, PRECISION)
    if COLUMNS > COUNT:
        responses = tl.where((i < COUNT)[None, :], responses, float("-inf"))
    return responses


@kernel(do_not_specialize=["height", "width"])
def _feature_unify(features, basis, out, grad, softmax, channels, chunks, height, width,
                   COUNT: tl.constexpr, ORDER: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
                   LONG: tl.constexpr):  # fmt: skip
    """The layer at one pixel; with ``grad`` instead what its gradients need of every row's softmax."""
    pixel = tl.program_id(0)
    b, y, x = _place(pixel, height, width)
    i = tl.arange(0, COLUMNS)
    # Exponentials are powers of two.
    scale = _share(y, x, height, width, KERNEL) * LOG2_E
    if grad is not None:
        grads = _at(grad, b, y, x) + i.to(tl.int64) * grad.stride_c
        upstream = tl.load(grads, mask=i < COUNT, other=0.0).to(tl.float32)
    sums_before = tl.zeros((ROWS // 16, 8, COLUMNS), dtype=tl.float32)
    sums = tl.zeros((ROWS // 16, 8, COLUMNS), dtype=tl.float32)
    chunk = pixel * 0
    while chunk < chunks:
        rows, exist, first = _chunk(chunk, channels, COUNT, ORDER, ROWS)
        responses = _responses(
            features, basis, scale, pixel, y, x, rows, exist, first, channels, height, width,
            COUNT, ORDER, KERNEL, TAPS, ROWS, COLUMNS, PRECISION,
        )  # fmt: skip
        largest = tl.max(responses, axis=1)
        mass = tl.exp2(responses - largest[:, None])
        total = tl.sum(mass, axis=1)
        weight = tl.where(exist, 1.0 / (total * channels), 0.0)
        chunk += 1
        if grad is None:
            shares = mass * weight[:, None]
            # A thread has rows i and i + 8 of a product's result.
            sums += tl.sum(tl.reshape(shares, (ROWS // 16, 2, 8, COLUMNS)), axis=1)
            if LONG and chunk % SHORT_SUM == 0:
                sums_before += sums
                sums = tl.zeros((ROWS // 16, 8, COLUMNS), dtype=tl.float32)
        else:
            at = pixel.to(tl.int64) * channels + rows
            tl.store(softmax.largest + at, largest, mask=exist)
            tl.store(softmax.weight + at, weight, mask=exist)
            tl.store(softmax.delta + at, tl.sum(mass * upstream[None, :], axis=1) / total, mask=exist)
    if grad is None:
        # Float32 would lose the digits that AnyUp multiplies.
        mean = tl.sum(tl.reshape(sums_before + sums, (ROWS // 2, COLUMNS)).to(tl.float64), axis=0)
        tl.store(
            _at(out, b, y, x) + i.to(tl.int64) * out.stride_c,
            mean.to(tl.float32).to(out.data.dtype.element_ty),
            mask=i < COUNT,
        )


@triton.jit
def _own_taps(KERNEL: tl.constexpr, TAPS: tl.constexpr):
    """Those of the program; where one has them all, those that its responses are made of, which are read once."""
    t = tl.arange(0, TAPS)
    if KERNEL * KERNEL > TAPS:
        t += tl.program_id(1) * TAPS
    return t


@triton.jit
def _response_gradients(features, basis, grad, softmax, scale, pixel, b, y, x, rows, exist, first, m, channels,
                        height, width,
                        COUNT: tl.constexpr, ORDER: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of the correlations of some channels with filters m at one pixel; ``scale`` as for responses."""
    responses = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in tl.static_range(0, KERNEL * KERNEL, TAPS):
        t = begin + tl.arange(0, TAPS)
        weights = _filters(basis, m[None, :], t[:, None], COUNT, KERNEL) * scale
        patches = _patches(
            features, pixel, y, x, rows[:, None], exist[:, None], t[None, :], channels, height, width, KERNEL
        )
        responses = product(patches, weights, responses, PRECISION)
    used = exist[:, None] & (m < COUNT)[None, :]
    # Row and column of every response, as far as they differ.
    if ORDER == CHANNELS:
        row, row_exists, column, column_exists = rows[:, None], exist[:, None], m[None, :], (m < COUNT)[None, :]
    elif ORDER == FILTERS:
        row, row_exists = (first + m)[None, :], (m < COUNT)[None, :]
        column, column_exists = (rows - first)[:, None], exist[:, None]
    else:
        flat = rows[:, None] * COUNT + m[None, :]
        row, row_exists, column, column_exists = flat % channels, used, flat // channels, used
    start = pixel.to(tl.int64) * channels
    largest = tl.load(softmax.largest + start + row, mask=row_exists, other=0.0)
    weight = tl.load(softmax.weight + start + row, mask=row_exists, other=0.0) * (scale / LOG2_E)
    delta = tl.load(softmax.delta + start + row, mask=row_exists, other=0.0)
    pointers = _at(grad, b, y, x) + column.to(tl.int64) * grad.stride_c
    upstream = tl.load(pointers, mask=column_exists, other=0.0).to(tl.float32)
    gradients = tl.exp2(responses - largest) * weight * (upstream - delta)
    if COUNT % COLUMNS != 0 or ORDER == MIXED:
        # The largest response of a row is no bound of one that does not exist.
        gradients = tl.where(used, gradients, 0.0)
    return gradients


@kernel(do_not_specialize=["height", "width", "begin"])
def _feature_unify_grad_patches(features, basis, grad, softmax, result, channels, chunks, height, width, begin,
                                COUNT: tl.constexpr, ORDER: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
                                ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of taps of the patches of some channels at one pixel from ``begin`` on, ``result`` (pixels, K K, C)."""
    t = _own_taps(KERNEL, TAPS)
    own = tl.program_id(0) // chunks
    pixel = begin + own
    rows, exist, first = _chunk(tl.program_id(0) % chunks, channels, COUNT, ORDER, ROWS)
    b, y, x = _place(pixel, height, width)
    scale = _share(y, x, height, width, KERNEL) * LOG2_E
    sums = tl.zeros((ROWS, TAPS), dtype=tl.float32)
    for start in tl.static_range(0, COUNT, COLUMNS):
        m = start + tl.arange(0, COLUMNS)
        gradients = _response_gradients(
            features, basis, grad, softmax, scale, pixel, b, y, x, rows, exist, first, m, channels, height, width,
            COUNT, ORDER, KERNEL, TAPS, ROWS, COLUMNS, PRECISION,
        )  # fmt: skip
        weights = _filters(basis, m[None, :], t[:, None], COUNT, KERNEL) * scale
        sums = product(gradients, tl.trans(weights), sums, PRECISION)
    pointers = result + (own.to(tl.int64) * (KERNEL * KERNEL) + t)[None, :] * channels + rows[:, None]
    tl.store(pointers, sums * (1.0 / scale), mask=exist[:, None] & (t < KERNEL * KERNEL)[None, :])


@kernel(do_not_specialize=["height", "width", "begin", "end"])
def _feature_unify_grad_basis(features, basis, grad, softmax, result, channels, chunks, height, width, begin, end,
                              COUNT: tl.constexpr, ORDER: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
                              ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
                              RUN: tl.constexpr):  # fmt: skip
    """What some channels of a run of the pixels from ``begin`` to ``end`` give to the gradient of some taps of some
    filters, ``result`` (runs and chunks of channels, M, K K).
    """
    PARTS: tl.constexpr = (COUNT + COLUMNS - 1) // COLUMNS
    t = _own_taps(KERNEL, TAPS)
    m = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    own = tl.program_id(0) // PARTS
    rows, exist, first = _chunk(own % chunks, channels, COUNT, ORDER, ROWS)
    pixel = begin + own // chunks * RUN
    last = tl.minimum(pixel + RUN, end)
    sums = tl.zeros((COLUMNS, TAPS), dtype=tl.float32)
    while pixel < last:
        b, y, x = _place(pixel, height, width)
        scale = _share(y, x, height, width, KERNEL) * LOG2_E
        gradients = _response_gradients(
            features, basis, grad, softmax, scale, pixel, b, y, x, rows, exist, first, m, channels, height, width,
            COUNT, ORDER, KERNEL, TAPS, ROWS, COLUMNS, PRECISION,
        )  # fmt: skip
        patches = _patches(
            features, pixel, y, x, rows[:, None], exist[:, None], t[None, :], channels, height, width, KERNEL
        )
        sums = product(tl.trans(gradients), patches, sums, PRECISION)
        pixel += 1
    pointers = result + (own.to(tl.int64) * COUNT + m)[:, None] * (KERNEL * KERNEL) + t[None, :]
    tl.store(pointers, sums, mask=(m < COUNT)[:, None] & (t < KERNEL * KERNEL)[None, :])


@kernel(do_not_specialize=["height", "width", "begin", "end", "start"])
def _gather_patches(taps, result, channels, height, width, begin, end, start, KERNEL: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """Adds to ``result`` (pixels, C) of the pixels from ``start`` on what the patches that hold them give, in the order
    of the taps; those of the pixels from ``begin`` to ``end`` exist.
    """
    c_tiles = tl.cdiv(channels, BLOCK)
    pixel = start + tl.program_id(0) // c_tiles
    b, y, x = _place(pixel, height, width)
    c = tl.program_id(0) % c_tiles * BLOCK + tl.arange(0, BLOCK)
    at = result + pixel.to(tl.int64) * channels + c
    total = tl.load(at, mask=c < channels, other=0.0)
    t = pixel * 0
    while t < KERNEL * KERNEL:
        # Tap t of the patch at q holds the pixel.
        row, column = y - t // KERNEL + KERNEL // 2, x - t % KERNEL + KERNEL // 2
        q = (b * height + row) * width + column
        if (row >= 0) & (row < height) & (column >= 0) & (column < width) & (q >= begin) & (q < end):
            place = ((q - begin).to(tl.int64) * (KERNEL * KERNEL) + t) * channels
            total += tl.load(taps + place + c, mask=c < channels, other=0.0)
        t += 1
    tl.store(at, total, mask=c < channels)


def feature_unify(features: Tensor, basis: Tensor, released: bool, out: Tensor) -> None:
    """``out`` (B, M, h, w) of the ``features`` (B, C, h, w) and the ``basis`` (M, 1, K, K), float32; see the op."""
    batch, channels, height, width = features.shape
    order = _order(features, basis, released)
    tile = unify_tile(channels, len(basis), order)
    chunks = _chunks(channels, len(basis), order, tile)
    with launch.on_device_of(out):
        _feature_unify[(batch * height * width,)](
            _pixels(features, len(basis), order), basis, map_of(out), None, None, channels,
            chunks, height, width, LONG=chunks > SHORT_SUM.value, **_options(basis, order, tile)
        )  # fmt: skip


def feature_unify_backward(
    grad: Tensor, features: Tensor, basis: Tensor, released: bool, shares: int, results: list[Tensor]
) -> None:
    """``results``: gradients of features and (float32) basis; an empty one is not wanted."""
    batch, channels, height, width = features.shape
    filters, area = len(basis), basis.shape[-1] ** 2
    order = _order(features, basis, released)
    pixels = _pixels(features, filters, order)
    softmax = Softmax(*(pixels.new_empty(pixels.shape, dtype=torch.float32) for _ in range(3)))
    of_features = pixels.new_zeros(pixels.shape, dtype=torch.float32) if results[0].numel() else None
    of_basis = basis.new_zeros(basis.shape, dtype=torch.float64) if results[1].numel() else None
    with launch.on_device_of(grad):
        tile = unify_tile(channels, filters, order)
        _feature_unify[(batch * height * width,)](
            pixels, basis, None, map_of(grad), softmax, channels, _chunks(channels, filters, order, tile), height,
            width, LONG=False, **_options(basis, order, tile)
        )  # fmt: skip
        tile = gradients_tile(filters, order, launch.architecture(features.device))
        chunks = _chunks(channels, filters, order, tile)
        inputs, options = (pixels, basis, map_of(grad), softmax), _options(basis, order, tile)
        tap_parts = launch.cdiv(area, options["TAPS"])
        of_a_pixel = channels if of_features is not None else chunks * filters // RUN
        for band in folded.bands(batch, height, width * of_a_pixel * area * 4, 1):
            begin = (band.image * height + band.row) * width
            end = begin + band.images * band.rows * width
            if of_features is not None:
                patches = pixels.new_empty((end - begin, area, channels), dtype=torch.float32)
                _feature_unify_grad_patches[((end - begin) * chunks, tap_parts)](
                    *inputs, patches, channels, chunks, height, width, begin, **options
                )
                _gather(patches, of_features, begin, end, basis.shape[-1])
            if of_basis is not None:
                runs = launch.cdiv(end - begin, RUN)
                parts = basis.new_empty((runs * chunks, filters, area))
                _feature_unify_grad_basis[(len(parts) * launch.cdiv(filters, tile.columns), tap_parts)](
                    *inputs, parts, channels, chunks, height, width, begin, end, RUN=RUN, **options
                )
                of_basis += parts.sum(0, dtype=torch.float64).reshape(basis.shape)
    if of_features is not None:
        if order == FILTERS.value:
            of_features = of_features.unflatten(3, (-1, filters)).transpose(3, 4).flatten(3)
        results[0].copy_(of_features.permute(0, 3, 1, 2))
    if of_basis is not None:
        results[1].copy_(of_basis)


def _gather(taps: Tensor, result: Tensor, begin: int, end: int, kernel: int) -> None:
    """Of a band of pixels, which is rows of one image or images: the rows whose pixels its patches hold."""
    _, height, width, channels = result.shape
    margin = kernel // 2 * width
    image = begin // (height * width) * height * width
    start = max(begin - margin, image)
    stop = min(end + margin, launch.cdiv(end, height * width) * height * width)
    block = min(launch.power_of_two(channels), 512)
    _gather_patches[((stop - start) * launch.cdiv(channels, block),)](
        taps, result, channels, height, width, begin, end, start, KERNEL=kernel, BLOCK=block
    )  # fmt: skip


def _order(features: Tensor, basis: Tensor, released: bool) -> int:
    if not released:
        return CHANNELS.value
    return MIXED.value if features.shape[1] % len(basis) else FILTERS.value


def _pixels(features: Tensor, filters: int, order: int) -> Tensor:
    """(B, h, w, C), contiguous; the channels of a remainder beside each other."""
    pixels = features.permute(0, 2, 3, 1)
    if order == FILTERS.value:
        pixels = pixels.unflatten(3, (filters, -1)).transpose(3, 4)
    return pixels.contiguous().flatten(3)


def _chunks(channels: int, filters: int, order: int, tile: UnifyTile) -> int:
    """Chunks of ``tile.rows`` rows, none of which is in two products."""
    if order == FILTERS.value:
        return channels // filters * launch.cdiv(filters, tile.rows)
    return launch.cdiv(channels, tile.rows)


def _options(basis: Tensor, order: int, tile: UnifyTile) -> dict:
    return {
        "COUNT": len(basis),
        "ORDER": order,
        "KERNEL": basis.shape[-1],
        "TAPS": max(min(launch.power_of_two(basis.shape[-1] ** 2), 32), 16),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "PRECISION": launch.dot_precision(),
        "num_warps": tile.warps,
        "maxnreg": tile.registers,
    }
