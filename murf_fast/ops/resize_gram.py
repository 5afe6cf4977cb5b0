"""``U^T U`` of a resize applied to a map: second moments of the resized map without resizing it. Internal."""

from __future__ import annotations

from torch import Tensor

from murf_fast import backends, reference
from murf_fast._layout import is_channels_last
from murf_fast.ops import _contract
from murf_fast.ops._derivatives import linear
from murf_fast.ops._library import empty_map, layout_of, register
from murf_fast.ops._resize import Resize
from murf_fast.tables.resize import gram_axis, is_large


def resize_gram(x: Tensor, how: Resize, backend: str) -> Tensor:
    """``G_h x G_w`` with ``G = U^T U`` of a resize (without ``via``) of the map ``x`` (B, C, h, w).

    ``<x, resize_gram(x)>`` is the squared norm of the resized map, and since the rows of ``U`` sum to one, the result
    for a map of ones holds the weight of every low-resolution pixel in the sum of the resized map.

    Memory: the result. Symmetric: its own adjoint. Source: a batch norm's statistics at low resolution.
    """
    if backend == "reference":
        return _reference(x, how, backend)
    return _resize_gram(x, how, backend)


def _requires(op, x, how, backend) -> None:
    _contract.map_(op, "x", x, backend)
    _contract.resize(op, how)


def _empty(x, how, backend) -> Tensor:
    return empty_map(x, x.shape, is_channels_last(x))


def _launch(x, how, backend, out) -> None:
    size, mode, antialias, _ = how
    large = is_large(mode, size)
    axes = tuple(gram_axis(n, m, mode, antialias, None, large) for n, m in zip(x.shape[2:], size, strict=True))
    backends.launcher(backend).upsample_sum([x], [axes], None, out)


def _reference(x, how, backend) -> Tensor:
    result = reference.resize_gram(x, how.size, how.mode, how.antialias)
    return result.contiguous(memory_format=layout_of(is_channels_last(x)))


def _backward(wanted, arguments, grad):
    _, how, backend = arguments
    return (_resize_gram(grad, how, backend),)


_resize_gram = register(
    "resize_gram(Tensor x, SymInt[] size, str interpolation, bool antialias, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    _backward,
    keeps=False,
    forward_mode=linear("resize_gram", 0),
    reference=_reference,
)
