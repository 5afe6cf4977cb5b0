"""Fusion rules, and any choice of a detector's layers and scales from one encoding, against their plain statements."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from test_anomaly_detector import images, model
from util import assert_within_budget

from murf_fast import reference
from murf_fast.anomaly import (
    PRESETS,
    MultiResolutionDetector,
    ScoringRules,
    Subset,
    _searching,
    subset_scores,
    subsets_of,
)
from murf_fast.anomaly.subsets import ALL

LAYERS, SCALES = (0, 2), (0.5, 1.0)
OPTIONS = {"layers": LAYERS, "scales": SCALES, "pixels": None}


@pytest.fixture(scope="module")
def fitted():
    return MultiResolutionDetector(model(), **OPTIONS).fit(images(3))


def with_rules(detector, rules):
    """The banks of a fitted detector under other rules."""
    other = MultiResolutionDetector(detector.encoder, pixels=None, rules=rules)
    other.banks_, other.images_ = detector.banks_, detector.images_
    return other


def distances(detector, image, k, dtype, metric="l2"):
    """(k, h, w) of every bank: the distances of the patches of an image to their nearest rows."""
    with torch.no_grad():
        maps = detector.encoder(image[None]).maps
    for rows, bank in zip(maps, detector.banks_, strict=True):
        query = rows[0].flatten(1).T
        found = reference.nearest_distance(query.to(dtype), bank.to(dtype), k, metric)[0]
        yield found.T.reshape(k, *rows.shape[2:])


def upsampled(maps, size=(32, 40)):
    return torch.stack([F.interpolate(m[None, None], size, mode="bilinear")[0, 0] for m in maps])


IMAGE = images(1, seed=5)[0]


@pytest.mark.parametrize(
    ("rules", "pick", "fuse"),
    [
        (ScoringRules(fusion="max"), lambda d: d[0], lambda m: m.max(0).values),
        (ScoringRules(k=3, neighbors="kth"), lambda d: d[2], lambda m: m.mean(0)),
        (ScoringRules(k=3), lambda d: d.mean(0), lambda m: m.mean(0)),
        (
            ScoringRules(scale_weights=(1, 3), layer_weights=(2, 0.5)),
            lambda d: d[0],
            lambda m: (2 * m[0] + 0.5 * m[1] + 6 * m[2] + 1.5 * m[3]) / 10,
        ),
        (ScoringRules(layer_weights=(0, 1)), lambda d: d[0], lambda m: (m[1] + m[3]) / 2),
        (PRESETS["superad"], lambda d: d[0], lambda m: m.mean(0)),
    ],
    ids=["max", "kth", "mean of k", "weights", "one layer by its weight", "superad"],
)
def test_rules_are_what_they_say(rules, pick, fuse, fitted):
    found = with_rules(fitted, rules).score(IMAGE)
    oracle, same_dtype = (
        fuse(upsampled([pick(d) for d in distances(fitted, IMAGE, rules.k, dtype, rules.metric)]))
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget(found.map, oracle, same_dtype)


def test_the_image_s_score_is_of_the_fused_patches(fitted):
    """On the finest grid that counts."""
    for rules, fuse in ((ScoringRules(fusion="max"), lambda m: m.max(0).values), (ScoringRules(), lambda m: m.mean(0))):
        oracle, same_dtype = (
            fuse(upsampled([d[0] for d in distances(fitted, IMAGE, 1, dtype)], (8, 10))).max()
            for dtype in (torch.float64, torch.float32)
        )
        assert_within_budget(torch.tensor(with_rules(fitted, rules).score(IMAGE).score), oracle, same_dtype)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fusion": "median"}, "`fusion` must be one of"),
        ({"neighbors": "all"}, "`neighbors` must be one of"),
        ({"scale_weights": (1, -1)}, "`scale_weights` must be 0 or more, and not all 0"),
        ({"layer_weights": (0.0, 0.0)}, "`layer_weights` must be 0 or more, and not all 0"),
        ({"layer_weights": ()}, "`layer_weights` must be 0 or more, and not all 0"),
        ({"layer_weights": (float("nan"), 1)}, "`layer_weights` must be finite"),
        ({"scale_weights": (1, 1), "fusion": "max"}, '`scale_weights` must be None for fusion="max"'),
    ],
)
def test_rules_that_are_none(options, words):
    with pytest.raises(ValueError, match=words):
        ScoringRules(**options)


def test_weights_are_as_many_as_scales_and_layers(fitted):
    with pytest.raises(ValueError, match=r"`rules.scale_weights` must be 2 numbers, .* got \(1.0, 2.0, 3.0\)"):
        with_rules(fitted, ScoringRules(scale_weights=(1, 2, 3)))


def test_rules_come_back_from_disk(fitted, tmp_path):
    rules = ScoringRules(k=2, neighbors="kth", scale_weights=[1, 3])
    with_rules(fitted, rules).save(tmp_path)
    assert json.loads((tmp_path / "detector.json").read_text())["rules"]["scale_weights"] == [1.0, 3.0]
    assert MultiResolutionDetector.load(tmp_path, fitted.encoder).rules == rules


@pytest.mark.parametrize("rules", ["mrf-ad", "mrf-max", "patchcore"])
def test_a_subset_is_a_detector_with_these_layers_and_scales(rules, fitted):
    detector = with_rules(fitted, rules)
    found = subset_scores(detector, IMAGE, "all")
    assert len(found) == 3 * 3
    for name, subset in subsets_of(detector, "all").items():
        alone = [
            MultiResolutionDetector(vit, subset.layers, subset.scales, pixels=None, rules=rules)
            .fit(images(3))
            .score(IMAGE)
            for vit in (model().double(), model())
        ]
        assert_within_budget(found[name].map, *(a.map for a in alone))
        assert_within_budget(torch.tensor(found[name].score), *(torch.tensor(a.score) for a in alone))
    whole = detector.score(IMAGE)
    assert torch.equal(found[ALL].map, whole.map)
    assert found[ALL].score == whole.score


def test_kinds_of_subsets(fitted):
    assert list(subsets_of(fitted, "none")) == [ALL]
    assert list(subsets_of(fitted, "scales")) == ["all - 0.5", "all - 1", ALL]
    assert list(subsets_of(fitted, "layers")) == ["0 - all", "2 - all", ALL]
    each = subsets_of(fitted, "scales-x-layers")
    assert list(each)[4:] == ["0 - 0.5", "0 - 1", "2 - 0.5", "2 - 1", ALL]
    assert each["2 - 0.5"] == Subset((2,), (0.5,))
    with pytest.raises(ValueError, match="`kind` must be one of"):
        subsets_of(fitted, "some")


def test_one_encoding_and_one_search_per_bank(fitted, monkeypatch):
    encoded, searched = [], []
    encode, search = type(fitted.encoder).forward, _searching.search
    monkeypatch.setattr(type(fitted.encoder), "forward", lambda self, x: encoded.append(1) or encode(self, x))
    monkeypatch.setattr(_searching, "search", lambda bank, *how: searched.append(bank) or search(bank, *how))
    subset_scores(fitted, IMAGE, "all")
    assert encoded == [1]
    assert searched == fitted._searchable()


def test_subsets_that_are_none(fitted):
    for subset in (Subset((1,), (0.5,)), Subset((0,), (0.7,)), Subset((), (0.5,))):
        with pytest.raises(ValueError, match="`subsets` must have"):
            subset_scores(fitted, IMAGE, {"mine": subset})
    with pytest.raises(ValueError, match="call fit"):
        subset_scores(MultiResolutionDetector(model(), **OPTIONS), IMAGE, "scales")


@pytest.mark.parametrize("subsets", [{"x": ((0,), 1.0)}, {"x": (0, (1.0,))}, {"x": (0,)}, [((0,), (1.0,))], 3])
def test_what_is_no_subset_at_all(subsets, fitted):
    with pytest.raises(TypeError, match="`subsets` must"):
        subset_scores(fitted, images(1)[0], subsets)
