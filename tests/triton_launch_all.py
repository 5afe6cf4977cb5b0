"""Hands every Triton kernel to Triton's own launcher, with a stand-in for the CUDA driver behind it.

Calls run on CPU tensors: kernels are specialized, compiled and loaded as on a GPU, and what reaches the driver is held
against what the Python launcher passed: the number of parameters against the kernel's, pointers, integers and floats
by value, grid, threads and shared memory. Results mean nothing. Prints a line of JSON for every call.

The code of a kernel is nothing to the stand-in, which runs none. So a kernel of the record (compiled_record.py) is not
compiled again: Triton's launcher gets what the compiler has told of it, and no code.

python tests/triton_launch_all.py FOLDER-OF-LIBCUDA [CALL]    # CALL alone, with no use of the record
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

# Behind the tests, whose offline.py is meant.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compiled_record
import offline
import registry
import torch
import triton
import triton.backends.nvidia.driver as nvidia
from edge_shapes import CALLS
from launches import Uncompiled, uncompiled
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import JITFunction, driver
from triton.runtime.cache import triton_key

from murf_fast import backends, kernels  # noqa: F401  before the variable below, which would make them interpreted

# What lets the ops hand CPU tensors to Triton.
os.environ["TRITON_INTERPRET"] = "1"
# Triton's launchers open the library by its name, which is found because it is open already.
os.environ["TRITON_LIBCUDA_PATH"] = sys.argv[1]
library = ctypes.CDLL(f"{sys.argv[1]}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
library.stand_in_value.restype = ctypes.c_uint64
ARCHITECTURE = 90
CHANGED = ("num_warps",)  # options that the compiler may change
SCRATCH = 2  # parameters that Triton adds to those of a kernel: pointers to memory of its own
FORMATS = {"fp32": ("f", "I"), "fp64": ("d", "Q"), "fp16": ("e", "H"), "i1": ("?", "B")}
FORMATS |= {f"{sign}{bits}": (code, code.upper()) for bits, code in ((8, "b"), (16, "h"), (32, "i"), (64, "q"))
            for sign in "iu"}  # fmt: skip

faults: list[str] = []
kernels_launched: dict[str, int] = {}  # hash of a compiled kernel: parameters that it was passed


allocate = torch.empty


def filled(*shape, **options) -> torch.Tensor:
    """Instead of ``torch.empty``: nothing is computed, and an op may look at what its kernels should have written."""
    return allocate(*shape, **options).fill_(1)


def flat(types, values) -> Iterator[tuple[str, object]]:
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def as_passed(kind: str, value: object) -> tuple[int, int]:
    """Bytes of a parameter, and its value as an unsigned number."""
    if kind[0] == "*":
        return 8, 0 if value is None else value.data_ptr()
    signed, unsigned = FORMATS[kind]
    packed = struct.pack(signed, value) if kind[0] != "u" else struct.pack(signed.upper(), value)
    return len(packed), struct.unpack(unsigned, packed)[0]


class CheckedLauncher(nvidia.CudaLauncher):
    """Triton's launcher, and a look at what the driver was handed."""

    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        self.name, self.hash, self.types = src.fn.__name__, metadata.hash, list(src.signature.values())
        self.expected = [32 * metadata.num_warps, 1, 1, metadata.shared]

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
        parameters = [as_passed(*one) for one in flat(self.types, values)]
        kernels_launched[self.hash] = len(parameters)
        sizes = (ctypes.c_uint * len(parameters))(*(size for size, _ in parameters))
        library.stand_in_expect(len(parameters), sizes)
        before = library.stand_in_launches()
        super().__call__(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values)
        if library.stand_in_launches() != before + 1:
            faults.append(f"{self.name}: not launched on a grid of {(x, y, z)}")
            return
        shape = [library.stand_in_shape(i) for i in range(7)]
        if shape != [x, y, z, *self.expected]:
            faults.append(f"{self.name}: grid, threads and shared memory {shape}, expected {[x, y, z, *self.expected]}")
        for i, (_, value) in enumerate(parameters):
            if library.stand_in_value(i) != value:
                faults.append(f"{self.name}: parameter {i} is {library.stand_in_value(i):#x}, passed was {value:#x}")


