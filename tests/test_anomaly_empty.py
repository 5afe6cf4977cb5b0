"""Images and objects smaller than a patch of a scale, and what is not an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_anomaly_detector import images, model

from murf_fast.anomaly import MultiResolutionDetector, ScoringRules
from murf_fast.nn import MultiResolutionEncoder

VIT = model()
SCALES = (0.25, 1.0)


def detector(**options):
    return MultiResolutionDetector(VIT, **{"layers": (0, 2), "scales": SCALES, "pixels": None, **options})


def box(top, left, bottom, right):
    def foreground(image):
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        mask[top:bottom, left:right] = True
        return mask

    return foreground


def count_encodings(monkeypatch):
    calls = []
    forward = MultiResolutionEncoder.forward
    monkeypatch.setattr(MultiResolutionEncoder, "forward", lambda self, x: calls.append(1) or forward(self, x))
    return calls


@given(height=st.integers(1, 30), width=st.integers(1, 30), scale=st.floats(0.02, 1.5))
@settings(max_examples=12, deadline=None)
def test_images_of_any_size_at_any_scale(height, width, scale):
    g = torch.Generator().manual_seed(height * width)
    train, test = torch.rand(2, 3, height, width, generator=g)
    found = detector(scales=(scale, 1.0)).fit([train]).score(test)
    assert found.map.shape == (height, width)
    assert bool(found.map.isfinite().all())
    assert found.score > 0
    strict = detector(scales=(scale, 1.0), on_empty="raise")
    sides = [int(n * s) for n in (height, width) for s in (scale, 1.0)]
    if min(sides) >= 5:  # scales times sizes may be rounded
        assert torch.equal(strict.fit([train]).score(test).map, found.map)
    elif min(sides) < 3:
        with pytest.raises(
            ValueError, match=rf"`images\[0\]` of {height} x {width} pixels is smaller than a patch of 4"
        ):
            strict.fit([train])


def test_an_enlarged_image_is_one_patch():
    bank = detector(scales=(0.05,)).fit([torch.rand(3, 24, 40)]).banks_[0]
    assert len(bank) == 1
    assert [len(b) for b in detector(scales=(0.1, 0.5)).fit([torch.rand(3, 24, 80)]).banks_] == [2, 2, 30, 30]


def test_a_small_image_is_found_before_any_work(monkeypatch):
    calls = count_encodings(monkeypatch)
    train = [*images(2), torch.rand(3, 40, 12)]
    words = r"`images\[2\]` of 40 x 12 pixels is smaller than a patch of 4 at scale 0.25"
    with pytest.raises(ValueError, match=words):
        detector(on_empty="raise").fit(train)
    # An encoder of one's own has its own rule.
    own = MultiResolutionEncoder(VIT, scales=SCALES, layers=(0, 2), norm=False)
    with pytest.raises(ValueError, match=words):
        MultiResolutionDetector(own, pixels=None).fit(train)
    assert calls == []


@pytest.mark.parametrize("options", [{}, {"index": "coreset"}, {"rules": "patchcore"}, {"rules": "anomaly-dino"}])
def test_objects_smaller_than_a_coarse_patch(options, tmp_path):
    small = box(8, 8, 14, 14)  # a patch at scale 0.25 is 16 pixels
    fine = detector(scales=(1.0,), foreground=small, **options).fit(images(2))
    image = images(1, seed=5)[0]
    both = detector(foreground=small, **options)
    with pytest.warns(UserWarning, match=r"covers no patch of any image at scale 0\.25: left out"):
        both.fit(images(2))
    expected, found = fine.score(image), both.score(image)
    assert [len(b) > 0 for b in both.banks_] == [False, False, True, True]
    torch.testing.assert_close(found.map, expected.map)
    assert found.score == pytest.approx(expected.score, rel=1e-5)
    coarse, alone, _ = both.score_each_scale(image)
    assert (coarse.score, float(coarse.map.abs().max())) == (0, 0)
    torch.testing.assert_close(alone.map, found.map)
    both.save(tmp_path)
    loaded = MultiResolutionDetector.load(tmp_path, VIT, foreground=small)
    assert torch.equal(loaded.score(image).map, found.map)


def test_a_scale_is_left_out_where_one_image_has_no_patch():
    whole, small = box(0, 0, 32, 40), box(8, 8, 14, 14)
    subject = detector(foreground=whole).fit(images(2))
    image = images(1, seed=5)[0]
    subject.foreground = small
    fine = subject.score_each_scale(image)[1]
    assert torch.equal(subject.score(image).map, fine.map)
    assert subject.score(image).score == fine.score > 0
    subject.on_empty = "raise"
    with pytest.raises(
        ValueError, match=r"`foreground` covers no patch of the image at scale 0\.25, where it has \(2, 2\)"
    ):
        subject.score(image)


def test_no_foreground_at_all(monkeypatch):
    nothing = box(0, 0, 0, 0)
    subject = detector(foreground=box(0, 0, 32, 40)).fit(images(2))
    calls = count_encodings(monkeypatch)
    subject.foreground = nothing
    found = subject.score(images(1)[0])
    assert (found.score, float(found.map.abs().max()), found.map.shape) == (0, 0, (32, 40))
    with pytest.raises(ValueError, match="covers no patch of any image at any scale"):
        detector(foreground=nothing).fit(images(2))
    with pytest.raises(ValueError, match=r"covers no patch of `images\[0\]` at scale 0\.25"):
        detector(foreground=nothing, on_empty="raise").fit(images(2))
    assert calls == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ([], "must be a tensor .* or the path of an image file, got list"),
        (None, "got NoneType"),
        ([torch.rand(3, 8, 8)], "got list"),
        (b"image.png", "got bytes"),
        (3, "got int"),
        (torch.rand(8, 8), r"must be a tensor \(3, H, W\), got shape \(8, 8\)"),
        (torch.rand(2, 3, 8, 8), r"got shape \(2, 3, 8, 8\)"),
        (torch.rand(3, 0, 8), r"got shape \(3, 0, 8\)"),
        (torch.ones(3, 8, 8, dtype=torch.int64), "must be uint8 or floating point, got torch.int64"),
        (np.zeros((8, 8, 4), np.uint8), r"must be \(H, W, 3\)"),
        (np.zeros((8, 8, 3), np.uint16), "got uint16"),
        (np.zeros((8, 8, 3), bool), "got bool"),
        (np.zeros((8, 8, 3), object), "got object"),
    ],
)
def test_what_is_no_image(image, words, monkeypatch):
    calls = count_encodings(monkeypatch)
    subject = detector()
    with pytest.raises((TypeError, ValueError), match=words):
        subject.fit([*images(1), image])
    assert calls == []
    with pytest.raises(ValueError, match=r"fit\(\) or load\(\) first"):
        subject.score(image)
    subject.fit(images(1))
    with pytest.raises((TypeError, ValueError), match=words):
        subject.score(image)


def test_one_image_is_not_several(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    pixels = images(1)[0].permute(1, 2, 0).numpy()
    pil.fromarray(pixels).save(path)
    for one in (images(1)[0], pixels, pil.fromarray(pixels), path, str(path), None, 3):
        with pytest.raises(TypeError, match="`images` must be several images, such as a list or a generator"):
            detector().fit(one)


def test_kinds_of_several_images(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    train = images(2)
    expected = detector().fit(train).banks_
    pictures = [pil.fromarray(x.permute(1, 2, 0).numpy()) for x in train]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    arrays = np.stack([np.asarray(p) for p in pictures])
    for several in (torch.stack(train), arrays, pictures, paths, map(str, paths), (x for x in train), tuple(train)):
        for a, e in zip(detector().fit(several).banks_, expected, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_empty": "ignore"}, "`on_empty` must be one of"),
        ({"scales": ()}, "`scales` must be one or more positive numbers"),
        ({"scales": (1.0, float("inf"))}, "`scales` must be"),
        ({"scales": (float("nan"),)}, "`scales` must be"),
        ({"pixels": float("inf")}, "`pixels` must be positive"),
        ({"pixels": float("nan")}, "`pixels` must be positive"),
        ({"precision": "int8"}, "`precision` must be one of"),
        ({"rules": {}}, "`rules` must be one of"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        detector(**options)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "lanczos"}, "`mode` must be one of"),
        ({"border": "zero"}, "`border` must be one of"),
        ({"k": 0}, "`k` must be at least 1"),
        ({"k": 1.5}, "`k` must be an integer"),
        ({"sigma": -1}, "`sigma` must be"),
        ({"sigma": float("nan")}, "`sigma` must be"),
        ({"sigma": True}, "`sigma` must be"),
    ],
)
def test_bad_rules(fields, words):
    with pytest.raises((TypeError, ValueError), match=words):
        ScoringRules(**fields)
