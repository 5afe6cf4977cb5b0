"""Tables and plots from the JSON of a run. Nothing in a report is typed by hand.

    python benchmarks/report.py RUN.json [--status STATUS.md]
    python benchmarks/report.py --status STATUS.md      # from what is in the repository

writes results/<device>/{results.json, README.md, speedup.png}. The documentation makes its tables from all of them
when it is built (docs/_ext/results.py).
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import floors
import status
from formulas import FEWER
from machine import slug
from status import headline

from murf_fast.cli.bench.records import SCHEMA

RESULTS = Path(__file__).parent / "results"
LATE = "not begun, out of time"  # how gpu.py ends what it says of a measurement that it had no time for


def condense(run: dict) -> dict:
    """What a repository keeps of pytest-benchmark's JSON."""
    cases = [entry["extra_info"] for entry in run["benchmarks"] if "op" in entry["extra_info"]]
    ceilings = cases[0]["ceilings"] if cases else {}
    for case in cases:  # a resumed run has measured them twice
        if case["ceilings"] == ceilings:
            del case["ceilings"]
    return {
        "schema": SCHEMA,
        "machine": run["machine_info"]["murf_fast"],
        "ceilings": ceilings,
        "cases": cases,
        "failed": run.get("failed", []),
    }


def merged(old: dict, new: dict) -> dict:
    """A run of some operations put in the place of theirs in an older run on the same machine."""
    ran = {case["op"] for case in new["cases"]}
    cases = [case for case in _with_origin(old) if case["op"] not in ran] + _with_origin(new)
    found = {**new, "cases": sorted(cases, key=lambda case: case["op"]), "failed": new["failed"]}
    if "check" in new:
        commit = old["machine"].get("commit")
        found["check"] = {op: {"commit": commit, **own} for op, own in old.get("check", {}).items()} | new["check"]
        tools = old.get("sanitize", {}).keys() | new["sanitize"].keys()
        found["sanitize"] = {
            tool: {op: _said_at(text, commit) for op, text in old.get("sanitize", {}).get(tool, {}).items()}
            | new["sanitize"].get(tool, {})
            for tool in sorted(tools)
        }
    return found


def _said_at(text: str, commit: str | None) -> str:
    """What a sanitizer said, and of which commit."""
    return text if commit is None or ", at " in text else f"{text}, at {commit}"


def _with_origin(results: dict) -> list[dict]:
    """The cases with the commit and the ceilings of their own run, which a report of several runs must not mix up."""
    origin = {"commit": results["machine"].get("commit"), "ceilings": results["ceilings"]}
    return [{**origin, **case} for case in results["cases"]]


def verdicts(case: dict, ceilings: dict) -> list[dict]:
    """One row per contender family: the fastest of it, the ratio, and whether the goal was reached."""
    ours = case["contenders"]["murf_fast"]
    part = case["beside"][0] if case.get("beside") else None
    others = {n: c for n, c in case["contenders"].items() if n not in ("murf_fast", part)}
    rows = []
    for family in dict.fromkeys(_family(name) for name in others):
        members = {n: c for n, c in others.items() if _family(n) == family}
        name, fastest = min(members.items(), key=lambda item: headline(item[1]))
        goal = next((t["ratio"] for t in case["targets"] if _is_meant(family, t["against"])), None)
        ratio = headline(fastest) / headline(ours)
        rows.append(
            {
                "against": name,
                "ratio": ratio,
                "goal": goal,
                "reached": None if goal is None else ratio >= goal,
                "peak_bytes": fastest["peak_bytes"],
            }
        )
    return rows


def other_goals(case: dict, ceilings: dict) -> list[tuple[str, bool]]:
    """Goals beside the ratios, as sentences."""
    ours, found = case["contenders"]["murf_fast"], []
    if case["write_target"]:
        share = case["bytes"] / headline(ours) / case.get("ceilings", ceilings)["write_bytes_per_s"]
        found.append(
            (
                f"{share:.0%} of the streaming-write rate (goal {case['write_target']:.0%})",
                share >= case["write_target"],
            )
        )
    if case["memory_target"] and ours["peak_bytes"] is not None:
        limit, what = case["memory_target"]
        share = ours["peak_bytes"] / case["bytes"]
        found.append((f"peak memory {share:.2f} times the {what} (goal at most {limit:.3g})", share <= limit))
    against, limit = case.get("less_memory") or (None, 0.0)
    if against in case["contenders"] and ours["peak_bytes"] is not None:  # a run that was cut short may lack it
        share = ours["peak_bytes"] / case["contenders"][against]["peak_bytes"]
        found.append((f"peak memory {share:.2f} times that of {against} (goal at most {limit:.3g})", share <= limit))
    if case.get("beside"):
        part, against, goal = case["beside"]
        without = [
            case["contenders"][n]["median_s"] - case["contenders"][part]["median_s"] for n in ("murf_fast", against)
        ]
        own, theirs = max(without[0], 1e-9), without[1]
        found.append(
            (f"{theirs / own:.1f} times faster than {against} beside the {part} (goal {goal:g})", theirs >= goal * own)
        )
    return found


