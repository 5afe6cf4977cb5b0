"""The CUDA path of a call without a GPU: fake tensors that say they are on one, and what a capture may not do.

Fake tensors have shapes, dtypes and devices but no memory, so what is seen is which operations a call makes on which
devices, not what they compute. A build of torch without CUDA can neither index such tensors nor copy between them from
Python, which the function mode here does by operations instead.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)


class _WithoutDevice(TorchFunctionMode):
    """Methods whose bindings ask for the device's driver before anything can stand in for it."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is Tensor.__getitem__:
            return _indexed(*arguments)
        if function is Tensor.__setitem__:
            x, index, value = arguments
            part = _indexed(x, index)
            torch.ops.aten.copy.default(part, value) if isinstance(value, Tensor) else part.fill_(value)
            return None
        if function is Tensor.copy_:
            torch.ops.aten.copy.default(*arguments, **options)
            return arguments[0]
        if function is Tensor.contiguous:
            x, layout = arguments[0], options.get("memory_format", torch.contiguous_format)
            return x if x.is_contiguous(memory_format=layout) else x.clone(memory_format=layout)
        return function(*arguments, **options)


def _indexed(x: Tensor, index: object) -> Tensor:
    index = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in index:
        at = index.index(Ellipsis)
        used = sum(i is not None for i in index) - 1
        index[at : at + 1] = [slice(None)] * (x.ndim - used)
    axis = 0
    for i in index:
        if i is None:
            x = x.unsqueeze(axis)
        elif isinstance(i, slice):
            x = torch.ops.aten.slice.Tensor(x, axis, i.start, i.stop, 1 if i.step is None else i.step)
        elif isinstance(i, Tensor):
            raise NotImplementedError("an index that is a tensor")
        else:
            x = torch.ops.aten.select.int(x, axis, i)
            continue
        axis += 1
    return x


class Operations(TorchDispatchMode):
    """Counts operations by name, and with ``capture`` refuses those that a CUDA graph cannot hold.

    Those are reads of values by the host and copies between host and device: a graph would read or write memory that
    is gone when it is replayed.
    """

    def __init__(self, capture: bool = False) -> None:
        super().__init__()
        self.counts, self.capture = Counter(), capture

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        name = function._schema.name
        self.counts[name] += 1
        if self.capture:
            tensors = [t for t in tree_leaves((arguments, options, result)) if isinstance(t, Tensor)]
            # Numbers of Python are tensors of the host without dimensions, passed by value.
            kinds = {t.device.type for t in tensors if t.device.type != "cpu" or t.ndim or t.dtype.is_complex}
            if len(kinds) > 1:
                raise AssertionError(f"{name} mixes {sorted(kinds)}, which a CUDA graph cannot hold")
        return result


@contextlib.contextmanager
def fake_cuda(capture: bool = False) -> Iterator[Operations]:
    """Within the block tensors may be made on CUDA; reads of their values raise, as no fake tensor has any."""
    driver = {"is_available": True, "is_current_stream_capturing": capture, "get_device_capability": (9, 0)}
    with contextlib.ExitStack() as stack:
        for name, answer in driver.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        stack.enter_context(mock.patch("torch._prims_common.wrappers._safe_copy_out", lambda **given: given["copy_to"]))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_WithoutDevice())
        yield stack.enter_context(Operations(capture))


def moved(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` with fake parameters and buffers on CUDA, the floating ones of ``dtype``; within :func:`fake_cuda`."""

    def fake(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device=CUDA)

    for part in module.modules():
        for name, x in part._parameters.items():
            part._parameters[name] = None if x is None else nn.Parameter(fake(x), requires_grad=False)
        for name, x in part._buffers.items():
            part._buffers[name] = None if x is None else fake(x)
    return module
