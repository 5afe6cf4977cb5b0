"""Argument checks shared by the ops: before any work, saying which argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from murf_fast import backends
from murf_fast._arguments import choice as choice
from murf_fast._arguments import dense as dense
from murf_fast._arguments import flag as flag
from murf_fast._arguments import integer as integer
from murf_fast._arguments import is_sequence as is_sequence
from murf_fast._arguments import number as number
from murf_fast._arguments import numbers as numbers
from murf_fast._arguments import pair as pair
from murf_fast.annotations import Mode
from murf_fast.ops._derivatives import derivatives_wanted
from murf_fast.ops._resize import Resize
from murf_fast.tables.resize import ANTIALIASED, MAX_PIXELS, MODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_AREA = 2**40  # pixels of a map; beyond, sizes in bytes overflow


def tensor(op: str, name: str, value: object) -> Tensor:
    """A dense floating-point tensor of any shape."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"murf_fast.{op}: `{name}` must be a floating-point tensor, got {got}")
    return dense(op, name, value)


def map_(op: str, name: str, value: object, at: int | None = None) -> Tensor:
    """A floating-point map (B, C, H, W) with at least one channel and one pixel; entry ``at`` of a list."""
    if isinstance(value, Tensor) and value.dtype in DTYPES and value.layout is torch.strided and not value.is_nested:
        shape = value.shape
        if len(shape) == 4 and shape[1] >= 1 and shape[2] >= 1 and shape[3] >= 1:
            return value
    name = name if at is None else f"{name}[{at}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"murf_fast.{op}: `{name}` must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"murf_fast.{op}: `{name}` must have one of the dtypes {_names(DTYPES)}, got {value.dtype}")
    dense(op, name, value)
    if value.ndim != 4:
        raise ValueError(f"murf_fast.{op}: `{name}` must be (B, C, H, W), got shape {tuple(value.shape)}")
    raise ValueError(f"murf_fast.{op}: `{name}` must have C, H, W >= 1, got shape {tuple(value.shape)}")


def maps(op: str, features: object, *, same_channels: bool, name: str = "features") -> list[Tensor]:
    """One or more maps of one batch, device and dtype."""
    if isinstance(features, Tensor):
        features = [features]
    if not isinstance(features, Sequence) or len(features) == 0:
        raise TypeError(
            f"murf_fast.{op}: `{name}` must be a non-empty list of tensors (B, C, h, w), got "
            f"{type(features).__name__}{' of length 0' if isinstance(features, Sequence) else ''}"
        )
    first = map_(op, name, features[0], 0)
    batch, channels = first.shape[:2]
    for i, x in enumerate(features[1:], start=1):
        own_batch, own_channels, _, _ = map_(op, name, x, i).shape
        if own_batch != batch:
            raise ValueError(
                f"murf_fast.{op}: `{name}[{i}]` must have the batch size of `{name}[0]`, {batch}, got {own_batch}"
            )
        if x.dtype != first.dtype or not (x.is_cpu and first.is_cpu):
            same_device_and_dtype(op, f"{name}[{i}]", x, f"{name}[0]", first)
        if same_channels and own_channels != channels:
            raise ValueError(
                f"murf_fast.{op}: `{name}[{i}]` must have the channels of `{name}[0]`, {channels}, got {own_channels}"
            )
    return list(features)


def same_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(
            f"murf_fast.{op}: `{name}` must be on the device of `{like_name}`, {like.device}, got {x.device}"
        )


