"""Records of the benchmarks: which files are taken, what is refused before any work, and that nothing is lost."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import machine
import measure
import pytest
import registry
import report
from rich.console import Console
from typer.testing import CliRunner

from murf_fast.cli import commands
from murf_fast.cli.bench import records, suites
from murf_fast.cli.bench.suites import Options

ROOT = Path(__file__).resolve().parents[1]
HERE = machine.describe()
RATES = {"write_bytes_per_s": 1e10, "copy_bytes_per_s": 1e10, "gemm_flops_per_s": 1e11}
LINE = "resize: position embedding"
OTHER = "upsample_sum: three maps"


def timing(seconds):
    return {"median_s": seconds, "p20_s": seconds * 0.98, "p80_s": seconds * 1.02, "rounds": 9, "peak_bytes": 1}


def entry(name, ours=0.001, eager=0.004):
    op, _, case = name.partition(": ")
    contenders = {"murf_fast": timing(ours), "eager": timing(eager)}
    info = {
        "op": op, "case": case, "dtype": "float32", "error": 0.0, "bytes": 1000, "operations": 0, "targets": [],
        "write_target": None, "memory_target": None, "contenders": contenders, "ceilings": dict(RATES),
    }  # fmt: skip
    return {"name": f"test[{name}]", "fullname": f"bench_all.py::test[{name}]", "extra_info": info, "stats": {}}


def run_of(*entries, planned=None, quick=False, options=None, failed=(), **of_machine):
    names = [e["name"][5:-1] for e in entries]
    header = {
        "schema": 1, "quick": quick, "planned": planned or names, "options": options or {"suites": [], "cases": []}
    }  # fmt: skip
    return {
        "machine_info": {"murf_fast": {**HERE, **of_machine}},
        "benchmarks": list(entries),
        "failed": list(failed),
        "murf_fast": header,
    }


@pytest.fixture
def saved(tmp_path):
    def save(content, name="old.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return save


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """``murf-fast bench`` in ``tmp_path``; where it would measure, ``measured`` is written and ``status`` returned."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, measured=None, status=0):
        def fake(options, asked, console):
            asked_for.append(asked)
            if measured is not None:
                options.record.write_text(json.dumps(measured))
            return status

        asked_for = []
        monkeypatch.setattr(suites, "_measure", fake)
        monkeypatch.setattr(suites, "_report", lambda *_: 0)
        result = CliRunner().invoke(commands.app, ["bench", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result, asked_for

    return call


def flat(result):
    return " ".join(result.output.split())


def test_both_kinds_of_files_hold_the_same(saved):
    run = run_of(entry(LINE), entry(OTHER), failed=["test[murf: x]: error 2"])
    first = records.read(saved(run))
    second = records.read(saved(report.condense(json.loads(json.dumps(run))), "results.json"))
    without = {name: {k: v for k, v in case.items() if k != "ceilings"} for name, case in first.cases.items()}
    assert list(first.cases) == list(second.cases) == [LINE, OTHER]
    assert without == second.cases
    assert (first.machine, first.failed) == (second.machine, second.failed) == (HERE, ["test[murf: x]: error 2"])
    assert first.ceilings == second.ceilings == RATES


def test_the_committed_results_are_records():
    for path in (ROOT / "benchmarks" / "results").glob("cpu-*/results.json"):
        record = records.read(path)
        assert len(record.cases) > 10
        assert not record.quick


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "is neither"),
        ("3", "is neither"),
        ({}, "is neither"),
        ({"benchmarks": [], "machine_info": {}}, "is neither"),
        ({"benchmarks": [{"extra_info": {"op": "resize"}}], "machine_info": {"murf_fast": HERE}}, "is neither"),
        ({**run_of(entry(LINE)), "murf_fast": {"schema": 2}}, "has schema 2; this version reads 1"),
        (run_of(entry(LINE, ours=0.0)), "no positive seconds"),
        (run_of(entry(LINE), entry(LINE)), "two cases of one name"),
        (run_of(), "holds no case"),
        (run_of(entry(LINE), quick=True), "is of small (--quick) cases, and this run is of full ones"),
        (run_of(entry(LINE), driver="580"), "is of a GPU"),
        (run_of(entry(LINE), device="Z80", threads=1000), "another machine (device: Z80, now"),
        (run_of(entry("sort: quickly")), "has no case of"),
    ],
)
def test_what_is_no_baseline_is_refused_in_one_line_before_any_work(content, words, saved, bench):
    path = saved(content)
    result, asked = bench("--against", path)
    assert result.exit_code == 2
    assert words in result.output
    assert str(path) in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert asked == []
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "nowhere.json"], "nowhere.json"),
        (["nosuch"], "no suite for nosuch; there are: adaptive_conv"),
        (["nosuch"], "and, each by itself: anyup, featsharp, jbu"),
        (["--fail-on-slower"], "--against"),
        (["--other-machine"], "--against"),
        (["--resume"], "there is no out/benchmarks/run.json"),
        (["jbu", "--quick"], "takes no option but --out"),
    ],
)
def test_bad_input_is_one_line(arguments, words, bench):
    result, asked = bench(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert asked == []


def test_an_installed_package_says_that_it_has_no_suites(monkeypatch, tmp_path, bench):
    (tmp_path / "benchmarks").mkdir()  # of somebody else, beside the package
    monkeypatch.setattr(suites, "SUITES", tmp_path / "benchmarks")
    for arguments in ([], ["nosuch"], ["murf"]):
        result, asked = bench(*arguments)
        assert (result.exit_code, asked) == (2, [])
        assert "part of the source checkout" in result.output


def test_a_missing_library_is_named(monkeypatch, bench):
    monkeypatch.setattr(suites, "NEEDED", ("pytest", "no_such_library"))
    result, asked = bench("resize")
    assert (result.exit_code, asked) == (1, [])
    assert "this needs no_such_library: pip install 'murf-fast[bench,cli]'" in result.output


def test_slower_has_an_exit_status_of_its_own(saved, bench):
    old = saved(run_of(entry(LINE), entry(OTHER)))
    slow = run_of(entry(LINE, ours=0.002), entry(OTHER))
    result, asked = bench("--against", old, measured=slow)
    assert result.exit_code == 0
    assert "1 slower, 0 faster, 1 within" in flat(result)
    assert asked == [{"suites": [], "cases": [LINE, OTHER]}]
    assert bench("--against", old, "--fail-on-slower", measured=slow)[0].exit_code == 10
    assert bench("--against", old, "--fail-on-slower", measured=run_of(entry(LINE), entry(OTHER)))[0].exit_code == 0
    result, _ = bench("--against", old, "--fail-on-slower", measured=run_of(entry(LINE, ours=0.0005), entry(OTHER)))
    assert result.exit_code == 0
    assert "0 slower, 1 faster, 1 within" in flat(result)
    # A wrong result comes before a slow one.
    wrong = run_of(entry(LINE, ours=0.002), planned=[LINE, OTHER], failed=[f"test[{OTHER}]: error 2"])
    result, _ = bench("--against", old, "--fail-on-slower", measured=wrong)
    assert result.exit_code == 1
    assert f"failed now: test[{OTHER}]: error 2" in flat(result)


def test_a_machine_that_is_not_as_fast_as_it_was_is_told(saved, bench):
    old, busy = saved(run_of(entry(LINE))), run_of(entry(LINE))
    assert "the machine itself" not in bench("--against", old, measured=busy)[0].output
    busy["benchmarks"][0]["extra_info"]["ceilings"]["write_bytes_per_s"] /= 5
    result, _ = bench("--against", old, measured=busy)
    assert "the machine itself: write 10, now 2 G/s: busy now or then" in flat(result)
    assert "copy" not in flat(result)


def test_names_choose_among_the_cases_of_the_old_record(saved, bench):
    old = saved(run_of(entry(LINE), entry(OTHER)))
    result, asked = bench("resize", "--against", old, measured=run_of(entry(LINE)))
    assert asked == [{"suites": ["resize"], "cases": [LINE]}]
    assert "1 cases compared" in flat(result)
    result, asked = bench("murf", "--against", old)
    assert (result.exit_code, asked) == (2, [])
    assert "has no case of murf" in result.output


def test_a_case_that_is_no_more_is_named(saved, bench):
    old = saved(run_of(entry(LINE), entry(OTHER)))
    options = {"suites": [], "cases": [LINE, OTHER]}
    result, _ = bench("--against", old, measured=run_of(entry(LINE), options=options))
    assert f"no longer among the cases: {OTHER}" in flat(result)


def test_another_machine_on_request_only(saved, bench):
    old = saved(run_of(entry(LINE, ours=0.0001, eager=0.0004), device="Z80"))
    result, _ = bench("--against", old, "--other-machine", measured=run_of(entry(LINE)))
    assert result.exit_code == 0
    assert "device: Z80, now" in flat(result)
    assert "by their ratios alone: 0 slower, 0 faster, 1 within" in flat(result)


def test_an_interrupted_run_says_what_it_kept_and_is_continued(bench, tmp_path):
    options = {"suites": ["resize", "upsample_sum"], "cases": []}
    part = run_of(entry(LINE), planned=[LINE, OTHER], options=options)
    result, _ = bench(*options["suites"], measured=part, status=suites.INTERRUPTED)
    assert result.exit_code == 130
    assert "interrupted: 1 of 2 cases are kept in out/benchmarks/run.json; the same command with --resume" in flat(
        result
    )
    result, asked = bench(*reversed(options["suites"]), "--resume", measured=run_of(entry(LINE), entry(OTHER)))
    assert result.exit_code == 0
    assert "1 cases are kept, 1 left to measure" in flat(result)
    assert len(asked) == 1
    # What has ended otherwise is no success either.
    assert bench(*options["suites"], measured=part, status=0)[0].exit_code == 1


def test_a_complete_run_is_not_measured_again(bench, saved, tmp_path):
    (tmp_path / "out" / "benchmarks").mkdir(parents=True)
    saved(run_of(entry(LINE), options={"suites": ["resize"], "cases": []}), "out/benchmarks/run.json")
    result, asked = bench("resize", "--resume")
    assert (result.exit_code, asked) == (0, [])


def test_a_refused_case_is_measured_again(bench, saved, tmp_path):
    (tmp_path / "out" / "benchmarks").mkdir(parents=True)
    options = {"suites": ["resize"], "cases": []}
    refused = run_of(entry(LINE), planned=[LINE, OTHER], failed=[f"test[{OTHER}]: error 2"], options=options)
    saved(refused, "out/benchmarks/run.json")
    result, asked = bench("resize", "--resume", measured=refused, status=1)
    assert (result.exit_code, len(asked)) == (1, 1)
    assert bench("resize", "--resume", measured=run_of(entry(LINE), entry(OTHER), options=options))[0].exit_code == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"commit": "abc"}, "commit: abc, now"),
        ({"threads": 1000}, "threads: 1000, now"),
        ({"torch": "1.0"}, "torch: 1.0, now"),
        ({"options": {"suites": ["murf"], "cases": []}}, "the suites asked for"),
        ({"options": {"suites": ["resize"], "cases": [LINE]}}, "the cases asked for"),
    ],
)
def test_another_run_is_not_continued(change, words, bench, saved, tmp_path):
    (tmp_path / "out" / "benchmarks").mkdir(parents=True)
    made = {"options": {"suites": ["resize"], "cases": []}, "planned": [LINE, OTHER], **change}
    path = saved(run_of(entry(LINE), **made), "out/benchmarks/run.json")
    before = path.read_text()
    result, asked = bench("resize", "--resume")
    assert (result.exit_code, asked) == (2, [])
    assert f"cannot be resumed, for what differs: {words}" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert path.read_text() == before


