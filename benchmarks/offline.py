"""What can be known of the Triton kernels' speed without a GPU: results/offline/{record.json, README.md}.

    python benchmarks/offline.py            # everything, some minutes
    python benchmarks/offline.py OP ...     # the cases of some operations; the rest of the record stays
    python benchmarks/offline.py --check    # one case of every kernel, or of those of OP ..., against the record

Every case runs at full size on tensors without memory (weightless.py); its launches are compiled for sm_90 instead
(launches.py) and costed (cost.py). Kernels that no case launches are costed in the small shapes of `configurations`.
`--check` costs only what has changed since its row was made (seals.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import predictions
import registry
import torch
import triton
from cost import Cost, costs
from launches import Launch, captured
from seals import seal
from triton.runtime import JITFunction
from weightless import Weightless

from murf_fast import kernels

ARCHITECTURE = 90
DTYPES = ("float32", "bfloat16")
# No kernels' speed: calls that cost what a call costs, and what only CPUs have.
LEFT_OUT = ("dense_attention", "overhead")
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
    launches = _launches(task, only, without)
    with _naming(task):
        return [_row(task, cost, launches) for cost in costs(launches, {})]


def changed(recorded: list[dict]) -> list[dict]:
    """Of rows of one case, made anew: those whose seals hold no more. Rows that a case lacks now are left out."""
    task = (recorded[0]["op"], recorded[0]["case"], recorded[0]["dtype"])
    launches = _launches(task, [row["kernel"] for row in recorded], compiles=False)
    with _naming(task):
        kept = [row for row in recorded if row.get("seal") == seal(launches, row["kernel"], row["instructions"])]
    others = [row["kernel"] for row in recorded if row not in kept]
    return kept + (rows(task, others) if others else [])


def _launches(
    task: Task, only: Iterable[str] | None = None, without: Iterable[str] = (), compiles: bool = True
) -> list[Launch]:
    op, name, dtype = task
    without = {*without, *predictions.BY_DATA}
    wanted = captured(ARCHITECTURE, lambda k: (only is None or k in only) and k not in without, lambda kernel: compiles)
    with _naming(task), wanted as launches:
        _call(op, name)(getattr(torch, dtype))
    return launches


@contextlib.contextmanager
def _naming(task: Task) -> Iterator[None]:
    """Errors say what they are of."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{', '.join(task)}: {type(error).__name__}: {error}") from error


def _call(op: str, name: str) -> Callable[[torch.dtype], None]:
    if name == predictions.SMALL:
        return lambda dtype: registry.all_configurations()[op]("cpu", dtype)
    case = next(case for case in registry.cases() if (case.op, case.name) == (op, name))

    def call(dtype: torch.dtype) -> None:
        with Weightless():
            case.build("cpu", dtype).ours()

    return call


def _row(task: Task, cost: Cost, launches: list[Launch]) -> dict:
    op, name, dtype = task
    found = {"op": op, "case": name, "dtype": dtype, **asdict(cost)}
    found["instructions"] = round(found["instructions"])
    found["flops"] = {unit: round(flops) for unit, flops in sorted(found["flops"].items())}
    return found | {"seal": seal(launches, cost.kernel, found["instructions"])}


def everything(ops: list[str], kept: list[dict]) -> list[dict]:
    """Rows of all cases, those of an operation that launch the same once; or of ``ops`` alone, and those ``kept``."""
    wanted = [task for task in tasks() if not ops or task[0] in ops]
    found = kept + _distinct(_parallel(rows, [(task,) for task in wanted]))
    launched = {dtype: {row["kernel"] for row in found if row["dtype"] == dtype} for dtype in DTYPES}
    small = [task for task in small_tasks() if not ops or task[0] in ops]
    for some in _parallel(rows, [(task, None, launched[task[2]]) for task in small]):
        new = [row for row in some if row["kernel"] not in launched[row["dtype"]]]
        for row in new:
            launched[row["dtype"]].add(row["kernel"])
        found += new
    return found


def _parallel(function: Callable[..., list[dict]], calls: list[tuple]) -> list[list[dict]]:
    """``function`` of every call, in their order."""
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        results = [pool.apply_async(function, call) for call in calls]
        found = []
        for number, result in enumerate(results, 1):
            found.append(result.get())
            print(f"{number} of {len(calls)}", file=sys.stderr, flush=True)
    return found


def _distinct(cases: list[list[dict]]) -> list[dict]:
    seen, found = set(), []
    for case in cases:
        what = json.dumps([{**row, "case": None, "seal": None} for row in case], sort_keys=True)
        if what not in seen:
            seen.add(what)
            found += case
    return found


def check(recorded: list[dict]) -> list[str]:
    """What is wrong with the record, told from one case of every kernel and dtype."""
    wanted = predictions.representatives(recorded)
    found = _parallel(changed, [(own,) for own in predictions.by_case(wanted).values()])
    return predictions.faults(wanted, itertools.chain.from_iterable(found))


def settle_keys() -> None:
    """Has Triton hash the functions of all kernels in one order. Its key of a kernel depends on which of those that it
    calls the process had hashed before, and so would a seal.
    """
    for name in sorted(module.name for module in pkgutil.iter_modules(kernels.__path__)):
        for value in vars(importlib.import_module(f"{kernels.__name__}.{name}")).values():
            if isinstance(value, JITFunction):
                value.cache_key  # noqa: B018  kept by the function


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations or models whose rows are made anew")
    parser.add_argument("--check", action="store_true", help="compare with the record, which stays")
    parser.add_argument("--record", type=Path, default=predictions.FOLDER, help="the record's folder")
    arguments = parser.parse_args()
    settle_keys()  # before processes are forked
    if arguments.check:
        rows = predictions.recorded(arguments.record)["rows"]
        faults = check([row for row in rows if not arguments.ops or row["op"] in arguments.ops])
        print("\n".join(faults))
        return 1 if faults else 0
    unknown = set(arguments.ops) - set(registry.suites())
    if unknown:
        parser.error(f"no such operation: {', '.join(sorted(unknown))}")
    recorded = predictions.recorded(arguments.record)["rows"] if arguments.ops else []
    kept = [row for row in recorded if row["op"] not in arguments.ops]
    found = everything(arguments.ops, kept)
    found.sort(key=lambda row: (row["op"], row["case"] == predictions.SMALL))
    predictions.write({"architecture": ARCHITECTURE, "triton": triton.__version__, "rows": found}, arguments.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
