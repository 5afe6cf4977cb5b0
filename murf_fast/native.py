"""The C++ extension: the only file that touches it. Arguments have been checked by the ops; nothing is allocated here
but channels_last or planar copies of low-resolution maps whose strides a kernel cannot walk, and scratch memory.

A kernel is given addresses. They are taken where a tensor of another dtype, device or shape than the kernel will walk
is refused (:func:`_address`, :func:`_dense`, :func:`_strided`, :func:`_rows`, :class:`_maps`): the last word, after the
contract of the op (murf_fast/ops/_contract.py), and the first about scratch memory.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.tables.folded import FoldedAxis
from murf_fast.tables.moments import join
from murf_fast.tables.query_blocks import blocks_of
from murf_fast.tables.resize import AxisTable

Axes = list[tuple[AxisTable, AxisTable]]
Folded = tuple[FoldedAxis, FoldedAxis]

# Bytes from which a result is worth a system call about its pages.
_LARGE = 8 << 20
# Pixels whose statistics are summed apart: a multiple of every level's tiles, enough parts for many threads. The sums
# must not depend on the threads.
PIXEL_CHUNK = 1536
# Bytes of per-pixel kernels that a joint bilateral upsampling holds at a time: few calls, and little beside its result.
_KERNEL_BYTES = 16 << 20
_LABELS = (torch.uint8, torch.int16, torch.int32)


def upsample_concat(features: list[Tensor], axes: Axes, out: Tensor) -> None:
    _prefer_huge_pages(out)
    if _is_channels_last(out):
        maps = _maps(features, axes, channels_last=True)
        module().upsample_concat(_dtype(out), maps.tuples, tuple(out.shape), _dense(out, maps.dtype), _fork.threads())
        return
    begin = 0
    for feature, pair in zip(features, axes, strict=True):
        _sum_planar([feature], [pair], None, out[:, begin : begin + feature.shape[1]])
        begin += feature.shape[1]


def upsample_sum(features: list[Tensor], axes: Axes, bias: Tensor | None, out: Tensor) -> None:
    _prefer_huge_pages(out)
    if not _is_channels_last(out):
        _sum_planar(features, axes, bias, out)
        return
    maps = _maps(features, axes, channels_last=True)
    shape = out.shape
    address = _dense(out, maps.dtype)
    module().upsample_sum(
        _dtype(out), maps.tuples, shape, _bias(bias, shape), address, True, out.stride(0), _fork.threads()
    )


def resize_adjoint(grad: Tensor, axes: tuple[AxisTable, AxisTable], out: Tensor) -> None:
    channels_last = _is_channels_last(out)
    maps = _maps([grad], [axes], channels_last)
    _same_shape(out, (*grad.shape[:2], axes[0].in_size, axes[1].in_size))
    address = _dense(out, maps.dtype)
    module().resize_adjoint(_dtype(out), maps.tuples[0], out.shape[0], address, channels_last, _fork.threads())


def upsample_argmax(
    features: list[Tensor], axes: Axes, bias: Tensor | None, labels: Tensor, values: Tensor | None
) -> None:
    maps = _maps(features, axes, channels_last=True)
    shape, pixels = _shape(features, labels), labels.numel()
    if labels.dtype not in _LABELS:
        raise TypeError(f"murf_fast: labels must be uint8, int16 or int32 for a kernel, got {labels.dtype}")
    module().upsample_argmax(
        _dtype(features[0]),
        maps.tuples,
        shape,
        _bias(bias, shape),
        labels.element_size(),
        _address(labels, labels.dtype, pixels),
        _address(values, maps.dtype, pixels),
        _fork.threads(),
    )


def upsample_expectation(
    features: list[Tensor], axes: Axes, bias: Tensor | None, values: Tensor, softmax: bool, out: Tensor
) -> None:
    maps = _maps(features, axes, channels_last=True)
    shape = _shape(features, out)
    module().upsample_expectation(
        _dtype(features[0]),
        maps.tuples,
        shape,
        _bias(bias, shape),
        _address(values, torch.float32, shape[1]),
        softmax,
        _address(out, torch.float32, out.numel()),
        _fork.threads(),
    )


def upsample_expectation_backward(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    values: Tensor,
    softmax: bool,
    grad_out: Tensor,
    gradients: list[Tensor],
    row_value_gradients: Tensor | None,
) -> None:
    maps = _maps(features, axes, channels_last=True)
    shape = _shape(features, grad_out)
    module().upsample_expectation_backward(
        _dtype(features[0]),
        maps.tuples,
        shape,
        _bias(bias, shape),
        _address(values, torch.float32, shape[1]),
        softmax,
        _address(grad_out, torch.float32, grad_out.numel()),
        _pixel_gradients(features, gradients),
        _address(row_value_gradients, torch.float32, shape[0] * shape[1] * shape[2]),
        _fork.threads(),
    )


def upsample_cross_entropy(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    loss: Tensor,
    lse: Tensor,
) -> None:
    maps = _maps(features, axes, channels_last=True)
    shape, pixels = _shape(features, target), target.numel()
    module().upsample_cross_entropy(
        _dtype(features[0]),
        maps.tuples,
        shape,
        _bias(bias, shape),
        _cross_entropy(target, weight, shape, ignore_index, label_smoothing),
        _address(loss, torch.float32, pixels),
        _address(lse, torch.float32, 2 * pixels),
        _fork.threads(),
    )


def upsample_cross_entropy_backward(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    lse: Tensor,
    grad_loss: Tensor,
    gradients: list[Tensor],
) -> None:
    maps = _maps(features, axes, channels_last=True)
    shape, pixels = _shape(features, target), target.numel()
    module().upsample_cross_entropy_backward(
        _dtype(features[0]),
        maps.tuples,
        shape,
        _bias(bias, shape),
        _cross_entropy(target, weight, shape, ignore_index, label_smoothing),
        _address(lse, torch.float32, 2 * pixels),
        _address(grad_loss, torch.float32, pixels),
        _pixel_gradients(features, gradients),
        _fork.threads(),
    )


def image_to_patches(
    image: Tensor,
    axes: tuple[AxisTable, AxisTable],
    patch_size: int,
    gain: tuple[float, float, float],
    offset: tuple[float, float, float],
    channels_first: bool,
    out: Tensor,
) -> None:
    """``image`` is a (B, 3, H, W) view; ``out`` (B, rows, 3 p p) may have any batch and row stride."""
    _prefer_huge_pages(out)
    image = image if image.stride(3) == 1 or image.stride()[1::2] == (1, 3) else image.contiguous()
    y, x = axes
    batch, height, width = image.shape[0], y.in_size, x.in_size
    is_uint8 = image.dtype == torch.uint8
    patches = (y.out_size // patch_size) * (x.out_size // patch_size)
    _same_shape(out, (batch, patches, 3 * patch_size**2))
    if out.stride(2) != 1:
        raise ValueError(f"murf_fast: rows of patches must be contiguous for a kernel, got strides {out.stride()}")
    module().image_to_patches(
        is_uint8,
        _dtype(out) if is_uint8 else _dtype(image),
        _dtype(out),
        (_strided(image, image.dtype, (batch, 3, height, width))[0], (batch, height, width), tuple(image.stride())),
        y.native,
        x.native,
        (patch_size, out.stride(0), out.stride(1), channels_first, gain, offset),
        _strided(out, out.dtype)[0],
        _fork.threads(),
    )


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_y: Tensor | None,
    bias_x: Tensor | None,
    rule: tuple[str, str],
    heads: int,
    mean: bool,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _prefer_huge_pages(out)
    attention = _attention(q, k, v, bias_y, bias_x, rule, heads, mean, scale)
    grid = tuple(q.shape[2:])
    module().window_attention(
        _dtype(q),
        attention,
        _strided(out, q.dtype, (len(q), v.shape[1], *grid)),
        _address(lse, torch.float32, len(q) * heads * grid[0] * grid[1]),
        _fork.threads(),
    )


def window_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_y: Tensor | None,
    bias_x: Tensor | None,
    rule: tuple[str, str],
    heads: int,
    mean: bool,
    scale: float,
    shares: int,
    results: list[Tensor],
) -> None:
    """``results``: gradients of q, k, v and the biases; an empty one is not wanted. Bias gradients come for both."""
    parts = []
    for bias, result in zip((bias_y, bias_x), results[3:], strict=True):
        parts.append(q.new_empty((q.shape[0] * shares, *bias.shape), dtype=torch.float32) if result.numel() else None)
    grid = tuple(q.shape[2:])
    module().window_attention_backward(
        _dtype(q),
        _attention(q, k, v, bias_y, bias_x, rule, heads, mean, scale),
        _strided(grad_out, q.dtype, (len(q), v.shape[1], *grid)),
        _address(grad_lse, torch.float32, len(q) * heads * grid[0] * grid[1]),
        tuple(_wanted(result, x) for result, x in zip(results, (q, k, v))),  # noqa: B905 (biases follow)
        tuple(_address(p, torch.float32, 0) for p in parts),
        shares,
        _fork.threads(),
    )
    for part, result in zip(parts, results[3:], strict=True):
        if part is not None:
            result.copy_(part.sum(0))


def feature_unify(features: Tensor, basis: Tensor, released: bool, out: Tensor) -> None:
    shape = (len(features), len(basis), *features.shape[2:])
    module().feature_unify(
        _dtype(features), _unify(features, basis, released), _strided(out, features.dtype, shape), _fork.threads()
    )


def feature_unify_backward(
    grad: Tensor, features: Tensor, basis: Tensor, released: bool, shares: int, results: list[Tensor]
) -> None:
    """``results``: gradients of features and basis; an empty one is not wanted."""
    parts = basis.new_empty((len(features) * shares, *basis.shape)) if results[1].numel() else None
    module().feature_unify_backward(
        _dtype(features),
        _unify(features, basis, released),
        _strided(grad, features.dtype, (len(features), len(basis), *features.shape[2:])),
        _wanted(results[0], features),
        _address(parts, torch.float32, 0),
        shares,
        _fork.threads(),
    )
    if parts is not None:
        results[1].copy_(parts.sum(0))


def pixel_linear(
    x: Tensor,
    out: Tensor,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    unit_eps: float | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """See :mod:`murf_fast.ops._pixel_linear`; float32 only."""
    _prefer_huge_pages(out)
    (pixels, channels), inputs, single = out.shape, x.shape[1], torch.float32
    chunks = -(-pixels // PIXEL_CHUNK)
    parts = empty((chunks, 2, channels), torch.float64) if statistics else None
    gain, shift = norm or (None, None)
    rows, columns = rotation or (None, None)
    width = 0 if columns is None else len(columns)
    if weight is None and inputs != channels:
        raise ValueError(f"murf_fast: without a weight a layer keeps its {inputs} channels, got {channels}")
    layer = (
        (pixels, inputs, channels, PIXEL_CHUNK, width),
        *_strided(x, single, (pixels, inputs)),
        _address(gain, single, inputs),
        _address(shift, single, inputs),
        (unit_eps is not None, unit_eps or 0.0),
        _address(weight, single, inputs * channels),
        _address(bias, single, channels),
        _address(residual, single, pixels * channels),
        _address(rows, single, pixels // max(width, 1) * 2 * channels),
        _address(columns, single, width * 2 * channels),
        _address(out, single, pixels * channels),
        _address(parts, torch.float64, chunks * 2 * channels),
    )
    module().pixel_linear(layer, _fork.threads())
    return None if parts is None else join(parts, PIXEL_CHUNK, pixels)


def nearest_index(bank: Tensor, cosine: bool, precision: str, device: torch.device) -> list[Tensor]:
    """The prepared bank; the device is the bank's."""
    from murf_fast import _nearest

    with _fork.calling_thread_only():
        return _nearest.prepare(bank, cosine, precision)


