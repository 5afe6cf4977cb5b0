"""Registration of ops under the ``murf_fast`` namespace, and what every op needs around its kernels.

An op is one schema with one Python implementation for CPU and CUDA, which allocates the result and hands it to the
launcher of the backend named by its last argument ("native" or "triton"). The reference does not come this way: it is
plain PyTorch, called by the op's function directly, with PyTorch's own gradients.

Only graphs that ``torch.export`` captured have "auto" there, which is a backend, or the op's reference, once they run;
and which ONNX, where an op has a form in it, gets as the reference's standard nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from murf_fast import _fork, backends
from murf_fast._layout import is_channels_last
from murf_fast.backends import AUTO, BackendUnavailableError
from murf_fast.ops._derivatives import autograd_kernel, one_by_one
from murf_fast.ops._plain import is_plain
from murf_fast.ops._resize import Resize
from murf_fast.tables.resize import AxisTable, axis, is_large


class Outline(NamedTuple):
    """What a backward must know of a tensor whose values it does not need."""

    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool


_library = torch.library.Library("murf_fast", "DEF")


def register(
    schema: str,
    contract: Callable[..., Any],
    empty: Callable[..., Any] | None,
    launch: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    keeps: bool = True,
    keeps_result: int | None = None,
    forward_mode: Callable[..., Any] | None = None,
    reference: Callable[..., Any] | None = None,
    onnx: bool = False,
    checked: bool = False,
) -> Callable[..., Any]:
    """Defines ``murf_fast::<schema>`` with its CPU and CUDA implementation, fake implementation and derivatives.

    The functions take the arguments of the schema by position, the last of which is the backend. Those that say how
    maps are resized (``size``, ``interpolation``, ``antialias``, ``via``) come as one :class:`Resize` in the place of
    ``interpolation``.

    Args:
        schema: Name, arguments and results; an argument that is written into is ``Tensor(a!)``. Tensors with gradients
            come first.
        contract: Takes the op's name and the arguments; raises a TypeError or ValueError where ``launch`` would make
            an address of something else than it thinks.
        empty: The results, not yet computed: shapes, dtypes and layouts. It makes those of the fake implementation,
            too. None for an op that writes into its argument.
        launch: Takes the arguments and ``empty``'s results, which it fills. Not called for a batch without entries,
            whose results are zeros.
        backward: Takes what is wanted (a truth value for every argument, a list for a list), the arguments and the
            gradients of the results; returns the gradients of the first arguments, the rest having none. None: a
            backward raises, naming the op.
        keeps: Whether the arguments of ``backward`` have values. Else an :class:`Outline` stands for a tensor.
        keeps_result: Of several results one without a gradient, which ``backward`` finds behind the arguments.
        forward_mode: The result's tangent, see :func:`murf_fast.ops._derivatives.autograd_kernel`. None: tangents
            raise, naming the op.
        reference: The results of the arguments by plain PyTorch, in the layouts of ``empty``'s: for exported graphs.
            None: they need the kernels. :data:`LAUNCHED`: ``launch`` takes the backend "reference", too.
        onnx: Whether the reference is made of operations that are standard nodes of ONNX.
        checked: Whether whoever calls the returned function has checked all that the contract asks for, and chosen a
            backend, which keeps torch to one thread in a process made by fork.

    Returns:
        The op, for calls within this library. Where nothing of PyTorch's dispatcher is needed it is passed by.
    """
    op = schema[: schema.index("(")]
    name = f"murf_fast::{op}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    overload = getattr(torch.ops.murf_fast, op).default
    arguments = overload._schema.arguments
    joined, flat, places = _packing([a.name for a in arguments])
    positions = [i for i, place in enumerate(places) if place is not None and "Tensor" in str(arguments[place].type)]
    if empty:
        work = _allocating(empty, launch)
    else:
        written = [a.alias_info is not None and a.alias_info.is_write for a in arguments].index(True)
        work = _writing(launch, places.index(written))
    exported = _Exported(op, contract, reference, onnx, work)

    def implementation(*arguments: Any) -> Any:
        return checking(*joined(arguments))

    def checking(*arguments: Any) -> Any:
        if arguments[-1] == AUTO:
            backend = exported.backend(arguments)
            if backend == "reference":
                return exported.by_reference(arguments)
            arguments = (*arguments[:-1], backend)
        contract(op, *arguments)
        if _fork.is_child():
            with _fork.calling_thread_only():
                return work(*arguments)
        return work(*arguments)

    def fake(*arguments: Any) -> Any:
        _on_one_device(op, arguments)
        return None if empty is None else empty(*joined(arguments))

    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(name, fake, lib=_library)
    setup_context = None
    if backward is not None:
        setup_context, backward = _keeping(joined, backward, keeps, keeps_result, exported.kernels_of)
    settled = exported.settled_by(joined, is_differentiable=backward is not None)
    kernel = autograd_kernel(overload, implementation, backward, setup_context, forward_mode, settled)
    _library.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(name, one_by_one(overload), lib=_library)
    plain = work if checked else checking

    def call(*arguments: Any) -> Any:
        tensors: list[Tensor] = []
        for i in positions:
            value = arguments[i]
            if isinstance(value, list):
                tensors += value
            elif value is not None:
                tensors.append(value)
        return plain(*arguments) if is_plain(tensors) else overload(*flat(arguments))

    return call


LAUNCHED: Any = object()


class _Exported:
    """What a call in an exported graph comes to, whose backend is "auto"."""

    def __init__(
        self, op: str, contract: Callable[..., Any], reference: Any, onnx: bool, work: Callable[..., Any]
    ) -> None:
        self.op, self._contract, self._reference, self._onnx, self._work = op, contract, reference, onnx, work

    def backend(self, arguments: Sequence[Any]) -> str:
        """That of this process for these tensors."""
        like = _first_tensor(arguments)
        if self._reference is None:
            return self.kernels_of(like)
        return backends.resolve(None, like.device.type, like.dtype)

    def kernels_of(self, like: Tensor) -> str:
        """The backend of what has kernels alone: gradients, too."""
        backend = backends.resolve(None, like.device.type, like.dtype)
        if backend != "reference":
            return backend
        preferred = "triton" if like.is_cuda else "native"
        reasons = backends.reasons_against(preferred, like.device.type, like.dtype)
        raise BackendUnavailableError(
            f"murf_fast.{self.op}: this part of an exported graph needs the kernels of backend {preferred!r}: "
            + ("; ".join(reasons) or "the reference was asked for, and it has none")
        )

    def by_reference(self, arguments: Sequence[Any]) -> Any:
        """The results of arguments of the op's functions, with a :class:`Resize`."""
        self._contract(self.op, *arguments)
        like = _first_tensor(arguments)
        if self._reference is LAUNCHED or not like.shape[0]:
            return self._work(*arguments[:-1], "reference")
        return self._reference(*arguments)

    def settled_by(self, joined: Callable[..., Any], is_differentiable: bool) -> Callable[..., Any]:
        """``(flat arguments, plain)`` to (flat arguments, None), or to (None, results) where gradients are those of
        plain PyTorch, or nodes of ONNX are wanted.

        ``plain``: nobody traces, so that the choice can be made.
        """

        def settled(arguments: tuple[Any, ...], plain: bool) -> tuple[tuple[Any, ...] | None, Any]:
            if torch.onnx.is_in_onnx_export():
                if not self._onnx:
                    raise NotImplementedError(
                        f"murf_fast.{self.op}: this operation has no form in ONNX; export with torch.export or "
                        "AOTInductor, or everything but it"
                    )
                return None, self.by_reference(joined(arguments))
            if not plain or not is_differentiable or self._reference in (None, LAUNCHED):
                return arguments, None
            backend = self.backend(arguments)
            if backend == "reference":
                return None, self.by_reference(joined(arguments))
            return (*arguments[:-1], backend), None

        return settled


