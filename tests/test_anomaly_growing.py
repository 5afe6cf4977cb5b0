"""Fits into a folder: what an end before the last image leaves, going on, and what is not overwritten."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile

import pytest
import torch
from test_anomaly_detector import OPTIONS, images, model

from murf_fast.anomaly import MultiResolutionDetector, _growing, _selection
from murf_fast.anomaly._files import RowFile
from murf_fast.nn import MultiResolutionEncoder


@pytest.fixture(scope="module")
def vit():
    return model()


def detector(vit, **options):
    return MultiResolutionDetector(vit, **{**OPTIONS, **options})


def stopping(after, error=KeyboardInterrupt):
    """A `progress` that ends a fit."""

    def progress(done, _):
        if done == after:
            raise error("ended")

    return progress


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def encodings(monkeypatch):
    calls, forward = [], MultiResolutionEncoder.forward

    def counted(self, given):
        calls.append(len(given))
        return forward(self, given)

    monkeypatch.setattr(MultiResolutionEncoder, "forward", counted)
    return calls


@pytest.mark.parametrize("options", [{}, {"index": "coreset", "coreset": 0.3}])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_ended_fit_goes_on(vit, tmp_path, options, error, monkeypatch):
    several = images(5)
    whole = detector(vit, **options).fit(iter(several))
    with pytest.raises(error):
        detector(vit, **options).fit(iter(several), folder=tmp_path, batch=1, progress=stopping(3, error))
    assert "detector.json" not in files(tmp_path)
    with pytest.raises(ValueError, match="holds a fit that did not finish, no detector yet"):
        MultiResolutionDetector.load(tmp_path, vit)
    with pytest.raises(ValueError, match=r"holds a fit that did not finish; fit\(resume=True\) goes on"):
        detector(vit, **options).fit(several, folder=tmp_path)
    calls, done = encodings(monkeypatch), []
    again = detector(vit, **options).fit(
        iter(several), folder=tmp_path, resume=True, batch=1, progress=lambda count, _: done.append(count)
    )
    assert done == [3, 4, 5]
    assert calls == [1, 1]
    loaded = MultiResolutionDetector.load(tmp_path, vit)
    for expected, bank, saved in zip(whole.banks_, again.banks_, loaded.banks_, strict=True):
        torch.testing.assert_close(bank, expected)
        assert torch.equal(bank, saved)
    assert loaded.images_ == 5
    assert loaded.normal_ is not None
    assert loaded.normal_ == again.normal_
    assert loaded.normal_.score == pytest.approx(whole.normal_.score, rel=1e-4)
    assert files(tmp_path) == [*(f"bank-{i:03d}.safetensors" for i in range(4)), "detector.json"]


def centers_met(monkeypatch):
    """How many centers the rows of banks meet from here on."""
    module, found = importlib.import_module("murf_fast.native.k_center_greedy"), []
    steps = module._steps
    monkeypatch.setattr(module, "_steps", lambda *a: found.append(a[6] - a[5]) or steps(*a))
    return found


@pytest.mark.parametrize("projection", [None, "linear"])
@pytest.mark.parametrize("after", [2, 30, 119])
def test_an_ended_selection_goes_on(vit, tmp_path, after, projection, monkeypatch):
    """In the first, a later and the last bank: rows that are chosen stay, and meet no center again but the last."""
    options = {"index": "coreset", "coreset": 0.3, "projection": projection}
    several, told, ended = images(2), [], []
    whole = detector(vit, **options).fit(several, batch=1)

    def end(done, _):
        ended.append(done)
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detector(vit, **options).fit(several, folder=tmp_path, batch=1, coreset_progress=end)
    met = centers_met(monkeypatch)
    again = detector(vit, **options).fit(
        several, folder=tmp_path, resume=True, batch=1, coreset_progress=lambda *pair: told.append(pair)
    )
    for bank, expected in zip(again.banks_, whole.banks_, strict=True):
        assert torch.equal(bank, expected)
    assert told == sorted(set(told))
    assert {wanted for _, wanted in told} == {120}
    assert told[-1][0] == 120
    assert sum(met) <= 120 - ended[-1] + 1
    assert files(tmp_path) == [*(f"bank-{i:03d}.safetensors" for i in range(4)), "detector.json"]


def test_a_selection_is_of_its_rows_and_settings(vit, tmp_path, monkeypatch):
    options, several = {"index": "coreset", "coreset": 0.3}, images(2)

    def ended(folder, **more):
        with pytest.raises(KeyboardInterrupt):
            detector(vit, **{**options, **more}).fit(
                several, folder=folder, resume=True, batch=1, coreset_progress=lambda done, _: stopping(1)(1, 1)
            )

    ended(tmp_path)
    kept = sorted(tmp_path.glob("*.coreset"))
    assert [path.name for path in kept] == ["bank-000.safetensors.coreset"]
    # Of another share or projection it begins anew, and replaces what was there.
    met = centers_met(monkeypatch)
    for more in ({"coreset": 0.5}, {"projection": "sparse"}):
        before = kept[0].read_bytes()
        ended(tmp_path, **more)
        assert met.pop() == 1
        assert kept[0].read_bytes() != before
    damaged = kept[0].read_bytes()[:-30]
    kept[0].write_bytes(damaged)
    with pytest.raises(ValueError, match=r"bank-000\.safetensors\.coreset is damaged: .*; start anew"):
        detector(vit, **options).fit(several, folder=tmp_path, resume=True)
    kept[0].unlink()
    kept[0].symlink_to(tmp_path / "unfinished.json")
    with pytest.raises(ValueError, match="is damaged: it is not a regular file"):
        detector(vit, **options).fit(several, folder=tmp_path, resume=True)
    assert len(detector(vit, **options).fit(several, folder=tmp_path, overwrite=True).banks_[0]) == 12


def test_a_selection_is_told_while_it_is_made(vit, tmp_path, monkeypatch):
    """What is on disk then is what a kill leaves."""
    monkeypatch.setattr(_selection, "SECONDS", 0.0)
    several, left = images(2), tmp_path / "left"

    def killed(done, _):
        if done > 40 and not left.exists():
            shutil.copytree(tmp_path / "bank", left)

    options = {"index": "coreset", "coreset": 0.3}
    whole = detector(vit, **options).fit(several, folder=tmp_path / "bank", batch=1, coreset_progress=killed)
    told = []
    again = detector(vit, **options).fit(
        several, folder=left, resume=True, batch=1, coreset_progress=lambda done, _: told.append(done)
    )
    assert told[0] >= 12
    for bank, expected in zip(again.banks_, whole.banks_, strict=True):
        assert torch.equal(bank, expected)


def test_interrupted_between_two_banks(vit, tmp_path, monkeypatch):
    """Rows of an image that is not whole do not count."""
    several, appended, append = images(3), [], RowFile.append

    def interrupted(self, rows):
        append(self, rows)
        appended.append(1)
        if len(appended) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            detector(vit).fit(several, folder=tmp_path, batch=1)
    assert json.loads((tmp_path / "unfinished.json").read_text())["images"] == 1
    again = detector(vit).fit(several, folder=tmp_path, resume=True, batch=1)
    for bank, expected in zip(again.banks_, detector(vit).fit(several, batch=1).banks_, strict=True):
        assert torch.equal(bank, expected)


def test_going_on_needs_the_same(vit, tmp_path):
    several = images(4)
    with pytest.raises(KeyboardInterrupt):
        detector(vit).fit(several, folder=tmp_path, batch=1, progress=stopping(2))
    told = (tmp_path / "unfinished.json").read_text()
    options = {"folder": tmp_path, "resume": True}
    for others in ([several[1], several[0], *several[2:]], several[:1]):
        with pytest.raises(ValueError, match="stopped after 2 images, and the first 2 of `images` are others"):
            detector(vit).fit(iter(others), **options)
    with pytest.raises(ValueError, match="with other settings: scales, pixels; give the same"):
        detector(vit, scales=(0.5,), pixels=100).fit(several, **options)
    for text, words in (
        ("{", "is damaged"),
        (json.dumps({**json.loads(told), "rows": [10**9] * 4}), "is shorter than unfinished.json says"),
        (json.dumps({**json.loads(told), "rows": [1]}), "it has 1 banks"),
        (json.dumps({**json.loads(told), "images": -1}), "was not written by a fit"),
    ):
        (tmp_path / "unfinished.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            detector(vit).fit(several, **options)
    (tmp_path / "unfinished.json").write_text(told)
    os.rename(tmp_path / "bank-001.safetensors.rows", tmp_path / "moved")
    with pytest.raises(ValueError, match=r"bank-001\.safetensors\.rows is damaged or missing"):
        detector(vit).fit(several, **options)
    assert detector(vit).fit(several, folder=tmp_path, overwrite=True).images_ == 4


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"layers": [1]}, "layers"),
        ({"scales": (0.5,)}, "scales"),
        ({"norm": True}, "norm"),
        ({"pixels": 900}, "pixels"),
        ({"shorter_side": 30}, "shorter_side"),
        ({"references": 0.5}, "references"),
        ({"background": "keep"}, "background"),
        ({"on_empty": "raise"}, "on_empty"),
        ({"foreground": lambda image: image[0] >= 0}, "foreground"),
    ],
)
def test_going_on_with_another_setting_is_refused_by_its_name(vit, tmp_path, other, name):
    several = images(3)
    with pytest.raises(KeyboardInterrupt):
        detector(vit).fit(several, folder=tmp_path, batch=1, progress=stopping(1))
    with pytest.raises(ValueError, match=f"with other settings: {name}; give the same, or start anew"):
        detector(vit, **other).fit(several, folder=tmp_path, resume=True)


def test_going_on_with_other_weights_is_refused(vit, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        detector(vit).fit(images(3), folder=tmp_path, batch=1, progress=stopping(1))
    other = model()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="with other settings: encoder; give the same"):
        detector(other).fit(images(3), folder=tmp_path, resume=True)


@pytest.mark.parametrize("background", ["black", "keep"])
def test_going_on_with_another_foreground_is_refused(vit, tmp_path, background):
    """Of one pixel, which is in no patch's majority, too: it is not blackened."""
    several, top = images(3), torch.zeros(images(1)[0].shape[1:], dtype=torch.bool)
    top[:20] = True
    other = top.clone()
    other[-1, -1] = True
    options = {"background": background, "on_empty": "skip"}
    with pytest.raises(KeyboardInterrupt):
        detector(vit, foreground=lambda _: top, **options).fit(several, folder=tmp_path, batch=1, progress=stopping(2))
    with pytest.raises(ValueError, match="or have another foreground; give the same"):
        detector(vit, foreground=lambda _: other, **options).fit(several, folder=tmp_path, resume=True)
    again = detector(vit, foreground=lambda _: top.clone(), **options).fit(several, folder=tmp_path, resume=True)
    assert again.images_ == 3


