"""benchmarks/gpu.sh without a GPU: all its stages in the interpreter, and what becomes of a context that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu
import gpu_pytest
import pytest
import report
import torch
from every_op import OPS

from murf_fast import backends

ROOT = Path(__file__).resolve().parents[1]
interpreted = pytest.mark.skipif(
    bool(backends.reasons_against("triton", "cpu")), reason="; ".join(backends.reasons_against("triton", "cpu"))
)


def run(out: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out)} | variables
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out)


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU; the script itself is the test")
    done = run(tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


@interpreted
@pytest.mark.long
def test_dry_run_of_all_stages(tmp_path):
    """Also without the extension, which the script never imports, and without the link that an installation makes."""
    done = run(tmp_path, "--dry-run", "--only", "gaussian_blur")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr  # of a thread, which nobody waits for
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "summary.txt", "logs.tar.gz"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failed"] == []
    assert results["check"]["gaussian_blur"]["passed"] >= 1
    assert results["sanitize"]["memcheck"] == {"gaussian_blur": "clean"}
    assert {c["op"] for c in results["cases"]} == {"gaussian_blur"}
    assert all({"murf_fast", "eager separable"} <= c["contenders"].keys() for c in results["cases"])
    assert "| `gaussian_blur` |" in report.table(results)
    stages = [line.split(":")[0] for line in (tmp_path / "summary.txt").read_text().splitlines()[:4]]
    assert stages == list(gpu.STAGES)
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert {"logs/check.log", "logs/speed.log"} <= set(archive.getnames())


@interpreted
@pytest.mark.long
def test_a_dead_context_costs_what_killed_it(tmp_path):
    """The unit is lost, the process ends, and the others go on in a fresh one; in pytest's workers, too."""
    import murf_fast

    operation = "gaussian_blur"
    assert hasattr(murf_fast, operation)
    done = run(tmp_path, "--dry-run", "--only", operation, "--stage", "check", "--stage", "sanitize",
               MURF_FAST_GPU_FAULT=operation)  # fmt: skip
    assert done.returncode == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["check"][operation]["passed"] == 0
    assert len(results["check"][operation]["failed"]) == 1
    assert "context" in results["sanitize"]["memcheck"][operation]
    assert f"FAILED tests/test_gpu_quick.py::test_parity[cpu-sliced-torch.float32-{operation}]" in done.stdout


FAKE_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    unit = json.loads(line)
    print("noise of a tool", flush=True)
    if unit["do"] == "crash":
        os.kill(os.getpid(), 11)
    if unit["do"] == "hang":
        time.sleep(60)
    print(json.dumps({"kind": "ran", "pid": os.getpid()}), flush=True)
    print(json.dumps({"kind": "done", "dead": "the context" if unit["do"] == "kill" else None}), flush=True)
    if unit["do"] == "kill":
        os._exit(3)
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Does units in processes of the script above; who did what, what was lost, and how many were begun."""
    (tmp_path / "gpu_worker.py").write_text(FAKE_WORKER)
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(gpu, "HERE", tmp_path)

    def work(does: list[str], seconds: float = 60.0, **options):
        limit = gpu.Run(tmp_path, tmp_path, None, False, time.monotonic() + seconds)
        heard, lost = [], {}
        units = [{"do": name} for name in does]
        begun = gpu.work(limit, "stage", units, limit.deadline, lambda unit, message: heard.append(message["pid"]),
                         lambda unit, why: lost.update({unit["do"]: why}), **options)  # fmt: skip
        return heard, lost, begun

    return work


def test_one_process_does_all_that_goes_well(stage):
    heard, lost, begun = stage(["a", "b", "c"])
    assert (len(heard), len(set(heard)), lost, begun) == (3, 1, {}, 3)


def test_a_fresh_process_after_a_crash_and_after_a_dead_context(stage):
    heard, lost, begun = stage(["a", "crash", "b", "kill", "c", "d"])
    assert begun == 6
    assert lost == {"crash": "died with status -11", "kill": "the context"}
    a, b, killed, c, d = heard
    assert b == killed != a
    assert c == d != b


def test_a_call_that_never_ends(stage, monkeypatch):
    monkeypatch.setattr(gpu, "UNIT_LIMIT", 2.0)
    heard, lost, _ = stage(["hang", "a"])
    assert lost == {"hang": "stopped after 2 s"}
    assert len(heard) == 1


def test_a_stage_ends_in_time(stage):
    started = time.monotonic()
    _, lost, begun = stage(["a", "hang", "b"], seconds=3.0)
    assert begun == 2
    assert lost.keys() == {"hang"}
    assert time.monotonic() - started < 20


def test_several_processes(stage):
    heard, lost, _ = stage(["a"] * 12, processes=3)
    assert (len(heard), lost) == (12, {})


def test_all_stages_fit_a_loan():
    assert sum(gpu.LIMITS.values()) <= 480
    assert gpu.LIMITS.keys() == gpu.STAGES.keys()


@pytest.mark.parametrize("op", OPS, ids=str)
def test_tests_are_told_by_their_op(op):
    name = f"tests/test_gpu_quick.py::test_parity[cuda-sliced-torch.bfloat16-{op}]"
    assert gpu_pytest.op_of(name) == op.name.partition("[")[0]
    assert gpu_pytest.op_of("tests/test_pixel_linear.py::test_triton[cuda-open-(64, 12, 8)-torch.float32]") == (
        "pixel_linear"
    )


@pytest.mark.parametrize(
    ("line", "is_error"),
    [
        ("========= Invalid __global__ write of size 4 bytes", True),
        ("========= Error: Race reported between Write access", True),
        ("========= Warning: Potential WAR hazard detected", True),
        ("========= COMPUTE-SANITIZER", False),
        ("========= ERROR SUMMARY: 0 errors", False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", False),
    ],
)
def test_what_a_sanitizer_says(line, is_error):
    assert bool(gpu.SANITIZER_ERROR.search(f"=========\n{line}\n")) == is_error
