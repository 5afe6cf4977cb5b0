"""``murf-fast tables``: what it measures, prints, writes and draws, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from murf_fast.cli import commands, meter
from murf_fast.cli.bench.suites import TABLES
from murf_fast.cli.clock import Clock, summary
from murf_fast.cli.tables import case, columns, command, figure, forecast, formats, results, runner, upsampling
from murf_fast.cli.tables.case import Case, Table, Work

VIT = ("--model", "table_models:vit")
SMALL = {
    "anyup10": ("--sizes", "32", "--models", "bilinear,anyup"),
    "jbu": ("--sizes", "32", "--models", "jbu"),
    "encoder": ("--sizes", "28,56", *VIT),
    "murf2": ("--sizes", "28,56", *VIT),
    "featsharp14": ("--sizes", "56,112", *VIT),
    "mrfad": ("--sizes", "56", *VIT),
}
COUNTS = {"anyup10": 4, "jbu": 2, "encoder": 4, "murf2": 6, "featsharp14": 8, "mrfad": 2}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(runner, "SECONDS", 0.01)
    monkeypatch.setattr(upsampling, "CHANNELS", 48)
    monkeypatch.setattr(figure, "DPI", 110)


def invoke(*arguments):
    return CliRunner().invoke(commands.app, ["tables", *map(str, arguments)])


def refused(result, words):
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert isinstance(result.exception, SystemExit)


def waiting(seconds=0.0, x=1, code=case.OURS, **options):
    """A case whose part does nothing, or raises what it is given."""
    raises = options.pop("raises", None)

    def build():
        def call():
            if raises is not None:
                raise raises
            return torch.ones(8)

        return {"part": call}

    return Case({"size": x, "method": "m", "code": code}, build, {"number": 2.0 * x}, **options)


@pytest.fixture
def table_of(monkeypatch):
    """Puts a table of given cases in the place of jbu's."""

    def put(*cases):
        made = Table(
            title="A_table of 100 %",
            labels=("size", "method", "code"),
            parts={"part": "part"},
            facts={"number": ("number, M", 1e-6)},
            x="size",
            sizes=(1,),
            models=("m",),
            size="pixels",
            cases=lambda setting: cases,
        )
        monkeypatch.setattr("murf_fast.cli.tables.kinds.jbu.TABLE", made)

    return put


def test_every_table_is_tested():
    assert set(SMALL) == set(COUNTS) == set(case.names())
    assert all(name in invoke("--help").output for name in case.names())


