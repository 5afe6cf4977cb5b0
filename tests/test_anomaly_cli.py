"""``murf-fast anomaly``: banks on disk, a picture, and one line where something is wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from test_cli import invoke

from murf_fast.anomaly import MultiResolutionDetector
from murf_fast.anomaly._commands import encoder, read

pil = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "normal"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "more/c.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        pil.fromarray(pixels).resize((84, 70)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_fit_and_score(photos, weights, tmp_path):
    options = ("--weights", weights, "--scales", "0.5,1", "--layers", "0 1", "--pixels", 0)
    result = invoke("anomaly", "fit", photos, "--out", tmp_path / "bank", *options)
    assert result.exit_code == 0, result.output
    # 84 x 70 pixels: 6 x 5 patches, and 3 x 2 at half the size; two layers; three images.
    assert "3 images, 4 banks, 216 rows" in result.output
    picture = tmp_path / "out" / "map.png"
    result = invoke("anomaly", "score", tmp_path / "bank", photos / "a.png", "--out", picture, "--weights", weights)
    assert result.exit_code == 0, result.output
    detector = MultiResolutionDetector.load(tmp_path / "bank", encoder(weights).model)
    expected = detector.score(read(photos / "a.png")).score
    shown = float(re.search(r"image score ([-\d.e]+)", result.output)[1])
    assert shown == pytest.approx(expected, rel=1e-4, abs=1e-9)
    drawn = np.asarray(pil.open(picture).convert("RGB"))
    assert drawn.shape[1] > drawn.shape[0] > 100
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 100


def test_one_line_for_what_is_wrong(photos, weights, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (("fit", tmp_path / "none", "--out", tmp_path / "o"), "is not a folder"),
        (("fit", tmp_path / "empty", "--out", tmp_path / "o"), "holds no image"),
        (("fit", photos, "--out", tmp_path / "o", "--layers", "x"), "expected numbers"),
        (("fit", photos, "--out", tmp_path / "o", "--layers", "9"), "must be indices of 2 blocks"),
        (("score", tmp_path / "empty", photos / "a.png"), "holds no detector"),
        (("score", tmp_path / "empty", tmp_path / "none.png"), "No such file"),
    ):
        result = invoke("anomaly", *arguments, "--weights", weights)
        assert result.exit_code in (1, 2)
        assert words in " ".join(result.output.split()), result.output
        assert "Traceback" not in result.output


def test_random_weights_are_refused(photos, tmp_path, monkeypatch):
    from murf_fast.demo import backbone

    random = backbone.Backbone(torch.nn.Identity(), "RANDOM", is_random=True)
    monkeypatch.setattr(backbone, "load", lambda named: random)
    result = invoke("anomaly", "fit", photos, "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert "name a folder by --weights" in " ".join(result.output.split())