def index_layout(rows: int, dim: int) -> tuple[list, list]:
    """(dtype, shape) that the low-precision rows of an index may have, and (shape, dtype) of what follows them."""
    from murf_fast import _nearest

    return _nearest.layout(rows, dim)


def nearest_distance(
    query: Tensor, bank: Tensor, index: list[Tensor], k: int, metric: str, distances: Tensor, indices: Tensor
) -> None:
    from murf_fast import _nearest

    _nearest.search(query, bank, index, k, metric, distances, indices)


def has_bf16_products() -> bool:
    """Whether this processor multiplies matrices in bfloat16 faster than in float32."""
    return module().has_bf16_products()


def nearest_prepare(x: Tensor, mean: Tensor | None, scale: Tensor, out: Tensor, role: str) -> tuple[Tensor, Tensor]:
    """``out = x * scale - mean`` rounded, with the columns of ``role``; returns squared norms and errors of the rows.

    An empty ``scale`` stands for ones.
    """
    rows, dim = x.shape
    squares, errors = empty((rows,), torch.float64), empty((rows,), torch.float64)
    width = dim if role == "plain" else dim + 6
    if out.ndim != 2 or len(out) != rows or out.shape[1] < width:
        raise ValueError(f"murf_fast: prepared rows must be ({rows}, {width} or more), got {tuple(out.shape)}")
    module().nearest_prepare(
        _rows(x, scale),
        _address(mean, torch.float32, dim),
        _dtype(out),
        _address(out, out.dtype, out.numel()),
        out.stride(0),
        getattr(module().NearestRole, role),
        _address(squares, torch.float64, rows),
        _address(errors, torch.float64, rows),
        _fork.threads(),
    )
    return squares, errors


