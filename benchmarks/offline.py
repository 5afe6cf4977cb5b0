"""What can be known of the Triton kernels' speed without a GPU: results/offline/{record.json, README.md}.

    python benchmarks/offline.py            # everything, some minutes
    python benchmarks/offline.py OP ...     # the cases of some operations; the rest of the record stays
    python benchmarks/offline.py --check    # one case of every kernel against the record

Every case runs at full size on tensors without memory (weightless.py); its launches are compiled for sm_90 instead
(launches.py) and costed (cost.py). Kernels that no case launches are costed in the small shapes of `configurations`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import predictions
import registry
import torch
import triton
from cost import Cost, costs
from launches import captured
from weightless import Weightless

ARCHITECTURE = 90
DTYPES = ("float32", "bfloat16")
# No kernels' speed: calls that cost what a call costs.
LEFT_OUT = ("overhead",)
# Cases that are built in their own dtype alone: the precision of an index is an argument; whole models have cases of
# both dtypes.
OWN_DTYPE = ("anyup_model", "jafar_model", "murf", "naf_model", "nearest_distance")

Task = tuple[str, str, str]  # operation, case (or predictions.SMALL), dtype


def tasks() -> list[Task]:
    """Cases of float32 in both dtypes; a case of another dtype in that."""
    found = []
    for case in registry.cases():
        if case.op in LEFT_OUT:
            continue
        own = str(case.dtype).removeprefix("torch.")
        dtypes = DTYPES if own == "float32" and case.op not in OWN_DTYPE else (own,)
        found += [(case.op, case.name, dtype) for dtype in dtypes]
    return found


def small_tasks() -> list[Task]:
    return [(op, predictions.SMALL, dtype) for op in registry.all_configurations() for dtype in DTYPES]


def rows(task: Task, only: Iterable[str] | None = None, without: Iterable[str] = ()) -> list[dict]:
    """A row for every kernel that the case launches; for some of them ``only``, or ``without`` some."""
    op, name, dtype = task
    without = {*without, *predictions.BY_DATA}
    try:
        with captured(ARCHITECTURE, lambda k: (only is None or k in only) and k not in without) as launches:
            _call(op, name)(getattr(torch, dtype))
        return [_row(task, cost) for cost in costs(launches, {})]
    except Exception as error:
        raise RuntimeError(f"{op}, {name}, {dtype}: {type(error).__name__}: {error}") from error


def _call(op: str, name: str) -> Callable[[torch.dtype], None]:
    if name == predictions.SMALL:
        return lambda dtype: registry.all_configurations()[op]("cpu", dtype)
    case = next(case for case in registry.cases() if (case.op, case.name) == (op, name))

    def call(dtype: torch.dtype) -> None:
        with Weightless():
            case.build("cpu", dtype).ours()

    return call


def _row(task: Task, cost: Cost) -> dict:
    op, name, dtype = task
    found = {"op": op, "case": name, "dtype": dtype, **asdict(cost)}
    found["instructions"] = round(found["instructions"])
    found["flops"] = {unit: round(flops) for unit, flops in sorted(found["flops"].items())}
    return found


def everything(ops: list[str], kept: list[dict]) -> list[dict]:
    """Rows of all cases, those of an operation that launch the same once; or of ``ops`` alone, and those ``kept``."""
    wanted = [task for task in tasks() if not ops or task[0] in ops]
    found = kept + _distinct(_parallel([(task,) for task in wanted]))
    launched = {dtype: {row["kernel"] for row in found if row["dtype"] == dtype} for dtype in DTYPES}
    small = [task for task in small_tasks() if not ops or task[0] in ops]
    for some in _parallel([(task, None, launched[task[2]]) for task in small]):
        new = [row for row in some if row["kernel"] not in launched[row["dtype"]]]
        for row in new:
            launched[row["dtype"]].add(row["kernel"])
        found += new
    return found


def _parallel(calls: list[tuple]) -> list[list[dict]]:
    """``rows`` of every call, in their order."""
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        results = [(call[0], pool.apply_async(rows, call)) for call in calls]
        found = []
        for task, result in results:
            found.append(result.get())
            print(", ".join(task), file=sys.stderr, flush=True)
    return found


def _distinct(cases: list[list[dict]]) -> list[dict]:
    seen, found = set(), []
    for case in cases:
        what = json.dumps([{**row, "case": None} for row in case], sort_keys=True)
        if what not in seen:
            seen.add(what)
            found += case
    return found


def check(recorded: list[dict]) -> list[str]:
    """What is wrong with the record, told from one case of every kernel and dtype."""
    wanted = predictions.representatives(recorded)
    kernels: dict[Task, list[str]] = {}
    for row in wanted:
        kernels.setdefault((row["op"], row["case"], row["dtype"]), []).append(row["kernel"])
    found = _parallel(list(kernels.items()))
    return predictions.faults(wanted, itertools.chain.from_iterable(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations or models whose rows are made anew")
    parser.add_argument("--check", action="store_true", help="compare with the record, which stays")
    arguments = parser.parse_args()
    if arguments.check:
        faults = check(predictions.recorded()["rows"])
        print("\n".join(faults))
        return 1 if faults else 0
    unknown = set(arguments.ops) - set(registry.suites())
    if unknown:
        parser.error(f"no such operation: {', '.join(sorted(unknown))}")
    kept = [r for r in predictions.recorded()["rows"] if r["op"] not in arguments.ops] if arguments.ops else []
    found = everything(arguments.ops, kept)
    found.sort(key=lambda row: (row["op"], row["case"] == predictions.SMALL))
    predictions.write({"architecture": ARCHITECTURE, "triton": triton.__version__, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