def built_quickly(name: str, source: str, folder: str, _, includes: list[str], libraries: list[str]) -> str:
    """Instead of Triton's call of the C compiler: without optimization, as each launcher is called a few times. Their
    only library is the driver's, whose stand-in is open already.
    """
    assert libraries == ["libcuda.so.1"]
    path = Path(folder, name).with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
    folders = [f"-I{one}" for one in (*includes, sysconfig.get_path("include"))]
    command = [offline.COMPILER, source, "-O0", "-w", "-shared", "-fPIC", "-o", path, *folders]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(path)


class StandInDriver:
    """As much of Triton's driver as compiling, loading and launching ask for."""

    def __init__(self):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), CheckedLauncher

    def get_current_target(self):
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiler:
    """``triton.compile``, and what it has told of each kernel beside its code; a kernel that is ``known`` by that gets
    no code.
    """

    def __init__(self, known: dict[str, dict]):
        self.compile, self.known, self.told = triton.compile, known, {}

    def __call__(self, src, target, options: dict) -> CompiledKernel:
        before = uncompiled(src, target, options)
        noted = beforehand(before, target, options)
        facts = self.known.get(before.hash[: compiled_record.DIGITS])
        if facts is None:
            kernel = self.compile(src, target=target, options=options)
            assert kernel.hash == before.hash
            found = {n: v for n, v in kernel.metadata._asdict().items() if n not in noted or n in CHANGED}
            facts = {"parameters": parameters_of(kernel), **found}
        else:
            kernel = without_code(before, noted | facts)
        self.told[kernel.hash] = facts
        return kernel


def parameters_of(kernel: CompiledKernel) -> int:
    """Of a compiled kernel, as the assembler declares it."""
    return kernel.asm["ptx"].split(".entry")[1].split(")")[0].count(".param")


def beforehand(kernel: Uncompiled, target, options: dict) -> dict:
    """What Triton notes of a kernel before it compiles it."""
    parsed = make_backend(target).parse_options({**options, **kernel.src.parse_options()})
    noted = {"hash": kernel.hash, "target": target, "triton_version": triton.__version__}
    return noted | vars(parsed) | get_cache_invalidating_env_vars()


def without_code(kernel: Uncompiled, metadata: dict) -> CompiledKernel:
    """As Triton reads it from its cache."""
    with tempfile.TemporaryDirectory() as folder:
        told, code = Path(folder, f"{kernel.name}.json"), Path(folder, f"{kernel.name}.cubin")
        told.write_text(json.dumps(metadata, default=vars))
        code.write_bytes(b"no code")
        return CompiledKernel(kernel.src, {path.name: path for path in (told, code)}, kernel.hash)


def calls() -> dict[str, Callable[[], object]]:
    found = {
        name: lambda configurations=configurations: configurations("cpu", torch.float32)
        for name, configurations in registry.all_configurations().items()
    }
    return found | CALLS


def launched(label: str) -> dict:
    """What came of a call. In a process of its own: Triton's key of a kernel depends on the kernels before it."""
    of_call: dict[str, CompiledKernel] = {}
    run = JITFunction.run

    def remembered(self, *arguments, **options):
        kernel = run(self, *arguments, **options)
        of_call[kernel.hash] = kernel
        return kernel

    error = None
    with mock.patch.object(JITFunction, "run", remembered), backends.use_backend("triton"):
        try:
            calls()[label]()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    told = []
    for kernel in of_call.values():
        facts, passed = triton.compiler.compile.told[kernel.hash], kernels_launched.get(kernel.hash)
        if passed is None or passed + SCRATCH != facts["parameters"]:
            faults.append(f"{kernel.name}: {passed} parameters and {SCRATCH}, the kernel has {facts['parameters']}")
        told.append({"hash": kernel.hash[: compiled_record.DIGITS], **facts})
    return {"call": label, "kernels": told, "faults": faults, "error": error}


def main() -> None:
    only = sys.argv[2:]
    triton.knobs.build.impl = built_quickly
    driver.set_active(StandInDriver())
    torch.empty = filled
    # Read by every kernel at its first launch.
    triton.compiler.compile = Compiler({} if only else compiled_record.read(compiled_record.LAUNCHED))
    # What every process would begin with. The assembler is a part of the keys: that of triton_compile_all.py's.
    triton_key(), get_ptxas_version(ARCHITECTURE)
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
        for call in pool.imap(launched, only or calls(), chunksize=1):
            print(json.dumps(call), flush=True)


if __name__ == "__main__":
    main()
