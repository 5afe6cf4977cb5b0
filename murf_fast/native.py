"""The C++ extension: the only file that touches it. Arguments have been checked by the ops; nothing is allocated here
but channels_last or planar copies of low-resolution maps whose strides a kernel cannot walk.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from murf_fast.resample import AxisTable
from murf_fast.statistics import join
from murf_fast.window import FoldedAxis
from murf_fast.window_blocks import blocks_of

Axes = list[tuple[AxisTable, AxisTable]]
Folded = tuple[FoldedAxis, FoldedAxis]

# Bytes from which a result is worth a system call about its pages.
_LARGE = 8 << 20
# Pixels whose statistics are summed apart: a multiple of every level's tiles, enough parts for many threads. The sums
# must not depend on the threads.
PIXEL_CHUNK = 1536
# Bytes of per-pixel kernels that a joint bilateral upsampling holds at a time: few calls, and little beside its result.
_KERNEL_BYTES = 16 << 20


@functools.cache
def _load():
    try:
        from murf_fast import _native
    except ImportError as error:
        return None, str(error)
    return _native, None


def module():
    """The extension; raises ImportError with the reason when it is missing."""
    extension, error = _load()
    if extension is None:
        raise ImportError(f"murf_fast: the C++ extension is missing: {error}")
    return extension


def load_error() -> str | None:
    return _load()[1]


def current_level() -> str:
    """Instruction-set level in use: the best one, or the one that MURF_FAST_CPU names."""
    return module().current_level()


def available_levels() -> list[str]:
    return module().available_levels()


def upsample_concat(features: list[Tensor], axes: Axes, out: Tensor) -> None:
    _prefer_huge_pages(out)
    if _is_channels_last(out):
        maps = _maps(features, axes, channels_last=True)
        module().upsample_concat(_dtype(out), maps.tuples, tuple(out.shape), out.data_ptr(), _threads())
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
    module().upsample_sum(
        _dtype(out), maps.tuples, tuple(out.shape), _bias(bias), out.data_ptr(), True, out.stride(0), _threads()
    )


def resize_adjoint(grad: Tensor, axes: tuple[AxisTable, AxisTable], out: Tensor) -> None:
    channels_last = _is_channels_last(out)
    maps = _maps([grad], [axes], channels_last)
    module().resize_adjoint(_dtype(out), maps.tuples[0], out.shape[0], out.data_ptr(), channels_last, _threads())


def upsample_argmax(
    features: list[Tensor], axes: Axes, bias: Tensor | None, labels: Tensor, values: Tensor | None
) -> None:
    maps = _maps(features, axes, channels_last=True)
    module().upsample_argmax(
        _dtype(features[0]),
        maps.tuples,
        _shape(features, labels),
        _bias(bias),
        labels.element_size(),
        labels.data_ptr(),
        0 if values is None else values.data_ptr(),
        _threads(),
    )


def upsample_expectation(
    features: list[Tensor], axes: Axes, bias: Tensor | None, values: Tensor, softmax: bool, out: Tensor
) -> None:
    maps = _maps(features, axes, channels_last=True)
    module().upsample_expectation(
        _dtype(features[0]),
        maps.tuples,
        _shape(features, out),
        _bias(bias),
        values.data_ptr(),
        softmax,
        out.data_ptr(),
        _threads(),
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
    module().upsample_expectation_backward(
        _dtype(features[0]),
        maps.tuples,
        _shape(features, grad_out),
        _bias(bias),
        values.data_ptr(),
        softmax,
        grad_out.data_ptr(),
        [g.data_ptr() for g in gradients],
        0 if row_value_gradients is None else row_value_gradients.data_ptr(),
        _threads(),
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
    cross_entropy = (target.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index, label_smoothing)
    module().upsample_cross_entropy(
        _dtype(features[0]),
        maps.tuples,
        _shape(features, target),
        _bias(bias),
        cross_entropy,
        loss.data_ptr(),
        lse.data_ptr(),
        _threads(),
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
    cross_entropy = (target.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index, label_smoothing)
    module().upsample_cross_entropy_backward(
        _dtype(features[0]),
        maps.tuples,
        _shape(features, target),
        _bias(bias),
        cross_entropy,
        lse.data_ptr(),
        grad_loss.data_ptr(),
        [g.data_ptr() for g in gradients],
        _threads(),
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
    batch, _, height, width = image.shape
    is_uint8 = image.dtype == torch.uint8
    module().image_to_patches(
        is_uint8,
        _dtype(out) if is_uint8 else _dtype(image),
        _dtype(out),
        (image.data_ptr(), (batch, height, width), tuple(image.stride())),
        axes[0].native,
        axes[1].native,
        (patch_size, out.stride(0), out.stride(1), channels_first, gain, offset),
        out.data_ptr(),
        _threads(),
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
    module().window_attention(_dtype(q), attention, _strided(out), 0 if lse is None else lse.data_ptr(), _threads())


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
    module().window_attention_backward(
        _dtype(q),
        _attention(q, k, v, bias_y, bias_x, rule, heads, mean, scale),
        _strided(grad_out),
        0 if grad_lse is None else grad_lse.data_ptr(),
        tuple(_strided(x) if x.numel() else (0, (0, 0, 0, 0)) for x in results[:3]),
        tuple(0 if p is None else p.data_ptr() for p in parts),
        shares,
        _threads(),
    )
    for part, result in zip(parts, results[3:], strict=True):
        if part is not None:
            result.copy_(part.sum(0))


def feature_unify(features: Tensor, basis: Tensor, released: bool, out: Tensor) -> None:
    module().feature_unify(_dtype(features), _unify(features, basis, released), _strided(out), _threads())


def feature_unify_backward(
    grad: Tensor, features: Tensor, basis: Tensor, released: bool, shares: int, results: list[Tensor]
) -> None:
    """``results``: gradients of features and basis; an empty one is not wanted."""
    parts = basis.new_empty((len(features) * shares, *basis.shape)) if results[1].numel() else None
    module().feature_unify_backward(
        _dtype(features),
        _unify(features, basis, released),
        _strided(grad),
        _strided(results[0]) if results[0].numel() else (0, (0, 0, 0, 0)),
        0 if parts is None else parts.data_ptr(),
        shares,
        _threads(),
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
    pixels, channels = out.shape
    parts = torch.empty((-(-pixels // PIXEL_CHUNK), 2, channels), dtype=torch.float64) if statistics else None
    rows, columns = rotation or (None, None)
    addresses = [0 if t is None else t.data_ptr() for t in (*(norm or (None, None)), weight, bias, residual)]
    layer = (
        (pixels, x.shape[1], channels, PIXEL_CHUNK, 0 if columns is None else len(columns)),
        x.data_ptr(),
        tuple(x.stride()),
        *addresses[:2],
        (unit_eps is not None, unit_eps or 0.0),
        *addresses[2:],
        0 if rows is None else rows.data_ptr(),
        0 if columns is None else columns.data_ptr(),
        out.data_ptr(),
        0 if parts is None else parts.data_ptr(),
    )
    module().pixel_linear(layer, _threads())
    return None if parts is None else join(parts, PIXEL_CHUNK, pixels)


def nearest_index(bank: Tensor, cosine: bool, precision: str, device: torch.device) -> list[Tensor]:
    """The prepared bank; the device is the bank's."""
    from murf_fast import _nearest

    return _nearest.prepare(bank, cosine, precision)


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
    squares, errors = torch.empty(len(x), dtype=torch.float64), torch.empty(len(x), dtype=torch.float64)
    module().nearest_prepare(
        _nearest_rows(x, scale),
        0 if mean is None else mean.data_ptr(),
        _dtype(out),
        out.data_ptr(),
        out.stride(0),
        getattr(module().NearestRole, role),
        squares.data_ptr(),
        errors.data_ptr(),
        _threads(),
    )
    return squares, errors