def test_an_earlier_record_is_kept_and_quick_ones_lie_apart(bench, tmp_path):
    folder = tmp_path / "out" / "benchmarks"
    first = run_of(entry(LINE, ours=0.002))
    bench("resize", measured=first)
    bench("resize", "--quick", measured=run_of(entry(LINE), quick=True))
    assert sorted(p.name for p in folder.iterdir()) == ["quick.json", "run.json"]
    result, _ = bench("resize", measured=run_of(entry(LINE)))
    (kept,) = folder.glob("run-*.json")
    assert json.loads(kept.read_text()) == first
    assert f"the record that was here is now out/benchmarks/{kept.name}" in flat(result)


def test_a_quick_run_is_no_report(saved):
    path = saved(run_of(entry(LINE), quick=True))
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "--quick" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_quick_table_says_so(saved):
    printed = io.StringIO()
    options = Options(quick=True)
    record = records.read(saved(run_of(entry(LINE), quick=True, failed=["test[murf: x]: error 2"])))
    assert suites._report(options, record, Console(file=printed, width=120)) == 0
    text = " ".join(printed.getvalue().split())
    assert text.startswith("QUICK: small cases")
    assert "1 ms (0.98 to 1.02)" in text
    assert "failed: test[murf: x]: error 2" in text


