"""Many images: scores that are those of one, banks that grow, what held-out normal images score; kinds and sizes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_anomaly_detector import OPTIONS, images, model
from util import assert_within_budget

from murf_fast._files import sha256_of_json
from murf_fast.anomaly import Anomaly, MultiResolutionDetector, NormalRange
from murf_fast.anomaly._images import Size, as_tensor
from murf_fast.anomaly._reading import read_ahead
from murf_fast.nn import MultiResolutionEncoder

pil = pytest.importorskip("PIL.Image")
SIZES = ((32, 40), (32, 40), (24, 28), (60, 36), (32, 40))


@pytest.fixture(scope="module")
def vit():
    return model()


@pytest.fixture(scope="module")
def fitted(vit):
    return MultiResolutionDetector(vit, **OPTIONS).fit(images(3))


@pytest.fixture(scope="module")
def several():
    return [images(1, seed, size)[0] for seed, size in enumerate(SIZES)]


@pytest.mark.parametrize("batch", [1, 2, None])
def test_scores_are_those_of_single_images(fitted, several, batch, monkeypatch):
    single = [fitted.score(image) for image in several]
    calls, forward = [], MultiResolutionEncoder.forward
    monkeypatch.setattr(MultiResolutionEncoder, "forward", lambda s, x: calls.append(len(x)) or forward(s, x))
    found = list(fitted.score_many(iter(several), batch=batch))
    assert calls == {1: [1] * 5, 2: [2, 2, 1], None: [5]}[batch]
    if batch == 1:
        assert [a.score for a in found] == [a.score for a in single]
        assert all(torch.equal(a.map, b.map) for a, b in zip(found, single, strict=True))
        return
    # A pass that images share has products of other shapes, which round elsewhere.
    exact = MultiResolutionDetector(model().double(), **OPTIONS).fit(images(3))
    for image, one, other in zip(several, single, found, strict=True):
        assert_within_budget(other.map, exact.score(image).map, one.map)


def test_files_are_read_ahead_in_order(fitted, several, tmp_path):
    paths = []
    for i, image in enumerate(several):
        paths.append(tmp_path / f"Ärger {i} 检查.png")
        pil.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    mixed = [paths[0], several[1], paths[2], paths[3], several[4]]
    read = list(read_ahead(iter(mixed)))
    assert [name for name, _, _ in read] == [f"`images[{i}]`" for i in range(5)]
    assert [is_file for _, _, is_file in read] == [True, False, True, True, False]
    for (_, tensor, _), image in zip(read, several, strict=True):
        assert torch.equal(tensor[0], image)
    assert [a.score for a in fitted.score_many(mixed, batch=1)] == [fitted.score(image).score for image in several]


def test_a_broken_file_is_named_before_any_work(fitted, several, tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, several, strict=True):
        pil.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:-40])
    paths[4].write_text("no image")
    calls = []
    monkeypatch.setattr(MultiResolutionEncoder, "forward", lambda *_: calls.append(1))
    for call in (MultiResolutionDetector(fitted.encoder, pixels=None).fit, fitted.score_many, fitted.add):
        with pytest.raises(ValueError, match=r"3\.png is damaged or cut: .* \(and 1 more of 5 files\)"):
            call(paths)
    # Of an iterator the files are not known before.
    monkeypatch.undo()
    found = fitted.score_many(iter(paths), batch=1)
    assert len([next(found) for _ in range(3)]) == 3
    with pytest.raises(ValueError, match=r"3\.png is damaged or cut"):
        next(found)


@pytest.mark.parametrize("batch", [1, 4, None])
@pytest.mark.parametrize("kind", ["file", "pixels", "source"])
def test_a_failure_costs_no_image_before_it(fitted, several, kind, batch, tmp_path):
    """Also of those that wait to share its pass, or are read ahead; their numbers are those without it."""
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, several, strict=False):
        pil.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    paths[2].write_text("no image")

    def source():
        yield from paths[:2]
        if kind == "source":
            raise RuntimeError("the camera is gone")
        yield paths[2] if kind == "file" else torch.full((3, 32, 40), torch.nan)
        yield several[3]

    results, found = fitted.score_many(source(), batch=batch), []
    with pytest.raises(RuntimeError if kind == "source" else ValueError, match=r"camera|not an image|finite"):
        found.extend(results)  # takes what comes before the error
    expected = list(fitted.score_many(several[:2], batch=batch))
    assert [a.score for a in found] == [a.score for a in expected]
    assert all(torch.equal(a.map, b.map) for a, b in zip(found, expected, strict=True))
    folder = tmp_path / "bank"
    with pytest.raises((RuntimeError, ValueError)):
        MultiResolutionDetector(fitted.encoder, pixels=None).fit(source(), folder=folder, batch=batch)
    assert json.loads((folder / "unfinished.json").read_text())["images"] == 2


@pytest.mark.parametrize("index", ["exact", "coreset"])
def test_adding_images(vit, index, tmp_path):
    options = {**OPTIONS, "index": index, "coreset": 0.25}
    first, more = images(2), images(2, seed=7)
    grown = MultiResolutionDetector(vit, **options).fit(first, held_out=0)
    grown.save(tmp_path)
    before = [bank.clone() for bank in grown.banks_]
    image = images(1, seed=5)[0]
    scores = [grown.score(x).score for x in more]
    assert grown.normal_ is None
    assert grown.add(more) is grown
    assert grown.images_ == 4
    assert (grown.normal_.images, grown.normal_.score) == (2, pytest.approx(max(scores), rel=1e-4))
    if index == "exact":
        whole = MultiResolutionDetector(vit, **options).fit([*first, *more])
        for bank, expected in zip(grown.banks_, whole.banks_, strict=True):
            torch.testing.assert_close(bank, expected)
        torch.testing.assert_close(grown.score(image).map, whole.score(image).map)
    else:
        assert [len(b) for b in grown.banks_] == [20, 20, 80, 80]
        new = MultiResolutionDetector(vit, **{**options, "index": "exact"}).fit(more).banks_
        for bank, old, rows in zip(grown.banks_, before, new, strict=True):
            near = torch.cdist(bank.double(), torch.cat([old, rows]).double()).min(1).values
            assert float(near.max()) < 1e-4  # of the coreset or of the new rows, and of both
            assert torch.equal(bank[0], old[0])
            assert float(torch.cdist(bank.double(), rows.double()).min()) < 1e-4
    # Also after load, whose files stay as they are.
    loaded = MultiResolutionDetector.load(tmp_path, vit).add(more)
    for bank, expected in zip(loaded.banks_, grown.banks_, strict=True):
        assert torch.equal(bank, expected)
    assert MultiResolutionDetector.load(tmp_path, vit).images_ == 2
    with pytest.raises(ValueError, match=r"fit\(\) or load\(\) first"):
        MultiResolutionDetector(vit, **options).add(more)
    loaded._sharded = object()
    with pytest.raises(ValueError, match="banks of which ranks or workers hold parts"):
        loaded.add(more)


@pytest.mark.parametrize(
    "options", [{}, {"rules": "patchcore"}, {"index": "coreset", "coreset": 1.0}, {"foreground": "left"}]
)
def test_held_out_images_are_scored_by_those_before(vit, options):
    def left(image):
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        mask[:, :20] = True
        return mask

    options = {**OPTIONS, **options, **({"foreground": left} if "foreground" in options else {})}
    train = [*images(6), *images(2, seed=3, size=(40, 36))]
    fitted = MultiResolutionDetector(vit, **options).fit(train, held_out=2)
    others = MultiResolutionDetector(vit, **{**options, "index": "exact"}).fit(train[:6], held_out=0)
    found = [others.score(image) for image in train[6:]]
    normal = fitted.normal_
    assert normal.images == 2
    assert normal.score == pytest.approx(max(a.score for a in found), rel=1e-4)
    assert normal.highest == pytest.approx(max(float(a.map.max()) for a in found), rel=1e-4)
    assert normal.middle == pytest.approx(np.mean([float(a.map.median()) for a in found]), rel=1e-4)
    # A quarter of the images at most.
    assert MultiResolutionDetector(vit, **options).fit(train[:4], held_out=9).normal_.images == 1
    for few, held_out in ((train[:1], 4), (train[:4], 0)):
        assert MultiResolutionDetector(vit, **options).fit(few, held_out=held_out).normal_ is None


def test_normal_range():
    low, high = (
        NormalRange.of([Anomaly(torch.tensor([[a, b, b]]), s)]) for a, b, s in ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    )
    assert low == NormalRange(1, 2.0, 2.0, 3.0)
    assert low.joined(high) == high.joined(low) == NormalRange(2, 3.5, 5.0, 6.0)
    assert low.joined(high).limits == (3.5, 6.5)
    assert NormalRange.of([]) is None


def test_images_are_only_shrunk(vit, tmp_path):
    image = images(1)[0]
    options = {**OPTIONS, "scales": (1.0,), "pixels": 4 * 32 * 40}
    kept = MultiResolutionDetector(vit, **options)
    enlarged = MultiResolutionDetector(vit, **options, enlarge=True)
    assert (kept.grids((32, 40)), enlarged.grids((32, 40))) == ([(8, 10)], [(16, 20)])
    assert kept.grids((128, 160)) == enlarged.grids((128, 160)) == [(16, 20)]
    assert len(kept.fit([image]).banks_[0]) == 80
    assert len(enlarged.fit([image]).banks_[0]) == 320
    sizes = [Size(*given).of(10, 10) for given in ((None, True), (25, False), (100, False), (401, False), (401, True))]
    assert sizes == [(10, 10), (5, 5), (10, 10), (10, 10), (20, 20)]
    enlarged.save(tmp_path)
    assert MultiResolutionDetector.load(tmp_path, vit).enlarge is True
    # Banks of earlier versions were made by enlarging, whatever the default is now.
    index = json.loads((tmp_path / "detector.json").read_text())
    index = {n: v for n, v in index.items() if n not in ("sha256", "enlarge", "rounded", "type", "normal")}
    index["version"] = 2
    (tmp_path / "detector.json").write_text(json.dumps({**index, "sha256": sha256_of_json(index)}))
    old = MultiResolutionDetector.load(tmp_path, vit)
    assert (old.enlarge, old.normal_) == (True, None)
    assert torch.equal(old.score(image).map, enlarged.score(image).map)
    with pytest.raises(TypeError, match="`enlarge` must be True or False"):
        MultiResolutionDetector(vit, **OPTIONS, enlarge="yes")


def test_gray_and_deep_images_in_memory():
    gray = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    colours = np.repeat(gray[..., None], 3, axis=2)
    alpha = np.concatenate([colours, 255 - colours[..., :1]], axis=2)
    expected = torch.from_numpy(colours).permute(2, 0, 1)[None]
    deep = (gray.astype(np.uint32) * 257 + 100).clip(0, 65535).astype(np.uint16)
    arrays = (gray, gray[..., None], colours, alpha, deep, deep.astype(">u2"), pil.fromarray(gray), pil.fromarray(deep))
    for image in arrays:
        assert torch.equal(as_tensor(image), expected)
    for array in (gray, deep):
        for image in (torch.from_numpy(array), torch.from_numpy(array)[None], torch.from_numpy(array)[None, None]):
            assert torch.equal(as_tensor(image), expected)
    assert torch.equal(as_tensor(torch.from_numpy(alpha).permute(2, 0, 1)), expected)
    assert torch.equal(as_tensor(torch.from_numpy(gray) / 255), expected / 255)


def test_the_same_weights_in_another_type(vit, fitted, tmp_path):
    fitted.save(tmp_path / "float32")
    half = model().half()
    refused = (
        r"made with the same weights in float32, `encoder` has them in float16; convert it \(model.to\(torch.float32"
    )
    with pytest.raises(ValueError, match=refused):
        MultiResolutionDetector.load(tmp_path / "float32", half)
    with pytest.raises(ValueError, match="made with another encoder"):
        MultiResolutionDetector.load(tmp_path / "float32", model(seed=1).half(), any_precision=True)
    image = images(1, seed=5)[0]
    accepted = MultiResolutionDetector.load(tmp_path / "float32", half, any_precision=True)
    own = MultiResolutionDetector(half, **OPTIONS).fit(images(3))
    exact = fitted.score(image).score
    # Off by no more than features of float16 are anyway, of which banks and queries are made here.
    assert abs(accepted.score(image).score - exact) <= 4 * abs(own.score(image).score - exact) + 1e-2 * exact
    own.save(tmp_path / "float16")
    with pytest.raises(ValueError, match="made with the same weights in float16, `encoder` has them in float32"):
        MultiResolutionDetector.load(tmp_path / "float16", vit)
    assert MultiResolutionDetector.load(tmp_path / "float16", model().half()).images_ == 3


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("batch", 0, "`batch` must be at least 1"), ("held_out", -1, "`held_out` must be at least 0")],
)
def test_bad_numbers(fitted, name, value, words):
    calls = [fitted.fit, fitted.add] + ([fitted.score_many] if name == "batch" else [])
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call(images(1), **{name: value})


def test_the_range_is_kept(fitted, vit, tmp_path):
    fitted.save(tmp_path)
    assert MultiResolutionDetector.load(tmp_path, vit).normal_ == fitted.normal_
    index = json.loads((tmp_path / "detector.json").read_text())
    for wrong in (3, {}, {**dataclasses.asdict(fitted.normal_), "score": "high"}):
        changed = {n: v for n, v in {**index, "normal": wrong}.items() if n != "sha256"}
        (tmp_path / "detector.json").write_text(json.dumps({**changed, "sha256": sha256_of_json(changed)}))
        with pytest.raises(ValueError, match="`normal` must be the numbers of a range or null"):
            MultiResolutionDetector.load(tmp_path, vit)