def model_table(results: dict) -> str:
    """Latency, head parameters and peak memory of whole models; empty where none were run."""
    found = [case for case in results["cases"] if case.get("facts")]
    if not found:
        return ""
    others = [n for n in dict.fromkeys(n for case in found for n in case["contenders"]) if n != "murf_fast"]
    names = [*others, "murf_fast"]
    facts = list(dict.fromkeys(name for case in found for name in case["facts"]))
    head = [*facts, "dtype", *(f"{n} {what}" for what in ("latency", "peak MB") for n in names)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * (len(facts) + 1)}{'---:|' * (2 * len(names))}"]
    for case in found:
        sides = [case["contenders"].get(name) for name in names]
        cells = [str(case["facts"].get(name, "")) for name in facts] + [case["dtype"]]
        cells += ["" if s is None else _ms(s["median_s"]) for s in sides]
        cells += ["" if s is None else _mb(s["peak_bytes"]) for s in sides]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(results: dict) -> str:
    lines = [
        "| operation | case | murf_fast | spread | of write rate | of ceiling | peak MB | against | ratio | goal "
        "| their peak MB |",
        "|---|---|---:|---:|---:|---|---:|---|---:|---|---:|",
    ]
    works = floors.recorded()
    for case in results["cases"]:
        ours = case["contenders"]["murf_fast"]
        ceilings = case.get("ceilings", results["ceilings"])
        share = case["bytes"] / headline(ours) / ceilings["write_bytes_per_s"]
        spread = f"{_ms(ours['p20_s'])} to {_ms(ours['p80_s'])}"
        head = (
            f"| `{case['op']}` | {case['case']} | {_ms(headline(ours))} | {spread} "
            f"| {share:.0%} | {of_ceiling(case, results, works)} | {_mb(ours['peak_bytes'])} "
        )
        for row in verdicts(case, results["ceilings"]):
            lines.append(f"{head}| {row['against']} | {row['ratio']:.1f} | {_goal(row)} | {_mb(row['peak_bytes'])} |")
            head = "| | | | | | | "
    return "\n".join(lines)


def of_ceiling(case: dict, results: dict, works: dict) -> str:
    """The share of what this machine could reach at most, and what limits that; empty where the record does not say:
    a case that there is no more, or a rate that was not measured then.
    """
    row = floors.work_in(works, case)
    if row is None:
        return ""
    ceilings = case.get("ceilings", results["ceilings"])
    floor = floors.floor_of(row, floors.measured(ceilings, bool(results["machine"]["driver"])))
    if floor is None:
        return ""
    fewer = "*" if any(op in FEWER for op in row["ops"]) else ""
    return f"{floor.seconds / headline(case['contenders']['murf_fast']):.0%}{fewer} {floor.bound}"


def short_table(results: dict) -> str:
    lines = ["| operation | case | against | times faster | goal |", "|---|---|---|---:|---|"]
    for case in results["cases"]:
        for row in verdicts(case, results["ceilings"]):
            lines.append(f"| `{case['op']}` | {case['case']} | {row['against']} | {row['ratio']:.1f} | {_goal(row)} |")
    for case in results["cases"]:
        for sentence, reached in other_goals(case, results["ceilings"]):
            lines.append(
                f"| `{case['op']}` | {case['case']} | | {sentence} | {'reached' if reached else '**missed**'} |"
            )
    late = [failure for failure in results.get("failed", []) if failure.endswith(LATE)]
    lines += [f"| {f} | | | not measured | **failed** |" for f in results.get("failed", []) if f not in late]
    if late:
        lines.append(f"| {len(late)} more measurements | | | not begun: out of time | |")
    return "\n".join(lines)