class NearestState:
    """What a search knows about its queries: candidates, upper bounds, exact distances; see csrc/types.h."""

    def __init__(self, queries: int, k: int, capacity: int) -> None:
        self.k, self.capacity = k, capacity
        self.tensors = [
            empty((queries, width), dtype).zero_() if dtype == torch.int32 else empty((queries, width), dtype)
            for dtype, width in self._arrays
        ]

    @property
    def _arrays(self) -> tuple[tuple[torch.dtype, int], ...]:
        """Dtype and entries per query, in the order of the struct; 32-bit integers are counts."""
        count = (torch.int32, 1)
        candidates = ((torch.float32, self.capacity), (torch.int64, self.capacity), count)
        bounds, exact = (torch.float32, self.k), ((torch.float64, self.k), (torch.int64, self.k))
        return (*candidates, bounds, count, *exact, count)

    def part(self, rows: slice) -> NearestState:
        part = NearestState.__new__(NearestState)
        part.k, part.capacity, part.tensors = self.k, self.capacity, [t[rows] for t in self.tensors]
        return part

    def native(self, queries: int) -> tuple:
        """For the kernels, which walk so many queries."""
        addresses = tuple(
            _address(t, dtype, queries * width) for t, (dtype, width) in zip(self.tensors, self._arrays, strict=True)
        )
        return self.k, self.capacity, addresses


