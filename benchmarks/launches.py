"""The launches of a call, compiled for a GPU that is not here and with the arguments that they would have had."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from sass.run import Region
from torch import Tensor
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import JITFunction, driver
from triton.runtime.cache import get_cache_key

from murf_fast import backends, kernels  # noqa: F401  before `captured`, in which they would become interpreted ones

assembler = importlib.import_module("murf_fast.kernels.assembler")
patch_embed = importlib.import_module("murf_fast.ops.patch_embed")  # the op hides its module

FORMATS = {"fp32": "f", "fp64": "d", "fp16": "e", "i1": "?"} | {
    f"{sign}{bits}": code.upper() if sign == "u" else code
    for bits, code in ((8, "b"), (16, "h"), (32, "i"), (64, "q"))
    for sign in "iu"
}


class OfflineDriver:
    """As much of Triton's driver as compilation asks for."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Uncompiled:
    """In the place of a compiled kernel: all that is known of it before it is compiled."""

    name: str
    hash: str
    src: object


def uncompiled(src, target: GPUTarget, options: dict) -> Uncompiled:
    """Instead of ``triton.compile``. The hash is that of the compiled kernel, by which Triton's cache knows it: of the
    source with all that it calls, constants, specializations, options, the architecture, Triton and its assembler.
    """
    backend = make_backend(target)
    parsed = backend.parse_options({**options, **src.parse_options()})
    key = get_cache_key(src, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    return Uncompiled(src.name, hashlib.sha256(key.encode()).hexdigest(), src)


@dataclass(frozen=True)
class Launch:
    """``kernel`` has its ``asm``, or is `Uncompiled`; ``arguments`` are (Triton's type, value), without constants."""

    kernel: object
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, object], ...]

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tensors(self) -> list[Tensor | None]:
        """Those of the pointers among the arguments."""
        return [value for kind, value in self.arguments if kind[0] == "*"]

    def place(self, program: int) -> tuple[int, int, int]:
        x, y, _ = self.grid
        return program % x, program // x % y, program // x // y

    def packed(self) -> bytes:
        """The arguments as they lie in the constant bank, each at a multiple of its size."""
        data = b""
        for kind, value in self.arguments:
            if kind[0] == "*":
                part = struct.pack("Q", 0 if value is None else value.data_ptr())
            else:
                part = struct.pack("<" + FORMATS[kind], value)
            data += bytes(-len(data) % len(part)) + part
        return data

    def regions(self) -> list[Region]:
        found = []
        for tensor in filter(lambda t: t is not None and t.numel(), self.tensors):
            integer = not tensor.dtype.is_floating_point
            found.append(Region(tensor.data_ptr(), extent(tensor) * tensor.element_size(), integer))
        return found


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


@contextlib.contextmanager
def captured(
    architecture: int, wanted: Callable[[str], bool], compiles: Callable[[Uncompiled], bool] = lambda kernel: True
) -> Iterator[list[Launch]]:
    """Within, kernels are compiled and noted instead of launched, those whose names are not ``wanted`` are neither;
    what ``compiles`` denies is noted as it is before that.
    """
    launches: list[Launch] = []
    functions: set[JITFunction] = set()
    compile_ = JITFunction.run

    def compile_some(src, target: GPUTarget, options: dict):
        kernel = uncompiled(src, target, assembler.marked(target, options))
        if not compiles(kernel):
            return kernel
        return assembler.compiled(triton.compile, src, target, options)

    def note(self: JITFunction, *arguments, grid, warmup, **options):
        if not wanted(self.__name__):
            return None
        functions.add(self)
        binder = self.device_caches[0][-1]
        self.compile = compile_some
        kernel = compile_(self, *arguments, grid=grid, warmup=True, **options)
        bound = binder(*arguments, **options)[0]
        if isinstance(grid, Callable):
            grid = grid(bound)
        shape = (*grid, 1, 1)[:3]
        flattened = flat(list(kernel.src.signature.values()), list(bound.values()))
        launches.append(Launch(kernel, shape, tuple(flattened)))
        return kernel

    driver.set_active(OfflineDriver(architecture))
    allocate, torch.empty = torch.empty, plausible
    before, JITFunction.run = os.environ.get("TRITON_INTERPRET", "0"), note
    os.environ["TRITON_INTERPRET"] = "1"  # what lets the ops hand CPU tensors to Triton
    try:
        with backends.use_backend("triton"), mock.patch.object(patch_embed, "_is_on_cpu", return_value=False):
            yield launches
    finally:
        JITFunction.run, torch.empty = compile_, allocate
        os.environ["TRITON_INTERPRET"] = before
        for function in functions:
            function.device_caches.clear()  # of kernels that are not compiled, and of this architecture


_allocate = torch.empty
LARGE = 64 << 20  # bytes, beyond which memory is fresh from the system: zeros, in no need of memory until touched


def plausible(*shape, **options) -> Tensor:
    """Instead of ``torch.empty``: an op may look at what its kernels should have written."""
    tensor = _allocate(*shape, **options)
    return tensor if tensor.numel() * tensor.element_size() > LARGE else tensor.fill_(1)


def flat(types, values) -> Iterator[tuple[str, object]]:
    """Arguments in the order of the kernel's parameters; constants have none."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind != "constexpr":
            yield kind, value
