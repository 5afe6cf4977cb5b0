"""``murf-fast anomaly evaluate``: its numbers, that it goes on where it stopped, and one line for what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_sets import SIZE, image, mvtec, mvtec2
from matplotlib.colors import to_rgb
from test_cli import invoke

from murf_fast._pillow import read
from murf_fast.anomaly import MultiResolutionDetector, au_pro, au_roc, best_f1, categories, subsets_of
from murf_fast.anomaly.evaluation import Scored, _image_auroc
from murf_fast.anomaly.subsets import ALL
from murf_fast.cli.anomaly import evaluate as command
from murf_fast.cli.anomaly._inputs import encoder
from murf_fast.cli.anomaly._picture import LINE

pil = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")
pytest.importorskip("scipy")

SETTINGS = ("--scales", "0.5,1", "--layers", "0 1", "--pixels", 0)


def run(data, out, weights, *options):
    result = invoke("anomaly", "evaluate", data, "--out", out, "--weights", weights, *SETTINGS, *options)
    assert result.exit_code == 0, result.output
    return json.loads((out / "results.json").read_text()), result.output


def refused(words, *arguments):
    result = invoke("anomaly", "evaluate", *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.replace("│", " ").split()), result.output
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def nuts(tmp_path_factory):
    """Two categories."""
    root = tmp_path_factory.mktemp("sets")
    mvtec(root, "nut")
    mvtec2(root, "can")
    return root


@pytest.fixture(scope="module")
def evaluated(nuts, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    return (out, *run(nuts, out, weights, "--subsets", "scales-x-layers", "--heat-maps", "--keep-banks"))


def test_numbers_are_those_of_fit_and_score(nuts, weights, evaluated):
    _, results, printed = evaluated
    found = results["categories"]["nut"]
    (nut,) = categories(nuts / "nut")
    detector = MultiResolutionDetector(encoder(weights).encoder([0, 1], [0.5, 1]), pixels=None)
    detector.fit([read(path) for path in nut.train])
    anomalies = [detector.score(read(sample.path)) for sample in nut.test]
    maps, masks = [a.map.numpy() for a in anomalies], [sample.read_mask(SIZE) for sample in nut.test]
    f1, threshold = best_f1(maps, masks)
    defects = [[[sample.is_defect]] for sample in nut.test]
    assert found["measures"][ALL] == {
        "image AUROC": au_roc([np.array([[a.score]]) for a in anomalies], np.array(defects)),
        "AU-PRO_0.05": au_pro(maps, masks, 0.05),
        "AU-PRO_0.3": au_pro(maps, masks, 0.3),
        "AU-ROC_0.05": au_roc(maps, masks, 0.05),
        "AU-ROC": au_roc(maps, masks),
        "F1": f1,
        "F1 threshold": threshold,
    }
    assert (found["fit images"], found["test images"]) == (3, 6)
    assert set(found["seconds"]) == {"fit", "score", "measure"}
    for name, value in results["mean"].items():
        of_each = [results["categories"][c]["measures"][ALL][name] for c in ("nut", "can")]
        assert value == sum(of_each) / 2
        assert f"{value:.4f}" in printed
    assert "mean of 2 categories" in printed


def test_every_subset_is_there_and_of_its_own_banks(evaluated):
    _, results, printed = evaluated
    found = results["categories"]["nut"]["measures"]
    assert list(found) == ["all - 0.5", "all - 1", "0 - all", "1 - all", "0 - 0.5", "0 - 1", "1 - 0.5", "1 - 1", ALL]
    assert all(name in printed for name in found)
    assert len({tuple(values.values()) for values in found.values()}) > 1


def test_heat_maps(evaluated):
    out, *_ = evaluated
    drawn = sorted(p.relative_to(out / "heat-maps").as_posix() for p in (out / "heat-maps").rglob("*.png"))
    assert drawn[:2] == ["can/bad/000_regular.png.png", "can/good/000_regular.png.png"]
    assert len(drawn) == 2 + 6
    pixels = np.asarray(pil.open(out / "heat-maps" / "can" / "bad" / "000_regular.png.png").convert("RGB"))
    line = np.asarray(to_rgb(LINE)) * 255
    threshold = json.loads((out / "results.json").read_text())["categories"]["can"]["measures"][ALL]["F1 threshold"]
    assert threshold is not None
    # The line of the best F1 is on the third of four panels and on the colour bar at the right.
    is_line = np.abs(pixels - line).max(2) < 40
    columns = np.flatnonzero(is_line.any(0)) / pixels.shape[1]
    assert ((columns > 0.48) & (columns < 0.7)).any()
    assert (columns > 0.9).any()
    assert not (columns < 0.46).any()


def test_what_is_done_is_not_done_again(nuts, weights, evaluated, monkeypatch):
    out, results, _ = evaluated
    fitted = []
    fit = MultiResolutionDetector.fit
    monkeypatch.setattr(MultiResolutionDetector, "fit", lambda *a, **k: fitted.append(1) or fit(*a, **k))
    again, printed = run(nuts, out, weights)
    assert again == results
    assert "nut: done already" in printed
    # More subsets from the banks that were kept.
    more, _ = run(nuts / "nut", out, weights, "--subsets", "all")
    assert len(more["categories"]["nut"]["measures"]) == 9
    assert not fitted
    # Banks of other images are not taken.
    (out / "banks" / "can.json").write_text('{"images": "other"}')
    (out / "categories" / "can.json").unlink()
    assert (
        run(nuts, out, weights)[0]["categories"]["can"]["measures"][ALL]
        == results["categories"]["can"]["measures"][ALL]
    )
    assert fitted == [1]


def test_other_images_under_a_name_are_done_again(weights, tmp_path):
    folder = mvtec(tmp_path / "set", "nut")
    first, _ = run(folder, tmp_path / "out", weights)
    assert not (tmp_path / "out" / "banks").exists()
    image(folder / "train" / "good" / "more.png", 99)
    second, _ = run(folder, tmp_path / "out", weights)
    assert (first["categories"]["nut"]["fit images"], second["categories"]["nut"]["fit images"]) == (3, 4)


def test_an_interrupted_run_goes_on(nuts, weights, tmp_path, monkeypatch):
    done = command._category
    monkeypatch.setattr(command, "_category", lambda p, c, *a: done(p, c, *a) if c.name == "can" else 1 / 0)
    result = invoke("anomaly", "evaluate", nuts, "--out", tmp_path / "o", "--weights", weights, *SETTINGS)
    assert isinstance(result.exception, ZeroDivisionError)
    monkeypatch.undo()
    assert "can: done already" in run(nuts, tmp_path / "o", weights)[1]


def test_one_line_for_what_is_wrong(nuts, weights, evaluated, tmp_path):
    out, *_ = evaluated
    given = ("--weights", weights)
    refused("with other layers: [0, 1], now [1]", nuts, "--out", out, *given, "--layers", "1", "--scales", "0.5,1")
    refused("with other rules", nuts, "--out", out, *given, *SETTINGS, "--rules", "mrf-max")
    refused("with other pixels", nuts, "--out", out, *given, *SETTINGS[:4])
    refused("known layout", tmp_path, "--out", tmp_path / "o", *given)
    refused("is not a folder", tmp_path / "none", "--out", tmp_path / "o", *given)
    (tmp_path / "file").write_text("")
    refused("file", nuts, "--out", tmp_path / "file", *given)
    refused("--device must be cpu, cuda", nuts, "--out", tmp_path / "o", *given, "--device", "cuda:77")
    refused("`kind` must be one of", nuts, "--out", tmp_path / "o", *given, *SETTINGS, "--subsets", "some")
    refused("`rules` must be one of", nuts, "--out", tmp_path / "o", *given, *SETTINGS, "--rules", "mine")
    refused("must be 2 numbers", nuts, "--out", tmp_path / "o", *given, *SETTINGS, "--scale-weights", "1")
    refused("not all 0", nuts, "--out", tmp_path / "o", *given, *SETTINGS, "--layer-weights", "x")
    refused(
        "patches at the largest scale",
        nuts,
        "--out",
        tmp_path / "o",
        *given,
        "--enlarge",
        "--pixels",
        "1e15",
        "--layers",
        "1",
    )
    (out / "categories" / "nut.json").write_text("{")
    refused("nut.json is damaged", nuts, "--out", out, *given, *SETTINGS)


def test_files_are_looked_at_before_any_work(weights, tmp_path):
    folder = mvtec(tmp_path, "nut")
    (folder / "test" / "good" / "001.png").write_bytes(b"no image")
    refused("001.png is not an image", folder, "--out", tmp_path / "o", "--weights", weights, *SETTINGS)
    image(folder / "test" / "good" / "001.png", 1)
    image(folder / "ground_truth" / "cut" / "001_mask.png", 1, size=(20, 42))
    refused("must have the size of its image", folder, "--out", tmp_path / "o", "--weights", weights, *SETTINGS)
    assert not (tmp_path / "o" / "results.json").exists()


def test_weights_of_fusion(weights, tmp_path):
    folder = mvtec(tmp_path, "nut")
    whole, _ = run(folder, tmp_path / "w", weights, "--scale-weights", "0,1", "--layer-weights", "1,0")
    single, _ = run(folder, tmp_path / "s", weights, "--subsets", "scales-x-layers")
    assert whole["categories"]["nut"]["measures"][ALL] == single["categories"]["nut"]["measures"]["0 - 1"]


def test_what_a_set_does_not_say(weights, tmp_path):
    (nut,) = categories(mvtec(tmp_path, "nut"))
    detector = MultiResolutionDetector(encoder(weights).encoder([1], [1.0]), pixels=None)
    detector.fit([read(path) for path in nut.train])
    whole = subsets_of(detector, "none")[ALL]
    defects = Scored(detector, [s for s in nut.test if s.is_defect]).measures(whole)
    assert defects.pop("image AUROC") is None
    assert all(value >= 0 for value in defects.values())
    good = Scored(detector, [s for s in nut.test if not s.is_defect]).measures(whole)
    assert set(good.values()) == {None}


def test_images_that_all_score_alike_are_in_no_order():
    assert _image_auroc(np.array([2.0, 2.0, 2.0]), np.array([True, False, True])) == 0.5
    assert _image_auroc(np.array([3.0, 1.0, 2.0]), np.array([True, False, False])) == 1.0


def test_masks_of_sixteen_bits_are_those_of_eight(tmp_path):
    folder = mvtec(tmp_path, "nut")
    before = [sample.read_mask(SIZE) for sample in categories(folder)[0].test]
    for sample in categories(folder)[0].test:
        if sample.mask is not None:
            mask = np.asarray(pil.open(sample.mask).convert("L")) > 0
            pil.fromarray(mask.astype(np.uint16)).save(sample.mask)
    after = [sample.read_mask(SIZE) for sample in categories(folder)[0].test]
    assert any(mask.any() for mask in before)
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))


def test_broken_images_are_named_or_left_out(tmp_path, weights):
    folder = mvtec(tmp_path, "nut")
    (category,) = categories(folder)
    category.test[0].path.write_bytes(category.test[0].path.read_bytes()[:60])
    refused(category.test[0].path.name, folder, "--out", tmp_path / "out", "--weights", weights, *SETTINGS)
    out = tmp_path / "left"
    results, printed = run(folder, out, weights, "--skip-broken")
    assert results["categories"]["nut"]["test images"] == len(category.test) - 1
    assert "left out, as they cannot be read: 1 image" in printed
    assert "done already" in run(folder, out, weights, "--skip-broken")[1]


def test_a_link_that_leads_nowhere_is_named(tmp_path, weights):
    folder = mvtec(tmp_path, "nut")
    (folder / "test" / "good" / "lost.png").symlink_to(tmp_path / "nothing.png")
    refused("lost.png", folder, "--out", tmp_path / "out", "--weights", weights, *SETTINGS)


def test_a_mask_that_changed_is_not_done_already(tmp_path, weights):
    folder, out = mvtec(tmp_path, "nut"), tmp_path / "out"
    run(folder, out, weights)
    mask = next(s.mask for s in categories(folder)[0].test if s.mask is not None)
    pixels = np.asarray(pil.open(mask).convert("L"))
    pil.fromarray(255 - pixels).save(mask)
    assert "done already" not in run(folder, out, weights)[1]


def test_names_with_brackets_are_no_markup(tmp_path, weights):
    results, printed = run(mvtec(tmp_path, "nut [m4] []"), tmp_path / "out [bold]", weights)
    assert list(results["categories"]) == ["nut [m4] []"]
    assert "[m4]" in printed
