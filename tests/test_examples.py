"""Every script of examples/ as a user runs it, on a small model with random weights."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from safetensors.torch import save_file  # noqa: E402

from murf_fast.nn import AnyUp  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "examples"
# Options that make a run short, and what it must say.
RUNS = {
    "linear_probe": (["--sizes", "56,84", "--steps", "2"], r"coffee: \d+\.\d% of the marked pixels"),
    "featup": (["--size", "56"], r"\(1, 32, 4, 4\) -> \(1, 32, 64, 64\)"),
    "anyup_labels": (["--size", "96", "--encode", "56"], r"-> \(1, 96, 96\) torch.uint8 in"),
    "anomaly_folder": (["--layers", "0,1", "--scales", "0.3"], r"stained.png: score \d"),
    "siglip_hd_student": (["--steps", "2"], r"step   2: loss on held-out crops 0\.\d"),
    "export_segmenter": (["--sizes", "28,56"], r"labels \(1, 400, 600\) torch.uint8 of the loaded program are those"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Dinov2Model(transformers.Dinov2Config(**size)).save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in AnyUp(qk_dim=32).state_dict().items()}, folder / "anyup.safetensors")
    return folder


def run(name, arguments, monkeypatch):
    """Runs the script in this process; its modules are forgotten behind it."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(str(FOLDER))
    with torch.random.fork_rng(devices=[]):
        try:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        finally:
            sys.modules.pop("_shared", None)


def test_every_script_is_run_and_shown():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"_shared"}
    assert scripts == set(RUNS)
    page = (FOLDER.parent / "docs" / "examples.md").read_text()
    for name in scripts:
        assert f"python examples/{name}.py" in page
        assert re.search(rf"!\[[^]]+\]\(pictures/{name}\.(jpg|png)\)", page), name


@pytest.mark.parametrize("name", RUNS)
def test_example(name, weights, tmp_path, monkeypatch, capsys):
    options, says = RUNS[name]
    given = [] if name == "siglip_hd_student" else ["--weights", weights]
    given += ["--upsampler", weights / "anyup.safetensors"] if name == "anyup_labels" else []
    run(name, [*given, *options, "--out", tmp_path], monkeypatch)
    assert re.search(says, capsys.readouterr().out)
    (picture,) = [path for path in tmp_path.iterdir() if path.suffix in (".jpg", ".png")]
    assert picture.stem == name
    with Image.open(picture) as image:
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 50


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--normal", "x"], "go together"), (["--scales", "0.5", "--steps", "1"], "unrecognized")]
)
def test_wrong_options_end_in_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run("anomaly_folder", [*arguments, "--out", tmp_path], monkeypatch)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_images_is_named(weights, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"{tmp_path} holds no image"):
        run(
            "anomaly_folder",
            ["--weights", weights, "--layers", "0", "--normal", tmp_path, "--test", tmp_path],
            monkeypatch,
        )
