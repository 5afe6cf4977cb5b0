"""What Triton kernels are compiled for, and the records of what came of it: golden/compiled.json for the tests of the
code, golden/launched.json for those of the launches.

A kernel is known by the key of Triton's cache, which changes with its source, what that calls, constants, options,
architecture, Triton and its assembler. So a record can be behind, which costs time, and not wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

# What each architecture is asked for: one dtype in whole (sm_90 two), and products, whose instructions and tiles are
# its own, in others, too; the half dtypes differ by a conversion.
WHOLE = ("90:float32:recorded", "90:bfloat16:recorded", "80:float16:recorded", "100:bfloat16:recorded")
PRODUCTS = ("80:float32", "90:float32:tf32", "100:float32", "89:float16", "120:float16")
REQUESTS = (*WHOLE, *(f"{request}:products:recorded" for request in PRODUCTS))
# What a line of triton_compile_all.py says of who asked.
ASKED = ("arch", "dtype", "tf32", "hash")
COMPILED = Path(__file__).parent / "golden" / "compiled.json"
LAUNCHED = COMPILED.with_name("launched.json")
DIGITS = 16  # of a hash


def read(path: Path = COMPILED) -> dict[str, dict]:
    """Facts of kernels by the first `DIGITS` of their hashes."""
    return {key: facts for facts, keys in json.loads(path.read_text()) for key in keys}


def write(kernels: Iterable[dict], path: Path = COMPILED) -> None:
    """Facts, and the hashes of the kernels that they are of."""
    rows: dict[str, set[str]] = {}
    for kernel in kernels:
        facts = {name: value for name, value in kernel.items() if name not in ASKED}
        rows.setdefault(json.dumps(facts), set()).add(kernel["hash"])
    lines = ",\n".join(f"[{facts}, {json.dumps(sorted(keys))}]" for facts, keys in sorted(rows.items()))
    path.write_text(f"[\n{lines}\n]\n")
