"""What a launcher may take for granted about the arguments of a registered op.

Every call of ``torch.ops.murf_fast.*`` passes here before a launcher sees it: from the op's function, which has checked
its own arguments in the user's words; from autograd, which hands on gradients as it finds them; and from anyone who
calls the registered op. Shapes, dtypes, devices, names and overlaps that a kernel would turn into addresses are refused
with a TypeError or ValueError. :data:`CONTRACTS` has an entry for every op, or the op cannot be registered.

A test costs about a tenth of a microsecond; words are looked for only once one fails.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.backends import BackendUnavailableError
from murf_fast.ops import _checks
from murf_fast.tables.folded import PADDINGS
from murf_fast.tables.resize import ANTIALIASED, MODES, scaled_size
from murf_fast.windows import axis_window

# What kernels compute on; float64 runs through the reference.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODES_OF_WINDOWS = (None, "bilinear", "bicubic")


def guarded(name: str, implementation: Callable) -> Callable:
    """The implementation behind its contract."""
    contract = CONTRACTS[name]

    @functools.wraps(implementation)
    def checked(*arguments):
        contract(*arguments)
        if _fork.is_child():
            with _fork.calling_thread_only():
                return implementation(*arguments)
        return implementation(*arguments)

    return checked


def guarded_fake(name: str, fake: Callable) -> Callable:
    """The fake implementation, which also takes a call that mixes meta tensors with others, on one device only."""

    @functools.wraps(fake)
    def checked(*arguments):
        tensors = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        for x in tensors:
            if (x.device.type == "meta") != (tensors[0].device.type == "meta"):
                devices = ", ".join(sorted({str(t.device) for t in tensors}))
                raise ValueError(f"murf_fast.{name}: all tensors must be on one device, got {devices}")
        return fake(*arguments)

    return checked


def _backend(op: str, backend: str, like: Tensor) -> None:
    if backend == "native":
        if not like.is_cpu:
            raise BackendUnavailableError(
                f"murf_fast.{op}: backend 'native' takes CPU tensors, these are on {like.device}"
            )
    elif backend == "triton":
        if not like.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendUnavailableError(
                f"murf_fast.{op}: backend 'triton' takes CUDA tensors (and CPU tensors with TRITON_INTERPRET=1), these "
                f"are on {like.device}"
            )
    else:
        raise ValueError(f"murf_fast.{op}: `backend` must be 'native' or 'triton', got {backend!r}")


def _tensor(op: str, name: str, x: Tensor, like: Tensor, shape: Sequence[int | None], dtypes: Sequence) -> None:
    """A tensor on the device of ``like``; None in ``shape`` is any size, and ``dtypes`` are what it may have."""
    if x.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"murf_fast.{op}: `{name}` must be {names}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"murf_fast.{op}: `{name}` must be on {like.device}, got {x.device}")
    have = x.shape
    if len(have) != len(shape) or any(n is not None and n != m for n, m in zip(shape, have, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"murf_fast.{op}: `{name}` must have shape ({wanted}), got {tuple(have)}")


def _map(op: str, name: str, x: Tensor) -> None:
    shape = x.shape
    if len(shape) != 4 or x.dtype not in DTYPES or not (shape[1] and shape[2] and shape[3]):
        _checks.map_(op, name, x)
        raise TypeError(f"murf_fast.{op}: `{name}` must be float32, bfloat16 or float16 for a kernel, got {x.dtype}")


def _maps(op: str, features: Sequence[Tensor], same_channels: bool, name: str = "features") -> None:
    if not features:
        raise TypeError(f"murf_fast.{op}: `{name}` must be a non-empty list of tensors (B, C, h, w)")
    first = features[0]
    _map(op, f"{name}[0]", first)
    if len(features) == 1:
        return
    dtype, on_cpu, (batch, channels, _, _) = first.dtype, first.is_cpu, first.shape
    for x in features[1:]:
        if x.ndim == 4 and x.dtype is dtype and (x.is_cpu if on_cpu else x.device == first.device):
            b, c, h, w = x.shape
            if b == batch and h and w and (c == channels if same_channels else c):
                continue
        _checks.maps(op, list(features), same_channels=same_channels, name=name)


def _bias(op: str, bias: Tensor | None, features: Sequence[Tensor]) -> None:
    if bias is None:
        return
    first, shape = features[0], bias.shape
    fits = shape == first.shape[1:2] or shape == first.shape[:2]
    if not fits or bias.dtype not in _checks.DTYPES or bias.device != first.device:
        _checks.bias(op, bias, list(features))


def _grid(op: str, name: str, size: Sequence[int]) -> None:
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"murf_fast.{op}: `{name}` must be two positive integers, got {tuple(size)}")


def _rule(op: str, mode: str, antialias: bool, via: Sequence[int] | None = None) -> None:
    if mode not in MODES or (antialias and mode not in ANTIALIASED):
        _checks.mode(op, mode, antialias)
    if via is not None:
        _grid(op, "via", via)


def _factors(op: str, factors: Sequence[float] | None, in_size: Sequence[int], out_size: Sequence[int]) -> None:
    """Factors that give the result its size: with others a table would point beyond the map."""
    if factors is None:
        return
    if len(factors) != 2 or not all(f > 0 and math.isfinite(f) for f in factors):
        raise ValueError(f"murf_fast.{op}: `scale_factor` must be two positive, finite numbers, got {tuple(factors)}")
    if any(scaled_size(n, f) != m for n, f, m in zip(in_size, factors, out_size, strict=True)):
        raise ValueError(
            f"murf_fast.{op}: `scale_factor` must give the {tuple(out_size)} pixels of the result, got "
            f"{tuple(factors)} of {tuple(in_size)}"
        )


def _one_of(op: str, name: str, value: object, known: Sequence) -> None:
    if value not in known:
        raise ValueError(f"murf_fast.{op}: `{name}` must be one of {tuple(known)}, got {value!r}")


def _count(op: str, name: str, values: Sequence, count: int) -> None:
    if len(values) != count:
        raise ValueError(f"murf_fast.{op}: `{name}` must have {count} entries, got {len(values)}")


def _out(op: str, out: Tensor, shape: Sequence[int], inputs: Sequence[Tensor | None]) -> None:
    with torch.no_grad():  # whether gradients are needed is for the op's function to ask
        _checks.out(op, out, shape, inputs)


def _resize(x, size, mode, antialias, via, scale_factor, channels_last, backend) -> None:
    op = "resize"
    _map(op, "x", x)
    _backend(op, backend, x)
    _grid(op, "size", size)
    _rule(op, mode, antialias, via)
    _factors(op, scale_factor, x.shape[2:], size)


def _resize_out(x, mode, antialias, via, scale_factor, out, backend) -> None:
    op = "resize_out"
    _resize(x, out.shape[2:], mode, antialias, via, scale_factor, False, backend)
    _out(op, out, (*x.shape[:2], *out.shape[2:]), [x])


def _resize_adjoint(grad, in_size, mode, antialias, via, scale_factor, channels_last, backend) -> None:
    op = "resize_adjoint"
    _map(op, "grad", grad)
    _backend(op, backend, grad)
    _grid(op, "in_size", in_size)
    _rule(op, mode, antialias, via)
    _factors(op, scale_factor, in_size, grad.shape[2:])


def _resize_gram(x, size, mode, antialias, backend) -> None:
    op = "resize_gram"
    _map(op, "x", x)
    _backend(op, backend, x)
    _grid(op, "size", size)
    _rule(op, mode, antialias)


def _gaussian_blur(x, sigma, border, channels_last, backend) -> None:
    op = "gaussian_blur"
    _map(op, "x", x)
    _backend(op, backend, x)
    if not 0 < sigma < 1e6:
        raise ValueError(f"murf_fast.{op}: `sigma` must be a positive number of pixels, got {sigma!r}")
    _one_of(op, "border", border, ("symmetric", "reflect"))


def _upsample_concat(features, size, mode, antialias, via, channels_last, backend) -> None:
    op = "upsample_concat"
    _maps(op, features, same_channels=False)
    _backend(op, backend, features[0])
    _grid(op, "size", size)
    _rule(op, mode, antialias, via)


def _upsample_concat_out(features, size, mode, antialias, via, out, backend) -> None:
    _upsample_concat(features, size, mode, antialias, via, False, backend)
    shape = (features[0].shape[0], sum(f.shape[1] for f in features), *size)
    _out("upsample_concat_out", out, shape, features)


def _upsample_sum(features, bias, size, mode, antialias, via, channels_last, backend) -> None:
    op = "upsample_sum"
    _maps(op, features, same_channels=True)
    _backend(op, backend, features[0])
    _bias(op, bias, features)
    _grid(op, "size", size)
    _rule(op, mode, antialias, via)


def _upsample_sum_out(features, bias, size, mode, antialias, via, out, backend) -> None:
    _upsample_sum(features, bias, size, mode, antialias, via, False, backend)
    _out("upsample_sum_out", out, (*features[0].shape[:2], *size), [*features, bias])


def _upsample_argmax(features, bias, size, mode, antialias, via, return_values, backend) -> None:
    op = "upsample_argmax"
    _maps(op, features, same_channels=True)
    _backend(op, backend, features[0])
    _bias(op, bias, features)
    _grid(op, "size", size)
    _rule(op, mode, antialias, via)


def _upsample_expectation(features, bias, values, size, softmax, mode, antialias, via, backend) -> None:
    op = "upsample_expectation"
    _maps(op, features, same_channels=True)
    _backend(op, backend, features[0])
    _bias(op, bias, features)
    _tensor(op, "values", values, features[0], (features[0].shape[1],), _checks.DTYPES)
    _grid(op, "size", size)
    _rule(op, mode, antialias, via)


def _upsample_expectation_backward(
    grad, features, bias, values, softmax, mode, antialias, via, values_gradient, backend
) -> None:
    op = "upsample_expectation_backward"
    _upsample_expectation(features, bias, values, grad.shape[1:], softmax, mode, antialias, via, backend)
    _tensor(op, "grad", grad, features[0], (features[0].shape[0], None, None), _checks.DTYPES)


def _upsample_cross_entropy(
    features, bias, target, weight, mode, antialias, via, ignore_index, label_smoothing, backend
) -> None:
    op = "upsample_cross_entropy"
    _maps(op, features, same_channels=True)
    first = features[0]
    _backend(op, backend, first)
    _bias(op, bias, features)
    _tensor(op, "target", target, first, (first.shape[0], None, None), (torch.int64,))
    _grid(op, "target's size", target.shape[1:])
    if weight is not None:
        _tensor(op, "weight", weight, first, (first.shape[1],), _checks.DTYPES)
    _rule(op, mode, antialias, via)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"murf_fast.{op}: `label_smoothing` must be in [0, 1], got {label_smoothing!r}")


def _upsample_cross_entropy_backward(
    grad, features, bias, target, weight, lse, mode, antialias, via, ignore_index, label_smoothing, backend
) -> None:
    op = "upsample_cross_entropy_backward"
    _upsample_cross_entropy(
        features, bias, target, weight, mode, antialias, via, ignore_index, label_smoothing, backend
    )
    _tensor(op, "grad", grad, target, target.shape, _checks.DTYPES)
    _tensor(op, "lse", lse, target, (2, *target.shape), (torch.float32,))


def _image_to_patches(images, size, patch_size, mode, antialias, gain, offset, channels_first, dtype, backend) -> None:
    op = "image_to_patches"
    _tensor(op, "images", images, images, (None, 3, None, None), (torch.uint8, *DTYPES))
    _grid(op, "images' size", images.shape[2:])
    _backend(op, backend, images)
    _grid(op, "size", size)
    if not 1 <= patch_size <= min(size):
        raise ValueError(f"murf_fast.{op}: `patch_size` must be in 1 .. {min(size)}, got {patch_size}")
    _rule(op, mode, antialias)
    _count(op, "gain", gain, 3)
    _count(op, "offset", offset, 3)
    _one_of(op, "dtype", dtype, DTYPES)


def _taps(op: str, taps: int) -> int:
    diameter = math.isqrt(max(taps, 0))
    if diameter**2 != taps or diameter % 2 == 0:
        raise ValueError(f"murf_fast.{op}: `kernels` must have D * D taps with D odd, got {taps}")
    return diameter


def _windows(op: str, source: Sequence[int], grid: Sequence[int], diameter: int, mode, padding) -> None:
    """Sizes of an adaptive convolution: its tables read no pixel outside the source."""
    _one_of(op, "interpolation", mode, _MODES_OF_WINDOWS)
    _one_of(op, "padding", padding, (None, *PADDINGS))
    _grid(op, "source's size", source)
    if padding == "reflect" and min(grid) <= diameter // 2:
        raise ValueError(
            f"murf_fast.{op}: reflect padding by {diameter // 2} needs more rows and columns, got {tuple(grid)}"
        )
    expected = tuple(grid) if padding else tuple(n + diameter - 1 for n in grid)
    if mode is None and tuple(source) != expected:
        raise ValueError(f"murf_fast.{op}: without a resize the source must be {expected}, got {tuple(source)}")


def _adaptive_conv(source, kernels, bias, mode, padding, channels_last, backend) -> None:
    op = "adaptive_conv"
    _map(op, "source", source)
    _map(op, "kernels", kernels)
    _backend(op, backend, source)
    _tensor(op, "kernels", kernels, source, (source.shape[0], None, None, None), (source.dtype, torch.float32))
    _windows(op, source.shape[2:], kernels.shape[2:], _taps(op, kernels.shape[1]), mode, padding)
    if bias is not None:
        _tensor(op, "bias", bias, source, (source.shape[1],), _checks.DTYPES)


def _adaptive_conv_backward_source(grad, kernels, in_size, mode, padding, channels_last, backend) -> None:
    op = "adaptive_conv_backward_source"
    _map(op, "grad", grad)
    _map(op, "kernels", kernels)
    _backend(op, backend, grad)
    _tensor(op, "kernels", kernels, grad, (grad.shape[0], None, *grad.shape[2:]), (grad.dtype, torch.float32))
    _count(op, "in_size", in_size, 2)
    _windows(op, in_size, grad.shape[2:], _taps(op, kernels.shape[1]), mode, padding)


def _adaptive_conv_backward_kernels(grad, source, taps, mode, padding, dtype, backend) -> None:
    op = "adaptive_conv_backward_kernels"
    _map(op, "grad", grad)
    _map(op, "source", source)
    _backend(op, backend, grad)
    _tensor(op, "source", source, grad, (*grad.shape[:2], None, None), (grad.dtype,))
    _windows(op, source.shape[2:], grad.shape[2:], _taps(op, taps), mode, padding)
    _one_of(op, "kernels_dtype", dtype, (grad.dtype, torch.float32))


def _network(op: str, guidance, params, range_mask, fixup_mask, radius: int) -> None:
    """Parameters and masks of the bilateral kernels; see :class:`murf_fast.ops.BilateralParams`."""
    if radius < 0 or min(guidance.shape[2:]) <= radius:
        raise ValueError(
            f"murf_fast.{op}: `radius` must be in 0 .. {min(guidance.shape[2:]) - 1} for a guidance of "
            f"{tuple(guidance.shape[2:])}, got {radius}"
        )
    if len(params) not in (6, 10):
        raise ValueError(f"murf_fast.{op}: `params` must be 6 tensors, or 10 with a fix-up, got {len(params)}")
    taps, guides, keys = (2 * radius + 1) ** 2, guidance.shape[1], params[3].numel()
    shapes = [(), (), (keys, guides), (keys,), (keys, keys), (keys,)]
    shapes += [(taps, taps + guides), (taps,), (taps, taps), (taps,)]
    for i, (x, shape) in enumerate(zip(params, shapes)):  # noqa: B905 (without a fix-up there are fewer)
        flat = x.flatten(1) if x.ndim == 4 else x
        _tensor(op, f"params[{i}]", flat, guidance, shape, _checks.DTYPES)
    if keys < 1:
        raise ValueError(f"murf_fast.{op}: `params` must have at least one key")
    for name, mask, channels in (("range_mask", range_mask, keys), ("fixup_mask", fixup_mask, taps)):
        if mask is not None:
            _tensor(op, name, mask, guidance, (guidance.shape[0], channels), (*_checks.DTYPES, torch.bool))


def _bilateral_kernels(guidance, params, range_mask, fixup_mask, radius, dtype, backend) -> None:
    op = "bilateral_kernels"
    _map(op, "guidance", guidance)
    _backend(op, backend, guidance)
    _network(op, guidance, params, range_mask, fixup_mask, radius)
    _one_of(op, "kernels_dtype", dtype, (guidance.dtype, torch.float32))


def _bilateral_kernels_backward(grad, guidance, params, range_mask, fixup_mask, radius, backend) -> None:
    op = "bilateral_kernels_backward"
    _map(op, "guidance", guidance)
    _backend(op, backend, guidance)
    _network(op, guidance, params, range_mask, fixup_mask, radius)
    shape = (guidance.shape[0], (2 * radius + 1) ** 2, *guidance.shape[2:])
    _tensor(op, "grad", grad, guidance, shape, (guidance.dtype, torch.float32))


def _joint_bilateral_upsample(
    sources, guidance, params, range_mask, fixup_mask, bias, radius, mode, channels_last, backend
) -> None:
    op = "joint_bilateral_upsample"
    _maps(op, sources, same_channels=False, name="sources")
    first = sources[0]
    _backend(op, backend, first)
    _map(op, "guidance", guidance)
    _tensor(op, "guidance", guidance, first, (first.shape[0], None, None, None), (first.dtype, torch.float32))
    _network(op, guidance, params, range_mask, fixup_mask, radius)
    _one_of(op, "interpolation", mode, _MODES_OF_WINDOWS[1:])
    _count(op, "channels_last", channels_last, len(sources))
    if bias is not None:
        for source in sources:
            _tensor(op, "bias", bias, first, (source.shape[1],), _checks.DTYPES)


def _basis(op: str, basis: Tensor, features: Tensor) -> None:
    k = basis.shape[-1] if basis.ndim else 0
    if k % 2 == 0 or len(basis) < 1 or tuple(basis.shape[1:]) not in ((1, k, k), (k, k)):
        raise ValueError(f"murf_fast.{op}: `basis` must be (M, 1, k, k) with k odd, got {tuple(basis.shape)}")
    _tensor(op, "basis", basis, features, basis.shape, _checks.DTYPES)


def _feature_unify(features, basis, released, backend) -> None:
    op = "feature_unify"
    _map(op, "features", features)
    _backend(op, backend, features)
    _basis(op, basis, features)


def _feature_unify_backward(grad, features, basis, released, wanted, backend) -> None:
    op = "feature_unify_backward"
    _feature_unify(features, basis, released, backend)
    _tensor(op, "grad", grad, features, (features.shape[0], len(basis), *features.shape[2:]), (features.dtype,))
    _count(op, "wanted", wanted, 2)


@functools.lru_cache(256)
def _is_window_rule(spec: str, out: int, size: int) -> bool:
    """Whether a rule names, for each of ``out`` queries, one or more of ``size`` keys."""
    try:
        window = axis_window(spec, out, size)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if str(error).startswith("murf_fast.windows"):
            raise  # says more than that it is no rule: which argument of the rule leaves a query without a key
        return False
    index, count = window.index, window.count
    fits = window.size == size and len(index) == len(count) == out and index.shape[1] >= 1
    return bool(
        fits and (count >= 1).all() and (count <= index.shape[1]).all() and (index >= 0).all() and (index < size).all()
    )


def _window_attention(q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, return_lse, backend) -> None:
    op = "window_attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        _map(op, name, x)
    _backend(op, backend, q)
    _tensor(op, "k", k, q, (*q.shape[:2], None, None), (q.dtype,))
    _tensor(op, "v", v, q, (q.shape[0], None, *k.shape[2:]), (q.dtype,))
    if num_heads < 1 or q.shape[1] % num_heads or (not mean and v.shape[1] % num_heads):
        raise ValueError(f"murf_fast.{op}: `num_heads` must divide the channels, got {num_heads}")
    if not math.isfinite(scale):
        raise ValueError(f"murf_fast.{op}: `scale` must be finite, got {scale!r}")
    for name, spec, out, size in (("rows", rows, q.shape[2], k.shape[2]), ("columns", columns, q.shape[3], k.shape[3])):
        if not _is_window_rule(spec, out, size):
            raise ValueError(f"murf_fast.{op}: `{name}` must be a rule for {out} queries and {size} keys, got {spec!r}")
    for name, bias, axis in (("bias_y", bias_y, 2), ("bias_x", bias_x, 3)):
        if bias is not None:
            _tensor(op, name, bias, q, (num_heads, q.shape[axis], k.shape[axis]), _checks.DTYPES)
    if (bias_y is None) != (bias_x is None):
        raise ValueError(f"murf_fast.{op}: `bias_y` and `bias_x` must be given together")


def _window_attention_backward(
    grad_out, grad_lse, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, wanted, backend
) -> None:
    op = "window_attention_backward"
    _window_attention(q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, False, backend)
    _tensor(op, "grad_out", grad_out, q, (q.shape[0], v.shape[1], *q.shape[2:]), (q.dtype,))
    if grad_lse is not None:
        _tensor(op, "grad_lse", grad_lse, q, (q.shape[0], num_heads, *q.shape[2:]), _checks.DTYPES)
    _count(op, "wanted", wanted, 5)
    if any(wanted[3:]) and bias_y is None:
        raise ValueError(f"murf_fast.{op}: `wanted` asks for the gradient of a bias that is not given")


def _image_queries(image, parameters, size, grid, backend) -> None:
    from murf_fast.ops._image_encoders import ENCODER, GROUPS

    op = "image_queries"
    _map(op, "image", image)
    _backend(op, backend, image)
    _grid(op, "size", size)
    _grid(op, "grid", grid)
    _count(op, "parameters", parameters, 3 * len(ENCODER) + 4)
    _tensor(op, "parameters[-1]", parameters[-1], image, (None,), _checks.DTYPES)
    channels = len(parameters[-1])
    if channels < 1 or channels % GROUPS:
        raise ValueError(f"murf_fast.{op}: `parameters[-1]` must have a multiple of {GROUPS} entries, got {channels}")
    square, vector = (channels, channels), (channels,)
    shapes = []
    for inputs in (image.shape[1], channels, channels):
        shapes += [(channels, inputs), *[s for _ in range(4) for s in (vector, vector, square)]]
    shapes += [(2, channels), (channels, 9 * channels), square, vector]
    for i, (x, shape) in enumerate(zip(parameters, shapes, strict=True)):
        _tensor(op, f"parameters[{i}]", x.flatten(1) if x.ndim == 4 else x, image, shape, _checks.DTYPES)
    if parameters[-3].shape[1:] != (channels, 3, 3):
        raise ValueError(f"murf_fast.{op}: `parameters[-3]` must be a 3 x 3 convolution")


def _k_center_greedy(features, start, count, backend) -> None:
    op = "k_center_greedy"
    _tensor(op, "features", features, features, (None, None), DTYPES)
    _backend(op, backend, features)
    _tensor(op, "start", start, features, (None,), (torch.int64,))
    if not 1 <= len(start) <= count <= len(features):
        raise ValueError(
            f"murf_fast.{op}: needs 1 <= rows of `start` <= `count` <= rows of `features`, got {len(start)}, {count}, "
            f"{len(features)}"
        )


def _nearest_distance(query, bank, index, k, metric, precision, backend) -> None:
    op = "nearest_distance"
    dtypes = (*DTYPES, torch.float64)
    _tensor(op, "query", query, query, (None, None), dtypes)
    _backend(op, backend, query)
    # A bank may stay in host memory, from which a GPU search brings it in blocks.
    at_home = bank if backend == "triton" and bank.is_cpu else query
    _tensor(op, "bank", bank, at_home, (None, query.shape[1]), dtypes)
    if min(bank.shape) < 1:
        raise ValueError(f"murf_fast.{op}: `bank` must have rows and columns, got {tuple(bank.shape)}")
    if not 1 <= k <= len(bank):
        raise ValueError(f"murf_fast.{op}: `k` must be in 1 .. {len(bank)}, got {k}")
    _one_of(op, "metric", metric, ("l2", "l2sq", "cosine"))
    _one_of(op, "precision", precision, ("auto", "float32", "bfloat16", "float16"))
    if index:
        _count(op, "index", index, 0 if torch.float64 in (query.dtype, bank.dtype) else 5)
        check_index(op, index, query, bank, metric == "cosine", backend)


def check_index(op: str, index: Sequence[Tensor], query: Tensor, bank: Tensor, cosine: bool, backend: str) -> None:
    """The tensors of a prepared bank, as :class:`murf_fast.ops.NearestIndex` holds them."""
    from murf_fast import backends

    mean, scale, low, *rest = index
    (rows, dim), double, single = bank.shape, (torch.float64,), (torch.float32,)
    _tensor(op, "index[0]", mean, query, (dim,), single)
    _tensor(op, "index[1]", scale, query, (rows if cosine else 0,), double)
    shapes, others = backends.launcher(backend).index_layout(rows, dim)
    at_home = low.device == query.device or (low.is_cpu and query.is_cuda)
    if not at_home or (low.dtype, tuple(low.shape)) not in shapes:
        raise ValueError(f"murf_fast.{op}: `index[2]` is no copy of this bank, got {low.dtype} {tuple(low.shape)}")
    for i, (x, (shape, dtype)) in enumerate(zip(rest, others, strict=True), start=3):
        _tensor(op, f"index[{i}]", x, query, shape, (dtype,))
    for i, x in enumerate(index):
        if not x.is_contiguous():
            raise ValueError(f"murf_fast.{op}: `index[{i}]` must be contiguous")


CONTRACTS: dict[str, Callable] = {
    "adaptive_conv": _adaptive_conv,
    "adaptive_conv_backward_kernels": _adaptive_conv_backward_kernels,
    "adaptive_conv_backward_source": _adaptive_conv_backward_source,
    "bilateral_kernels": _bilateral_kernels,
    "bilateral_kernels_backward": _bilateral_kernels_backward,
    "feature_unify": _feature_unify,
    "feature_unify_backward": _feature_unify_backward,
    "gaussian_blur": _gaussian_blur,
    "image_queries": _image_queries,
    "image_to_patches": _image_to_patches,
    "joint_bilateral_upsample": _joint_bilateral_upsample,
    "k_center_greedy": _k_center_greedy,
    "nearest_distance": _nearest_distance,
    "resize": _resize,
    "resize_adjoint": _resize_adjoint,
    "resize_gram": _resize_gram,
    "resize_out": _resize_out,
    "upsample_argmax": _upsample_argmax,
    "upsample_concat": _upsample_concat,
    "upsample_concat_out": _upsample_concat_out,
    "upsample_cross_entropy": _upsample_cross_entropy,
    "upsample_cross_entropy_backward": _upsample_cross_entropy_backward,
    "upsample_expectation": _upsample_expectation,
    "upsample_expectation_backward": _upsample_expectation_backward,
    "upsample_sum": _upsample_sum,
    "upsample_sum_out": _upsample_sum_out,
    "window_attention": _window_attention,
    "window_attention_backward": _window_attention_backward,
}
