"""The record of offline.py: its file, the least times it implies, and its table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "results" / "offline"
GROWTH = 1.1  # of a kernel's instructions that is seen
# Kernels whose loops end with the data, which is not there: their instructions are not counted.
BY_DATA = ("_k_center_select", "_nearest_scored", "_nearest_chosen")
SMALL = "small shapes (no case launches it)"
# Of a kernel in a case: what changes with its code or its launch, and only by chance stays where they change.
FINGERPRINT = ("kernel", "launches", "programs", "instructions", "registers", "shared", "read", "written")


@dataclass(frozen=True)
class Device:
    """A GPU's peaks: warp instructions, bytes and floating-point operations (by what products run on) per second."""

    issue: float
    bytes: float
    flops: dict[str, float]


# H100 SXM5 and H200 SXM have the same chip. "NVIDIA H100 Tensor Core GPU Architecture" (white paper), the H100 SM and
# table 2: 132 multiprocessors of four schedulers, each of which issues a warp instruction a cycle; 66.9 TFLOP/s in
# float32, which are 132 x 128 x 2 at the boost clock of 1.98 GHz; half of that in float64. Data sheets of the H100 and
# the H200: dense products of 989.4 TFLOP/s in half precision and 494.7 in TF32; 3.35 and 4.8 TB/s of memory.
_FLOPS = {"half": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12, "float64": 33.5e12}
DEVICES = {
    "H100": Device(132 * 4 * 1.98e9, 3.35e12, _FLOPS),
    "H200": Device(132 * 4 * 1.98e9, 4.8e12, _FLOPS),
}
HEAD = """# The Triton kernels, predicted without a GPU

Written by `python benchmarks/offline.py`. **Nothing here was measured.** Every launch of every case is compiled for
sm_90 at full size; how often each instruction runs is found by executing what decides the flow of a sample of its
programs (`benchmarks/sass`), with the tables that the kernel would read.

A time is the largest of three lower bounds, so a kernel may take longer and cannot take less:

- **issue**: instructions that all warps issue over what 132 x 4 schedulers issue at 1.98 GHz;
- **memory**: every tensor that a kernel reads or writes, once, over the memory's rate. Intermediate tensors between two
  launches count, what the caches do not hold and must be read again does not;
- **products**: floating-point operations over the peak of the unit that does them (tensor cores in half precision or
  TF32, float32, float64).

Not in it: latency, too few warps, bank conflicts, uncoalesced access, integer units at half rate, matrix instructions
of warps (HMMA) that reach less than those of four (HGMMA), launches, PyTorch's own operations around ours. Two GPUs:
H100 SXM and H200 SXM (sources: `predictions.py`). A branch on values of data is taken to go the shorter way (*): such
are repetitions of a tile with infinities.
"""


def recorded(folder: Path = FOLDER) -> dict:
    return json.loads((folder / "record.json").read_text())


