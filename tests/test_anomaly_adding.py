"""Saved detectors that change: the old one or the new one is there whatever ends it, on the disk before it is said."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from test_anomaly_detector import OPTIONS, images, model

from murf_fast.anomaly import MultiResolutionDetector, _files, _growing

CORESET = {"index": "coreset", "coreset": 0.4, "projection": "sparse"}


@pytest.fixture(scope="module")
def vit():
    return model()


def detector(vit, **options):
    return MultiResolutionDetector(vit, **{**OPTIONS, **options})


def load(folder, vit):
    return MultiResolutionDetector.load(folder, vit)


def equal(one, other):
    return len(one.banks_) == len(other.banks_) and all(map(torch.equal, one.banks_, other.banks_))


def stopping(after):
    def progress(done, _):
        if done == after:
            raise KeyboardInterrupt

    return progress


def watched(monkeypatch, see):
    """Calls ``see(name, arguments)`` before everything that changes names in a folder or writes to the disk."""

    def seen(name, call):
        def wrapped(*arguments, **options):
            see(name, arguments)
            return call(*arguments, **options)

        monkeypatch.setattr(os, name, wrapped)

    for name in ("replace", "rename", "unlink", "remove", "fsync"):
        seen(name, getattr(os, name))


@pytest.mark.parametrize("options", [{}, CORESET], ids=["exact", "coreset"])
def test_in_place_is_what_add_and_save_make(vit, tmp_path, options):
    old, new = images(3), images(2, seed=7)
    expected = detector(vit, **options).fit(old).add(new)
    detector(vit, **options).fit(old, folder=tmp_path)
    grown = load(tmp_path, vit)
    assert grown.projection == options.get("projection")
    assert grown.add(new, in_place=True) is grown
    found = load(tmp_path, vit)
    for each in (grown, found):
        assert equal(each, expected)
        assert (each.images_, each.normal_) == (5, expected.normal_)
    # Once more, by the one that has grown, and by one that was saved.
    again = images(1, seed=9)
    expected.add(again).save(tmp_path / "other")
    grown.add(again, in_place=True)
    assert equal(load(tmp_path, vit), expected)
    expected.add(again, in_place=True)
    assert load(tmp_path / "other", vit).images_ == 7
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".json", *[".safetensors"] * 4]


@pytest.mark.parametrize("projection", [None, "sparse", "linear"])
def test_the_projection_decides_after_loading_as_before(vit, tmp_path, projection):
    """Narrow features have no projection that is narrower: of wide rows the three choose differently."""
    fitted = detector(vit, **{**CORESET, "projection": projection}).fit(images(3))
    fitted.save(tmp_path)
    loaded = load(tmp_path, vit)
    assert loaded.projection == projection
    assert f"projection={projection!r}" in repr(loaded)
    new = images(2, seed=3)
    assert equal(loaded.add(new), fitted.add(new))


def test_other_projections_choose_other_rows(vit):
    """So that the test above can fail."""
    chosen = [detector(vit, **{**CORESET, "projection": p}).fit(images(3)).add(images(2)) for p in (None, "linear")]
    assert not equal(*chosen)


@pytest.mark.parametrize("what", ["add", "add a coreset", "save", "fit"])
def test_old_or_new_at_every_step(vit, tmp_path, monkeypatch, what):
    """What a kill leaves before every change of a name, and before every write to the disk, loads whole."""
    options = CORESET if "coreset" in what else {}
    old = detector(vit, **options).fit(images(2), folder=tmp_path / "bank")
    new = detector(vit, **options).fit(images(2)).add(images(1, seed=4))
    left = []

    def see(*_):
        left.append(tmp_path / f"left-{len(left)}")
        shutil.copytree(tmp_path / "bank", left[-1])

    monkeypatch.setattr(_growing, "SECONDS", 0.0)
    with monkeypatch.context() as patch:
        watched(patch, see)
        if what == "save":
            new.save(tmp_path / "bank", overwrite=True)
        elif what == "fit":
            detector(vit).fit([*images(2), *images(1, seed=4)], folder=tmp_path / "bank", overwrite=True, batch=1)
        else:
            load(tmp_path / "bank", vit).add(images(1, seed=4), in_place=True)
    assert len(left) > 8
    found = [load(folder, vit) for folder in (*left, tmp_path / "bank")]
    counts = [each.images_ for each in found]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (2, 3)
    going_on = 0
    for each, folder in zip(found, (*left, tmp_path / "bank"), strict=True):
        expected = old if each.images_ == 2 else new
        for bank, rows in zip(each.banks_, expected.banks_, strict=True):
            torch.testing.assert_close(bank, rows)
        if what == "add" and each.images_ == 2 and (folder / "unfinished.json").exists():
            # Between the new names of the banks and the index, too, it can go on.
            again = each.add(images(1, seed=4), in_place=True, resume=True)
            for bank, rows in zip(again.banks_, new.banks_, strict=True):
                torch.testing.assert_close(bank, rows)
            going_on += 1
    assert going_on > 3 or what != "add"


@pytest.mark.skipif(os.name == "nt", reason="folders are not written to the disk by a call there")
@pytest.mark.parametrize("what", ["fit", "fit a coreset", "add", "save"])
def test_on_the_disk_before_it_counts(vit, tmp_path, monkeypatch, what):
    """Every bank before its name, the names before the index, the index before its name, and that at the end."""
    options, folder = CORESET if "coreset" in what else {}, tmp_path / "new" / "bank"
    fitted = detector(vit).fit(images(2))
    if what == "add":
        fitted.save(folder)
    events = []

    def content(inode):
        """What a file holds as others read it; b"" for folders."""
        found = [path for path in folder.iterdir() if path.stat().st_ino == inode] if folder.exists() else []
        return found[0].read_bytes() if found else b""

    def see(name, arguments):
        if name == "fsync":
            inode = os.fstat(arguments[0]).st_ino
            events.append(("fsync", inode, content(inode)))
        elif name == "replace":
            inode = Path(arguments[0]).stat().st_ino
            events.append(("replace", Path(arguments[1]).name, inode, content(inode)))

    with monkeypatch.context() as patch:
        watched(patch, see)
        if what == "save":
            fitted.save(folder)
        elif what == "add":
            fitted.add(images(1), in_place=True)
        else:
            detector(vit, **options).fit(images(2), folder=folder)
    own, above = folder.stat().st_ino, folder.parent.stat().st_ino
    names = [event[1] for event in events]  # of what is renamed, inodes of what is written to the disk
    banks = [i for i, e in enumerate(events) if e[0] == "replace" and e[1].endswith(".safetensors")]
    at = names.index("detector.json")
    assert len(banks) == 4
    for i in (*banks, at):
        assert ("fsync", *events[i][2:]) in events[:i], f"{names[i]} was renamed before its content was on the disk"
    assert own in names[max(banks) : at]
    assert own in names[at:]
    assert what == "add" or above in names


def test_an_addition_that_ended_goes_on(vit, tmp_path):
    new = images(4, seed=2)
    fitted = detector(vit).fit(images(2), folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, vit).add(iter(new), in_place=True, batch=1, progress=stopping(3))
    with pytest.raises(ValueError, match=r"holds an addition that did not finish; add\(resume=True\) goes on"):
        load(tmp_path, vit).add(new, in_place=True)
    with pytest.raises(ValueError, match="stopped after 3 images, and the first 3 of `images` are others"):
        load(tmp_path, vit).add(new[::-1], in_place=True, resume=True)
    done = []
    grown = load(tmp_path, vit)
    grown.add(iter(new), in_place=True, resume=True, batch=1, progress=lambda count, _: done.append(count))
    assert done == [3, 4]
    expected = fitted.add(new, batch=1)
    assert equal(load(tmp_path, vit), expected)
    assert load(tmp_path, vit).normal_ == grown.normal_ == expected.normal_
    # Or starts anew.
    with pytest.raises(KeyboardInterrupt):
        grown.add(new, in_place=True, batch=1, progress=stopping(2))
    grown.add(new[:1], in_place=True, overwrite=True, batch=1)
    assert load(tmp_path, vit).images_ == 7
    # A retry of what came to its end adds nothing twice.
    with pytest.raises(ValueError, match="holds no addition that did not finish, so `resume`"):
        load(tmp_path, vit).add(new, in_place=True, resume=True)


def test_an_end_after_the_new_index_is_none(vit, tmp_path, monkeypatch):
    detector(vit).fit(images(2), folder=tmp_path)
    loaded = load(tmp_path, vit)
    index = (tmp_path / "detector.json").read_bytes()

    ended = []

    def see(*_):
        if not ended and (tmp_path / "detector.json").read_bytes() != index:
            ended.append(1)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watched(patch, see)
        with pytest.raises(KeyboardInterrupt):
            loaded.add(images(1), in_place=True)
    assert not (tmp_path / "unfinished.json").exists()
    assert load(tmp_path, vit).add(images(1), in_place=True).images_ == 4
    assert len(list(tmp_path.iterdir())) == 5


def test_additions_are_to_the_detector_that_was_loaded(vit, tmp_path, monkeypatch):
    detector(vit).fit(images(2), folder=tmp_path)
    one, other = load(tmp_path, vit), load(tmp_path, vit)
    one.add(images(1), in_place=True)
    with pytest.raises(ValueError, match="holds another detector by now"):
        other.add(images(1), in_place=True)

    # Nor do two write at once; where there are no locks, the first to end counts.
    def meanwhile(done, _):
        load(tmp_path, vit).save(tmp_path, overwrite=True)

    one.method = "other"
    with pytest.raises(ValueError, match="is written to by another fit, addition or save"):
        one.add(images(1, seed=3), in_place=True, progress=meanwhile)
    with monkeypatch.context() as patch:
        patch.setattr(_files, "lock", lambda folder: None)
        other = load(tmp_path, vit)
        with pytest.raises(ValueError, match="holds another detector by now"):
            other.add(
                images(1, seed=3), in_place=True, overwrite=True, progress=lambda *_: one.save(tmp_path, overwrite=True)
            )
    assert (one.images_, other.images_, load(tmp_path, vit).images_) == (3, 3, 3)
    one.add(images(1, seed=3), in_place=True, overwrite=True)
    assert load(tmp_path, vit).images_ == 4
    with pytest.raises(ValueError, match="needs a folder"):
        detector(vit).fit(images(2)).add(images(1), in_place=True)
    for name in ("overwrite", "resume"):
        with pytest.raises(ValueError, match=f"`{name}` needs `in_place`"):
            one.add(images(1), **{name: True})