class NearestState:
    """What a search knows about its queries: candidates, upper bounds, exact distances; see csrc/types.h."""

    def __init__(self, queries: int, k: int, capacity: int) -> None:
        self.k, self.capacity = k, capacity
        self.tensors = [
            torch.empty(queries, capacity),
            torch.empty(queries, capacity, dtype=torch.int64),
            torch.zeros(queries, dtype=torch.int32),
            torch.empty(queries, k),
            torch.zeros(queries, dtype=torch.int32),
            torch.empty(queries, k, dtype=torch.float64),
            torch.empty(queries, k, dtype=torch.int64),
            torch.zeros(queries, dtype=torch.int32),
        ]

    def part(self, rows: slice) -> NearestState:
        part = NearestState.__new__(NearestState)
        part.k, part.capacity, part.tensors = self.k, self.capacity, [t[rows] for t in self.tensors]
        return part

    @property
    def native(self) -> tuple:
        return self.k, self.capacity, tuple(t.data_ptr() for t in self.tensors)


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
    module().nearest_scan(
        _dtype(product),
        product.data_ptr(),
        (
            product.stride(0),
            first,
            product.shape[1],
            errors.data_ptr(),
            squares.data_ptr(),
            *block,
            absolute,
            relative,
        ),
        _nearest_rows(*query),
        _nearest_rows(*bank),
        state.native,
        _threads(),
    )


