"""``murf-fast anomaly score``: which images pass, by which threshold, what the exit status says, and the line."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from data_sets import image
from matplotlib.colors import to_rgb
from rich.console import Console
from test_cli import invoke

from murf_fast.anomaly import PRESETS, NormalRange
from murf_fast.cli.anomaly import _picture
from murf_fast.cli.anomaly._labels import Mistakes
from murf_fast.cli.anomaly._scores import Row, ScoreFiles
from murf_fast.cli.anomaly._steps import Steps
from murf_fast.cli.anomaly._threshold import Threshold

pil = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

NORMAL = NormalRange(4, 1.0, 5.0, 3.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Normal images, and good and defective ones to look at."""
    root = tmp_path_factory.mktemp("parts")
    for i in range(4):
        image(root / "normal" / f"{i}.png", i)
    for i in range(3):
        image(root / "test" / "good" / f"{i}.png", 10 + i)
        image(root / "test" / "cut" / f"{i}.png", 20 + i, defect=True)
    return root


@pytest.fixture(scope="module")
def banks(parts, weights, tmp_path_factory):
    """Banks with a range of normal images and without."""
    found = {}
    for held_out in (2, 0):
        found[held_out] = tmp_path_factory.mktemp("banks") / str(held_out)
        options = ("--scales", 1, "--layers", 1, "--pixels", 0, "--held-out", held_out, "--weights", weights)
        result = invoke("anomaly", "fit", parts / "normal", "--out", found[held_out], *options)
        assert result.exit_code == 0, result.output
    return found