def describe(results: dict) -> str:
    machine, ceilings = results["machine"], results["ceilings"]
    rates = (
        f"streaming write {ceilings['write_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"GEMM {ceilings['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s"
    )
    for key, what, unit in (
        ("gemm_bfloat16_flops_per_s", "in bfloat16", "GFLOP/s"),
        ("gemm_float32_flops_per_s", "in float32", "GFLOP/s"),
        ("gemm_tf32_flops_per_s", "in TF32", "GFLOP/s"),
        ("l2_bytes_per_s", "L2 read", "GB/s"),
    ):
        if key in ceilings:
            rates += f", {what} {ceilings[key] / 1e9:.0f} {unit}"
    where = (
        f"{machine['device']}, driver {machine['driver']}"
        if machine["driver"]
        else (f"{machine['device']}, {machine['threads']} threads, {machine['cpu_level']}")
    )
    commits = " and ".join(dict.fromkeys(case.get("commit") or machine["commit"] for case in results["cases"]))
    return (
        f"{where}; measured ceilings: {rates}. torch {machine['torch']}, triton {machine['triton']}, "
        f"Python {machine['python']}, murf_fast {machine['murf_fast']} at {commits}, {machine['date']}."
    )


def page(results: dict) -> str:
    goals = [s for case in results["cases"] for s in other_goals(case, results["ceilings"])]
    goals += [(failure, False) for failure in results.get("failed", [])]
    models = model_table(results)
    models = f"## Whole models\n\n{models}\n\n" if models else ""
    sentences = "\n".join(f"- {text}: {'reached' if reached else '**missed**'}" for text, reached in goals)
    return (
        f"# Results\n\n{describe(results)}\n\nColumns: see [the method](../../README.md).\n\n"
        f"{table(results)}\n\n{sentences}\n\n{models}![speed-up](speedup.png)\n"
    )


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    rows = [
        (f"{case['op']}\n{case['case']}", row)
        for case in results["cases"]
        for row in verdicts(case, results["ceilings"])
    ][::-1]
    figure, axes = plt.subplots(figsize=(11, 0.42 * len(rows) + 1.2), layout="constrained")
    positions = range(len(rows))
    colors = ["#8a8a8a" if r["goal"] is None else "#2b7a4b" if r["reached"] else "#b23b3b" for _, r in rows]
    axes.barh(positions, [r["ratio"] for _, r in rows], color=colors)
    for y, (_, r) in zip(positions, rows, strict=True):
        axes.text(r["ratio"] * 1.03, y, f"{r['ratio']:.1f}x against {r['against']}", va="center", fontsize=7)
        if r["goal"] is not None:
            axes.plot([r["goal"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1.5)
    axes.set_yticks(positions, [label for label, _ in rows], fontsize=6)
    axes.set_xscale("log")
    axes.set_xlim(0.5, max(r["ratio"] for _, r in rows) * 6)
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xlabel("times faster than the fastest of that kind (bar: goal; green reached, red missed, grey none set)")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=72)
    plt.close(figure)
    # A palette: a third of the bytes, in a repository that keeps every picture.
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def write(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "README.md").write_text(page(results))
    plot(results, folder / "speedup.png")


def _family(name: str) -> str:
    for kind in ("compile", "images only"):
        if kind in name:
            return name
    return name.removesuffix(" channels_last").removesuffix(" contiguous").split(" running")[0].split(" stack")[0]


def _is_meant(family: str, against: str) -> bool:
    """A goal against `eager` is one against `eager unfold`, but not against what a compiler makes of it."""
    return family == against or (family.startswith((f"{against} ", f"{against},")) and "compile" not in family)


def _goal(row: dict) -> str:
    if row["goal"] is None:
        return ""
    return f"{row['goal']:g}, {'reached' if row['reached'] else '**missed**'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--status", type=Path, help="what is known of the Triton kernels (status.py)")
    parser.add_argument("--merge", action="store_true", help="keep the operations of the folder that this run lacks")
    arguments = parser.parse_args()
    if arguments.run:
        write_run(arguments)
    elif not arguments.status:
        parser.error("neither a run nor --status")
    if arguments.status:
        arguments.status.write_text(status.page(verdicts))


def write_run(arguments: argparse.Namespace) -> None:
    results = json.loads(arguments.run.read_text())
    if "benchmarks" in results:
        if results.get("murf_fast", {}).get("quick"):
            raise SystemExit(f"{arguments.run} is of small cases (--quick), which no report may show")
        results = condense(results)
    if not (results["cases"] or results.get("check")):
        raise SystemExit("nothing was measured: " + "; ".join(results["failed"]))
    folder = arguments.out / slug(results["machine"])
    if arguments.merge and (folder / "results.json").is_file():
        results = merged(json.loads((folder / "results.json").read_text()), results)
    write(results, folder)
    parts = [describe(results), short_table(results), model_table(results), f"written to {folder}"]
    print("\n\n".join(part for part in parts if part))


if __name__ == "__main__":
    main()