def nearest_finish(
    query: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor],
    state: NearestState,
    metric: str,
    distances: Tensor,
    indices: Tensor,
) -> None:
    module().nearest_finish(
        _nearest_rows(*query),
        _nearest_rows(*bank),
        state.native,
        getattr(module().NearestMetric, metric),
        distances.data_ptr(),
        indices.data_ptr(),
        _threads(),
    )


def k_center_greedy(features: Tensor, centers: Tensor, given: int, progress) -> None:
    from murf_fast import _k_center

    _k_center.select(features, centers, given, progress)


class KCenterCodes:
    """Rows as eight-bit codes around their mean, with scales, squared norms and errors; see csrc/types.h."""

    def __init__(self, features: Tensor) -> None:
        rows, dim = features.shape
        mean = sum(part.sum(0, dtype=torch.float64) for part in features.split(4096)).div(rows).float()
        self.codes = torch.empty(rows, (dim + 63) // 64 * 64, dtype=torch.int8)
        self.numbers = torch.empty(3, rows, dtype=torch.float64)
        module().k_center_encode(_nearest_rows(features, self.numbers[0, :0]), mean.data_ptr(), self.native, _threads())

    @property
    def native(self) -> tuple:
        return self.codes.data_ptr(), self.codes.shape[1], *(row.data_ptr() for row in self.numbers)


def k_center_steps(
    features: Tensor, codes: KCenterCodes, nearest: Tensor, centers: Tensor, given: int, begin: int, end: int
) -> None:
    """Steps ``begin`` to ``end``: takes in ``centers[step]`` and, beyond the ``given`` ones, finds the next."""
    module().k_center_steps(
        _nearest_rows(features, codes.numbers[0, :0]),
        codes.native,
        nearest.data_ptr(),
        centers.data_ptr(),
        given,
        begin,
        end,
        _threads(),
    )


def stream_fill(out: Tensor) -> None:
    """Fills a dense float32 tensor with ones past the caches: the write rate that results are measured against."""
    module().stream_fill(out.data_ptr(), out.numel() * out.element_size(), _threads())


class _maps:
    """The extension's view of low-resolution maps; keeps copies alive until the call is over."""

    def __init__(self, features: list[Tensor], axes: Axes, channels_last: bool):
        walkable = _channels_contiguous if channels_last else _rows_contiguous
        self.tensors = [walkable(f) for f in features]
        self.tuples = [
            (f.data_ptr(), f.shape[1], tuple(f.stride()), y.native, x.native)
            for f, (y, x) in zip(self.tensors, axes, strict=True)
        ]


def _channels_contiguous(x: Tensor) -> Tensor:
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _sum_planar(features: list[Tensor], axes: Axes, bias: Tensor | None, out: Tensor) -> None:
    maps = _maps(features, axes, channels_last=False)
    module().upsample_sum(
        _dtype(out), maps.tuples, tuple(out.shape), _bias(bias), out.data_ptr(), False, out.stride(0), _threads()
    )


def _attention(q, k, v, bias_y, bias_x, rule, heads, mean, scale) -> tuple:
    rows, columns = blocks_of(*rule, tuple(q.shape[2:]), tuple(k.shape[2:]))
    return (
        (q.shape[0], heads, q.shape[1] // heads, v.shape[1]),
        mean,
        scale,
        _strided(q),
        _strided(k),
        _strided(v),
        rows.native,
        columns.native,
        0 if bias_y is None else bias_y.data_ptr(),
        0 if bias_x is None else bias_x.data_ptr(),
    )


def _unify(features: Tensor, basis: Tensor, released: bool) -> tuple:
    shape, kernel = tuple(features.shape), basis.shape[-1]
    return shape, len(basis), kernel, released, _strided(features), basis.data_ptr()


def _nearest_rows(x: Tensor, scale: Tensor) -> tuple:
    """Rows as the kernels take them; their entries are contiguous."""
    return x.data_ptr(), _dtype(x), x.shape[0], x.shape[1], x.stride(0), scale.data_ptr() if scale.numel() else 0


def _prefer_huge_pages(out: Tensor) -> None:
    if out.numel() * out.element_size() >= _LARGE:
        module().prefer_huge_pages(out.data_ptr(), out.numel() * out.element_size())


def _is_channels_last(out: Tensor) -> bool:
    return not out.is_contiguous()


def _shape(features: list[Tensor], full: Tensor) -> tuple[int, int, int, int]:
    batch, height, width = full.shape
    return batch, features[0].shape[1], height, width


def _bias(bias: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias is None else (bias.data_ptr(), bias.shape[1] if bias.shape[0] > 1 else 0)


def _dtype(x: Tensor):
    dtypes = module().DType
    return {torch.float32: dtypes.f32, torch.bfloat16: dtypes.bf16, torch.float16: dtypes.f16}[x.dtype]


def _threads() -> int:
    return torch.get_num_threads()


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
    module().adaptive_conv(
        _dtype(source),
        _dtype(kernels),
        _conv(source, axes, rows),
        _strided(source),
        _strided(kernels),
        0 if bias is None else bias.data_ptr(),
        _strided(out),
        _threads(),
    )


def adaptive_conv_backward_source(grad: Tensor, kernels: Tensor, axes: Folded, out: Tensor) -> None:
    grad = _channels_contiguous(grad)  # its pixels are read once for every source row of their windows
    module().adaptive_conv_backward_source(
        _dtype(grad),
        _dtype(kernels),
        _conv(grad, axes),
        _strided(grad),
        _strided(kernels),
        _strided(out),
        _threads(),
    )


def adaptive_conv_backward_kernels(grad: Tensor, source: Tensor, axes: Folded, out: Tensor) -> None:
    module().adaptive_conv_backward_kernels(
        _dtype(source),
        _dtype(out),
        _conv(grad, axes),
        _strided(grad),
        _strided(source),
        _strided(out),
        _threads(),
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
    band = max(-(-16 * _threads() // batch), _KERNEL_BYTES // (4 * row_floats)) // 2 * 2
    band = max(2, min(band, height))
    kernels = torch.empty((min(band, height) * row_floats,), dtype=torch.float32)
    for begin in range(0, height, band):
        rows = (begin, min(begin + band, height))
        shape = (batch, rows[1] - begin, width, (2 * radius + 1) ** 2)
        of_rows = kernels[: (rows[1] - begin) * row_floats].view(shape).permute(0, 3, 1, 2)
        _kernels_of_rows(network, guidance, rows, of_rows)
        for source, pair, out in zip(sources, axes, outs, strict=True):
            adaptive_conv(source, of_rows, bias, pair, out, rows)


def _kernels_of_rows(network: _bilateral, guidance: Tensor, rows: tuple[int, int], out: Tensor) -> None:
    module().bilateral_kernels(
        _dtype(guidance), _dtype(out), (*network.tuple, rows), _strided(guidance), _strided(out), _threads()
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
    grad_logits = torch.empty((batch, height, grad.shape[1], width), dtype=torch.float32)
    grad_guidance = torch.empty((batch, height, guides, width), dtype=torch.float32)
    grad_params = torch.empty((batch * bands, network.params.numel()), dtype=torch.float32)
    module().bilateral_kernels_backward(
        _dtype(guidance),
        _dtype(grad),
        (*network.tuple, (0, height)),
        _strided(guidance),
        _strided(grad),
        bands,
        grad_logits.data_ptr(),
        grad_guidance.data_ptr(),
        grad_params.data_ptr(),
        _threads(),
    )
    return grad_guidance.transpose(1, 2), grad_params.sum(0)


class _bilateral:
    """The extension's view of the networks of `bilateral_kernels`; keeps copies alive until the call is over."""

    def __init__(self, guidance: Tensor, params: list[Tensor], range_mask, fixup_mask, radius: int):
        self.params = torch.cat([p.detach().reshape(-1).float() for p in params])
        self.masks = [None if m is None else m.float().contiguous() for m in (range_mask, fixup_mask)]
        batch, guides, height, width = guidance.shape
        self.tuple = (
            (batch, height, width, guides, params[3].numel(), radius),
            len(params) > 6,
            self.params.data_ptr(),
            *(0 if m is None else m.data_ptr() for m in self.masks),
        )


def _conv(like: Tensor, axes: Folded, rows: tuple[int, int] | None = None):
    y, x = axes
    return (*like.shape[:2], y.native, x.native, rows or (0, y.out_size))


def _strided(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), tuple(x.stride())