@pytest.mark.parametrize("options", [{}, {"index": "coreset", "coreset": 0.3}])
def test_images_that_are_not_done_may_be_others(vit, tmp_path, options):
    """The banks, and what normal images score, are those of one fit of what is given, bit for bit."""
    several, others = images(5), images(6, seed=9)
    for name, given in (("others", [*several[:2], *others]), ("fewer", several[:2]), ("more", [*several, *others])):
        with pytest.raises(KeyboardInterrupt):
            detector(vit, **options).fit(several, folder=tmp_path / name, batch=1, progress=stopping(2))
        again = detector(vit, **options).fit(given, folder=tmp_path / name, batch=1, resume=True)
        whole = detector(vit, **options).fit(given, batch=1)
        assert again.images_ == len(given)
        assert again.normal_ == whole.normal_
        for bank, expected in zip(again.banks_, whole.banks_, strict=True):
            assert torch.equal(bank, expected)


def test_whatever_ends_the_process(vit, tmp_path, monkeypatch):
    """What is on disk while an image is worked on is what a kill leaves; it may cost what was not told yet."""
    several, left = images(5), tmp_path / "left"
    monkeypatch.setattr(_growing, "SECONDS", 0.0)
    append = RowFile.append

    def killed(self, rows):
        append(self, rows)
        if (tmp_path / "bank" / "unfinished.json").exists() and not left.exists():
            shutil.copytree(tmp_path / "bank", left)  # the second image has rows in the first bank alone

    monkeypatch.setattr(RowFile, "append", killed)
    detector(vit).fit(several, folder=tmp_path / "bank", batch=1)
    monkeypatch.undo()
    assert json.loads((left / "unfinished.json").read_text())["images"] == 1
    done = []
    fitted = detector(vit).fit(several, folder=left, resume=True, batch=1, progress=lambda count, _: done.append(count))
    assert done == [1, 2, 3, 4, 5]
    for bank, expected in zip(fitted.banks_, detector(vit).fit(several, batch=1).banks_, strict=True):
        assert torch.equal(bank, expected)


