from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from murf_fast.anomaly import au_pro, au_roc

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
