"""The command line: what it prints, what it writes, and that its numbers hold."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import murf_fast
from murf_fast import _extension, backends
from murf_fast.cli import _terminal, commands, info, meter
from murf_fast.cli.demo import backbone, pipeline
from murf_fast.cli.demo.operations import operations
from murf_fast.nn.vit.principal import fused_projection

OPERATIONS = [
    "upsample_concat",
    "linear_head",
    "upsample_argmax",
    "upsample_expectation",
    "upsample_cross_entropy",
    "upsample_mean",
    "joint_bilateral_upsample",
]


def invoke(*arguments):
    return CliRunner().invoke(commands.app, [str(a) for a in arguments])


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC).save(path)
    return path


def test_info_names_everything():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    for expected in (murf_fast.__version__, torch.__version__, *backends.NAMES, *info.VARIABLES, *info.OPTIONAL):
        assert expected in result.output
    if _extension.load_error() is None:
        assert _extension.current_level() in result.output


def test_info_as_json_holds_the_same(monkeypatch):
    monkeypatch.setenv("MURF_FAST_WEIGHTS", "some [folder]")
    monkeypatch.delenv("MURF_FAST_BACKEND", raising=False)
    result = invoke("info", "--json")
    assert result.exit_code == 0, result.output
    found, report = json.loads(result.output), info.collect()
    assert found.keys() == {"schema", *(f.name for f in dataclasses.fields(report))}
    for name in ("versions", "cpu", "gpus", "missing"):
        assert found[name] == getattr(report, name)
    assert {(b["backend"], b["device"]): b["reasons"] for b in found["backends"]} == report.backends
    assert all(b["works"] == (not b["reasons"]) for b in found["backends"])
    assert {b["backend"] for b in found["backends"] if b["works"] and b["device"] == "cpu"} >= {"reference"}
    assert found["optional"]["typer"] == report.optional["typer"]
    assert {name for name, version in found["optional"].items() if version is None} == {
        name for name, version in report.optional.items() if version == "not installed"
    }
    assert found["variables"]["MURF_FAST_WEIGHTS"] == "some [folder]"
    assert found["variables"]["MURF_FAST_BACKEND"] is None


def test_info_gives_every_reason(monkeypatch):
    monkeypatch.setattr(backends, "native_problems", lambda: ["the extension went on holiday"])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    report = info.collect()
    assert report.backends["native", "cpu"] == ["the extension went on holiday"]
    assert len(report.backends["native", "cuda"]) >= 2
    assert any("interpreter" in reason for reason in report.backends["triton", "cpu"])
    assert report.backends["reference", "cpu"] == []


def test_info_survives_a_level_that_cannot_run():
    code = "from murf_fast.cli import info; print(info.collect().cpu)"
    result = python(code, MURF_FAST_CPU="abacus")
    assert result.returncode == 0, result.stderr
    assert "abacus" in result.stdout


def test_info_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "murf_fast", "info"], capture_output=True, text=True, timeout=120, check=True
    )
    assert murf_fast.__version__ in result.stdout
    assert "Backends" in result.stdout


def test_version():
    result = CliRunner().invoke(commands.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"murf-fast {murf_fast.__version__}\n")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_one_line(missing):
    result = python(f"import sys; sys.modules[{missing!r}] = None\nfrom murf_fast.cli import main; main()")
    assert result.returncode == 1
    assert result.stderr.strip() == f"murf-fast: the command line needs {missing}: pip install 'murf-fast[cli]'"


@pytest.mark.parametrize("missing", ["PIL", "matplotlib", "transformers"])
def test_the_demo_says_what_it_needs(missing, tmp_path):
    result = python(
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['murf-fast', 'demo', '--out', {str(tmp_path)!r}]\n"
        "from murf_fast.cli import main; main()"
    )
    assert result.returncode == 1
    assert "pip install 'murf-fast[cli,models]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_demo_end_to_end(weights, photo, tmp_path):
    out = tmp_path / "out"
    arguments = ("demo", photo, "--out", out, "--weights", weights, "--sizes", "28,42,70", "--longest", 40)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "tiny" in result.output
    for name in OPERATIONS:
        assert name in result.output
    record = json.loads((out / "murf_fast_demo.json").read_text())
    assert [row["operation"] for row in record["rows"]] == OPERATIONS
    for row in record["rows"]:
        assert row["fast"]["seconds"] > 0
        assert row["reference"]["seconds"] > 0
        # The budget of every parity test: twice the float32 reference's error, and one rounding.
        assert row["fast"]["error"] <= 2 * row["reference"]["error"] + torch.finfo(torch.float32).eps
    with Image.open(out / "murf_fast_demo.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 3 * pixels.shape[0]
    # Six panels: in each sixth of the width something other than paper and grey text.
    for sixth in np.array_split(pixels.astype(int), 6, axis=1):
        assert (np.ptp(sixth, axis=2) > 40).mean() > 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "28;42"], "--sizes"),
        (["--sizes", ""], "--sizes"),
        (["--weights", "nowhere"], "--weights must be a folder"),
        (["no_such_photo.jpg"], "no_such_photo.jpg"),
        (["--sizes", "7"], "patch size"),
        (["--sizes", "28,-14"], "--sizes"),
        (["--sizes", "inf"], "--sizes"),
        (["--sizes", "99999"], "resolutions must be at most 2534"),
        (["--sizes", "9" * 400], "resolutions must be at most 2534"),
        (["--sizes", "9" * 5000], "--sizes"),
        (["--longest", "0"], "--longest"),
        (["--longest", "1"], "--longest"),
        (["--longest", "1000000000"], "--longest"),
        (["--threads", "1000000"], "--threads"),
    ],
)
def test_demo_refuses_bad_input(arguments, message, weights, tmp_path):
    given = [] if "--weights" in arguments else ["--weights", weights]
    result = invoke("demo", "--out", tmp_path, *given, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "no suite for nonsense"),
        (["jbu", "nonsense"], "no suite for"),
    ],
)
def test_bench_refuses_bad_input(arguments, words):
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert isinstance(result.exception, SystemExit)


def test_missing_memory_is_one_line():
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        with pytest.raises(typer.Exit), _terminal.one_line("cli"):
            raise error
    with pytest.raises(RuntimeError, match="a bug"), _terminal.one_line("cli"):
        raise RuntimeError("a bug")


def test_demo_operations_notice_a_wrong_result():
    maps = [torch.randn(1, 5, n, n).contiguous(memory_format=torch.channels_last) for n in (3, 4)]
    for operation in operations(maps, (9, 11), torch.randn(1, 3, 40, 30)):
        good = operation.fast()
        wrong = [t + 1 for t in good] if isinstance(good, list) else good + 1
        if good is not wrong and operation.name == "upsample_argmax":
            wrong = (good.int() + 1) % 150
        kept, broken = operation.errors((good, wrong))
        assert kept < 1e-5 < broken, operation.name


def test_backbone_falls_back_to_seeded_random_weights(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def unreachable(name, **options):
        raise OSError(f"{name} is not here")

    monkeypatch.delenv("MURF_FAST_WEIGHTS", raising=False)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    monkeypatch.setattr(backbone, "hub_reachable", lambda: False)
    first, second = backbone.load(), backbone.load()
    assert "RANDOM" in first.description
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_encoding_follows_murf(weights):
    loaded = backbone.load(weights)
    image = torch.randn(1, 3, 50, 80)
    feature = pipeline.encode(loaded, image, 42)
    square = torch.nn.functional.interpolate(image, (42, 42), mode="bilinear", align_corners=False)
    with torch.no_grad():
        tokens = loaded.model(pixel_values=square).last_hidden_state
    assert feature.shape == (1, 24, 3, 3)
    assert torch.equal(feature[0, :, 1, 2], tokens[0, 1 + 3 + 2])


def test_components_are_those_of_the_fused_map():
    maps = [torch.randn(1, c, n, n) for c, n in ((5, 3), (4, 6))]
    grid = (9, 8)
    shown = fused_projection(maps, grid)[0].double()
    fused = torch.cat([torch.nn.functional.interpolate(m.double(), (6, 6), mode="bilinear") for m in maps], 1)
    tokens = fused[0].flatten(1).T
    centred = tokens - tokens.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    projected = (axes @ centred.T).reshape(1, 3, 6, 6)
    expected = torch.nn.functional.interpolate(projected, grid, mode="bilinear")[0]
    signs = (shown * expected).sum((1, 2)).sign()[:, None, None]
    torch.testing.assert_close(shown, signs * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory can be reset on Linux only")
def test_peak_memory_counts_what_is_freed_again():
    def call():
        passing = torch.ones(2**24)
        return passing.sum()

    _, peak = meter.observed(call)
    # Linux counts resident pages in batches per processor, so a mark is some hundred kilobytes off.
    assert 0.95 * 2**26 < peak < 2**27