def _first_tensor(arguments: Sequence[Any]) -> Tensor:
    first = arguments[0]
    return first[0] if isinstance(first, (list, tuple)) else first


def _packing(names: Sequence[str]) -> tuple[Callable[..., Any], Callable[..., Any], list[int | None]]:
    """From the arguments of a schema to those with a :class:`Resize`, and back; and where the former come from."""
    if "antialias" not in names:
        return tuple, tuple, list(range(len(names)))
    begin = names.index("interpolation")
    has_via = "via" in names
    end = begin + 2 + has_via
    size = names.index("size") if "size" in names else begin
    after = size + ("size" in names)
    place = begin - ("size" in names)  # of the Resize
    places = [*range(size), *range(after, begin), None, *range(end, len(names))]

    def joined(values: Sequence[Any]) -> tuple[Any, ...]:
        mode, antialias, *via = values[begin:end]
        via = tuple(via[0]) if has_via and via[0] is not None else None
        grid = tuple(values[size]) if after > size else None
        return (*values[:size], *values[after:begin], Resize(grid, mode, antialias, via), *values[end:])

    def flat(values: Sequence[Any]) -> tuple[Any, ...]:
        grid, mode, antialias, via = values[place]
        how = (mode, antialias, via) if has_via else (mode, antialias)
        grid = (grid,) if after > size else ()
        return (*values[:size], *grid, *values[size:place], *how, *values[place + 1 :])

    return joined, flat, places


class _Saved(int):
    """Which of a context's saved tensors."""


