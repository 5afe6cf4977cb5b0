"""``murf-fast anomaly``: banks on disk, a picture, and one line where something is wrong."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from test_cli import invoke

from murf_fast._pillow import read
from murf_fast.anomaly import MultiResolutionDetector
from murf_fast.cli.anomaly._inputs import encoder

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


def refused(words, *arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.replace("│", " ").split()), result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_one_line_for_what_is_wrong(photos, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "o")
    for arguments, words in (
        (("fit", tmp_path / "none", *out), "is not a folder"),
        (("fit", tmp_path / "empty", *out), "holds no image"),
        (("fit", photos, "--out", photos / "a.png"), "--out must be a folder"),
        (("fit", photos, *out, "--layers", "x"), "expected numbers"),
        (("fit", photos, *out, "--layers", ""), "expected numbers"),
        (("fit", photos, *out, "--layers", "9"), "must be indices of 2 blocks"),
        (("fit", photos, *out, "--layers", "9" * 30), "must be indices of 2 blocks"),
        (("fit", photos, *out, "--layers", "1", "--index", "hnsw"), "`index` must be one of"),
        (("fit", photos, *out, "--layers", "1", "--rules", "mine"), "`rules` must be one of"),
        (("score", tmp_path / "empty", photos / "a.png"), "holds no detector"),
        (("score", tmp_path / "empty", photos / "a.png", "--out", tmp_path), "--out must be a picture's file name"),
        (("score", tmp_path / "empty", tmp_path / "none.png"), "No such file"),
        (("score", tmp_path / "empty", photos / "notes.txt"), "not an image that Pillow"),
    ):
        refused(words, "anomaly", *arguments, "--weights", weights)


@pytest.mark.parametrize("scales", ["inf", "nan", "", ",", "-1", "0", "1e300", "0.5;1", "1,inf", "101"])
def test_scales_are_numbers(scales, photos, weights, tmp_path):
    refused("expected numbers", "anomaly", "fit", photos, "--out", tmp_path / "o", "--scales", scales)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pixels", "nan", "--layers", "1"), "pixels"),
        (("--pixels", "inf", "--layers", "1"), "`pixels` must be finite"),
        (("--pixels", "-1"), "--pixels"),
        (("--pixels", "1e15", "--layers", "1"), "patches at the largest scale, more than 32,768"),
        (("--pixels", "0", "--scales", "100", "--layers", "1"), "patches at the largest scale, more than 32,768"),
    ],
)
def test_limits_before_any_work(options, words, photos, weights, tmp_path):
    refused(words, "anomaly", "fit", photos, "--out", tmp_path / "o", "--weights", weights, *options)
    assert not (tmp_path / "o").exists()


def test_a_large_image_of_banks_that_scale_nothing(photos, weights, tmp_path):
    options = ("--weights", weights, "--scales", "1", "--layers", "1", "--pixels", "0")
    result = invoke("anomaly", "fit", photos, "--out", tmp_path / "bank", *options)
    assert result.exit_code == 0, result.output
    pil.new("1", (12000, 12000)).save(tmp_path / "large.png")
    refused("has 734,449 patches", "anomaly", "score", tmp_path / "bank", tmp_path / "large.png", "--weights", weights)


def test_weights_that_do_not_load(photos, weights, tmp_path):
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / f"without {name}"
        shutil.copytree(weights, folder)
        for damage in (b"", b"{}", b"\xff" * 100):
            (folder / name).write_bytes(damage)
            refused(
                "holds no vision transformer that loads",
                "anomaly",
                "fit",
                photos,
                "--out",
                tmp_path,
                "--weights",
                folder,
            )


def test_random_weights_are_refused(photos, tmp_path, monkeypatch):
    from murf_fast.cli.demo import backbone

    random = backbone.Backbone(torch.nn.Identity(), "RANDOM", is_random=True)
    monkeypatch.setattr(backbone, "load", lambda named: random)
    result = invoke("anomaly", "fit", photos, "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert "name a folder by --weights" in " ".join(result.output.split())
