"""What operations cannot avoid, and what that takes on a chip at least: bytes, operations, intensity, bound, time.

    python benchmarks/roofline.py                                   # every case of the suites, on this machine
    python benchmarks/roofline.py upsample_argmax --chip h100 --chip l4
    python benchmarks/roofline.py window_attention --sizes size=1024 grid=64 --dtype bfloat16 --chip h200 --json
    python benchmarks/roofline.py --record [OP ...]               # counts the cases anew: results/roofline/record.json

Bytes are those of inputs and results, once; operations those of the definition (formulas.py). Nothing is computed and
no GPU is needed. A time is a bound: no kernel whose data comes from memory is faster, but data that a cache holds, rows
that need no look and filters with fewer products may be. ``this`` is the record of this machine's ceilings, measured
now where there is none; times that its benchmarks measured stand beside. On H100 and H200 so does what the code of our
Triton kernels says (offline.py).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import floors
import formulas
import predictions
import registry
import torch
from machine import describe, slug
from status import headline

DTYPES = ("float32", "bfloat16", "float16")


def tasks(ops: list[str]) -> list[tuple[registry.Case, str]]:
    """Cases and dtypes that some device measures."""
    from gpu_speed import variants

    found = {(c.id, str(c.dtype).removeprefix("torch.")): c for c in registry.cases() if "cpu" in c.devices}
    by_id = {c.id: c for c in registry.cases()}
    found |= {(unit["case"], unit["dtype"]): by_id[unit["case"]] for unit in variants()}
    return [(c, dtype) for (_, dtype), c in found.items() if not ops or c.op in ops]


def counted(case: registry.Case, dtype: str) -> dict:
    """A row of the record."""
    from dataclasses import replace

    from work import work_of

    work = work_of(replace(case, dtype=getattr(torch, dtype)))
    return {"op": case.op, "case": case.name, "dtype": dtype, **work.as_row()}


def record(ops: list[str]) -> None:
    kept = [row for row in floors.recorded().values() if ops and row["op"] not in ops]
    wanted = tasks(ops)
    rows = []
    for number, (case, dtype) in enumerate(wanted, 1):
        rows.append(counted(case, dtype))
        print(f"{number} of {len(wanted)}", file=sys.stderr, flush=True)
    rows = sorted(kept + rows, key=lambda row: row["op"])
    floors.RECORD.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    floors.RECORD.write_text(f'{{"rows": [\n{lines}\n]}}\n')


def results_of_this_machine() -> dict | None:
    path = floors.RESULTS / slug(describe("cuda" if torch.cuda.is_available() else "cpu")) / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def results_on(chip: str) -> Iterator[dict]:
    """Results of GPUs of that name."""
    for path in sorted(floors.RESULTS.glob("*/results.json")):
        results = json.loads(path.read_text())
        name = results["machine"]["device"].lower().replace(" ", "")
        if results["machine"]["driver"] and chip in name:
            yield results


def medians(results: dict) -> dict[tuple[str, str, str], tuple[float, dict]]:
    """Seconds of every case's call, and the ceilings of its run."""
    works, found = floors.recorded(), {}
    for case in results["cases"]:
        if row := floors.work_in(works, case):
            key = row["op"], row["case"], row["dtype"]
            found[key] = headline(case["contenders"]["murf_fast"]), case.get("ceilings", results["ceilings"])
    return found


def lines_of(rows: list[dict], chips: list[str]) -> list[dict]:
    """What is said of every row on every chip."""
    of_kernels = predictions.by_case(predictions.recorded()["rows"]) if {"h100", "h200"} & {*chips} else {}
    found = []
    for name in chips:
        times: dict[tuple[str, str, str], tuple[float, dict]] = {}
        if name == "this":
            results = results_of_this_machine()
            gpu = torch.cuda.is_available()
            ceilings = results["ceilings"] if results else _ceilings_now(gpu)
            times = medians(results) if results else {}
            chip = floors.measured(ceilings, gpu)
        else:
            chip = floors.CHIPS[name]
            for results in results_on(name):
                times |= medians(results)
        for row in rows:
            key = row["op"], row["case"], row["dtype"]
            seconds, own = times.get(key, (None, None))
            # Of a run of its own, a case has its own ceilings.
            at = floors.floor_of(row, floors.measured(own, gpu) if own and name == "this" else chip)
            kernels = of_kernels.get(key)
            found.append(
                {
                    **{k: row[k] for k in ("op", "case", "dtype", "read", "written", "operations")},
                    "intensity": sum(row["operations"].values()) / max(1, row["read"] + row["written"]),
                    "chip": name,
                    "bound": at.bound if at else None,
                    "floor_s": at.seconds if at else None,
                    "kernels_s": (
                        predictions.seconds(kernels, name.upper())
                        if kernels and name.upper() in predictions.DEVICES
                        else None
                    ),
                    "measured_s": seconds,
                    "share": at.seconds / seconds if at and seconds else None,
                    "may_be_less": [formulas.FEWER[op] for op in row["ops"] if op in formulas.FEWER],
                }
            )
    return found