def _keeping(
    joined: Callable[..., Any],
    backward: Callable[..., Any],
    keeps: bool,
    result: int | None,
    kernels_of: Callable[[Tensor], str],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What an ``autograd.Function`` does around ``backward``: keeps the arguments and brings them back."""

    def setup_context(ctx, inputs, output) -> None:
        tensors: list[Tensor] = []

        def kept(value: Any) -> Any:
            if isinstance(value, list):
                return [kept(entry) for entry in value]
            if not isinstance(value, Tensor):
                return value
            if not keeps:
                return Outline(value.shape, value.dtype, value.ndim == 4 and is_channels_last(value))
            tensors.append(value)
            return _Saved(len(tensors) - 1)

        arguments = joined(inputs)
        if result is not None:
            arguments = (*arguments, output[result])
            ctx.mark_non_differentiable(output[result])
        ctx.arguments = [kept(value) for value in arguments]
        ctx.save_for_backward(*tensors)

    def restored(value: Any, saved: Sequence[Tensor]) -> Any:
        if isinstance(value, list):
            return [restored(entry, saved) for entry in value]
        return saved[value] if isinstance(value, _Saved) else value

    def with_arguments(ctx, *grads: Any) -> Sequence[Any]:
        saved = ctx.saved_tensors
        arguments = [restored(value, saved) for value in ctx.arguments]
        place = -1 if result is None else -2  # of the backend
        if arguments[place] == AUTO and is_plain([g for g in grads if g is not None]):
            arguments[place] = kernels_of(next(g for g in grads if g is not None))
        return backward(ctx.needs_input_grad, arguments, *grads)

    return setup_context, with_arguments


def _allocating(empty: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
    def work(*arguments: Any) -> Any:
        results = empty(*arguments)
        if _first_tensor(arguments).shape[0]:
            launch(*arguments, results)
        else:
            for result in [results] if isinstance(results, Tensor) else results:
                result.zero_()
        return results

    return work


def _writing(launch: Callable[..., Any], position: int) -> Callable[..., Any]:
    """Raises the version of what it writes into: whoever saved that tensor must notice."""

    def work(*arguments: Any) -> None:
        out = arguments[position]
        torch.autograd.graph.increment_version(out)
        if out.numel():
            launch(*arguments)

    return work


def _on_one_device(op: str, arguments: Sequence[Any]) -> None:
    """A fake implementation also takes a call that mixes meta tensors with others."""
    tensors = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
    if len({t.device.type == "meta" for t in tensors}) > 1:
        devices = ", ".join(sorted({str(t.device) for t in tensors}))
        raise ValueError(f"murf_fast.{op}: all tensors must be on one device, got {devices}")


@lru_cache(maxsize=4096)
def axes_of(
    height: int,
    width: int,
    size: tuple[int, int],
    mode: str,
    antialias: bool,
    via: tuple[int, int] | None = None,
    scale_factor: tuple[float, float] | None = None,
) -> tuple[AxisTable, AxisTable]:
    """Tables of both axes for a map of height x width; ``size`` to ``via`` are a :class:`Resize`."""
    via_y, via_x = via or (None, None)
    factor_y, factor_x = scale_factor or (None, None)
    large = is_large(mode, size), via is not None and is_large(mode, via)
    return (
        axis(height, size[0], mode, antialias, via_y, factor_y, *large),
        axis(width, size[1], mode, antialias, via_x, factor_x, *large),
    )


def axes_of_maps(features: Sequence[Tensor], *resize) -> list[tuple[AxisTable, AxisTable]]:
    """The tables of every map, found by one lookup."""
    return _axes_of_shapes(tuple([f.shape for f in features]), *resize)


@lru_cache(maxsize=4096)
def _axes_of_shapes(shapes: tuple[torch.Size, ...], *resize) -> list[tuple[AxisTable, AxisTable]]:
    return [axes_of(height, width, *resize) for _, _, height, width in shapes]


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


def layout_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_map(like: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    if not channels_last:
        return like.new_empty(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def as_float32(x: Tensor | None) -> Tensor | Any:
    """A small companion as kernels take it: float32, contiguous."""
    return None if x is None else x.to(torch.float32).contiguous()


def written(out: Tensor, result: Tensor) -> None:
    """``out.copy_(result)`` for the reference of an op that writes: whoever saved ``out`` must notice."""
    torch.autograd.graph.increment_version(out)
    out.copy_(result)


def bias_gradient(gradient: Tensor, bias: Tensor | Outline) -> Tensor:
    """Of a bias (C,) or (B, C), which is added to every pixel."""
    return gradient.sum((0, 2, 3) if len(bias.shape) == 1 else (2, 3), dtype=torch.float32).to(bias.dtype)


def float32_rows(bias: Tensor | None) -> Tensor | None:
    """The bias as kernels take it: (1, C) or (B, C), float32, dense."""
    return None if bias is None else as_float32(bias).view(-1, bias.shape[-1])
