"""``murf-fast anomaly``: banks on disk, a picture, and one line where something is wrong."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from test_cli import invoke

from murf_fast._pillow import read
from murf_fast.anomaly import MultiResolutionDetector
from murf_fast.cli.anomaly._inputs import encoder

pil = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

pytestmark = pytest.mark.usefixtures("one_thread")


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
        (("fit", tmp_path / "none", *out), "no such file or folder"),
        (("fit", tmp_path / "empty", *out), "holds no image"),
        (("fit", photos, "--out", photos / "a.png"), "--out must be a folder"),
        (("fit", photos, *out, "--layers", "x"), "expected numbers"),
        (("fit", photos, *out, "--layers", ""), "expected numbers"),
        (("fit", photos, *out, "--layers", "9"), "must be indices of 2 blocks"),
        (("fit", photos, *out, "--layers", "9" * 30), "must be indices of 2 blocks"),
        (("fit", photos, *out, "--layers", "1", "--index", "hnsw"), "`index` must be one of"),
        (("fit", photos, *out, "--layers", "1", "--rules", "mine"), "`rules` must be one of"),
        (("fit", photos, *out, "--layers", "1", "--coreset", "0.5"), "need --index coreset, got exact"),
        (("fit", photos, *out, "--layers", "1", "--projection", "sparse"), "need --index coreset, got exact"),
        (("fit", photos, *out, "--method", "mine"), "`method` must be one of"),
        (("score", tmp_path / "empty", photos / "a.png"), "holds no detector"),
        (("score", tmp_path / "empty", photos / "a.png", "--out", tmp_path), "--out must be a picture's file name"),
        (("score", tmp_path / "empty", tmp_path / "none.png"), "no such file or folder"),
        (("score", tmp_path / "empty", photos / "notes.txt"), "not an image that Pillow"),
    ):
        refused(words, "anomaly", *arguments, "--weights", weights)


@pytest.mark.parametrize("scales", ["inf", "nan", "", ",", "-1", "0", "1e300", "0.5;1", "1,inf", "30,50,70"])
def test_scales_are_numbers(scales, photos, weights, tmp_path):
    refused("expected numbers", "anomaly", "fit", photos, "--out", tmp_path / "o", "--scales", scales)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pixels", "nan", "--layers", "1"), "pixels"),
        (
            ("--pixels", "inf", "--layers", "1"),
            "is a number of pixels, such as 5e6 for five megapixels, and at least 1024, got inf",
        ),
        (("--pixels", "-1"), "--pixels"),
        (("--pixels", "1e15", "--layers", "1", "--enlarge"), "patches at the largest scale, more than 32,768"),
        (("--pixels", "0.5"), "is a number of pixels, such as 5e6 for five megapixels, and at least 1024, got 0.5"),
        (("--pixels", "12"), "got 12"),
        (("--shorter-side", "1"), "--shorter-side"),
        (("--coreset", "10", "--index", "coreset"), "`coreset` must be in (0, 1], got 10.0"),
        (("--references", "25"), "`references` must be in (0, 1], got 25.0"),
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


@pytest.mark.parametrize("batch", [1, 3])
def test_a_file_that_breaks_while_others_are_scored(photos, weights, tmp_path, batch, monkeypatch):
    """It was whole when the command looked; only itself is lost, and only with --skip-broken the rest goes on."""
    bank = tmp_path / "bank"
    options = ("--weights", weights, "--scales", "1", "--layers", "1", "--pixels", "0")
    assert invoke("anomaly", "fit", photos, "--out", bank, *options).exit_code == 0
    names, score_many = ["a.png", "b.jpg", "c.png"], MultiResolutionDetector.score_many
    whole = (photos / names[1]).read_bytes()

    def breaking(self, images, **given):
        (photos / names[1]).write_text("no image")
        return score_many(self, images, **given)

    def scored(status, *more):
        (photos / names[1]).write_bytes(whole)
        shutil.rmtree(tmp_path / "pictures", ignore_errors=True)
        file = tmp_path / "scores.csv"
        command = ("anomaly", "score", bank, photos, "--weights", weights, "--batch", batch, "--scores", file)
        result = invoke(*command, "--out", tmp_path / "pictures", *more)
        assert result.exit_code == status, result.output
        with file.open() as lines:
            return {os.path.basename(row["image"]): row["score"] for row in csv.DictReader(lines)}, result.output

    expected, _ = scored(0)
    monkeypatch.setattr(MultiResolutionDetector, "score_many", breaking)
    before, output = scored(2)
    assert list(before) == names[:1]
    assert "is not an image" in output
    rest, output = scored(0, "--skip-broken")
    assert list(rest) == [names[0], *names[2:]]
    assert f"{names[1]} is not an image" in " ".join(output.split())
    for name, score in rest.items():  # up to the rounding of passes that are shared otherwise
        assert float(score) == pytest.approx(float(expected[name]), rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "pictures").rglob("*.png")) == ["a.png", "c.png"]


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


def test_clusters_in_one_line(photos, weights, tmp_path, monkeypatch):
    fit = ("anomaly", "fit", photos, "--out", tmp_path / "bank", "--weights", weights)
    refused("--workers is about Ray's workers: give --ray, too", *fit, "--workers", 2)
    refused("--threads is about Ray's workers: give --ray, too", *fit, "--threads", 2)
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (fit, ("anomaly", "score", tmp_path / "bank", photos)):
        result = invoke(*command, "--ray")
        assert result.exit_code == 1, result.output
        assert "this needs ray: pip install 'murf-fast[ray]'" in result.output
    assert not (tmp_path / "bank").exists()


def test_random_weights_are_refused(photos, tmp_path, monkeypatch):
    from murf_fast.cli.demo import backbone

    random = backbone.Backbone(torch.nn.Identity(), "RANDOM", is_random=True)
    monkeypatch.delenv("MURF_FAST_WEIGHTS", raising=False)
    monkeypatch.setattr(backbone, "load", lambda named: random)
    result = invoke("anomaly", "fit", photos, "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert "name a folder by --weights" in " ".join(result.output.split())


@pytest.fixture
def bank(photos, weights, tmp_path):
    options = ("--weights", weights, "--scales", "1", "--layers", "1", "--held-out", "1")
    result = invoke("anomaly", "fit", photos, "--out", tmp_path / "bank", *options)
    assert result.exit_code == 0, result.output
    return tmp_path / "bank"


def test_scores_of_folders(bank, photos, weights, tmp_path):
    """Names in any script and with brackets, what is no image, and equal names in two folders."""
    good, bad = tmp_path / "test" / "good", tmp_path / "test" / "[red] 划痕"
    for folder in (good, bad):
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("no image")
        (folder / "._0.png").write_text("what other systems leave")
        (folder / "folder.png").mkdir()
    for i, name in enumerate(("a.png", "b.jpg", "more/c.png")):
        shutil.copy(photos / name, good / f"{i}{(photos / name).suffix}")
    pil.fromarray(np.full((70, 84), 60000, np.uint16)).save(bad / "0.png")
    pil.fromarray(np.full((35, 42, 4), 9, np.uint8)).save(bad / "ü[b].png")
    out = {name: tmp_path / "out" / name for name in ("pictures", "maps", "a.csv", "b.json")}
    result = invoke(
        "anomaly", "score", bank, good, bad, "--weights", weights, "--labelled", "--batch", 2, "--map-type", "tiff",
        "--out", out["pictures"], "--maps", out["maps"], "--scores", out["a.csv"], "--scores", out["b.json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "4 other files are left alone" in result.output
    assert "image AUROC 1.0000; F1 1.0000 with --threshold" in result.output
    detector = MultiResolutionDetector.load(bank, encoder(weights).model)
    with out["a.csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    told = json.loads(out["b.json"].read_text())
    assert len(rows) == len(told["images"]) == 5
    for row, entry in zip(rows, told["images"], strict=True):
        found = detector.score(row["image"])
        assert float(row["score"]) == entry["score"] == pytest.approx(found.score, rel=1e-4)
        name = os.path.join(*os.path.splitext(row["image"])[0].split(os.sep)[-2:])
        heat = np.asarray(pil.open(out["maps"] / f"{name}.tiff"))
        assert (heat.dtype, heat.shape) == (np.float32, (int(row["height"]), int(row["width"])))
        np.testing.assert_allclose(heat, found.map.numpy(), rtol=1e-4)
        assert pil.open(out["pictures"] / f"{name}.png").width > 400
        assert row["label"] == str(int("good" not in row["image"]))
        assert row["verdict"] == entry["verdict"] == ("fail" if entry["score"] >= told["threshold"] else "pass")
    assert told["threshold"] == detector.normal_.score
    assert told["labelled"]["f1"] == 1


def test_one_scale_for_all_pictures(bank, photos, weights, tmp_path):
    """A part as normal as those held out has the lower half of the colours, whatever else is in the picture."""
    detector = MultiResolutionDetector.load(bank, encoder(weights).model)
    low, high = detector.normal_.limits
    assert detector.normal_.highest == pytest.approx((low + high) / 2)
    brightest = []
    for vmax in ((), ("--vmax", high * 1000)):
        result = invoke(
            "anomaly", "score", bank, photos / "a.png", "--out", tmp_path / "a.png", "--weights", weights, *vmax
        )
        assert result.exit_code == 0, result.output
        picture = np.asarray(pil.open(tmp_path / "a.png").convert("RGB")).astype(int)
        # The middle of the second panel: the map alone.
        brightest.append(picture[picture.shape[0] // 4 : -picture.shape[0] // 4, int(0.36 * picture.shape[1])].max())
    # A training image: all of its patches are in the bank.
    assert max(brightest) < 60


def test_broken_images_stop_before_any_work_or_are_listed(photos, weights, tmp_path):
    whole = (photos / "a.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.jpg").write_bytes(b"")
    options = ("--weights", weights, "--scales", "1", "--layers", "1")
    out = ("--out", tmp_path / "bank")
    refused("1 of 5 images cannot be read; --skip-broken leaves them out", "anomaly", "fit", photos, *out, *options)
    (photos / "empty.jpg").unlink()
    refused("cut.png is damaged or cut", "anomaly", "fit", photos, *out, *options)
    assert not (tmp_path / "bank").exists()
    (photos / "empty.jpg").write_bytes(b"")
    result = invoke("anomaly", "fit", photos, *out, *options, "--skip-broken")
    assert result.exit_code == 0, result.output
    assert "3 images, 1 bank" in result.output
    after = " ".join(result.output.partition("left out, as they cannot be read: 2 images")[2].split())
    assert "empty.jpg is not an image" in after
    assert "cut.png is damaged or cut" in after
    scores = tmp_path / "scores.json"
    result = invoke(
        "anomaly", "score", tmp_path / "bank", photos, "--skip-broken", "--scores", scores, "--weights", weights
    )
    assert result.exit_code == 0, result.output
    told = json.loads(scores.read_text())
    assert (len(told["images"]), len(told["skipped"])) == (3, 2)
    refused(
        "1 of 1 images cannot be read", "anomaly", "fit", photos / "cut.png", *out, "--force", "--skip-broken", *options
    )


def test_a_bank_is_not_lost(bank, photos, weights, tmp_path):
    options = ("--out", bank, "--weights", weights, "--scales", "1", "--layers", "1")
    refused("holds a bank; --force replaces it", "anomaly", "fit", photos, *options)
    result = invoke("anomaly", "fit", photos / "a.png", *options, "--force", "--enlarge", "--pixels", 30000)
    assert result.exit_code == 0, result.output
    # 84 x 70 pixels, enlarged to about 190 x 158: 13 x 11 patches of 24 float32.
    assert "1 image of 143 patches at all scales, enlarged to 0.03 megapixels: 143 rows in 1 bank, 13.73 kB" in (
        " ".join(result.output.split())
    )
    (bank / "detector.json").rename(bank / "unfinished.json")
    refused("holds a fit that did not finish; --resume goes on", "anomaly", "fit", photos, *options)


def test_a_coreset_goes_on(photos, weights, tmp_path, monkeypatch):
    """Stopped while its rows are chosen; the same command with --resume goes on, with the same bar."""
    options = ("--weights", weights, "--scales", "1", "--layers", "1", "--index", "coreset")
    module, done = importlib.import_module("murf_fast.anomaly._coreset"), []
    select = module.k_center_greedy

    def stopped(*arguments, progress, **others):
        def told(count, wanted):
            progress(count, wanted)
            done.append(count)
            if count >= 3:
                raise KeyboardInterrupt

        return select(*arguments, progress=told, **others)

    with monkeypatch.context() as patch:
        patch.setattr(module, "k_center_greedy", stopped)
        result = invoke("anomaly", "fit", photos, "--out", tmp_path / "bank", *options)
    assert result.exit_code not in (0, 2)
    assert "stopped after 3 images; the same command with --resume goes on" in " ".join(result.output.split())
    monkeypatch.setattr(
        module, "k_center_greedy", lambda *a, start, **k: done.append(len(start)) or select(*a, start=start, **k)
    )
    result = invoke("anomaly", "fit", photos, "--out", tmp_path / "bank", *options, "--resume")
    assert result.exit_code == 0, result.output
    assert "coreset" in result.output.split()
    assert "3 images, 1 bank, 9 rows" in result.output
    assert done[-1] == done[-2] >= 3  # it began with what there was


def test_score_says_what_is_wrong(bank, photos, weights, tmp_path):
    at = ("--weights", weights)
    (tmp_path / "file").write_text("")
    for arguments, words in (
        ((photos, "--out", tmp_path / "file"), "--out must be a folder, "),
        ((photos, "--maps", tmp_path / "file"), "--maps must be a folder"),
        ((photos, "--scores", tmp_path / "a.txt"), "--scores must end in .csv or .json"),
        ((photos, "--map-type", "png"), "--map-type must be one of npy, tiff"),
        ((photos, "--labelled"), "--labelled needs good and defective images"),
        ((photos / "a.png", photos / "a.png", photos / "more" / ".." / "a.png"), "two images have the name a"),
        ((photos, "--device", "abacus"), "--device must be cpu, cuda or cuda:1"),
    ):
        refused(words, "anomaly", "score", bank, *arguments, *at)


@pytest.mark.parametrize("option", ["--threshold", "--pixel-threshold", "--vmax"])
def test_a_number_that_is_none_is_refused(option, tmp_path):
    pil.new("RGB", (30, 30)).save(tmp_path / "x.png")
    result = invoke("anomaly", "score", tmp_path, tmp_path / "x.png", "--out", tmp_path / "m.png", option, "nan")
    assert result.exit_code == 2
    assert f"{option} must be a number" in result.output
    assert "got nan" in result.output


def test_a_picture_of_no_known_kind_is_refused_first(tmp_path):
    pil.new("RGB", (30, 30)).save(tmp_path / "x.png")
    result = invoke("anomaly", "score", tmp_path, tmp_path / "x.png", "--out", tmp_path / "m.xyz")
    assert result.exit_code == 2
    assert "--out must end as a picture does" in result.output


def test_folders_that_are_links_are_looked_into(tmp_path):
    from rich.console import Console

    from murf_fast.cli.anomaly._images import find

    (tmp_path / "far").mkdir()
    pil.new("RGB", (9, 9)).save(tmp_path / "far" / "x.png")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "near" / "round").symlink_to(tmp_path / "near")
    assert [file.path.name for file in find([tmp_path / "near"], Console())] == ["x.png"]