def test_a_quick_run_has_one_case_of_everything_and_compiles_nothing():
    cases = [case for case in registry.cases() if "cpu" in case.devices]
    chosen = measure.quick_cases(cases)
    assert [case.op for case in chosen] == registry.suites()
    assert "twice as fine" in next(case.name for case in chosen if case.op == "featsharp_model")
    calls = {"eager": 1, "MuRF compile": 2, "OpenVINO": 3}
    assert measure.without_compilers(calls) == {"eager": 1}
    assert measure.without_compilers({"compile": 2}) == {"compile": 2}


def test_ceilings_measured_twice_stay_with_their_cases():
    run = run_of(entry(LINE), entry(OTHER))
    run["benchmarks"][1]["extra_info"]["ceilings"]["write_bytes_per_s"] = 2e10
    condensed = report.condense(run)
    assert condensed["ceilings"] == RATES
    assert "ceilings" not in condensed["cases"][0]
    assert condensed["cases"][1]["ceilings"]["write_bytes_per_s"] == 2e10
    assert condensed["schema"] == records.SCHEMA


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals of a terminal")
def test_ctrl_c_keeps_what_was_measured_and_resume_measures_the_rest(tmp_path, monkeypatch):
    """The command itself, in a terminal's stead: interrupted after its first case, continued, compared with itself.
    Variables of an outer pytest, which would have pytest-benchmark measure nothing, are not the run's.
    """
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--benchmark-disable")
    names = ["resize", "window_attention", "window_attention_argmax"]
    command = [sys.executable, "-m", "murf_fast", "bench", *names, "--quick", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )
    path, until = tmp_path / "quick.json", time.monotonic() + 240
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 130, output
    first = json.loads(path.read_text())
    measured = len(first["benchmarks"])
    assert 1 <= measured < 3, output
    assert f"interrupted: {measured} of 3 cases are kept in {path}" in output
    assert "Traceback" not in output

    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    second = json.loads(path.read_text())
    assert second["benchmarks"][:measured] == first["benchmarks"]
    assert [e["extra_info"]["op"] for e in second["benchmarks"]] == names
    assert second["murf_fast"]["quick"] is True
    assert records.read(path).missing == []
    # pytest-benchmark's own tool reads the file.
    tool = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(path)], capture_output=True, text=True, timeout=60
    )
    assert tool.returncode == 0, tool.stderr
    assert "resize" in tool.stdout