def test_a_detector_is_not_overwritten_unasked(vit, tmp_path):
    first = detector(vit).fit(images(2), folder=tmp_path)
    for call in (lambda: detector(vit).fit(images(3), folder=tmp_path), lambda: first.save(tmp_path)):
        with pytest.raises(ValueError, match="holds a detector; overwrite=True replaces it"):
            call()
    # Until the new one is whole the old one is there.
    with pytest.raises(KeyboardInterrupt):
        detector(vit).fit(images(3), folder=tmp_path, overwrite=True, batch=1, progress=stopping(2))
    assert MultiResolutionDetector.load(tmp_path, vit).images_ == 2
    detector(vit, scales=(0.5,)).fit(images(3), folder=tmp_path, overwrite=True)
    # Other names than those of the old one, which was whole until then.
    assert files(tmp_path) == ["bank-000-2.safetensors", "bank-001-2.safetensors", "detector.json"]
    assert MultiResolutionDetector.load(tmp_path, vit).images_ == 3


def test_the_folder_is_tried_before_the_first_image(vit, tmp_path, monkeypatch):
    calls = encodings(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        detector(vit).fit(images(2), folder=tmp_path / "file" / "bank")
    for name in ("overwrite", "resume"):
        with pytest.raises(ValueError, match=f"`{name}` needs a `folder`"):
            detector(vit).fit(images(2), **{name: True})
    with pytest.raises(TypeError, match="`overwrite` must be True or False"):
        detector(vit).fit(images(2), folder=tmp_path / "bank", overwrite=1)
    assert calls == []
    # What ends before an image is done leaves nothing.
    with pytest.raises(ValueError, match="at least one image"):
        detector(vit).fit(iter([]), folder=tmp_path / "bank")
    assert files(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="temporary files have names there, and go when they are closed")
def test_temporary_files_have_no_names(vit, tmp_path, monkeypatch):
    """So nothing stays of them, however the process ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    fitted = detector(vit).fit(images(2), batch=1, progress=lambda *_: seen.append(files(tmp_path)))
    assert seen == [[], []]
    assert len(fitted.banks_[0]) == 40
