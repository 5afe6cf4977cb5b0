"""``murf-fast ablations`` on tiny models with random weights, and the page that says which table has which command."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from murf_fast.cli.ablations import _inputs, anyup, featsharp  # noqa: E402
from murf_fast.cli.ablations.run import ABLATIONS  # noqa: E402
from murf_fast.cli.commands import app  # noqa: E402
from murf_fast.nn import AnyUp, MultiResolutionEncoder, multi_scale_target  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "papers.md"
# Numbered tables and figures of each paper: the largest number of either.
PAPERS = {"MuRF": (8, 6), "MRF-AD": (8, 6), "FeatSharp": (14, 17), "AnyUp": (11, 12), "SigLIP-HD": (11, 3)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
        transformers.Dinov2Model(transformers.Dinov2Config(**size)).save_pretrained(folder / "dinov2")
        siglip = transformers.SiglipVisionConfig(**size, intermediate_size=64)
        for name in ("siglip", "student"):
            transformers.SiglipVisionModel(siglip).save_pretrained(folder / name)
        wide = transformers.SiglipVisionConfig(**size | {"hidden_size": 48}, intermediate_size=64)
        transformers.SiglipVisionModel(wide).save_pretrained(folder / "wide")
        save_file({k: v.contiguous() for k, v in AnyUp(qk_dim=32).state_dict().items()}, folder / "anyup.safetensors")
    return folder


def ran(*arguments):
    return CliRunner().invoke(app, ["ablations", *map(str, arguments)])


def rows(*arguments) -> list[dict]:
    result = ran(*arguments, "--patches", 4, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


def needs(name: str, folders: Path) -> list:
    takes = ABLATIONS[name].takes
    steps = ["--steps", 1] if "steps" in takes else []
    return steps + (["--upsampler", folders / "anyup.safetensors"] if "upsampler" in takes else [])


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_runs(name, folders, monkeypatch):
    monkeypatch.setattr(featsharp, "WINDOWS", (1, 3))
    monkeypatch.setattr(featsharp, "BATCHES", 2)
    monkeypatch.setattr(anyup, "BASIS", (8, 0))
    monkeypatch.setattr(anyup, "DIM", 32)
    found = rows(name, "--weights", folders / "dinov2", *needs(name, folders))
    assert len(found) > 2
    assert len({next(iter(row.values())) for row in found}) == len(found)
    for row in found:
        numbers = list(row.values())[1:]
        assert all(n is None or torch.tensor(n).isfinite() for n in numbers)
        assert numbers[-1] is not None
    if name in ("anyup-parts", "anyup-basis", "featsharp-windows"):  # what is varied has an effect
        assert len({list(row.values())[-1] for row in found}) == len(found)


def test_targets_are_those_of_the_library(folders):
    tower = transformers.SiglipVisionModel.from_pretrained(folders / "siglip").eval()
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    images = _inputs.squares(2 * 56)
    with torch.no_grad():
        own = MultiResolutionEncoder(tower, [56], antialias=True, **half)(images).maps[0]
    found = rows("siglip-hd-tilings", "--weights", folders / "siglip")
    for row, tiling in zip(found, ("disjoint", "half_overlap", "whole"), strict=True):
        target = multi_scale_target(tower, images, size=56, tiling=tiling, **half)
        assert row["L1"] == pytest.approx(float((own - target).abs().mean()), rel=1e-4)


def test_weights_of_scales_move_the_target_on_a_line(folders):
    """Of base and finer scale, the L1 distance to the base is the finer one's share of that between both."""
    found = rows("siglip-hd-weights", "--weights", folders / "siglip")
    even, fine, base = (row["L1"] for row in found)
    assert (fine / even, base / even) == (pytest.approx(4 / 3, rel=1e-4), pytest.approx(2 / 3, rel=1e-4))


def test_the_base_scale_alone_is_the_student(folders):
    first, *others = rows("siglip-hd-scales", "--weights", folders / "siglip")
    assert first["target"] == "1x"
    assert first["L1"] < 1e-5 < min(row["L1"] for row in others)
    assert first["linear CKA"] == pytest.approx(1)
    concat = rows("siglip-hd-fusions", "--weights", folders / "siglip")[1]
    assert concat["cosine"] is None and 0 < concat["linear CKA"] < 1  # noqa: PT018 (one row)


