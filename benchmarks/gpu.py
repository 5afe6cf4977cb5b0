"""The stages of a GPU run. Whatever is cut short, what was found until then has been written.

    warm       many processes compile what the following stages need
    check      the tests marked gpu_quick: every op and kernel; failures are printed as they come
    speed      ours and plain PyTorch for every operation, then what is compiled, FlexAttention among it
    sanitize   the smallest call of every operation under memcheck, those with products under racecheck

In OUT lie results.json (for report.py), summary.txt and logs.tar.gz. Nothing is installed and nothing is written beside
OUT and the system's folder for temporary files, where the compiled kernels are kept for the next run.
Exit status: 0; 1 if something failed; 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Seconds that a stage may take. What comes first is what the rest is worth nothing without.
LIMITS = {"warm": 80.0, "check": 110.0, "speed": 210.0, "sanitize": 80.0}
UNIT_LIMIT = 60.0  # one call of a worker: a kernel that never ends must not take the stage with it
PROCESSES = 16
# Operations whose kernels have matrix products: their shared memory is what can race.
PRODUCTS = (
    "adaptive_conv",
    "anyup_model",
    "feature_unify",
    "jafar_model",
    "naf_model",
    "nearest_distance",
    "neighborhood_attention",
    "window_attention",
    "window_attention_argmax",
)
CAPTURE_FAILURES = 3  # a failed capture costs a process; after so many none is tried
SANITIZER_ERROR = re.compile(r"^=+ *(Invalid|Misaligned|Error: |Warning: .*hazard|Program hit).*$", re.MULTILINE)


@dataclass
class Run:
    """What was asked for, and what is known so far."""

    out: Path
    work: Path  # logs, and the folder that the package is imported from
    only: str | None
    dry: bool
    deadline: float  # of all stages; that of a dry run has nothing to do with a GPU's
    measured: frozenset[tuple[str, str]] = frozenset()  # cases and dtypes that an earlier run has
    results: dict = field(
        default_factory=lambda: {"machine": {}, "ceilings": {}, "cases": [], "failed": [], "check": {}, "sanitize": {}}
    )
    lock: threading.RLock = field(default_factory=threading.RLock)
    captures_failed: int = 0

    def note(self, line: str) -> None:
        with self.lock:
            print(line, flush=True)
            with (self.out / "summary.txt").open("a") as file:
                file.write(line + "\n")

    def fail(self, line: str) -> None:
        with self.lock:
            self.results["failed"].append(line)
        self.note(f"FAILED {line}")

    def save(self) -> None:
        """The results as they stand, and the logs; a reader never sees half a file."""
        with self.lock:
            unfinished = self.out / "results.json.part"
            unfinished.write_text(json.dumps(self.results, indent=1) + "\n")
            unfinished.replace(self.out / "results.json")

    def pack_logs(self) -> None:
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.work / "logs", "logs")

    def wants(self, op: str) -> bool:
        return self.only in (None, op)

    def wants_case(self, unit: dict) -> bool:
        return self.wants(unit["op"]) and (unit["case"], unit["dtype"]) not in self.measured


class Worker:
    """A process of gpu_worker.py; it is handed one unit of work at a time and answers in lines of JSON."""

    def __init__(self, run: Run, log: Path, prefix: Sequence[str] = (), environment: dict | None = None) -> None:
        command = [*prefix, sys.executable, str(HERE / "gpu_worker.py"), *(["--dry-run"] if run.dry else [])]
        self.log, self.stopped = log.open("a"), False
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=run.work,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )

    def do(self, unit: dict, seconds: float, heard: Callable[[dict], None]) -> str | None:
        """Hands over a unit and passes on what is said about it; why the process is of no more use, or None."""
        timer = threading.Timer(max(seconds, 0.1), self.stop)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(unit) + "\n")
                self.process.stdin.flush()
            for line in self.process.stdout:
                if not line.startswith("{"):  # what tools that wrap the process say
                    continue
                message = json.loads(line)
                if message["kind"] == "done":
                    return message["dead"]
                heard(message)
            return f"stopped after {seconds:.0f} s" if self.stopped else f"died with status {self.process.wait()}"
        finally:
            timer.cancel()

    def stop(self) -> None:
        self.stopped = True
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def work(
    run: Run,
    stage: str,
    units: Sequence[dict],
    deadline: float,
    heard: Callable[[dict, dict], None],
    lost: Callable[[dict, str], None],
    processes: int = 1,
    start: Callable[[Path], Worker] | None = None,
) -> int:
    """Does the units in ``processes`` workers until the deadline; how many were begun.

    A worker whose CUDA context is dead, or that died, is replaced: only the unit it was at is lost.
    """
    waiting, begun = deque(units), 0
    log = run.work / "logs" / f"{stage}.log"

    def serve() -> None:
        nonlocal begun
        worker = None
        while True:
            with run.lock:
                left = deadline - time.monotonic()
                if not waiting or left <= 0:
                    break
                unit, begun = waiting.popleft(), begun + 1
            worker = worker or (start(log) if start else Worker(run, log))
            limit = left if run.dry else min(left, UNIT_LIMIT)
            why = worker.do(unit, limit, lambda message, unit=unit: heard(unit, message))
            if why is not None:
                lost(unit, why)
                worker.kill()
                worker.close()
                worker = None
            run.save()
        if worker:
            worker.close()

    threads = [threading.Thread(target=serve) for _ in range(min(processes, len(units)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return begun


def warm(run: Run, deadline: float) -> str:
    from gpu_speed import variants
    from registry import smallest_calls

    units = [{"do": "smallest", "op": op} for op in smallest_calls() if run.wants(op)]
    units += [{"do": "call", **unit} for unit in variants(run.dry) if run.wants_case(unit)]
    troubles = []

    def heard(unit: dict, message: dict) -> None:
        if message["kind"] == "error":
            troubles.append(f"warm {name_of(unit)}: {message['text']}")

    def lost(unit: dict, why: str) -> None:
        troubles.append(f"warm {name_of(unit)}: {why}")

    # Every process is a compiler; Inductor starts as many more for each as there are CPUs.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    begun = work(run, "warm", units, deadline, heard, lost, min(PROCESSES, os.cpu_count() or 1))
    del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
    for line in troubles:  # not failures: whatever is wrong with a kernel, the next stages say
        run.note(line)
    return f"{begun} of {len(units)} calls, {len(troubles)} with trouble"


def check(run: Run, deadline: float) -> str:
    """pytest with gpu_pytest.py, whose lines say what came of every test."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu_quick", "-p", "gpu_pytest", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "--tb=short", "--no-summary"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--max-worker-restart", "100"]
    files = sorted(p for p in (ROOT / "tests").glob("test_*.py") if "gpu_quick" in p.read_text())
    command += [*(["-k", run.only] if run.only else []), *map(str, files)]
    report = run.work / "logs" / "check.jsonl"
    environment = os.environ | {"MURF_FAST_CHECK_REPORT": str(report)}
    process = subprocess.Popen(
        command,
        cwd=run.work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(max(deadline - time.monotonic(), 0.1), lambda: os.killpg(process.pid, 9))
    timer.start()
    with (run.work / "logs" / "check.log").open("w") as log:
        for line in process.stdout:
            log.write(line)
            print(line, end="", flush=True)
    status = process.wait()
    stopped = not timer.is_alive()
    timer.cancel()
    for line in report.read_text().splitlines() if report.exists() else ():
        test = json.loads(line)
        found = run.results["check"].setdefault(test["op"], {"passed": 0, "failed": []})
        if test["passed"]:
            found["passed"] += 1
        elif test["id"] not in found["failed"]:  # again by the process that ended with it
            found["failed"].append(test["id"])
            run.fail(f"check: {test['id']}")
    if stopped:
        run.fail("check: stopped, out of time")
    elif status not in (0, 1):
        run.fail(f"check: pytest ended with status {status}")
    counts = [(c["passed"], len(c["failed"])) for c in run.results["check"].values()]
    return f"{sum(p for p, _ in counts)} passed, {sum(f for _, f in counts)} failed"


def speed(run: Run, deadline: float) -> str:
    import predictions
    from gpu_speed import variants

    known = predictions.by_case(predictions.recorded()["rows"])
    plain = [{"do": "speed", "compiled": False, **unit} for unit in variants(run.dry) if run.wants_case(unit)]
    compiled: list[dict] = []
    cases: dict[tuple, dict] = {}

    def heard(unit: dict, message: dict) -> None:
        with run.lock:
            kind, key = message.pop("kind"), (unit.get("case"), unit.get("dtype"))
            if kind == "ceilings":
                run.results.update(message)
            elif kind == "case":
                case = cases[key] = message["case"]
                rows = predictions.of_case(case, known)
                case["code"] = predictions.code(rows, run.results["machine"].get("device", ""))
                run.results["cases"].append(case)
                if message["compiles"] and not run.dry:  # Inductor's kernels need a device
                    compiled.append(unit | {"compiled": True})
            elif kind == "time":
                cases[key]["contenders"].setdefault(message["name"], {}).update(message["found"])
            elif kind == "error":
                run.fail(f"{name_of(unit)}: {message['text']}")
                run.captures_failed += "capture" in message["text"]
            run.save()
        if run.captures_failed >= CAPTURE_FAILURES:
            os.environ["MURF_FAST_GPU_CAPTURE"] = "0"  # of workers started from now on

    def lost(unit: dict, why: str) -> None:
        run.fail(f"{name_of(unit)}: {why}")

    late = []
    for units in ([{"do": "ceilings"}, *plain], compiled):
        begun = work(run, "speed", units, deadline, heard, lost)
        late += [f"{name_of(unit)}: not begun, out of time" for unit in units[begun:]]
    with run.lock:
        # Without a time of ours there is nothing to compare.
        run.results["cases"] = [case for case in run.results["cases"] if "murf_fast" in case["contenders"]]
        run.results["failed"] += late
    return f"{len(run.results['cases'])} of {len(plain)} cases, {len(late)} measurements not begun"


def sanitize(run: Run, deadline: float) -> str:
    from registry import smallest_calls

    tool = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    if not (tool or run.dry):
        return "compute-sanitizer is not here"
    said = []
    for check_, ops in (("memcheck", list(smallest_calls())), ("racecheck", PRODUCTS)):
        units = [{"do": "smallest", "op": op} for op in ops if run.wants(op)]
        said.append(f"{check_} {_sanitized(run, check_, tool, units, deadline)} of {len(units)} clean")
    return ", ".join(said)


def _sanitized(run: Run, check_: str, tool: str | None, units: list[dict], deadline: float) -> int:
    found = run.results["sanitize"].setdefault(check_, {})
    reports: list[Path] = []
    read = 0

    def start(log: Path) -> Worker:
        nonlocal read
        reports.append(run.work / "logs" / f"{check_}-{len(reports)}.log")
        read = 0
        prefix = [tool, "--tool", check_, "--log-file", str(reports[-1])] if tool and not run.dry else []
        # Every tensor an allocation of its own: the caching allocator's blocks would hide what lies beside them.
        return Worker(run, log, prefix, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    def verdict(unit: dict, trouble: str | None) -> None:
        nonlocal read
        report = reports[-1].read_text(errors="replace") if reports and reports[-1].exists() else ""
        said = SANITIZER_ERROR.search(report[read:])
        read = len(report)
        trouble = said.group(0).strip("= ") if said else trouble
        found[unit["op"]] = trouble or "clean"
        if trouble:
            run.fail(f"{check_} {unit['op']}: {trouble}")

    def heard(unit: dict, message: dict) -> None:
        verdict(unit, message.get("text"))

    work(run, check_, units, deadline, heard, verdict, start=start)
    return sum(v == "clean" for v in found.values())


def name_of(unit: dict) -> str:
    parts = [unit.get("case") or unit.get("op") or unit["do"], f"({unit['dtype']})" if "dtype" in unit else ""]
    return " ".join(filter(None, parts)) + (" compiled" if unit.get("compiled") else "")


STAGES = {"warm": warm, "check": check, "speed": speed, "sanitize": sanitize}


def importable(folder: Path) -> None:
    """Puts the package into ``folder``, of links: kernels/ is its `kernels` only once it is installed."""
    package = folder / "murf_fast"
    package.mkdir()
    for path in (ROOT / "murf_fast").iterdir():
        # The extension is of one Python; nothing here needs it, and so it is never there.
        if path.name not in ("kernels", "__pycache__") and not path.name.startswith("_native."):
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")


def prepare(work: Path, dry: bool) -> None:
    """What the processes of this run, and this one, import and where they write."""
    importable(work)
    (work / "logs").mkdir()
    kept = Path(tempfile.gettempdir(), f"murf-fast-gpu-{os.getuid()}")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(work), str(HERE)])
    os.environ["PYTHONPYCACHEPREFIX"] = str(kept / "bytecode")
    os.environ.setdefault("TRITON_CACHE_DIR", str(kept / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept / "inductor"))
    os.environ["PYTHONUNBUFFERED"] = os.environ["OMP_NUM_THREADS"] = "1"
    if dry:
        os.environ["TRITON_INTERPRET"], os.environ["MURF_FAST_BACKEND"] = "1", "triton"
    sys.path[:0] = [str(work), str(HERE)]


