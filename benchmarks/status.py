"""STATUS.md: for every operation, what shows that its Triton kernels are right and fast, and where they never ran.

What needs no GPU is said of tests that exist and that every change must pass; what needs one comes from the results
that are committed, and from nowhere else.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import predictions
import registry

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
# Models whose kernels are those of the layers on pixels.
MODELS = ("anyup_model", "jafar_model", "naf_model")
NEVER = "never ran"
HEAD = """# What is known of the Triton kernels

Written by `python benchmarks/report.py --status STATUS.md` from the tests that are here and the results under
`benchmarks/results`. "never ran" is meant literally.

- **interpreter**: tests compare it with the reference in Triton's interpreter, every address checked (outside of
  tensors, races, elements nobody wrote): `tests/checked_memory.py`.
- **compiled**: for these chips, without spills, within their shared memory, products on tensor cores:
  `tests/test_triton_compile.py`. What multiplies matrices is compiled for {others}, too.
- **launcher**: what Triton's own launcher hands to a stand-in for the driver is what was passed, in every dtype:
  `tests/test_triton_launch.py`.
- **predicted**: milliseconds that the kernels of its cases take on an H100 SXM at least, in float32 and in half
  precision, computed from their instructions, bytes and products (`benchmarks/results/offline/README.md`): no
  measurement.
- **parity, memcheck, racecheck, speed**: on a GPU, by `benchmarks/gpu.sh`; **measured**: milliseconds of the cases
  that ran, at the commit that is named, beside what was predicted for the same cases and the code of that commit.
- **predicted today**: the same for today's code, where a case has other kernels by now than those that were measured.
"""


def page(verdicts: Callable[[dict, dict], list[dict]], root: Path = RESULTS) -> str:
    """The whole file; ``verdicts`` compares ours with the others of a case."""
    found = [json.loads(path.read_text()) for path in sorted(root.glob("gpu-*/results.json"))]
    others = _named(_chips("PRODUCTS") - _chips("WHOLE"))
    sections = [HEAD.format(others=others), "## Without a GPU\n\n" + _offline()]
    sections += [f"## {_title(r['machine'])}\n\n{_on_device(r, verdicts)}" for r in found]
    if not found:
        sections.append(f"## On a GPU\n\nNo operation: {NEVER}.\n\n{_on_device({'cases': []}, verdicts)}")
    return "\n\n".join(section.strip() for section in sections) + "\n"


def operations() -> list[str]:
    """Those with kernels, of their own or of others; whole models beside AnyUp have none that no operation has."""
    return [name for name in registry.suites() if name in registry.smallest_calls()]


def _offline() -> str:
    interpreted, configured = _interpreted(), registry.all_configurations()
    rows = predictions.recorded()["rows"]
    lines = ["| operation | interpreter | compiled | launcher | predicted |", "|---|---|---|---|---|"]
    for op in operations():
        compiled = _named(_chips("WHOLE")) if op in configured else "as others' kernels"
        launcher = "tested" if op in configured else "as others' kernels"
        tested = "tested" if op in interpreted else "no test"
        lines.append(f"| `{op}` | {tested} | {compiled} | {launcher} | {_predicted(rows, op)} |")
    return "\n".join(lines)


def _on_device(results: dict, verdicts: Callable) -> str:
    ran = bool(results["cases"])
    columns = ["operation", "parity", "memcheck", "racecheck", "speed against the fastest other"]
    columns += ["predicted", "measured", "commit", "predicted today"] if ran else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for op in operations():
        cells = [_parity(results, op), *(_sanitizer(results, tool, op) for tool in ("memcheck", "racecheck"))]
        cells += [_speed(results, op, verdicts), *(_beside(results, op) if ran else [])]
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _predicted(rows: list[dict], op: str) -> str:
    """Least times of the operation's cases: float32, half precision."""
    cases = {key: own for key, own in predictions.by_case(rows).items() if key[0] == op and key[1] != predictions.SMALL}
    if not cases:
        return "no case"
    kinds: dict[str, list[float]] = {"float32": [], "half": []}
    for (_, _, dtype), own in cases.items():
        kinds["float32" if dtype == "float32" else "half"].append(predictions.seconds(own, "H100"))
    return ", ".join(_range(times) for times in kinds.values() if times)


def _beside(results: dict, op: str) -> list[str]:
    """Of the cases that were measured: the least time of the code that ran, what was measured, at which commit, and the
    least time of today's code where it is another."""
    known = predictions.by_case(predictions.recorded()["rows"])
    cases = [case for case in results["cases"] if case["op"] == op]
    now = [predictions.code(predictions.of_case(case, known), results["machine"]["device"]) for case in cases]
    then = [case.get("code") for case in cases]
    commits = dict.fromkeys(case.get("commit") or results["machine"]["commit"] for case in cases)
    return [
        _range(code["least_s"] for code in then if code) or "no record",
        _range(headline(case["contenders"]["murf_fast"]) for case in cases) or NEVER,
        ", ".join(commits),
        "" if now == then else _range(code["least_s"] for code in now if code) or "no record",
    ]


def headline(contender: dict) -> float:
    """Seconds that are quoted: of the replay of a CUDA graph where there is one."""
    return contender.get("replay_s") or contender["median_s"]


def _range(times: Iterable[float]) -> str:
    times = list(times)
    if not times:
        return ""
    ends = [f"{1000 * time:.3g}" for time in (min(times), max(times))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _title(machine: dict) -> str:
    return f"{machine['device']}, {machine['date']}, checked at {machine['commit']}"


def _parity(results: dict, op: str) -> str:
    found = results.get("check", {}).get("pixel_linear" if op in MODELS else op)
    if not found:
        return NEVER
    failed = f", **{len(found['failed'])} failed**" if found["failed"] else ""
    # Of an earlier run than that of the heading.
    commit = f", at {found['commit']}" if found.get("commit") else ""
    return f"{found['passed']} tests passed{failed}{commit}"


def _sanitizer(results: dict, tool: str, op: str) -> str:
    return results.get("sanitize", {}).get(tool, {}).get(op, NEVER)


def _speed(results: dict, op: str, verdicts: Callable) -> str:
    ratios = [
        min(row["ratio"] for row in rows)
        for case in results["cases"]
        if case["op"] == op and (rows := verdicts(case, results["ceilings"]))
    ]
    if not ratios:
        return NEVER
    return f"{min(ratios):.1f}" if len(ratios) == 1 else f"{min(ratios):.1f} to {max(ratios):.1f}"


def _interpreted() -> set[str]:
    """Operations with a test on whichever device Triton has: the fixture `device`, or a call in every_op.py."""
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        if any("device" in {a.arg for a in f.args.args} for f in functions if f.name.startswith("test")):
            found.add(path.stem.removeprefix("test_"))
    calls = ast.parse((ROOT / "tests" / "every_op.py").read_text())
    named = {node.attr for node in ast.walk(calls) if isinstance(node, ast.Attribute)}
    return found | (named & set(operations())) | (set(MODELS) if "pixel_linear" in found else set())


def _named(chips: Iterable[int]) -> str:
    return ", ".join(f"sm_{chip}" for chip in sorted(chips))


def _chips(requests: str) -> set[int]:
    """Compute capabilities that the tests compile for."""
    path = ROOT / "tests" / "compiled_record.py"
    spec = importlib.util.spec_from_file_location("compiled_record", path)
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    return {int(request.split(":")[0]) for request in getattr(record, requests)}
