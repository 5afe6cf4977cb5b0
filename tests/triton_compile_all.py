"""Compiles every Triton kernel for GPU architectures, without a GPU, exactly as the ops call it.

The configurations that `benchmarks/ops` and `benchmarks/models` register run on CPU tensors under a stand-in for the
driver; each kernel is specialized and compiled instead of being launched. Prints one JSON line per compiled kernel: its
architecture and name, bytes of shared memory, whether it uses tensor cores, its matrix products as (dtype, precision)
and how many there are, and registers and bytes of local memory and stack per thread (spills) as cuobjdump reports them.

python tests/triton_compile_all.py ARCHITECTURE:DTYPE[:tf32][:products] ...

With `products` only kernels that multiply matrices, as other requests have shown: what else there is does not depend on
the switch for TF32, and little on the chip within a generation.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import registry
import torch
from launches import captured
from sass.code import resources


def compile_configurations(arch: int, dtype: str, tf32: bool, name: str, wanted: set[str] | None) -> list[dict]:
    """The kernels of one entry of the registry (those ``wanted``), in a process of its own, whose caches are empty."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    with captured(arch, lambda kernel: wanted is None or kernel in wanted) as launches:
        registry.all_configurations()[name]("cpu", getattr(torch, dtype))
    compiled = {launch.kernel.hash: launch.kernel for launch in launches}
    return [
        {"arch": arch, "dtype": dtype, "tf32": tf32, "hash": key, **facts(kernel)} for key, kernel in compiled.items()
    ]


def facts(kernel) -> dict:
    mma = any(word in kernel.asm["ptx"] for word in ("mma.sync", "wgmma", "tcgen05.mma"))
    dots = re.findall(r"tt\.dot .*?(?:inputPrecision = (\w+))? *: *tensor<\d+x\d+x(\w+)>", kernel.asm["ttir"])
    products = sorted({(element, precision or "ieee") for precision, element in dots})
    found = {"name": kernel.name, "shared": kernel.metadata.shared, "mma": mma, "products": products, "dots": len(dots)}
    return found | resources(kernel.asm["cubin"])


def main(requests: list[str]) -> None:
    whole = [request for request in requests if "products" not in request.split(":")]
    seen, products = set(), set()
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
        for part, wanted in ((whole, None), ([r for r in requests if r not in whole], products)):
            tasks = [
                (int(arch), dtype, "tf32" in options, name, wanted)
                for arch, dtype, *options in (request.split(":") for request in part)
                for name in registry.all_configurations()
            ]
            for kernels in pool.starmap(compile_configurations, tasks, chunksize=1):
                for kernel in kernels:
                    if kernel["products"]:
                        products.add(kernel["name"])
                    if kernel["hash"] not in seen:
                        seen.add(kernel.pop("hash"))
                        print(json.dumps(kernel))


if __name__ == "__main__":
    main(sys.argv[1:])
