from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from murf_fast.anomaly import PixelCurves, _background, au_pro, au_roc, best_f1

pytest.importorskip("scipy")
GOLDEN = Path(__file__).parent / "golden"


def by_every_threshold(scores, masks, limit, by_region):
    """The definition: overlap and false-positive rate at every score that occurs."""
    from scipy import ndimage

    regions, points = [], [(0.0, 0.0)]
    for s, m in zip(scores, masks, strict=True):
        labels, n = ndimage.label(m, structure=np.ones((3, 3)))
        regions += [s[labels == r] for r in range(1, n + 1)]
    if not by_region:
        regions = [np.concatenate(regions)]
    background = np.concatenate([s[m == 0] for s, m in zip(scores, masks, strict=True)])
    for t in sorted({float(v) for s in scores for v in s.ravel()}, reverse=True):
        points.append((np.mean(background >= t), np.mean([np.mean(r >= t) for r in regions])))
    x, y = np.array([*points, (1.0, 1.0)]).T
    area = 0.0
    for x0, x1, y0, y1 in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


def hashed(shape, seed, levels=2**24):
    """Scores in 0..1 of integer arithmetic alone, the same with every version of numpy."""
    n = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(7919 * seed)
    n = (n * np.uint64(2654435761) ^ (n * np.uint64(2246822519) >> np.uint64(13))) % np.uint64(2**32)
    return (n % np.uint64(levels) / np.float64(levels)).astype(np.float32).reshape(shape)


def drawn(kind):
    """Maps and masks: continuous, of few levels, of half precision or of several dtypes; one image is all defect."""
    shapes = [(1, 1), (1, 2)] if kind == "tiny" else [(13, 17), (1, 40), (31, 5), (7, 7)]
    scores = [hashed(shape, i, 5 if kind == "tied" else 2**24) for i, shape in enumerate(shapes)]
    masks = [(hashed(shape, 90 + i) < 0.3).astype(np.uint8) for i, shape in enumerate(shapes)]
    masks[0][:], masks[-1][0, 0], masks[-1][-1, -1] = 1, 1, 0
    if kind == "half":
        scores = [s.astype(np.float16) for s in scores]
    elif kind == "mixed":
        scores = [s.astype(np.float64) + 1e-9 if i % 2 else s for i, s in enumerate(scores)]
    return scores, masks


# What 0.1.0 returned, which held all maps: au_pro(0.05), au_pro(0.3), au_roc(0.05), au_roc(1).
BEFORE = {
    "random": ("0x1.6615cd1750e0ep-6", "0x1.54c96d060480bp-4", "0x1.5673d45aa630cp-6", "0x1.2f312f81c33b3p-1"),
    "tied": ("0x1.5f286040b9621p-6", "0x1.04c99a3604adep-3", "0x1.db52bd2ee0488p-6", "0x1.0b60dc3e727c8p-1"),
    "half": ("0x1.65ba8ea0ce400p-6", "0x1.54a9be7233970p-4", "0x1.5318574ab39ebp-6", "0x1.2f2a7887a3562p-1"),
    "mixed": ("0x1.6615cd1750e0ep-6", "0x1.54c96d060480bp-4", "0x1.5673d45aa630cp-6", "0x1.2f312f81c33b3p-1"),
    "tiny": ("0x1.0000000000000p-1", "0x1.0000000000000p-1", "0x1.0000000000000p-1", "0x1.0000000000000p-1"),
}


@pytest.mark.parametrize("kind", BEFORE)
@pytest.mark.parametrize("run", [_background.RUN, 23])
def test_every_way_through_gives_the_same_bits(kind, run, monkeypatch, tmp_path):
    monkeypatch.setattr(_background, "RUN", run)
    scores, masks = drawn(kind)
    for i, (s, m) in enumerate(zip(scores, masks, strict=True)):
        np.save(tmp_path / f"score{i}.npy", s)
        np.save(tmp_path / f"mask{i}.npy", m)
    paths = [[tmp_path / f"{name}{i}.npy" for i in range(len(scores))] for name in ("score", "mask")]
    want = [float.fromhex(x) for x in BEFORE[kind]]
    inputs = {
        "again": lambda: (scores, masks),
        "once": lambda: (iter(scores), iter(masks)),
        "masks again": lambda: (iter(scores), masks),
        "paths": lambda: paths,
    }
    for name, given_as in inputs.items():
        got = [f(*given_as(), limit) for f, limit in ((au_pro, 0.05), (au_pro, 0.3), (au_roc, 0.05), (au_roc, 1.0))]
        assert got == want, name
        assert best_f1(*given_as()) == best_f1(scores, masks), name
    for memory in (0, 200, 1 << 20):
        curves = PixelCurves(memory=memory, folder=tmp_path)
        for s, m in zip(scores, masks, strict=True):
            assert curves.update(torch.from_numpy(s), m) is curves
        assert [curves.au_pro(), curves.au_pro(0.3), curves.au_roc(0.05), curves.au_roc()] == want
        assert curves.best_f1() == best_f1(scores, masks)