@pytest.mark.parametrize("name", sorted(SMALL))
def test_tables_end_to_end(name, tmp_path):
    pytest.importorskip("transformers")
    result = invoke(name, *SMALL[name], "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    table, told = case.table(name), json.loads((tmp_path / f"{name}.json").read_text())
    assert (told["format"], told["schema"], told["table"]) == (results.FORMAT, 1, name)
    assert told["cut"] is None
    assert len(told["rows"]) == told["planned"] == COUNTS[name]
    for row in told["rows"]:
        assert row["error"] is None
        assert set(row["parts"]) == set(table.parts)
        assert set(row["facts"]) == set(table.facts)
        for part in row["parts"].values():
            assert 0 < part["p20_s"] <= part["median_s"] <= part["p80_s"]
            assert part["rounds"] >= 1
    assert table.title in result.stdout
    assert "CUT SHORT" not in result.output
    assert "x ours" in result.stdout
    assert f"{name}.json" in result.stderr
    with Image.open(tmp_path / f"{name}.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    assert pixels.shape[1] > 1000
    # Ours is drawn in blue: lines or filled bars.
    assert (np.abs(pixels - [0x00, 0x72, 0xB2]).sum(2) < 12).sum() > 200


@pytest.mark.parametrize(("bench", "table"), sorted(TABLES.items()))
def test_bench_is_a_table_of_another_name(bench, table, monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(command, "main", lambda job, console, log: jobs.append(job) or 0)
    assert CliRunner().invoke(commands.app, ["bench", bench, "--out", str(tmp_path)]).exit_code == 0
    assert [(job.name, job.out) for job in jobs] == [(table, tmp_path)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "no table 'nonsense'; there are: anyup10, encoder, featsharp14, jbu, mrfad, murf2"),
        ([], "name a table: anyup10, encoder"),
        (["anyup10", "--sizes", "100"], "--sizes: 100 must be a multiple of the patch of 16 pixels"),
        (["anyup10", "--sizes", "16"], "at least 32"),
        (["jbu", "--sizes", "32"], "at least 48"),
        (["anyup10", "--sizes", "a"], "--sizes must be pixels"),
        (["anyup10", "--sizes", "99999"], "--sizes must be pixels"),
        (["anyup10", "--models", "loftup"], "no loftup in this table; there are: bilinear, jbu, jafar"),
        (["anyup10", "--models", ","], "--models must be names such as"),
        (["encoder", "--models", "ViT-Z"], "no 'ViT-Z'; there are: ViT-S/14, ViT-B/14, ViT-L/14"),
        (["encoder", "--models", "S", "--sizes", "100"], "the patch of 14 pixels of ViT-S/14 does not divide 100"),
        (["encoder", "--models", "S", *VIT], "--models and --model say which model it is: give one"),
        (["encoder", "--model", "table_models"], "--model must be module:function"),
        (["encoder", "--model", "table_models:nobody"], "cannot be imported"),
        (["encoder", "--model", "no_such_module:vit"], "cannot be imported"),
        (["encoder", "--model", "table_models:torch"], "must be a function"),
        (["encoder", "--model", "table_models:Nearest"], "must be a vision transformer"),
        (["encoder", "--model", "os:getcwd"], "must return a model, it returned a str"),
        (["encoder", "--weights", "/nowhere"], "/nowhere"),
        (["featsharp14", "--sizes", "56,70", *VIT], "the first, 56, is a view's; 70 must be a multiple of it"),
        (["mrfad", "--sizes", "14", *VIT], "has no patch of 14 pixels"),
        (["mrfad", "--batch", "2", *VIT], "--batch: mrfad scores images one by one"),
        (["mrfad", "--data", "/nowhere", *VIT], "/nowhere is not a folder"),
        (["anyup10", "--model", "os:getcwd"], "must return a model to call, it returned a str"),
        (["anyup10", "--data", "."], "--data: the table anyup10 takes none"),
        (["anyup10", "--weights", "a.pth"], "--weights are of one method"),
        (["anyup10", "--weights", "/nowhere.pth", "--models", "naf"], "/nowhere.pth"),
        (["anyup10", "--batch", "0"], "--batch must be 1 or more"),
        (["anyup10", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16"),
        (["anyup10", "--device", "tpu"], "--device must be cpu, cuda or cuda:1"),
        (["anyup10", "--budget", "nan"], "--budget must be a number of seconds"),
        (["anyup10", "--budget", "0"], "--budget must be a number of seconds"),
        (["anyup10", "--format", "html"], "--format must be one of rich, md, csv, latex, json"),
        (["--from", "/nowhere.json"], "--from: /nowhere.json is no file"),
        (["jbu", "--from", "x.json"], "--from makes no new measurements"),
        (["anyup10", "--sizes", "32", "--models", "bilinear", "--out", __file__], "--out must be a folder"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, words, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr(runner, "run", lambda *given: pytest.fail("it was measured"))
    monkeypatch.chdir(tmp_path)
    refused(invoke(*arguments), words)
    assert not list(tmp_path.iterdir())


def test_a_missing_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(invoke("anyup10", "--device", "cuda"), "--device cuda: torch sees no CUDA device")


def test_missing_transformers_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke("encoder", "--models", "S", "--sizes", "28", "--out", tmp_path)
    assert result.exit_code == 1
    assert "this needs transformers: pip install 'murf-fast[cli,models]'" in result.stderr


def test_a_budget_too_small_for_one_case(table_of, tmp_path):
    table_of(waiting(x=1, work=Work(1e18)), waiting(x=2, work=Work(1e15)))
    refused(invoke("jbu", "--device", "cpu", "--budget", "1", "--out", tmp_path), "is too little for one case: 2, m, ")
    assert not list(tmp_path.iterdir())


def test_a_budget_cuts_a_table_short(table_of, tmp_path):
    """What does not fit is left out, what comes after it and does fit is not; every format and the file say it."""
    table_of(waiting(x=1), waiting(x=2, work=Work(1e18)), waiting(x=3))
    result = invoke("jbu", "--device", "cpu", "--budget", "5", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "CUT SHORT: 2 of 3 cases, the budget" in result.stdout
    assert f"of 5 s are spent: 2 of 3 cases are kept in {tmp_path / 'jbu.json'}" in result.stderr
    assert "left out, as more is expected of them than is left: 2, m" in " ".join(result.stderr.split())
    assert "1 of 3: 2, m, " in result.stderr  # no terminal: a line for every case
    told = json.loads((tmp_path / "jbu.json").read_text())
    assert told["cut"] == "budget"
    assert [row["labels"]["size"] for row in told["rows"]] == [1, 3]
    for kind in ("md", "latex"):
        assert "CUT SHORT" in invoke("--from", tmp_path / "jbu.json", "--format", kind, "--out", tmp_path).stdout
    text = invoke("--from", tmp_path / "jbu.json", "--format", "csv", "--out", tmp_path).stdout
    assert {row["cut"] for row in csv.DictReader(io.StringIO(text))} == {"budget"}


def test_a_case_that_is_slower_than_expected_is_called_once(table_of, tmp_path, monkeypatch):
    """A second call would take more than is left; the cases after it are measured all the same. Nothing takes time but
    by a clock of the test's own."""
    calls = []

    def now():
        return 1.2 * len(calls)

    def seconds_of(call, device):
        begun = now()
        call()
        return now() - begun

    def build():
        return {"part": lambda: calls.append(1)}

    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter=now))
    monkeypatch.setattr(meter, "seconds_of", seconds_of)
    table_of(waiting(x=1), Case({"size": 2, "method": "slow", "code": case.OURS}, build, {"number": 4.0}), waiting(x=3))
    result = invoke("jbu", "--device", "cpu", "--budget", "2", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert len(calls) == 1
    assert "left out, as more is expected of them than is left: 2, slow" in " ".join(result.stderr.split())
    told = json.loads((tmp_path / "jbu.json").read_text())
    assert [row["labels"]["size"] for row in told["rows"]] == [1, 3]
    assert told["cut"] == "budget"
    calls.clear()
    table_of(Case({"size": 2, "method": "slow", "code": case.OURS}, build, {"number": 4.0}))
    result = invoke("jbu", "--device", "cpu", "--budget", "2", "--out", tmp_path / "none")
    assert result.exit_code == 2
    assert "--budget: no case was measured within 2 s" in result.stderr


def test_an_interruption_keeps_what_is_measured(table_of, tmp_path):
    table_of(waiting(x=1), waiting(x=2, raises=KeyboardInterrupt()), waiting(x=3))
    result = invoke("jbu", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 130
    assert "CUT SHORT: 1 of 3 cases, stopped by the user" in result.stdout
    assert f"interrupted: 1 of 3 cases are kept in {tmp_path / 'jbu.json'}" in result.stderr
    told = json.loads((tmp_path / "jbu.json").read_text())
    assert told["cut"] == "interrupted"
    assert [row["labels"]["size"] for row in told["rows"]] == [1]
    assert (tmp_path / "jbu.png").exists()


def test_an_interruption_before_the_first_row_says_so(table_of, tmp_path, monkeypatch):
    table_of(waiting(x=1, raises=KeyboardInterrupt()), waiting(x=2))
    result = invoke("jbu", "--device", "cpu", "--out", tmp_path, "--format", "csv")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "interrupted: nothing was measured"
    assert not (tmp_path / "jbu.png").exists()


def test_rows_are_on_disk_before_the_next_case(table_of, tmp_path):
    seen = []

    def look():
        seen.append([row["labels"]["size"] for row in json.loads((tmp_path / "jbu.json").read_text())["rows"]])
        return {"part": lambda: None}

    second = Case({"size": 2, "method": "m", "code": case.OURS}, look, {"number": 1.0})
    table_of(waiting(x=1), second)
    assert invoke("jbu", "--device", "cpu", "--out", tmp_path).exit_code == 0
    assert seen == [[1]]


def test_what_does_not_fit_says_so_and_the_rest_is_measured(table_of, monkeypatch, tmp_path):
    monkeypatch.setattr(forecast, "free_bytes", lambda device: 2**30)
    large = Work(bytes=2**32)
    table_of(waiting(x=1, work=large), waiting(x=2), waiting(x=3, raises=torch.OutOfMemoryError()))
    result = invoke("jbu", "--device", "cpu", "--out", tmp_path, "--format", "md")
    assert result.exit_code == 0, result.output
    assert "needs 4 GiB, 1 GiB are free" in result.stdout
    assert "out of memory" in result.stdout
    rows = json.loads((tmp_path / "jbu.json").read_text())["rows"]
    assert [bool(row["parts"]) for row in rows] == [False, True, False]


def test_a_bug_is_not_hidden(table_of, tmp_path):
    table_of(waiting(x=1, raises=RuntimeError("a bug")))
    result = invoke("jbu", "--device", "cpu", "--out", tmp_path)
    assert isinstance(result.exception, RuntimeError)


def test_a_model_of_ones_own(tmp_path):
    """Beside the others; one that fails has a row that says why."""
    options = ("--sizes", "32", "--models", "bilinear", "--device", "cpu", "--out", tmp_path, "--format", "md")
    result = invoke("anyup10", *options, "--model", "table_models:upsampler")
    assert result.exit_code == 0, result.output
    assert "table_models:upsampler | yours" in result.stdout
    result = invoke("anyup10", *options, "--model", "table_models:broken")
    assert result.exit_code == 0, result.output
    assert "RuntimeError: no such layer |" in result.stdout


def test_a_backbone_without_tokens_has_ours_alone(tmp_path):
    pytest.importorskip("transformers")
    result = invoke("encoder", "--model", "table_models:backbone", "--sizes", "28", "--out", tmp_path, "--format", "md")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "encoder.json").read_text())["rows"]
    assert rows[0]["parts"]
    assert "returns no tokens of patches" in rows[1]["error"]


def test_weights_on_disk(weights, tmp_path):
    result = invoke("encoder", "--weights", weights, "--sizes", "28", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"models: --weights {weights}" in result.stdout
    assert "random" not in result.stdout


def test_weights_of_a_method(tmp_path):
    from murf_fast.nn import NAF

    torch.save(NAF(32, kernel_size=3).state_dict(), tmp_path / "naf.pth")
    options = ("--models", "naf,bilinear", "--sizes", "144", "--device", "cpu", "--out", tmp_path)
    result = invoke("anyup10", *options, "--weights", tmp_path / "naf.pth")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "anyup10.json").read_text())["rows"]
    facts = {row["labels"]["method"]: row["facts"]["parameters"] for row in rows}
    assert facts == {"NAF": sum(p.numel() for p in NAF(32, kernel_size=3).parameters()), "bilinear": 0}


def test_own_data(weights, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("good", "scratch"):
        (tmp_path / "data" / "cap" / name).mkdir(parents=True)
    for i in range(6):
        pixels = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "cap" / "good" / f"{i}.png")
    Image.fromarray(pixels).save(tmp_path / "data" / "cap" / "scratch" / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "data" / "cap" / "scratch" / "a_mask.png")
    result = invoke("mrfad", "--weights", weights, "--data", tmp_path / "data", "--sizes", "56", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "mrfad.json").read_text())["rows"]
    assert {row["labels"]["category"] for row in rows} == {"cap"}
    assert 1 < rows[0]["facts"]["images"] < 6


def stored(tmp_path, **changes):
    part = {"median_s": 0.25, "p20_s": 0.2, "p80_s": 0.3, "rounds": 3, "peak_bytes": 3 * 2**20}
    rows = [
        {"labels": {"size": s, "method": m, "code": c}, "facts": {"parameters": 5e6, "operations": None},
         "parts": {"forward": part | {"median_s": t}}, "error": None}
        for s, m, c, t in ((64, "a|b & c_d", case.OURS, 0.25), (64, "a|b & c_d", case.PLAIN, 0.75))
    ]  # fmt: skip
    rows.append({"labels": {"size": 96, "method": "e", "code": case.PLAIN}, "facts": {"parameters": None},
                 "parts": {}, "error": "out of memory"})  # fmt: skip
    told = {"format": results.FORMAT, "schema": 1, "table": "anyup10", "planned": 3, "cut": None, "notes": [],
            "machine": {"device": "a_chip", "kind": "cpu", "threads": 1}, "setting": {"dtype": "float32", "batch": 1},
            "rows": rows}  # fmt: skip
    path = tmp_path / "anyup10.json"
    path.write_text(json.dumps(told | changes))
    return path


def test_formats_say_what_the_file_holds(tmp_path):
    path = stored(tmp_path)
    found = {kind: invoke("--from", path, "--format", kind, "--out", tmp_path) for kind in formats.FORMATS}
    assert all(result.exit_code == 0 for result in found.values()), found
    assert results.read(path).text() == found["json"].stdout
    rows = list(csv.DictReader(io.StringIO(found["csv"].stdout)))
    assert [row["forward_s"] for row in rows] == ["0.25", "0.75", ""]
    assert [row["forward_ratio"] for row in rows] == ["", "3.0", ""]
    assert [row["forward_peak_bytes"] for row in rows[:2]] == [str(3 * 2**20)] * 2
    assert [row["error"] for row in rows] == ["", "", "out of memory"]
    assert rows[0]["parameters"] == "5000000"
    markdown = [line for line in found["md"].stdout.splitlines() if line.startswith("| ")]
    assert len(markdown) == 2 + 3
    # A bar in a name is not a column.
    assert {line.replace("\\|", "").count("|") for line in markdown} == {markdown[0].count("|")}
    assert "| 5 | – | 750 | 3.00 | 3.0 |" in markdown[3]
    assert "out of memory" in markdown[4]
    latex = found["latex"].stdout
    lines = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len({line.replace(r"\&", "").count("&") for line in lines}) == 1
    assert r"a|b \& c\_d" in latex
    assert r"a\_chip" in latex
    assert latex.count(r"\begin") == latex.count(r"\end") == 2
    assert latex.count(r"\midrule") == 2
    assert "a|b & c_d" in found["rich"].stdout
    assert (tmp_path / "anyup10.png").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, "has schema 2, this version reads 1"),
        ({"format": "murf_fast bank"}, "holds no results"),
        ({"table": "anyup11"}, "is of a table 'anyup11'; there are: anyup10"),
        ({"rows": [{}]}, "is damaged"),
        ({"rows": 3}, "is damaged"),
        ({"machine": None}, "is damaged"),
        ({"rows": [{"labels": {"size": 1}, "facts": {}, "parts": {}}]}, "is damaged"),
        (
            {"rows": [{"labels": {"size": 1, "method": "a", "code": "b"}, "facts": {}, "parts": {"forward": {}}}]},
            "damaged",
        ),
    ],
)
def test_files_of_other_kinds_are_refused(changes, words, tmp_path):
    refused(invoke("--from", stored(tmp_path, **changes), "--out", tmp_path), words)


