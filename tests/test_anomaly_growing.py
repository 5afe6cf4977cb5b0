"""Fits into a folder: what an end before the last image leaves, going on, and what is not overwritten."""

from __future__ import annotations

import json
import os
import shutil
import tempfile

import pytest
import torch
from test_anomaly_detector import OPTIONS, images, model

from murf_fast.anomaly import MultiResolutionDetector, _growing
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
    with pytest.raises(ValueError, match="of another encoder, pixels; give the same"):
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