def test_a_trained_student_is_another(folders):
    arguments = ("siglip-hd-scales", "--weights", folders / "siglip", "--student", folders / "student")
    assert rows(*arguments)[0]["L1"] > 1e-2


def test_alignment_does_not_see_rotation_or_scale():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 5, generator=generator)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    turned = 3 * torch.einsum("oc,bchw->bohw", turn, x) + 1
    assert _inputs.cka(x, turned) == pytest.approx(1, abs=1e-6)
    assert _inputs.cka(x, torch.randn(2, 9, 5, 5, generator=generator)) < 0.5
    assert _inputs.cosine(x, 2 * x) == pytest.approx(1)


def test_windows_are_those_of_the_model(folders):
    model = _inputs.load(folders / "dinov2")
    found = rows("anyup-windows", "--weights", folders / "dinov2", "--upsampler", folders / "anyup.safetensors")
    task = anyup.VariantTask(model.tower, model.patch, 4)
    whole = AnyUp.from_checkpoint(folders / "anyup.safetensors", window_ratio=0.0).eval()
    assert found[-1]["window"] == "the whole map"
    assert found[-1]["cosine"] == pytest.approx(task.similarity(whole), rel=1e-5)
    assert found[-1]["cosine"] != found[1]["cosine"]


def test_training_helps(folders):
    model = _inputs.load(folders / "dinov2")
    before, after = (anyup._trained(model, 4, steps, anyup.PARTS["AnyUp"])[1] for steps in (0, 12))
    assert after < before


def test_tables_and_csv(folders):
    arguments = ("siglip-hd-fusions", "--weights", folders / "siglip", "--patches", 4)
    text = ran(*arguments).output
    assert "SigLIP-HD, Table 4" in text
    assert "SiglipVisionModel from --weights" in text
    table = list(csv.reader(io.StringIO(ran(*arguments, "--format", "csv").stdout)))
    assert table[0] == ["target", "cosine", "L1", "linear CKA"]
    assert len(table) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["table-9"], "no ablation 'table-9'; there are: anyup-parts"),
        (["anyup-windows"], "needs AnyUp's weights: --upsampler FILE"),
        (["anyup-windows", "--upsampler", "nowhere"], "--upsampler must be a file, got nowhere"),
        (["featsharp-tiles", "--steps", "3"], "`ablations featsharp-tiles` takes no --steps"),
        (["anyup-parts", "--student", "x"], "`ablations anyup-parts` takes no --student"),
        (["featsharp-tiles", "--format", "xml"], "--format must be one of table, csv, json, got 'xml'"),
        (["featsharp-tiles", "--weights", "nowhere"], "--weights must be a folder"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, said):
    result = ran(*arguments)
    assert result.exit_code == 2
    (line,) = result.output.strip().splitlines()
    assert said in line


def test_a_student_must_fit_its_teacher(folders):
    result = ran("siglip-hd-scales", "--weights", folders / "siglip", "--student", folders / "wide", "--patches", 4)
    assert (result.exit_code, result.output.strip()) == (
        2,
        "murf-fast: --student has 48 channels, the teacher 32",
    )
    assert ran("siglip-hd-scales", "--patches", 5).exit_code == 2


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("paper", PAPERS)
def test_the_page_lists_every_table_and_figure_once(paper):
    found = re.findall(r"^\| (Table|Figure) (\d+) \| [^|]+ \| [^|]+ \|$", sections()[paper], flags=re.MULTILINE)
    tables, figures = PAPERS[paper]
    wanted = [("Table", str(n + 1)) for n in range(tables)] + [("Figure", str(n + 1)) for n in range(figures)]
    assert sorted(found) == sorted(wanted)


def test_commands_of_the_page_exist():
    page = PAGE.read_text()
    assert set(re.findall(r"murf-fast ablations ([\w-]+)", page)) == ABLATIONS.keys()
    for module in re.findall(r"`python -m ([\w.]+)", page):
        __import__(module)
    root = PAGE.parents[1]
    for script in re.findall(r"`python (benchmarks/\S+)", page):
        assert (root / script).is_file()
    for command in set(re.findall(r"`murf-fast ((?:anomaly )?\w+)", page)):
        assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0, command
