"""Tables of what was measured, from ``benchmarks/results`` by the functions that write the reports there."""

from __future__ import annotations

import json

import registry
import report
import status

# The benchmarks of whole models, on the page of the operation that they are made of for the most part.
MODELS = {
    "window_attention": ("anyup_model", "naf_model", "jafar_model"),
    "joint_bilateral_upsample": (),
    "patch_embed": (),
}


def found() -> list[dict]:
    """Every record in the repository: processors first, then GPUs."""
    records = [json.loads(path.read_text()) for path in sorted(report.RESULTS.glob("*/results.json"))]
    return sorted(records, key=lambda record: bool(record["machine"]["driver"]))


def of(op: str) -> str:
    """What is recorded of one operation, machine by machine."""
    suites, parts = (op, *MODELS.get(op, ())), []
    for record in found():
        cases = [case for case in record["cases"] if case["op"] in suites]
        if cases:
            parts.append(f"{report.describe(dict(record, cases=cases))}\n\n{table(dict(record, cases=cases))}")
    if not parts:
        return "No benchmark of this operation by itself is recorded."
    head = (
        "Ours in milliseconds, its peak memory, and how many times faster it is than the fastest of each other kind, "
        "on the machine that is named; [how it is measured](../measured.md)."
    )
    return "\n\n".join([head, *parts])


def table(record: dict) -> str:
    """One row per case and contender, with goals where the benchmark sets one."""
    lines = ["| case | murf_fast | peak MB | against | times faster | their peak MB | goal |"]
    lines.append("|---|---:|---:|---|---:|---:|---|")
    for case in record["cases"]:
        ours = case["contenders"]["murf_fast"]
        time = f"{status.headline(ours) * 1e3:.3g} ms"
        head = f"| {_plain(case)} | {time} | {_megabytes(ours['peak_bytes'])} "
        rows = report.verdicts(case, record["ceilings"])
        if not rows:
            lines.append(f"{head}| | | | |")
        for row in rows:
            goal = "" if row["goal"] is None else f"{row['goal']:g}, {'reached' if row['reached'] else '**missed**'}"
            peak = _megabytes(row["peak_bytes"])
            lines.append(f"{head}| {row['against']} | {row['ratio']:.1f} | {peak} | {goal} |")
            head = "| | | "
    return "\n".join(lines)


def _plain(case: dict) -> str:
    return case["case"].replace("|", "\\|")


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f}"


def everything() -> str:
    """Every record, every operation, goals reached and missed."""
    parts = []
    for record in found():
        parts += [f"## {record['machine']['device']}", report.describe(record), report.short_table(record)]
    return "\n\n".join(parts)


def gpu_status() -> str:
    """STATUS.md as it would be written now, one heading deeper."""
    text = status.page(report.verdicts).partition("\n")[2]
    return text.strip()


def benchmarked() -> set[str]:
    return set(registry.suites())
