"""Registration of ops under the ``murf_fast`` namespace, and what every op needs around its kernels.

An op is one schema with one Python implementation for CPU and CUDA, which allocates the result and hands it to the
launcher of the backend named by its last argument ("native" or "triton"). The reference does not come this way: it is
plain PyTorch, called by the op's function directly, with PyTorch's own gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from murf_fast.ops._contract import guarded, guarded_fake
from murf_fast.ops._derivatives import autograd_kernel, one_by_one
from murf_fast.tables.resize import AxisTable, axis, is_large

_library = torch.library.Library("murf_fast", "DEF")


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    forward_mode: Callable | None = None,
) -> None:
    """Defines ``murf_fast::<schema>`` with its CPU and CUDA implementation, fake implementation and derivatives.

    Args:
        schema: Name, arguments and results; an argument that is written into is ``Tensor(a!)``.
        implementation, fake: Take the arguments of the schema, by position; called behind the op's contract.
        backward, setup_context: As for ``torch.library.register_autograd``. None: a backward raises, naming the op.
        forward_mode: The result's tangent, see :func:`murf_fast.ops._derivatives.autograd_kernel`. None: tangents
            raise, naming the op.
    """
    op = schema[: schema.index("(")]
    name = f"murf_fast::{op}"
    implementation, fake = guarded(op, implementation), guarded_fake(op, fake)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    overload = getattr(torch.ops.murf_fast, op).default
    implementation = _raising_versions(overload, implementation)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(name, fake, lib=_library)
    kernel = autograd_kernel(overload, implementation, backward, setup_context, forward_mode)
    _library.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(name, one_by_one(overload), lib=_library)


def _raising_versions(op: torch._ops.OpOverload, implementation: Callable) -> Callable:
    """The implementation, which raises the version of what it writes into: whoever saved that tensor must notice."""
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return implementation

    (position,) = written
    increment = torch.autograd.graph.increment_version

    def with_versions(*args):
        increment(args[position])
        return implementation(*args)

    return with_versions


def axes_of(
    height: int,
    width: int,
    size: Sequence[int],
    mode: str,
    antialias: bool,
    via: Sequence[int] | None = None,
    scale_factor: Sequence[float] | None = None,
) -> tuple[AxisTable, AxisTable]:
    """Tables of both axes for a map of height x width."""
    via_y, via_x = via or (None, None)
    factor_y, factor_x = scale_factor or (None, None)
    large = is_large(mode, size), via is not None and is_large(mode, via)
    return (
        axis(height, size[0], mode, antialias, via_y, factor_y, *large),
        axis(width, size[1], mode, antialias, via_x, factor_x, *large),
    )


def axes_of_maps(features: Sequence[Tensor], size, mode, antialias, via) -> list[tuple[AxisTable, AxisTable]]:
    return [axes_of(f.shape[2], f.shape[3], size, mode, antialias, via) for f in features]


def is_channels_last(x: Tensor) -> bool:
    """Whether a map lies channels_last in memory, by its strides; dense or not. Undecided layouts count as planar."""
    return x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def wants_channels_last(op: str, memory_format: torch.memory_format | None, like: Tensor) -> bool:
    """The layout of a result: as asked, else that of the first input."""
    if memory_format is None or memory_format == torch.preserve_format:
        return is_channels_last(like)
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(
            f"murf_fast.{op}: `memory_format` must be None, torch.channels_last or torch.contiguous_format, "
            f"got {memory_format}"
        )
    return memory_format == torch.channels_last


def empty_map(like: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def float32_rows(bias: Tensor | None) -> Tensor | None:
    """The bias as kernels take it: (1, C) or (B, C), float32, dense."""
    if bias is None:
        return None
    return bias.to(torch.float32).reshape(-1, bias.shape[-1]).contiguous()
