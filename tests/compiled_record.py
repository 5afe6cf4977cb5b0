"""What Triton kernels are compiled for, and the record of what came of it: golden/compiled.json.

A kernel is known by the key of Triton's cache, which changes with its source, what that calls, constants, options,
architecture, Triton and its assembler. So a record can be behind, which costs time, and not wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

# What each architecture is asked for: one dtype in whole, and products, whose instructions and tiles are its own, in
# others, too; the half dtypes differ by a conversion. What the launches take comes in whole, and is compiled anyway.
LAUNCHED = ("90:float32",)
WHOLE = (*LAUNCHED, "90:bfloat16:recorded", "80:float16:recorded", "100:bfloat16:recorded")
PRODUCTS = ("80:float32", "90:float32:tf32", "100:float32", "89:float16", "120:float16")
REQUESTS = (*WHOLE, *(f"{request}:products:recorded" for request in PRODUCTS))
# What a line of triton_compile_all.py says of who asked.
ASKED = ("arch", "dtype", "tf32", "hash")
FILE = Path(__file__).parent / "golden" / "compiled.json"


def read() -> dict[str, dict]:
    """Facts of kernels by their hashes."""
    return {key: facts for facts, keys in json.loads(FILE.read_text()) for key in keys}


def write(kernels: Iterable[dict]) -> None:
    """Facts, and the hashes of the kernels that they are of."""
    rows: dict[str, list[str]] = {}
    for kernel in kernels:
        facts = {name: value for name, value in kernel.items() if name not in ASKED}
        rows.setdefault(json.dumps(facts), []).append(kernel["hash"])
    lines = ",\n".join(f"[{facts}, {json.dumps(sorted(keys))}]" for facts, keys in sorted(rows.items()))
    FILE.write_text(f"[\n{lines}\n]\n")