def conclude(run: Run) -> None:
    if run.results["cases"]:
        from report import short_table

        run.note("\n" + short_table(run.results))
    print(f"\nin {run.out}: {', '.join(sorted(p.name for p in run.out.iterdir()))}")


def cases_of(results: Path) -> frozenset[tuple[str, str]]:
    """Cases and dtypes of an earlier run, as units of work name them."""
    cases = json.loads(results.read_text())["cases"]
    names = {(f"{c['op']}: {c['case'].removesuffix(', ' + c['dtype'])}", c["dtype"]) for c in cases}
    return frozenset(names | {(f"{c['op']}: {c['case']}", c["dtype"]) for c in cases})


def limit_of(text: str) -> tuple[str, float]:
    stage, _, seconds = text.partition("=")
    if stage not in STAGES:
        raise argparse.ArgumentTypeError(f"no stage is called {stage!r}; there are {', '.join(STAGES)}")
    return stage, float(seconds)


def has_device() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this one; may be repeated")
    parser.add_argument("--only", metavar="OP", help="one operation or model")
    parser.add_argument(
        "--after", type=Path, metavar="RESULTS", help="results.json: measure only what it does not have"
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="for all stages together (480)")
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="STAGE=SECONDS",
        type=limit_of,
        help="of one stage, in place of its own",
    )
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or HERE / "results" / "gpu-run")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter: no speeds")
    arguments = parser.parse_args()
    if not arguments.dry_run and not has_device():
        print(f"gpu.sh: no CUDA device, or no torch, in {sys.executable}", file=sys.stderr)
        return 2
    started = time.monotonic()
    limits = LIMITS | dict(arguments.limit)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.txt").write_text("")
    with tempfile.TemporaryDirectory(prefix="murf-fast-gpu-") as folder:
        prepare(Path(folder), arguments.dry_run)
        measured = cases_of(arguments.after) if arguments.after else frozenset()
        run = Run(out, Path(folder), arguments.only, arguments.dry_run, started + arguments.seconds, measured)
        for name in arguments.stage or STAGES:
            begun = time.monotonic()
            if begun >= run.deadline:
                run.fail(f"{name}: not begun, out of time")
                continue
            try:
                said = STAGES[name](run, run.deadline if run.dry else min(begun + limits[name], run.deadline))
                run.note(f"{name}: {said}, {time.monotonic() - begun:.0f} s")
            except Exception as error:  # the next stage may do better
                run.fail(f"{name}: {type(error).__name__}: {error}")
            run.save()
            run.pack_logs()
        conclude(run)
    return 1 if run.results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