def nearest_scan(
    product: Tensor,
    first: int,
    queries: tuple[Tensor, Tensor],
    block: tuple[float, float],
    absolute: float,
    relative: float,
    query: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor],
    state: NearestState,
) -> None:
    """Reduces a block of products to candidates. ``queries``: errors, squared norms; ``block``: the largest of each."""
    errors, squares = queries
    count, columns = len(query[0]), product.shape[1]
    if first + columns > len(bank[0]):
        raise ValueError(f"murf_fast: products end at row {first + columns} of a bank of {len(bank[0])}")
    module().nearest_scan(
        _dtype(product),
        _rows(product)[0],
        (
            product.stride(0),
            first,
            columns,
            _address(errors, torch.float64, count),
            _address(squares, torch.float64, count),
            *block,
            absolute,
            relative,
        ),
        _rows(*query),
        _rows(*bank),
        state.native(max(count, len(product))),
        _fork.threads(),
    )


def nearest_finish(
    query: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor],
    state: NearestState,
    metric: str,
    distances: Tensor,
    indices: Tensor,
) -> None:
    count = len(query[0])
    module().nearest_finish(
        _rows(*query),
        _rows(*bank),
        state.native(count),
        getattr(module().NearestMetric, metric),
        _address(distances, torch.float32, count * state.k),
        _address(indices, torch.int64, count * state.k),
        _fork.threads(),
    )


