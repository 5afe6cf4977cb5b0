"""Compiles every Triton kernel for GPU architectures, without a GPU, exactly as the ops call it.

The configurations that `benchmarks/ops` and `benchmarks/models` register run on CPU tensors under a stand-in for the
driver; each kernel is specialized and compiled instead of being launched. Prints one JSON line per compiled kernel: its
architecture and name, bytes of shared memory, whether it uses tensor cores, its matrix products as (dtype, precision)
and how many there are, and registers and bytes of local memory and stack per thread (spills) as cuobjdump reports them.

python tests/triton_compile_all.py ARCHITECTURE:DTYPE[:tf32] ...
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import registry
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from murf_fast import backends, kernels  # noqa: F401  before the variable below, which would make them interpreted

# What lets the ops hand CPU tensors to Triton.
os.environ["TRITON_INTERPRET"] = "1"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class OfflineDriver:
    """As much of a driver as compilation asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


allocate = torch.empty


def filled(*shape, **options) -> torch.Tensor:
    """Instead of ``torch.empty``: nothing is computed, and an op may look at what its kernels should have written."""
    return allocate(*shape, **options).fill_(1)


def compile_configurations(arch: int, dtype: str, tf32: bool, name: str) -> list[dict]:
    """The kernels of one entry of the registry; in a process of its own, whose caches are empty."""
    driver.set_active(OfflineDriver(arch))
    torch.empty = filled
    torch.backends.cuda.matmul.allow_tf32 = tf32
    compiled = {}
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_only
    with backends.use_backend("triton"):
        registry.all_configurations()[name]("cpu", getattr(torch, dtype))
    return [
        {"arch": arch, "dtype": dtype, "tf32": tf32, "hash": key, **facts(kernel)} for key, kernel in compiled.items()
    ]


def facts(kernel) -> dict:
    mma = any(word in kernel.asm["ptx"] for word in ("mma.sync", "wgmma", "tcgen05.mma"))
    dots = re.findall(r"tt\.dot .*?(?:inputPrecision = (\w+))? *: *tensor<\d+x\d+x(\w+)>", kernel.asm["ttir"])
    products = sorted({(element, precision or "ieee") for precision, element in dots})
    found = {"name": kernel.name, "shared": kernel.metadata.shared, "mma": mma, "products": products, "dots": len(dots)}
    return found | resources(kernel)


def resources(kernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name.lower(): int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}


def main(requests: list[str]) -> None:
    tasks = []
    for request in requests:
        arch, dtype, *tf32 = request.split(":")
        tasks += [(int(arch), dtype, bool(tf32), name) for name in registry.all_configurations()]
    seen = set()
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
        for kernels in pool.starmap(compile_configurations, tasks, chunksize=1):
            for kernel in kernels:
                if kernel["hash"] not in seen:
                    seen.add(kernel.pop("hash"))
                    print(json.dumps(kernel))


if __name__ == "__main__":
    main(sys.argv[1:])