def test_files_that_are_no_json_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    refused(invoke("--from", tmp_path / "a.json"), "is no JSON")
    (tmp_path / "a.json").write_text("3")
    refused(invoke("--from", tmp_path / "a.json"), "holds no results")


def test_nothing_measured_draws_nothing(tmp_path):
    path = stored(tmp_path)
    found = results.read(path)
    found.rows = found.rows[2:]
    assert not figure.draw(found, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert "out of memory" in columns.cells(found, found.rows[0])


def test_forecasts_follow_what_was_measured():
    device = forecast.Forecast("cpu", torch.float32)
    small, large, other = (waiting(x=x, work=Work(w)) for x, w in ((1, 1e12), (2, 4e12), (3, 1e12)))
    assert device.seconds(large) == pytest.approx(4 * device.seconds(small))
    device.learn(small, 7.0)
    assert device.seconds(small) == pytest.approx(7.0)
    assert device.seconds(large) == pytest.approx(28.0)
    assert device.seconds(other) == pytest.approx(7.0)


def test_slow_calls_are_timed_once(table_of, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "SLOW", -1.0)
    table_of(waiting(x=1))
    assert invoke("jbu", "--device", "cpu", "--out", tmp_path).exit_code == 0
    (row,) = json.loads((tmp_path / "jbu.json").read_text())["rows"]
    assert row["parts"]["part"]["rounds"] == 1


def test_summaries_and_clocks():
    found = summary([3.0, 1.0, 2.0, 5.0, 4.0])
    assert found == {"median_s": 3.0, "p20_s": 2.0, "p80_s": 4.0, "rounds": 5}
    calls = []
    assert Clock("cpu")(lambda: calls.append(1))["rounds"] == len(calls) == 1


def test_a_table_on_a_gpu(gpu, tmp_path):
    result = invoke("anyup10", "--sizes", "64", "--models", "anyup", "--device", "cuda", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for row in json.loads((tmp_path / "anyup10.json").read_text())["rows"]:
        for part in row["parts"].values():
            assert part["rounds"] >= 3
            assert part["peak_bytes"] > 0
