"""Derivatives of registered ops: reverse mode, forward mode (dual numbers) and second derivatives, or an error.

``torch.library.register_autograd`` drops tangents where no input requires a gradient, leaves a gradient's own gradient
out without a word where no formula is given, and does not run under ``torch.func.grad``. The autograd kernel made here
does what a built-in op's does, at every level of ``torch.func``'s transforms: what has a formula is right, and what has
none raises, naming the op. Where no derivative is wanted it goes straight to the op's implementation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._device import DeviceContext

from murf_fast._torch_versions import any_requires_grad
from murf_fast.backends import AUTO

# Dispatch keys of a plain call (see murf_fast.ops._plain) that the dispatcher has been asked to make all the same.
_PLAIN = {
    DispatchKeySet(device).add(autograd).raw_repr()
    for device, autograd in (
        (DispatchKey.CPU, DispatchKey.AutogradCPU),
        (DispatchKey.CUDA, DispatchKey.AutogradCUDA),
    )
}


def derivatives_wanted(tensors: Iterable[Tensor | None], *, tangents: bool = True) -> bool:
    """Whether any of the tensors wants a gradient or (``tangents``) carries a tangent."""
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return True
    # A compiler looks at graphs, in which tangents are arguments like others.
    return (
        tangents
        and forward_ad._current_level >= 0
        and any(forward_ad.unpack_dual(x).tangent is not None for x in given)
    )


def in_transform() -> bool:
    """Whether a call is inside one of ``torch.func``'s transforms.

    There a tensor does not say whether the caller's parameters want gradients, as its views are of the transform's
    level; writing into tensors is refused for those that do; and results, of whatever arguments, are of that level and
    must not be kept beyond it.
    """
    return torch._C._functorch.maybe_current_level() is not None


def writes_nothing(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a result of these tensors must be made by expressions alone, not by writes into a buffer."""
    return torch.compiler.is_compiling() or in_transform() or derivatives_wanted(tensors)


def is_watched() -> bool:
    """Whether a mode of the user's sees torch's operations and may change them; a default device is none."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    modes = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    return not all(isinstance(mode, DeviceContext) for mode in modes)


def differentiable_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function``, of plain PyTorch, where their own gradients are wanted."""
    inputs = [t for t, n in zip(tensors, needed, strict=True) if n]
    found = iter(torch.autograd.grad(function(*tensors), inputs, grad, create_graph=True))
    return tuple(next(found) if n else None for n in needed)


def autograd_kernel(
    op: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., Any] | None,
    forward_mode: Callable[..., Any] | None,
    settled: Callable[..., Any],
) -> Callable[..., Any]:
    """The op's kernel for the ``Autograd`` key, with the key set first.

    Args:
        op: The op.
        implementation: Its kernel for CPU and CUDA.
        backward, setup_context: As for ``torch.library.register_autograd``, but for the gradients of the last
            arguments, which may be left out where there are none. None: a backward raises.
        forward_mode: ``(args, tangents)`` to the tangent of the result, one for each result if there are several; None:
            tangents raise. ``tangents`` are nested as the arguments are, with None where there is none.
        settled: What becomes of a call of an exported graph: its arguments and nothing, or nothing and its result.
    """
    name = f"murf_fast.{op._opname}"
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
    function = _function(op, name, backward, setup_context)
    positions = _tensor_positions(op)
    redispatch, below, after = op.redispatch, torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    is_grad_enabled = torch.is_grad_enabled

    def kernel(keyset: DispatchKeySet, *args: Any) -> Any:
        # What is traced into a graph may have entered its dual level behind Python's back, and transforms have theirs.
        plain = keyset.raw_repr() in _PLAIN
        if args[-1] == AUTO:
            args, result = settled(args, plain)
            if args is None:
                return result
        if forward_ad._current_level >= 0 or not plain:
            primals, tangents = _split_duals(args, positions)
            if tangents is not None:
                if forward_mode is None:
                    raise NotImplementedError(f"{name}: a forward-mode derivative (jvp) is not implemented")
                return _dual(op(*primals), forward_mode(primals, tangents))
        if is_grad_enabled() and any_requires_grad(*args):
            if writes:
                raise RuntimeError(f"{name}: an operation that writes into its arguments has no gradient")
            return _apply(function, keyset, args, positions)
        if plain:
            return implementation(*args)
        with below():
            return redispatch(keyset & after, *args)

    return kernel