def k_center_greedy(features: Tensor, centers: Tensor, given: int, progress) -> None:
    from murf_fast import _k_center

    with _fork.calling_thread_only():
        _k_center.select(features, centers, given, progress)


class KCenterCodes:
    """Rows as eight-bit codes around their mean, with scales, squared norms and errors; see csrc/types.h."""

    def __init__(self, features: Tensor) -> None:
        rows, dim = features.shape
        mean = sum(part.sum(0, dtype=torch.float64) for part in features.split(4096)).div(rows).float()
        self.codes = empty((rows, (dim + 63) // 64 * 64), torch.int8)
        self.numbers = empty((3, rows), torch.float64)
        module().k_center_encode(
            _rows(features), _address(mean, torch.float32, dim), self.native(features), _fork.threads()
        )

    def native(self, features: Tensor) -> tuple:
        """For the kernels, which walk the codes of these rows."""
        (rows, dim), width = features.shape, self.codes.shape[1]
        if width < dim:
            raise ValueError(f"murf_fast: codes of {width} columns stand for no rows of {dim}")
        numbers = (_address(row, torch.float64, rows) for row in self.numbers)
        return _address(self.codes, torch.int8, rows * width), width, *numbers


def k_center_steps(
    features: Tensor, codes: KCenterCodes, nearest: Tensor, centers: Tensor, given: int, begin: int, end: int
) -> None:
    """Steps ``begin`` to ``end``: takes in ``centers[step]`` and, beyond the ``given`` ones, finds the next."""
    module().k_center_steps(
        _rows(features),
        codes.native(features),
        _address(nearest, torch.float64, len(features)),
        _address(centers, torch.int64, max(end + 1, given)),
        given,
        begin,
        end,
        _fork.threads(),
    )


def stream_fill(out: Tensor) -> None:
    """Fills a dense float32 tensor with ones past the caches: the write rate that results are measured against."""
    module().stream_fill(_address(out, torch.float32, 0), out.numel() * out.element_size(), _fork.threads())


class _maps:
    """The extension's view of low-resolution maps; keeps copies alive until the call is over."""

    def __init__(self, features: list[Tensor], axes: Axes, channels_last: bool):
        walkable = _channels_contiguous if channels_last else _rows_contiguous
        self.tensors = [walkable(f) for f in features]
        self.dtype = dtype = features[0].dtype
        self.tuples = []
        for f, (y, x) in zip(self.tensors, axes, strict=True):
            if f.dtype is not dtype or not f.is_cpu:
                _refuse(f, dtype, "any")
            self.tuples.append((f.data_ptr() or _no_memory(f), f.shape, f.stride(), y.native, x.native))


def _channels_contiguous(x: Tensor) -> Tensor:
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _sum_planar(features: list[Tensor], axes: Axes, bias: Tensor | None, out: Tensor) -> None:
    maps = _maps(features, axes, channels_last=False)
    shape = out.shape
    if out.dtype is not maps.dtype or not out.is_cpu or not (out.is_contiguous() or out[:1].is_contiguous()):
        _refuse(out, maps.dtype, "contiguous images")
    module().upsample_sum(
        _dtype(out),
        maps.tuples,
        shape,
        _bias(bias, shape),
        out.data_ptr() or _no_memory(out),
        False,
        out.stride(0),
        _fork.threads(),
    )


def _attention(q, k, v, bias_y, bias_x, rule, heads, mean, scale) -> tuple:
    (batch, depth, *grid), (*_, height, width), single = q.shape, k.shape, torch.float32
    rows, columns = blocks_of(*rule, tuple(grid), (height, width))
    return (
        (batch, heads, depth // heads, v.shape[1]),
        mean,
        scale,
        _strided(q, q.dtype, (batch, depth, rows.out_size, columns.out_size)),
        _strided(k, q.dtype, (batch, depth, rows.in_size, columns.in_size)),
        _strided(v, q.dtype, (batch, v.shape[1], rows.in_size, columns.in_size)),
        rows.native,
        columns.native,
        _address(bias_y, single, heads * grid[0] * height),
        _address(bias_x, single, heads * grid[1] * width),
    )


def _unify(features: Tensor, basis: Tensor, released: bool) -> tuple:
    shape, kernel = tuple(features.shape), basis.shape[-1]
    filters = len(basis)
    basis = _address(basis, torch.float32, filters * kernel**2)
    return shape, filters, kernel, released, _strided(features, features.dtype), basis


def _cross_entropy(target: Tensor, weight: Tensor | None, shape: tuple, ignore_index: int, smoothing: float) -> tuple:
    pixels = shape[0] * shape[2] * shape[3]
    weights = _address(weight, torch.float32, shape[1])
    return _address(target, torch.int64, pixels), weights, ignore_index, smoothing


def _pixel_gradients(features: list[Tensor], gradients: list[Tensor]) -> list[int]:
    """float32 gradients of maps, channels_last as the kernels write them."""
    for feature, gradient in zip(features, gradients, strict=True):
        _same_shape(gradient, feature.shape)
    return [_address(g.permute(0, 2, 3, 1), torch.float32, 0) for g in gradients]


def _wanted(result: Tensor, like: Tensor) -> tuple[int, tuple[int, ...]]:
    """A gradient's strided map; zeros for one that is empty because nobody wants it."""
    return _strided(result, like.dtype, like.shape) if result.numel() else (0, (0, 0, 0, 0))


def _prefer_huge_pages(out: Tensor) -> None:
    if out.numel() * out.element_size() >= _LARGE:
        module().prefer_huge_pages(out.data_ptr(), out.numel() * out.element_size())


def _is_channels_last(out: Tensor) -> bool:
    return not out.is_contiguous()


def _shape(features: list[Tensor], full: Tensor) -> tuple[int, int, int, int]:
    batch, height, width = full.shape
    return batch, features[0].shape[1], height, width


def _bias(bias: Tensor | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """Address and batch stride of (1, C) or (B, C) for a result of this shape."""
    if bias is None:
        return 0, 0
    rows, channels = bias.shape
    if channels != shape[1] or (rows != 1 and rows != shape[0]):
        _refuse(bias, torch.float32, f"(1, {shape[1]}) or ({shape[0]}, {shape[1]})")
    return _address(bias, torch.float32, 0), channels if rows > 1 else 0


@functools.cache
def _dtypes() -> dict:
    names = module().DType
    return {torch.float32: names.f32, torch.bfloat16: names.bf16, torch.float16: names.f16}


def _dtype(x: Tensor):
    tag = _dtypes().get(x.dtype)
    if tag is None:
        raise TypeError(f"murf_fast: a kernel takes float32, bfloat16 or float16, got {x.dtype}")
    return tag


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a kernel: of a named dtype on the CPU, whatever the process's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _address(x: Tensor | None, dtype: torch.dtype, elements: int) -> int:
    """Where the dense ``x`` begins, which has so many elements or more; 0 for None."""
    if x is None:
        return 0
    if x.dtype is not dtype or not x.is_cpu or x.numel() < elements or not x.is_contiguous():
        _refuse(x, dtype, f"contiguous with {elements} elements or more")
    return x.data_ptr() or _no_memory(x)


def _dense(x: Tensor, dtype: torch.dtype) -> int:
    """Where a map begins that is dense in one of the two layouts."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    if x.dtype is not dtype or not x.is_cpu or not dense:
        _refuse(x, dtype, "contiguous or channels_last")
    return x.data_ptr() or _no_memory(x)


def _strided(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> tuple[int, tuple[int, ...]]:
    """Where ``x`` begins and its strides, which are any; ``shape`` is what the kernel walks."""
    if x.dtype is not dtype or not x.is_cpu or (shape is not None and x.shape != shape):
        _refuse(x, dtype, shape)
    return x.data_ptr() or _no_memory(x), x.stride()


def _rows(x: Tensor, scale: Tensor | None = None) -> tuple:
    """Rows as the kernels of searches take them; their entries are contiguous. An empty scale stands for ones."""
    rows, dim = x.shape
    if not x.is_cpu or x.is_neg() or (x.stride(1) != 1 and dim > 1):
        _refuse(x, x.dtype, "contiguous rows without a negative bit")
    scaled = scale is not None and scale.numel() > 0
    scales = _address(scale, torch.float64, rows) if scaled else 0
    return x.data_ptr() or _no_memory(x), _dtype(x), rows, dim, x.stride(0), scales


def _same_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        _refuse(x, x.dtype, tuple(shape))


def _no_memory(x: Tensor) -> int:
    """The address of nothing; a fake tensor has no other."""
    if x.numel():
        raise ValueError(f"murf_fast: a kernel was to be given a tensor without memory, {type(x).__name__}")
    return 0


def _refuse(x: Tensor, dtype: torch.dtype, expected: object) -> None:
    raise (TypeError if x.dtype is not dtype else ValueError)(
        f"murf_fast: a kernel was to be given {dtype} on the CPU, {expected}, and got {x.dtype} on {x.device}, shape "
        f"{tuple(x.shape)}, strides {x.stride() if x.layout is torch.strided else x.layout}"
    )


def adaptive_conv(
    source: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    axes: Folded,
    out: Tensor,
    rows: tuple[int, int] | None = None,
) -> None:
    """With ``rows``, (begin, end), that band of ``out``, whose kernels are all that ``kernels`` holds."""
    _prefer_huge_pages(out)
    (batch, channels), (y, x) = source.shape[:2], axes
    begin, end = rows or (0, y.out_size)
    module().adaptive_conv(
        _dtype(source),
        _dtype(kernels),
        _conv(source, axes, rows),
        _strided(source, source.dtype, (batch, channels, y.in_size, x.in_size)),
        _strided(kernels, _kernels_dtype(kernels, source), (batch, y.taps * x.taps, end - begin, x.out_size)),
        _address(bias, torch.float32, channels),
        _strided(out, source.dtype, (batch, channels, y.out_size, x.out_size)),
        _fork.threads(),
    )


def adaptive_conv_backward_source(grad: Tensor, kernels: Tensor, axes: Folded, out: Tensor) -> None:
    grad = _channels_contiguous(grad)  # its pixels are read once for every source row of their windows
    (batch, channels), (y, x) = grad.shape[:2], axes
    module().adaptive_conv_backward_source(
        _dtype(grad),
        _dtype(kernels),
        _conv(grad, axes),
        _strided(grad, grad.dtype, (batch, channels, y.out_size, x.out_size)),
        _strided(kernels, _kernels_dtype(kernels, grad), (batch, y.taps * x.taps, y.out_size, x.out_size)),
        _strided(out, grad.dtype, (batch, channels, y.in_size, x.in_size)),
        _fork.threads(),
    )


def adaptive_conv_backward_kernels(grad: Tensor, source: Tensor, axes: Folded, out: Tensor) -> None:
    (batch, channels), (y, x) = grad.shape[:2], axes
    module().adaptive_conv_backward_kernels(
        _dtype(source),
        _dtype(out),
        _conv(grad, axes),
        _strided(grad, source.dtype, (batch, channels, y.out_size, x.out_size)),
        _strided(source, source.dtype, (batch, channels, y.in_size, x.in_size)),
        _strided(out, _kernels_dtype(out, source), (batch, y.taps * x.taps, y.out_size, x.out_size)),
        _fork.threads(),
    )


def bilateral_kernels(
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    radius: int,
    out: Tensor,
) -> None:
    network = _bilateral(guidance, params, range_mask, fixup_mask, radius)
    _kernels_of_rows(network, guidance, (0, guidance.shape[2]), out)


def joint_bilateral_upsample(
    sources: list[Tensor],
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    radius: int,
    bias: Tensor | None,
    axes: list[Folded],
    outs: list[Tensor],
) -> None:
    """Band by band of output rows: their kernels, then every source through them."""
    network = _bilateral(guidance, params, range_mask, fixup_mask, radius)
    batch, _, height, width = guidance.shape
    row_floats = batch * width * (2 * radius + 1) ** 2
    # At least sixteen rows for every thread, and an even number: at a doubling, pairs of rows share their windows.
    band = max(-(-16 * _fork.threads() // batch), _KERNEL_BYTES // (4 * row_floats)) // 2 * 2
    band = max(2, min(band, height))
    kernels = empty((min(band, height) * row_floats,), torch.float32)
    for begin in range(0, height, band):
        rows = (begin, min(begin + band, height))
        shape = (batch, rows[1] - begin, width, (2 * radius + 1) ** 2)
        of_rows = kernels[: (rows[1] - begin) * row_floats].view(shape).permute(0, 3, 1, 2)
        _kernels_of_rows(network, guidance, rows, of_rows)
        for source, pair, out in zip(sources, axes, outs, strict=True):
            adaptive_conv(source, of_rows, bias, pair, out, rows)


def _kernels_of_rows(network: _bilateral, guidance: Tensor, rows: tuple[int, int], out: Tensor) -> None:
    batch, _, _, width = guidance.shape
    module().bilateral_kernels(
        _dtype(guidance),
        _dtype(out),
        (*network.tuple, rows),
        _strided(guidance, guidance.dtype),
        _strided(out, _kernels_dtype(out, guidance), (batch, network.taps, rows[1] - rows[0], width)),
        _fork.threads(),
    )


def bilateral_kernels_backward(
    grad: Tensor,
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    radius: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the guidance (B, G, H, W) and of the concatenated parameters, both float32."""
    network = _bilateral(guidance, params, range_mask, fixup_mask, radius)
    batch, guides, height, width = guidance.shape
    # Bands of rows sum up parameter gradients of their own; their number must not depend on that of the threads.
    bands = max(1, min(16, height // 16))
    grad_logits = empty((batch, height, network.taps, width), torch.float32)
    grad_guidance = empty((batch, height, guides, width), torch.float32)
    grad_params = empty((batch * bands, network.params.numel()), torch.float32)
    module().bilateral_kernels_backward(
        _dtype(guidance),
        _dtype(grad),
        (*network.tuple, (0, height)),
        _strided(guidance, guidance.dtype),
        _strided(grad, _kernels_dtype(grad, guidance), (batch, network.taps, height, width)),
        bands,
        _address(grad_logits, torch.float32, grad_logits.numel()),
        _address(grad_guidance, torch.float32, grad_guidance.numel()),
        _address(grad_params, torch.float32, grad_params.numel()),
        _fork.threads(),
    )
    return grad_guidance.transpose(1, 2), grad_params.sum(0)


class _bilateral:
    """The extension's view of the networks of `bilateral_kernels`; keeps copies alive until the call is over."""

    def __init__(self, guidance: Tensor, params: list[Tensor], range_mask, fixup_mask, radius: int):
        self.params = torch.cat([p.detach().reshape(-1).float() for p in params])
        self.masks = [None if m is None else m.float().contiguous() for m in (range_mask, fixup_mask)]
        batch, guides, height, width = guidance.shape
        keys, self.taps = params[3].numel(), (2 * radius + 1) ** 2
        inputs, fixup = self.taps + guides, len(params) > 6
        count = 2 + keys * (guides + 1) + keys * (keys + 1)
        count += self.taps * (inputs + 1) + self.taps * (self.taps + 1) if fixup else 0
        self.tuple = (
            (batch, height, width, guides, keys, radius),
            fixup,
            _address(self.params, torch.float32, count),
            *(_address(m, torch.float32, batch * n) for m, n in zip(self.masks, (keys, self.taps), strict=True)),
        )


def _conv(like: Tensor, axes: Folded, rows: tuple[int, int] | None = None):
    y, x = axes
    return (*like.shape[:2], y.native, x.native, rows or (0, y.out_size))


def _kernels_dtype(kernels: Tensor, maps: Tensor) -> torch.dtype:
    """Kernels have the dtype of the maps or are float32."""
    return torch.float32 if kernels.dtype is torch.float32 else maps.dtype