def _ceilings_now(gpu: bool) -> dict:
    if not gpu:
        from measure import measured_ceilings

        return measured_ceilings()
    import gpu_speed

    found: dict = {}
    gpu_speed.surroundings("cuda", gpu_speed.Clock("cuda"), lambda kind, **message: found.update(message))
    return found["ceilings"]


def show(lines: list[dict]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = ("case", "chip", "MB", "GFLOP", "FLOP/byte", "bound", "at least", "by kernels", "measured", "share")
    console = Console(width=None if sys.stdout.isatty() else 200)
    for op in dict.fromkeys(line["op"] for line in lines):
        table = Table(title=op, title_justify="left", box=box.SIMPLE)
        for n, column in enumerate(columns):
            table.add_column(column, justify="left" if n < 2 or column == "bound" else "right", overflow="fold")
        own = [line for line in lines if line["op"] == op]
        for line in own:
            table.add_row(*_cells(line))
        console.print(table)
        for reason in dict.fromkeys(reason for line in own for reason in line["may_be_less"]):
            console.print(f"* {reason}", highlight=False)


def _cells(line: dict) -> list[str]:
    flops = ", ".join(f"{n / 1e9:.3g} {unit}" for unit, n in line["operations"].items())
    share = "" if line["share"] is None else f"{line['share']:.0%}{'*' if line['may_be_less'] else ''}"
    name = line["case"] if line["dtype"] in line["case"] else f"{line['case']}, {line['dtype']}"
    return [
        name,
        line["chip"],
        f"{(line['read'] + line['written']) / 1e6:.3g}",
        flops,
        f"{line['intensity']:.3g}",
        line["bound"] or "unknown",
        *(_ms(line[k]) for k in ("floor_s", "kernels_s", "measured_s")),
        share,
    ]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g} ms"


def rows_of(arguments: argparse.Namespace) -> list[dict]:
    """From the record, or of the sizes that were asked for."""
    if arguments.sizes is None and arguments.dtype is None:
        return [row for row in floors.recorded().values() if not arguments.ops or row["op"] in arguments.ops]
    import sized_calls
    from work import work_of_call

    rows = []
    dtype = arguments.dtype or "float32"
    for op in arguments.ops:
        sizes = sized_calls.parsed(op, arguments.sizes or [])
        work = work_of_call(functools.partial(sized_calls.call_of, op, sizes, getattr(torch, dtype)))
        name = " ".join(f"{k}={_written(getattr(sizes, k))}" for k in sized_calls.CALLS[op][0])
        rows.append({"op": op, "case": name, "dtype": dtype, **work.as_row()})
    return rows


def _written(value: int | tuple) -> str:
    if isinstance(value, int):
        return str(value)
    return "x".join(map(str, value)) if isinstance(value[0], int) else ",".join(_written(v) for v in value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations or models (all)")
    parser.add_argument("--sizes", nargs="+", metavar="NAME=VALUE", help="of one call, in place of the suites' cases")
    parser.add_argument("--dtype", choices=DTYPES, help="of that call (float32)")
    parser.add_argument("--chip", action="append", metavar="NAME", help=f"this, {', '.join(floors.CHIPS)} (this)")
    parser.add_argument("--json", action="store_true", help="lines of JSON: bytes, operations, seconds")
    parser.add_argument("--record", action="store_true", help="count the cases anew, without computing them")
    arguments = parser.parse_args()
    chips = arguments.chip or ["this"]
    for name in chips:
        if name != "this" and name not in floors.CHIPS:
            parser.error(f"no such chip: {name} (this, {', '.join(floors.CHIPS)})")
    sized = arguments.sizes is not None or arguments.dtype is not None
    import sized_calls

    known = sized_calls.CALLS.keys() if sized else {*registry.suites()}
    if unknown := set(arguments.ops) - set(known):
        parser.error(f"no such operation{' with sizes' if sized else ''}: {', '.join(sorted(unknown))}")
    if sized and not arguments.ops:
        parser.error("--sizes and --dtype are of an operation: name it")
    if arguments.record:
        record(arguments.ops)
        return 0
    try:
        rows = rows_of(arguments)
    except ValueError as error:
        parser.error(str(error))
    lines = lines_of(rows, chips)
    try:
        if arguments.json:
            for line in lines:
                print(json.dumps(line))
        else:
            show(lines)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