def linear(op: str, *positions: int) -> Callable[..., Any]:
    """``forward_mode`` of an op that is linear in its arguments at ``positions`` together: the op, on the tangents.

    An optional argument without a tangent is left out; another is zeros.
    """

    def forward_mode(args: Sequence[Any], tangents: Sequence[Any]) -> Any:
        args = list(args)
        for i in positions:
            args[i] = filled(args[i], tangents[i])
        return getattr(torch.ops.murf_fast, op)(*args)

    return forward_mode


def filled(values: list[Tensor] | Tensor | None, tangents: Any) -> Any:
    """Tangents with zeros for missing ones; None where an optional tensor has none."""
    if isinstance(values, (list, tuple)):
        return [torch.zeros_like(v) if t is None else t for v, t in zip(values, tangents, strict=True)]
    return tangents


def one_by_one(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """What ``torch.vmap`` makes of the op: one call for every entry of the batch dimension."""

    def entry(value: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [entry(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    def batched(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"murf_fast.{op._opname}: torch.vmap over an empty dimension")
        results = [op(*[entry(a, d, i) for a, d in zip(args, in_dims, strict=True)]) for i in range(info.batch_size)]
        first = results[0]
        if first is None or isinstance(first, Tensor):
            return (None, None) if first is None else (torch.stack(results), 0)
        return type(first)(torch.stack(r) for r in zip(*results, strict=True)), type(first)(0 for _ in first)

    return batched


def reference_second_derivative(
    reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    directions: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Derivatives of an op's gradient, through the plain PyTorch of its reference.

    The gradient is ``J(inputs)^T grads``; returned are the derivatives of its product with ``directions``, with respect
    to ``grads`` and to ``inputs``. Everything is computed in float32 at least and once more differentiable.

    Args:
        reference: Takes the tensors of ``inputs`` that are not None; one result for every entry of ``grads``.
        inputs: Tensors of the op that have gradients, None for absent ones.
        grads: Of its results; None for one that is not used.
        directions: One for every input; None, or an empty tensor, for a gradient that nobody made.
        wanted: Which of ``inputs`` the gradient was made for.
    """
    inputs, directions = cast("list[Tensor]", inputs), cast("list[Tensor]", directions)  # where they are asked for
    given = [i for i, x in enumerate(inputs) if x is not None]
    used = [i for i, g in enumerate(grads) if g is not None]

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        cotangents, values = tensors[: len(used)], tensors[len(used) :]

        def results(*values: Tensor) -> tuple[Tensor, ...]:
            out = reference(*[v.to(torch.promote_types(v.dtype, torch.float32)) for v in values])
            out = (out,) if isinstance(out, Tensor) else tuple(out)
            return tuple(out[i] for i in used)

        out, pullback = _vjp(results, *values)
        found = pullback(tuple(c.to(o.dtype) for c, o in zip(cotangents, out, strict=True)))
        return tuple(g for i, g in zip(given, found, strict=True) if i in asked)

    asked = [i for i in given if wanted[i] and directions[i] is not None and directions[i].shape == inputs[i].shape]
    made, pullback = _vjp(gradient, *[grads[i] for i in used], *[inputs[i] for i in given])
    derivatives = pullback(tuple(directions[i].to(m.dtype) for i, m in zip(asked, made, strict=True)))
    of_grads: list[Tensor | None] = [None] * len(grads)
    of_inputs: list[Tensor | None] = [None] * len(inputs)
    for i, d in zip(used, derivatives, strict=False):
        of_grads[i] = d
    for i, d in zip(given, derivatives[len(used) :], strict=True):
        of_inputs[i] = d
    return of_grads, of_inputs


def _vjp(function: Callable[..., Any], *primals: Tensor | None) -> tuple[Any, Callable[..., Any]]:
    """``torch.func.vjp``, whose results are two without ``has_aux``."""
    return torch.func.vjp(function, *primals)  # type: ignore[return-value]


def _split_duals(args: Sequence[Any], positions: Sequence[int]) -> tuple[list[Any], list[Any] | None]:
    """Arguments without their tangents, and the tangents, or None if there are none."""
    primals: list[Any] = list(args)
    tangents: list[Any] = [None] * len(args)
    found = False
    for i in positions:
        if args[i] is None:
            continue
        is_list = isinstance(args[i], (list, tuple))
        pairs = [forward_ad.unpack_dual(x, level=0) for x in (args[i] if is_list else [args[i]])]
        own_primals, own_tangents = [p.primal for p in pairs], [p.tangent for p in pairs]
        found = found or any(t is not None for t in own_tangents)
        primals[i], tangents[i] = (own_primals, own_tangents) if is_list else (own_primals[0], own_tangents[0])
    return primals, tangents if found else None


def _dual(result: Any, tangent: Any) -> Any:
    if isinstance(result, Tensor):
        return forward_ad.make_dual(result, tangent, level=0)
    return type(result)(forward_ad.make_dual(r, t, level=0) for r, t in zip(result, tangent, strict=True))


def _tensor_positions(op: torch._ops.OpOverload) -> list[int]:
    return [i for i, a in enumerate(op._schema.arguments) if "Tensor" in str(a.type)]


def _apply(function: Any, keyset: DispatchKeySet, args: Sequence[Any], positions: Sequence[int]) -> Any:
    tensors: list[Tensor | None] = []
    for i in positions:
        if isinstance(args[i], (list, tuple)):
            tensors.extend(args[i])
        else:
            tensors.append(args[i])
    with _one_level(enable_single_level_autograd_function):
        result = function.apply(keyset, args, *tensors)
    return list(result) if function.returns_list else result


def _one_level(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> contextlib.AbstractContextManager[Any]:
    """``context`` under a transform of torch.func, at one level of which an op's kernel runs."""
    return context() if torch._C._are_functorch_transforms_active() else contextlib.nullcontext()


@contextlib.contextmanager
def _other_levels() -> Iterator[None]:
    """An ``autograd.Function`` turns derivatives off for what it calls; other levels still want theirs."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _function(
    op: torch._ops.OpOverload, name: str, backward: Callable[..., Any] | None, setup_context: Callable[..., Any] | None
) -> type:
    """The op as an ``autograd.Function`` of (key set, arguments, tensors of the arguments in order)."""
    positions = _tensor_positions(op)
    arguments = op._schema.arguments
    returns_list = len(op._schema.returns) == 1 and "List" in str(op._schema.returns[0].type)
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset

    def forward(ctx, keyset, args, *tensors):
        with below():
            with _one_level(_other_levels):
                result = op.redispatch(keyset & after, *args)
            ctx.lengths = [len(args[i]) if isinstance(args[i], (list, tuple)) else None for i in positions]
            if setup_context is not None:
                setup_context(ctx, args, result)
        return tuple(result) if returns_list else result

    def backward_(ctx, *grads):
        if backward is None:
            raise NotImplementedError(f"{name}: a derivative is not implemented")
        needed = ctx.needs_input_grad
        by_argument: list[Any] = [False] * len(arguments)
        flat = iter(needed[2:])
        for i, length in zip(positions, ctx.lengths, strict=True):
            by_argument[i] = next(flat) if length is None else [next(flat) for _ in range(length)]
        try:
            ctx.needs_input_grad = tuple(by_argument)
            gradients = tuple(backward(ctx, list(grads)) if returns_list else backward(ctx, *grads))
        finally:
            ctx.needs_input_grad = needed
        gradients += (None,) * (len(arguments) - len(gradients))
        of_tensors = list(_flat(gradients, positions, ctx.lengths))
        if any(n and g is None for n, g in zip(needed[2:], of_tensors, strict=True)):
            missing = [a.name for a, n, g in zip(arguments, by_argument, gradients, strict=True) if n and g is None]
            raise NotImplementedError(f"{name}: the derivative for {', '.join(missing)} is not implemented")
        return None, None, *of_tensors

    attributes = {"forward": staticmethod(forward), "backward": staticmethod(backward_), "returns_list": returns_list}
    return type(f"{op._opname}_", (_SingleLevelFunction,), attributes)


def _flat(gradients: Sequence[Any], positions: Sequence[int], lengths: Sequence[int | None]) -> Iterator[Tensor | None]:
    for i, length in zip(positions, lengths, strict=True):
        if length is None:
            yield gradients[i]
        else:
            yield from [None] * length if gradients[i] is None else gradients[i]