def test_curves_may_be_read_between_updates():
    scores, masks = drawn("random")
    curves = PixelCurves(memory=64)
    for n, (s, m) in enumerate(zip(scores, masks, strict=True), 1):
        curves.update(s, m)
        if n > 1:
            assert curves.au_pro(0.3) == au_pro(scores[:n], masks[:n], 0.3)
            assert curves.au_roc() == au_roc(scores[:n], masks[:n])


@pytest.mark.parametrize("kind", BEFORE)
def test_best_f1_equals_the_definition(kind):
    scores, masks = drawn(kind)
    s = np.concatenate([s.astype(np.float64).ravel() for s in scores])
    defect = np.concatenate([m.ravel() for m in masks]) != 0
    levels = np.unique(s)[::-1]
    f1 = [2 * (defect & (s >= t)).sum() / ((s >= t).sum() + defect.sum()) for t in levels]
    assert best_f1(scores, masks) == (max(f1), levels[int(np.argmax(f1))])


def test_scores_of_images():
    scores, labels = [0.1, 0.7, 0.4, 0.9, 0.5], [0, 1, 0, 1, 1]
    pixels = [[np.array([[s]], dtype=np.float64) for s in scores], [np.array([[n]]) for n in labels]]
    for s, n in ((scores, labels), (np.array(scores), np.array(labels, dtype=bool)), (torch.tensor(scores), labels)):
        assert best_f1(s, n) == (1.0, pytest.approx(0.5))
        assert au_roc(s, n) == au_roc(*pixels) == 1.0
    assert best_f1(scores, [1, 0, 0, 1, 1]) == (0.75, 0.1)
    for bad in (labels[:3], [np.zeros((1, 1))] * 5, 3):
        with pytest.raises(ValueError, match="`masks` must have one label per score, 5, got"):
            best_f1(scores, bad)
    with pytest.raises(TypeError, match=r"`scores\[0\]` must be a floating-point"):
        au_pro(torch.tensor(scores), labels)


def test_memory_is_not_that_of_the_maps(monkeypatch):
    """16 MB of maps that are made one by one: an eighth of that is held at most."""
    monkeypatch.setattr(_background, "RUN", 1 << 16)
    mask = np.arange(256 * 256).reshape(256, 256) % 4099 == 0

    class Maps:
        def __iter__(self):
            return (np.linspace(0, 1 + i, mask.size, dtype=np.float32).reshape(mask.shape) for i in range(64))

    au_roc([GOOD], [MASK])  # what numpy imports late
    tracemalloc.start()
    try:
        curves = PixelCurves(regions=False, memory=1 << 18)
        for scores in Maps():
            curves.update(scores, mask)
        assert curves.au_roc(0.1) == au_roc(Maps(), [mask] * 64, 0.1)
        assert tracemalloc.get_traced_memory()[1] < 64 * mask.size * 4 / 8
    finally:
        tracemalloc.stop()


def test_masks_that_change_between_the_passes():
    class Fading:
        def __init__(self):
            self.masks = [GOOD > 5, MASK]

        def __iter__(self):
            return iter([self.masks.pop()])

    with pytest.raises(ValueError, match="the same pixels each time they are iterated, got 9 without defect, then 6"):
        au_roc([GOOD], Fading())


