"""Compiles every Triton kernel for GPU architectures, without a GPU, exactly as the ops call it.

The configurations that `benchmarks/ops` and `benchmarks/models` register run on CPU tensors under a stand-in for the
driver; each kernel is specialized and compiled instead of being launched. Prints one JSON line per compiled kernel: its
architecture and name, bytes of shared memory, whether it uses tensor cores, its matrix products as (dtype, precision)
and how many there are, how many products of warp groups miss shared memory (sass/descriptors.py), and registers and
bytes of local memory and stack per thread (spills) as cuobjdump reports them.

python tests/triton_compile_all.py ARCHITECTURE:DTYPE[:tf32][:products][:recorded][:only=OPERATION] ...
python tests/triton_compile_all.py --record    # what offline.py asks for, and the launches, into tests/golden

With `products` only kernels that multiply matrices, as other requests have shown: what else there is does not depend on
the switch for TF32, and little on the chip within a generation. With `recorded` a kernel of the record is not compiled
again: it is known by the key of Triton's cache, which changes with its source, what that calls, constants, options,
architecture, Triton and its assembler.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

# Behind the tests, whose offline.py is meant.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compiled_record
import offline
import registry
import torch
from launches import captured
from sass.code import blocks_of, disassembled, instructions, resources
from sass.descriptors import strays
from triton.runtime.cache import triton_key


def compile_configurations(
    arch: int, dtype: str, tf32: bool, name: str, wanted: set[str] | None, known: dict[str, dict]
) -> list[dict]:
    """The kernels of one entry of the registry (those ``wanted``), in a process of its own, whose caches are empty."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    with captured(
        arch, lambda kernel: wanted is None or kernel in wanted, lambda kernel: short(kernel) not in known
    ) as launches:
        registry.all_configurations()[name]("cpu", getattr(torch, dtype))
    kernels = {short(launch.kernel): launch.kernel for launch in launches}
    request = {"arch": arch, "dtype": dtype, "tf32": tf32}
    return [{**request, "hash": key, **(known.get(key) or facts(kernel))} for key, kernel in kernels.items()]


def short(kernel) -> str:
    return kernel.hash[: compiled_record.DIGITS]


def facts(kernel) -> dict:
    mma = any(word in kernel.asm["ptx"] for word in ("mma.sync", "wgmma", "tcgen05.mma"))
    dots = re.findall(r"tt\.dot .*?(?:inputPrecision = (\w+))? *: *tensor<\d+x\d+x(\w+)>", kernel.asm["ttir"])
    products = sorted({(element, precision or "ieee") for precision, element in dots})
    found = {"name": kernel.name, "shared": kernel.metadata.shared, "mma": mma, "products": products, "dots": len(dots)}
    if "wgmma" in kernel.asm["ptx"]:
        found["strays"] = len(strays(blocks_of(instructions(disassembled(kernel.asm["cubin"])))))
    return found | resources(kernel.asm["cubin"])


def everything(requests: Iterable[str]) -> Iterator[dict]:
    """A dictionary for every kernel, that of two requests once."""
    parts = [request.split(":") for request in requests]
    known = compiled_record.read() if any("recorded" in part for part in parts) else {}
    seen, products = set(), set()
    # What every process would begin with: a hash of half a gigabyte of Triton's own, and the benchmarks' files.
    triton_key()
    configurations = registry.all_configurations()
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
        for of_products in (False, True):
            tasks = [
                (int(arch), dtype, "tf32" in options, name, products if of_products else None,
                 known if "recorded" in options else {})
                for arch, dtype, *options in parts
                if ("products" in options) == of_products
                for name in [o[5:] for o in options if o.startswith("only=")] or configurations
            ]  # fmt: skip
            for kernels in pool.starmap(compile_configurations, tasks, chunksize=1):
                for kernel in kernels:
                    if kernel["products"]:
                        products.add(kernel["name"])
                    if kernel["hash"] not in seen:
                        seen.add(kernel["hash"])
                        yield kernel


def main(arguments: list[str]) -> None:
    if arguments == ["--record"]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= offline.environment(Path(folder))
            compiled_record.write(everything(compiled_record.REQUESTS))
            calls = offline.launch(Path(folder))
            compiled_record.write((kernel for call in calls for kernel in call["kernels"]), compiled_record.LAUNCHED)
        return
    for kernel in everything(arguments):
        print(json.dumps(kernel))


if __name__ == "__main__":
    main(sys.argv[1:])