def scored(bank, images, weights, out, *options, status=0):
    files = ("--scores", out / "s.csv", "--scores", out / "s.json")
    result = invoke("anomaly", "score", bank, images, *files, *options, "--weights", weights)
    assert result.exit_code == status, result.output
    with (out / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = json.loads((out / "s.json").read_text())
    assert [row["verdict"] or None for row in rows] == [entry["verdict"] for entry in told["images"]]
    assert [float(row["score"]) for row in rows] == [entry["score"] for entry in told["images"]]
    return told, " ".join(result.output.split())


def verdicts(told):
    return [entry["verdict"] for entry in told["images"]]


def expected(told, threshold):
    return ["fail" if entry["score"] >= threshold else "pass" for entry in told["images"]]


def test_thresholds(banks, parts, weights, tmp_path):
    test = parts / "test"
    told, _ = scored(banks[0], test, weights, tmp_path)
    assert (told["threshold"], told["threshold_from"], verdicts(told)) == (None, None, [None] * 6)
    told, printed = scored(banks[2], test, weights, tmp_path)
    normal = json.loads((banks[2] / "detector.json").read_text())["normal"]
    assert (told["threshold"], told["threshold_from"], told["pixel_threshold"]) == (
        normal["score"],
        "bank",
        normal["highest"],
    )
    assert verdicts(told) == expected(told, normal["score"])
    assert f"{verdicts(told).count('fail')} of 6 fail, at or above" in printed
    middle = sorted(entry["score"] for entry in told["images"])[3]
    told, printed = scored(banks[2], test, weights, tmp_path, "--threshold", middle)
    assert (told["threshold"], told["threshold_from"], told["pixel_threshold"]) == (middle, "given", middle)
    assert verdicts(told) == expected(told, middle)
    assert printed.count("FAIL") == 3
    assert printed.count("PASS") == 3
    told, printed = scored(banks[0], test, weights, tmp_path, "--threshold", "labelled", "--pixel-threshold", 7)
    best = told["labelled"]["threshold"]
    assert (told["threshold"], told["threshold_from"], told["pixel_threshold"]) == (best, "labelled", 7)
    assert verdicts(told) == expected(told, best)
    missed = sum(e["label"] and e["verdict"] == "pass" for e in told["images"])
    rejected = sum(not e["label"] and e["verdict"] == "fail" for e in told["images"])
    assert (told["labelled"]["missed"], told["labelled"]["rejected"]) == (missed, rejected)
    assert f"{missed} of 3 defective images pass, {rejected} of 3 good images fail" in printed
    result = invoke("anomaly", "score", banks[0], test, "--threshold", "bank", "--weights", weights)
    assert result.exit_code == 2
    assert "needs a bank with a range of normal images" in " ".join(result.output.split())


def test_the_exit_status_is_asked_for(banks, parts, weights, tmp_path):
    test = parts / "test"
    fails = ("--fail-on-defect",)
    scored(banks[2], test, weights, tmp_path, "--threshold", 0)
    scored(banks[2], test, weights, tmp_path, "--threshold", 0, *fails, status=10)
    scored(banks[2], test, weights, tmp_path, "--threshold", 1e9, *fails)
    # A part that was not looked at has not passed.
    (tmp_path / "some").mkdir()
    image(tmp_path / "some" / "whole.png", 3)
    (tmp_path / "some" / "cut.png").write_bytes(b"none")
    scored(banks[2], tmp_path / "some", weights, tmp_path, "--threshold", 1e9, "--skip-broken")
    scored(banks[2], tmp_path / "some", weights, tmp_path, "--threshold", 1e9, "--skip-broken", *fails, status=10)
    result = invoke("anomaly", "score", banks[0], test, *fails, "--weights", weights)
    assert result.exit_code == 2
    assert "--fail-on-defect needs a --threshold" in " ".join(result.output.split())


def line_in(path, left, right):
    """Whether the line's colour is between two shares of a picture's width."""
    pixels = np.asarray(pil.open(path).convert("RGB")).astype(int)
    part = pixels[:, int(left * pixels.shape[1]) : int(right * pixels.shape[1])]
    return bool((np.abs(part - np.multiply(to_rgb(_picture.LINE), 255)).max(2) < 40).any())


def test_pictures_have_the_line_of_the_labelled_threshold(banks, parts, weights, tmp_path):
    told, _ = scored(banks[2], parts / "test", weights, tmp_path, "--threshold", "labelled", "--out", tmp_path / "p")
    assert len(list((tmp_path / "p").rglob("*.png"))) == 6
    for entry in told["images"]:
        kind = "cut" if entry["label"] else "good"
        picture = tmp_path / "p" / kind / f"{entry['image'].rpartition('/')[2]}"
        assert line_in(picture, 0.62, 0.9) == (entry["highest"] >= told["threshold"])
        assert line_in(picture, 0.9, 1)


@pytest.mark.parametrize("line", [None, 0.0, 2.5, 9.0])
def test_the_line_is_on_map_and_bar(tmp_path, line):
    heat = np.linspace(0, 4, 40 * 60, dtype=np.float32).reshape(40, 60)
    photo = np.full((40, 60, 3), 128, np.uint8)
    scale = _picture.Scale(0.0, 5.0, line)
    for mask, (left, right) in ((None, (0.62, 0.9)), (heat > 3, (0.48, 0.7))):
        drawn = _picture.panels(photo, heat, scale, mask)
        _picture.draw(drawn, scale, "title", "note", tmp_path / "p.png")
        assert line_in(tmp_path / "p.png", left, right) == (line == 2.5)
        assert line_in(tmp_path / "p.png", 0.9, 1) == (line in (0.0, 2.5))
        assert not line_in(tmp_path / "p.png", 0, 0.3)


def test_a_bar_has_the_line_s_number_and_none_over_it():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for line in np.linspace(0, 5, 13):
        figure = Figure()
        FigureCanvasAgg(figure)
        _picture._colour_bar(figure, (0.1, 0.1, 0.1, 0.8), _picture.Scale(0.0, 5.0, float(line)))
        figure.canvas.draw()
        labels = [label for label in figure.axes[0].get_yticklabels() if label.get_text()]
        assert labels[-1].get_text() == f"{line:.4g}"
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_pictures_of_large_maps_are_of_their_means():
    heat = np.zeros((1000, 3000), np.float32)
    heat[:, ::2] = 2
    found = _picture._shrunk(heat, pil.Resampling.BOX)
    assert found.shape == (320, 960)
    assert abs(found.mean() - 1) < 1e-3


@pytest.mark.parametrize("shape", [(1, 40), (400, 3)])
def test_pictures_of_any_shape(tmp_path, shape):
    heat = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    scale = _picture.Scale(0.0, float(heat.max()), float(heat.max()) / 2)
    drawn = _picture.panels(np.full((*shape, 3), 255, np.uint8), heat, scale)
    note = "what the picture says beside its panels, which may be narrower than this text"
    _picture.draw(drawn, scale, "a title of some length", note, tmp_path / "p.png")
    pixels = np.asarray(pil.open(tmp_path / "p.png").convert("L"))
    assert (pixels[-_picture.DPI // 4 :] < 128).any()  # the note
    assert (pixels[:, -8:] > 250).all()  # nothing is cut off


def test_the_line_is_a_threshold_where_pixels_and_images_score_alike():
    given = Threshold.of("2.5", NORMAL)
    assert given.line(None, PRESETS["mrf-ad"], NORMAL)[0] == 2.5
    for name in ("patchcore", "anomaly-dino", "superad"):
        assert given.line(None, PRESETS[name], NORMAL)[0] == NORMAL.highest
        assert given.line(None, PRESETS[name], None)[0] is None
    assert given.line(1.5, PRESETS["superad"], NORMAL)[0] == 1.5
    bank = Threshold.of(None, NORMAL)
    assert (bank.score, bank.line(None, PRESETS["mrf-ad"], NORMAL)[0]) == (NORMAL.score, NORMAL.highest)
    assert [bank.verdict(s) for s in (2.9, 3.0)] == ["pass", "fail"]
    assert Threshold.of(None, None).verdict(1.0) is None


def test_mistakes_are_counted():
    found = Mistakes.of([1, 2, 3, 4, 5], [False, True, False, True, True], 3)
    assert (found.missed, found.defective, found.rejected, found.good) == (1, 3, 1, 2)


def test_rows_are_on_disk_before_their_verdicts(tmp_path):
    with ScoreFiles([tmp_path / "s.csv"]) as files:
        for score in (1.0, 3.0):
            files.add(Row("ü.png", score, score, 2, 2, None, True))
        assert "1.0" in (tmp_path / "s.csv").read_text(encoding="utf-8")
        files.judge(lambda score: "fail" if score > 2 else "pass")
        files.finish({}, {})
    rows = list(csv.DictReader((tmp_path / "s.csv").open(encoding="utf-8")))
    assert [row["verdict"] for row in rows] == ["pass", "fail"]
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv"]


def test_steps_appear_as_they_begin():
    with Steps(Console(quiet=True)) as steps:
        assert steps.done("images") == 0
        steps.of("references")(1, 9)
        steps.of("images", 9)(2, None)
        assert (steps.done("references"), steps.done("images")) == (1, 2)
        assert [task.total for task in steps._bar.tasks] == [9, 9]