@given(
    seed=st.integers(0, 999),
    levels=st.sampled_from([2, 5, 1000]),
    limit=st.sampled_from([0.05, 0.3, 1.0]),
    density=st.sampled_from([0.05, 0.3, 0.9]),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_definition(seed, levels, limit, density):
    rng = np.random.default_rng(seed)
    scores = [(rng.integers(0, levels, (n, 7)) / levels).astype(np.float32) for n in (6, 9, 5)]
    masks = [(rng.random(s.shape) < density).astype(np.uint8) for s in scores]
    masks[0][0, 0], masks[0][0, 1], scores[0][0, 0], scores[0][0, 1] = 1, 0, 0.5, 0.25
    assert au_pro(scores, masks, limit) == pytest.approx(by_every_threshold(scores, masks, limit, True), abs=1e-12)
    assert au_roc(scores, masks, limit) == pytest.approx(by_every_threshold(scores, masks, limit, False), abs=1e-12)


@pytest.mark.parametrize("name", ["au_pro", "anomaly__aupro"])
def test_golden_of_the_official_evaluation(name):
    """The original keeps false-positive rates in float32."""
    data = np.load(GOLDEN / f"{name}.npz")
    for limit, expected in zip(data["limits"], data["au_pro"], strict=True):
        for convert in (np.asarray, torch.from_numpy):
            assert au_pro(convert(data["scores"]), convert(data["masks"]), float(limit)) == pytest.approx(
                float(expected), abs=1e-6 if name == "au_pro" else 1e-5
            )


def test_golden_of_scikit_learn():
    data = np.load(GOLDEN / "anomaly__aupro.npz")
    assert au_roc(data["scores"], data["masks"]) == pytest.approx(float(data["pixel_auroc"]), abs=1e-7)


def test_half_precision_and_images_of_different_sizes():
    scores = [torch.tensor([[0.9, 0.1], [0.2, 0.3]], dtype=torch.bfloat16), torch.zeros(3, 5)]
    masks = [torch.tensor([[True, False], [False, False]]), torch.zeros(3, 5, dtype=torch.bool)]
    assert au_pro(scores, masks) == 1.0
    assert au_roc(scores, masks) == 1.0


GOOD = np.arange(12, dtype=np.float32).reshape(3, 4)
MASK = (GOOD > 8).astype(np.uint8)


@pytest.mark.parametrize("metric", [au_pro, au_roc])
@pytest.mark.parametrize(
    ("scores", "masks", "limit", "error", "words"),
    [
        ([GOOD], [MASK[:2]], 0.3, ValueError, r"`masks\[0\]` must have the size of its map, \(3, 4\), got \(2, 4\)"),
        ([GOOD], [], 0.3, ValueError, "must be as many, at least one, got 1 and 0"),
        ([GOOD], [MASK * 0], 0.3, ValueError, "`masks` have no defect pixel"),
        ([GOOD], [MASK * 0 + 1], 0.3, ValueError, "no pixel without defect"),
        ([GOOD * 0], [MASK], 0.3, ValueError, "`scores` are all equal, 0.0"),
        ([GOOD * np.float32(np.nan)], [MASK], 0.3, ValueError, r"`scores\[0\]` has 12 values that are not finite"),
        ([MASK], [MASK], 0.3, TypeError, r"`scores\[0\]` must be a floating-point"),
        ([GOOD], [MASK], 0, ValueError, r"`limit` must be in \(0, 1\], got 0"),
    ],
)
def test_bad_input(metric, scores, masks, limit, error, words):
    with pytest.raises(error, match=words):
        metric(scores, masks, limit)


def test_a_disk_that_fails_loses_nothing(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    scores, mask = generator.random((9, 9)), generator.random((9, 9)) < 0.3
    with pytest.raises(OSError, match="nowhere"):
        PixelCurves(folder=tmp_path / "nowhere")
    curves = PixelCurves(memory=0, folder=tmp_path).update(scores, mask)
    with monkeypatch.context() as patch:
        patch.setattr(_background.tempfile, "TemporaryFile", full)
        with pytest.raises(OSError, match="full"):
            curves.au_roc()
    assert curves.au_roc() == au_roc([scores], [mask])


def full(**_):
    raise OSError("the disk is full")


@pytest.mark.parametrize("measure", [au_pro, au_roc, best_f1])
def test_what_is_no_list_of_maps(measure, tmp_path):
    with pytest.raises(TypeError, match="`scores` must be several maps"):
        measure("maps.npy", "masks.npy")
    (tmp_path / "x.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"`scores\[0\]` must be a .npy file with an array, .*x.npy is not"):
        measure([tmp_path / "x.npy"], [np.ones((2, 2))])
    with pytest.raises(ValueError, match=r"`masks\[0\]` has NaN"):
        measure([np.random.rand(2, 2)], [np.array([[0, 1], [np.nan, 0]])])
    with pytest.raises(TypeError, match="`regions`"):
        PixelCurves(regions="no")