def same_device_and_dtype(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    same_device(op, name, x, like_name, like)
    if x.dtype != like.dtype:
        raise TypeError(f"murf_fast.{op}: `{name}` must have the dtype of `{like_name}`, {like.dtype}, got {x.dtype}")


def companion(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """A large tensor beside maps: of their batch and device, in their dtype or, beside a half one, float32."""
    same_device(op, name, x, like_name, like)
    if x.shape[0] != like.shape[0]:
        raise ValueError(
            f"murf_fast.{op}: `{name}` must have the batch size of `{like_name}`, {like.shape[0]}, got {x.shape[0]}"
        )
    if x.dtype != like.dtype and (x.dtype != torch.float32 or like.dtype == torch.float64):
        raise TypeError(
            f"murf_fast.{op}: `{name}` must have the dtype of `{like_name}`, {like.dtype}, or be float32 beside a half "
            f"type, got {x.dtype}"
        )


def grid(op: str, name: str, size: Any) -> tuple[int, int]:
    """A (height, width) of positive integers; one integer means a square."""
    height, width = (size, size) if not is_sequence(size) else size if len(size) == 2 else (None, None)
    if type(height) is not int or type(width) is not int:
        height, width = _pixels(op, name, size, height), _pixels(op, name, size, width)
    if height <= 0 or width <= 0:
        raise ValueError(f"murf_fast.{op}: `{name}` must be positive, got {size!r}")
    if height > MAX_PIXELS or width > MAX_PIXELS or height * width > MAX_AREA:
        raise ValueError(
            f"murf_fast.{op}: `{name}` must be at most {MAX_PIXELS} rows and columns and 2**40 pixels, got {size!r}"
        )
    return height, width


def _pixels(op: str, name: str, size: object, value: object) -> int:
    try:
        return integer(op, name, value)
    except TypeError:
        raise TypeError(f"murf_fast.{op}: `{name}` must be (height, width) in pixels, got {size!r}") from None


def span(op: str, name: str, value: object, size: int) -> tuple[int, int]:
    """(begin, end) of some of ``size`` rows, at least one."""
    begin, end = pair(op, name, value, 0)
    if not begin < end <= size:
        raise ValueError(f"murf_fast.{op}: `{name}` must be (begin, end) within {size} rows, got {(begin, end)}")
    return begin, end


def optional_grid(op: str, name: str, size: object) -> tuple[int, int] | None:
    return None if size is None else grid(op, name, size)


def mode(op: str, mode: str, antialias: bool) -> None:
    choice(op, "mode", mode, MODES)
    flag(op, "antialias", antialias)
    if antialias and mode not in ANTIALIASED:
        raise ValueError(f"murf_fast.{op}: `antialias=True` needs `mode` in {ANTIALIASED}, got {mode!r}")


def resize(op: str, size: object, how: Mode, antialias: bool, via: object = None, *, name: str = "size") -> Resize:
    size, via = grid(op, name, size), optional_grid(op, "via", via)
    mode(op, how, antialias)
    return Resize(size, how, antialias, via)


def backend(request: str | None, like: Tensor, dtype: torch.dtype | None = None) -> Any:
    """The backend that a call on a tensor takes, see :func:`murf_fast.backends.resolve`; ``dtype`` if not its own."""
    return backends.resolve(request, "cpu" if like.is_cpu else like.device.type, dtype or like.dtype)


def vector(op: str, name: str, x: Any, length: int, like: Tensor, *, what: str) -> Tensor:
    """A floating-point tensor (length,) on the device of `like`."""
    tensor(op, name, x)
    if tuple(x.shape) != (length,):
        raise ValueError(f"murf_fast.{op}: `{name}` must have shape ({length},), {what}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"murf_fast.{op}: `{name}` must be on {like.device}, got {x.device}")
    return x


def bias(op: str, bias: Any, features: list[Tensor]) -> None:
    """None, (C,) or one row per image (B, C)."""
    if bias is None:
        return
    first = features[0]
    tensor(op, "bias", bias)
    channels, batch = first.shape[1], first.shape[0]
    if tuple(bias.shape) not in ((channels,), (batch, channels)):
        raise ValueError(
            f"murf_fast.{op}: `bias` must have shape ({channels},) or ({batch}, {channels}), one entry per channel of "
            f"`features`, got {tuple(bias.shape)}"
        )
    if bias.device != first.device:
        raise ValueError(f"murf_fast.{op}: `bias` must be on {first.device}, got {bias.device}")


def out(
    op: str,
    out: Tensor,
    shape: Sequence[int],
    inputs: Sequence[Tensor | None],
    memory_format: torch.memory_format | None = None,
    *,
    name: str = "features[0]",
) -> None:
    """`out=`: right shape, dtype and device, dense in one of the two layouts (that of ``memory_format``), not an
    input's memory, no gradients. ``name``: that of the first input.
    """
    tensors = [x for x in inputs if x is not None]
    like = tensors[0]
    if not isinstance(out, Tensor):
        raise TypeError(f"murf_fast.{op}: `out` must be a tensor, got {type(out).__name__}")
    dense(op, "out", out)
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"murf_fast.{op}: `out` must have shape {tuple(shape)}, got {tuple(out.shape)}")
    same_device_and_dtype(op, "out", out, name, like)
    if not out.is_contiguous() and not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"murf_fast.{op}: `out` must be dense, contiguous or channels_last, got strides {tuple(out.stride())}"
        )
    if derivatives_wanted([out, *tensors]):
        raise ValueError(
            f"murf_fast.{op}: `out` cannot be given while gradients are needed or tangents come in; call under "
            "torch.no_grad()"
        )
    if out.is_neg() or out.is_conj():
        raise ValueError(f"murf_fast.{op}: `out` must not be a lazy negation; pass out.resolve_neg()")
    for x in tensors:
        if _overlap(out, x):
            raise ValueError(f"murf_fast.{op}: `out` must not share memory with an input")
    if memory_format is not None and not out.is_contiguous(memory_format=memory_format):
        raise ValueError(f"murf_fast.{op}: `out` has strides {tuple(out.stride())}, which is not {memory_format}")


def no_gradients(op: str, why: str, inputs: Sequence[Tensor | None], *, forward_mode: bool = False) -> None:
    """Refuses inputs that want a gradient, or carry a tangent where there is no ``forward_mode`` either."""
    if derivatives_wanted(inputs, tangents=not forward_mode):
        raise ValueError(
            f"murf_fast.{op}: {why} has no gradient{'' if forward_mode else ' and no tangent'}; call under "
            "torch.no_grad() or detach the inputs"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling() or a.device.type == "meta" or a.numel() == 0 or b.numel() == 0:
        return False

    def interval(x: Tensor) -> tuple[int, int]:
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()

    (a0, a1), (b0, b1) = interval(a), interval(b)
    return a0 < b1 and b0 < a1


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
