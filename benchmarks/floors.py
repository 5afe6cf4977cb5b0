"""The least time of a call on a chip: bytes over the memory's rate or operations over that of products, the longer.

A chip is a machine's measured ceilings or a data sheet's peaks. The work of every case is kept in
``results/roofline/record.json`` (work.py counts it), so a report of any machine can be read against it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from predictions import DEVICES

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "roofline" / "record.json"


@dataclass(frozen=True)
class Chip:
    """Bytes and floating-point operations (by the dtype of a product's operands) a second."""

    bytes: float
    flops: dict[str, float]


class Floor(NamedTuple):
    seconds: float
    bound: str  # "memory", or the dtype of the operations


def _sheet(terabytes: float, half: float, tf32: float, float32: float) -> Chip:
    """Peaks in TB/s and TFLOP/s. A float32 product is done in float32, or in three of TF32 (kernels/products.py)."""
    single = max(float32, tf32 / 3)
    return Chip(1e12 * terabytes, {"bfloat16": 1e12 * half, "float16": 1e12 * half, "float32": 1e12 * single})


# Dense products, accumulated in float32. H100 (SXM5) and H200: see predictions.py. Data sheets: NVIDIA A100 80 GB
# (SXM), A10, L4 and L40S (numbers with sparsity are halved here); "NVIDIA Ada GPU architecture" (white paper, RTX 4090)
# and "NVIDIA Ampere GA102 GPU architecture" (white paper, RTX 3090), tables of specifications.
CHIPS = {
    **{
        name.lower(): _sheet(d.bytes / 1e12, *(d.flops[unit] / 1e12 for unit in ("half", "tf32", "float32")))
        for name, d in DEVICES.items()
    },
    "a100": _sheet(2.039, 312, 156, 19.5),
    "a10": _sheet(0.6, 125, 62.5, 31.2),
    "l4": _sheet(0.3, 121, 60, 30.3),
    "l40s": _sheet(0.864, 362, 183, 91.6),
    "rtx4090": _sheet(1.008, 165.2, 82.6, 82.6),
    "rtx3090": _sheet(0.936, 71, 35.6, 35.6),
}


def measured(ceilings: dict, gpu: bool) -> Chip:
    """A machine by what was measured on it; rates that its record lacks are not there."""
    c = ceilings
    if gpu:
        flops = {"bfloat16": c["gemm_flops_per_s"], "float16": c["gemm_flops_per_s"]}
        if "gemm_float32_flops_per_s" in c:
            flops["float32"] = max(c["gemm_float32_flops_per_s"], c["gemm_tf32_flops_per_s"] / 3)
    else:
        flops = {"float32": c["gemm_flops_per_s"]}
        if "gemm_bfloat16_flops_per_s" in c:
            flops["bfloat16"] = c["gemm_bfloat16_flops_per_s"]
    # A copy through caches reads what it writes, which a streaming write does not.
    return Chip(max(c["write_bytes_per_s"], c["copy_bytes_per_s"]), flops)


def floor(size: int, operations: dict[str, int], chip: Chip) -> Floor | None:
    """None for a call that has nothing to do, and where the rate of some of its operations is unknown."""
    if operations.keys() - chip.flops.keys():
        return None
    times = {"memory": size / chip.bytes} | {unit: n / chip.flops[unit] for unit, n in operations.items()}
    bound = max(times, key=times.__getitem__)
    return Floor(times[bound], bound) if times[bound] else None


def recorded() -> dict[tuple[str, str, str], dict]:
    """The work of every case, by operation, name and dtype."""
    rows = json.loads(RECORD.read_text())["rows"] if RECORD.is_file() else []
    return {(row["op"], row["case"], row["dtype"]): row for row in rows}


def work_in(works: dict[tuple[str, str, str], dict], case: dict) -> dict | None:
    """Of a case of results; those of a GPU say in their name what dtype they have been cast to."""
    name = case["case"]
    for known in (name, name.removesuffix(f", {case['dtype']}")):
        if found := works.get((case["op"], known, case["dtype"])):
            return found
    return None


def floor_of(row: dict, chip: Chip) -> Floor | None:
    return floor(row["read"] + row["written"], row["operations"], chip)