def write(record: dict, folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    rest = json.dumps({key: value for key, value in record.items() if key != "rows"})
    (folder / "record.json").write_text(f'{rest[:-1]}, "rows": [\n{lines}\n]}}\n')
    (folder / "README.md").write_text(page(record))


def bounds(row: dict, device: Device) -> dict[str, float]:
    """The least seconds for each of what may limit a kernel."""
    return {
        "issue": row["instructions"] / device.issue,
        "memory": (row["read"] + row["written"]) / device.bytes,
        "products": max((flops / device.flops[unit] for unit, flops in row["flops"].items()), default=0.0),
    }


def seconds(rows: Iterable[dict], device: str) -> float:
    """The least time of kernels that run one after the other."""
    return sum(max(bounds(row, DEVICES[device]).values()) for row in rows)


def by_case(rows: Iterable[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """Rows by (operation, case, dtype)."""
    found: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    return found


def of_case(case: dict, known: dict[tuple[str, str, str], list[dict]]) -> list[dict]:
    """The rows of a measured case, which names its dtype where it is not that of the benchmark."""
    plain = case["case"].removesuffix(f", {case['dtype']}")
    return known.get((case["op"], plain, case["dtype"])) or known.get((case["op"], case["case"], case["dtype"]), [])


def code(rows: list[dict], device: str) -> dict | None:
    """What a measured case remembers of the kernels that ran, so that a later reader can tell whether today's are
    those: a digest of what is known of their code, and the least time predicted for it."""
    gpu = next((name for name in DEVICES if name in device), None)
    if not rows or gpu is None:
        return None
    known = json.dumps([[row[name] for name in FINGERPRINT] for row in rows])
    return {"digest": hashlib.sha256(known.encode()).hexdigest()[:16], "least_s": seconds(rows, gpu)}


def representatives(rows: list[dict]) -> list[dict]:
    """A row of every kernel in float32, and one in half precision where a case has it: those that are soonest made."""
    best: dict[tuple[str, bool], dict] = {}
    for row in rows:
        key = (row["kernel"], row["dtype"] == "float32")
        if row["case"] != SMALL or key[1]:
            best[key] = max(best.get(key, row), row, key=_rank)
    return list(best.values())


def _rank(row: dict) -> tuple:
    """Benchmarks before small shapes, operations before whole models, the kernel's own operation, few launches."""
    own = row["kernel"].lstrip("_") == row["op"]
    return (
        row["case"] != SMALL,
        row["op"] not in ("anyup_model", "fixed_filters", "jafar_model", "murf", "naf_model"),
        own,
        -row["launches"],
        row["instructions"],
    )


def faults(wanted: Iterable[dict], found: Iterable[dict]) -> list[str]:
    """What is wrong with rows of the record, given today's: kernels that are gone, or issue more than they did."""
    now = {(row["op"], row["case"], row["dtype"], row["kernel"]): row["instructions"] for row in found}
    said = []
    for row in wanted:
        key = (row["op"], row["case"], row["dtype"], row["kernel"])
        what = f"{row['kernel']} in {row['op']}, {row['case']}, {row['dtype']}"
        if key not in now:
            said.append(f"{what}: recorded, but not launched any more")
        elif now[key] > GROWTH * row["instructions"]:
            said.append(f"{what}: {now[key]:,} instructions, {row['instructions']:,} recorded")
    return said


def page(record: dict) -> str:
    rows = record["rows"]
    sections = [HEAD.strip(), f"Triton {record['triton']}, sm_{record['architecture']}."]
    for op in dict.fromkeys(row["op"] for row in rows):
        sections.append(f"## `{op}`\n\n" + _table([row for row in rows if row["op"] == op]))
    return "\n\n".join(sections) + "\n"


def _table(rows: list[dict]) -> str:
    lines = [
        "| case | dtype | kernel | launches x programs | registers, shared KB | instructions, 10^6 | read, written MB "
        "| GFLOP | issue, memory, products on H100, ms | least H100 ms | H200 ms | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (_, case, dtype), own in by_case(rows).items():
        lines += [_line(case, dtype, row) for row in own]
        if len(own) > 1:
            least = " | ".join(f"**{_ms(seconds(own, device))}**" for device in DEVICES)
            lines.append(f"| {case} | {dtype} | all | | | | | | | {least} | |")
    return "\n".join(lines)


def _line(case: str, dtype: str, row: dict) -> str:
    times = bounds(row, DEVICES["H100"])
    star = " *" if row["decided_by_data"] else ""
    flops = ", ".join(f"{count / 1e9:.3g} {unit}" for unit, count in row["flops"].items())
    cells = [
        case,
        dtype,
        f"`{row['kernel']}`{star}",
        f"{row['launches']} x {row['programs'] / row['launches']:,.0f}",
        f"{row['registers']}{' (spills)' if row['stack'] else ''}, {row['shared'] / 1024:.3g}",
        f"{row['instructions'] / 1e6:,.4g}",
        f"{row['read'] / 1e6:,.3g}, {row['written'] / 1e6:,.3g}",
        flops,
        ", ".join(_ms(t) for t in times.values()),
        *(_ms(seconds([row], device)) for device in DEVICES),
        max(times, key=times.__getitem__),
    ]
    return f"| {' | '.join(cells)} |"


def _ms(time: float) -> str:
    return f"{1000 * time:.3g}"
