"""Images and objects smaller than a patch of a scale, and what is not an image."""

from __future__ import annotations

import decimal
import fractions

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
NO_NUMBERS = (True, np.True_, "1", b"1", 1j, [None], ["1"], {}, torch.tensor(1.0))


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
    with pytest.warns(UserWarning, match=r"covers no patch of any image at scale 0\.25: left out") as told:
        both.fit(images(2))
    assert told[0].filename == __file__  # whose call it was
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
        (torch.rand(8), r"must be a tensor \(3, H, W\), .* got shape \(8,\)"),
        (torch.rand(2, 3, 8, 8), r"got shape \(2, 3, 8, 8\)"),
        (torch.rand(3, 0, 8), r"got shape \(3, 0, 8\)"),
        (torch.ones(3, 8, 8, dtype=torch.int64), "must be uint8, uint16 or floating point, got torch.int64"),
        (np.zeros((8, 8, 5), np.uint8), r"must be \(H, W, 3\)"),
        (np.zeros((8, 8, 3), np.int32), "got int32"),
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


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (lambda x: 255 * x, r"must be in 0\.\.1, .* divide them by 255"),
        (lambda x: torch.where(x > 0.9, torch.nan, x), "must be finite"),
        (lambda x: torch.where(x > 0.9, torch.inf, x), "must be finite"),
    ],
)
def test_pixels_that_no_image_has(kind, pixels, words, monkeypatch):
    calls = count_encodings(monkeypatch)
    good = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(0))
    bad = pixels(good)
    if kind is np.ndarray:
        bad = bad.permute(1, 2, 0).numpy()
    subject = detector()
    with pytest.raises(ValueError, match=rf"`images\[1\]` {words}"):
        subject.fit([good, bad])
    assert calls == []
    with pytest.raises(ValueError, match=rf"`images\[1\]` {words}"):
        subject.fit(iter([good, bad]))
    subject.fit([good])
    calls.clear()
    with pytest.raises(ValueError, match=words):
        subject.score(bad)
    assert calls == []


def test_more_neighbours_than_rows(monkeypatch, tmp_path):
    """4 rows of two images at the coarse scale."""
    words = r"`rules\.k` must be at most the 4 rows of a bank of scale 0\.25, got 5"
    rules = ScoringRules(k=5)
    calls = count_encodings(monkeypatch)
    small = [torch.rand(3, 16, 32) for _ in range(2)]
    with pytest.raises(ValueError, match=words):
        detector(rules=rules).fit(small)
    assert calls == []
    with pytest.raises(ValueError, match=words):
        detector(rules=rules).fit(iter(small))
    with pytest.raises(ValueError, match=r"`rules\.k` must be at most the 1 rows of a bank of scale 0\.25, got 2"):
        detector(rules=ScoringRules(k=2), index="coreset", coreset=0.1).fit(small)
    subject = detector(rules=ScoringRules(k=4)).fit(small)
    subject.score(small[0])
    subject.rules = rules
    subject.save(tmp_path)
    with pytest.raises(ValueError, match=words):
        MultiResolutionDetector.load(tmp_path, VIT)


@pytest.mark.parametrize("mask", [None, "mask", np.zeros((32, 40), object), object()])
def test_what_is_no_mask(mask):
    with pytest.raises(TypeError, match="`foreground` must give a mask"):
        detector(foreground=lambda image: mask).fit(images(1))


def test_numbers_of_every_kind(tmp_path):
    """Options are numbers as NumPy and fractions have them, and banks with them are saved and loaded."""
    kinds = (np.float32, np.float64, np.array, fractions.Fraction, decimal.Decimal)
    photos, found = images(2), []
    for i, kind in enumerate((float, *kinds)):
        options = {"pixels": kind(700), "coreset": kind(0.5), "index": "coreset", "scales": (np.float32(0.5), 1)}
        subject = detector(**options, rules=ScoringRules(k=np.int64(2), sigma=kind(1.5))).fit(photos)
        subject.save(tmp_path / str(i))
        loaded = MultiResolutionDetector.load(tmp_path / str(i), VIT)
        found.append(subject.score(photos[0]).map)
        assert torch.equal(loaded.score(photos[0]).map, found[0])
        assert torch.equal(found[-1], found[0])


def test_folders(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    subject = detector().fit(images(1))
    for call in (subject.save, lambda f: subject.fit(images(1), folder=f), lambda f: subject.load(f, VIT)):
        with pytest.raises(ValueError, match=r"`folder` is .*file, and it is not a folder"):
            call(file)
        with pytest.raises(TypeError, match="`folder` must be a path, got 3"):
            call(3)
    with pytest.raises(TypeError, match="`progress` must be callable"):
        subject.fit(images(1), progress=3)


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
        ({"scales": ()}, "`scales` must hold at least one"),
        ({"scales": (1.0, float("inf"))}, "`scales` must be"),
        ({"scales": (float("nan"),)}, "`scales` must be"),
        ({"pixels": float("inf")}, "`pixels` must be finite"),
        ({"pixels": float("nan")}, "`pixels` must be finite"),
        ({"precision": "int8"}, "`precision` must be one of"),
        ({"rules": {}}, "`rules` must be one of"),
        ({"rules": "patchcore", "index": "ivf"}, '`rules` with "reweighted" scores need index="exact"'),
        *(({name: value}, f"`{name}` must") for name in ("pixels", "coreset", "scales") for value in NO_NUMBERS),
    ],
)
def test_bad_options(options, words):
    with pytest.raises((TypeError, ValueError), match=rf"MultiResolutionDetector: {words}"):
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
        *(({name: value}, f"`{name}` must be") for name in ("k", "sigma") for value in (*NO_NUMBERS, None)),
        *(({name: None}, f"`{name}` must be one of") for name in ("metric", "mode", "border", "image_score")),
    ],
)
def test_bad_rules(fields, words):
    with pytest.raises((TypeError, ValueError), match=words):
        ScoringRules(**fields)
