"""Encodings beside searches. Without a GPU streams are stand-ins, which note who waits for what; all runs in order."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from test_anomaly_detector import OPTIONS, images, model
from torch import Tensor

from murf_fast.anomaly import MultiResolutionDetector, _overlap
from murf_fast.anomaly._patches import PatchEncoder


@pytest.fixture(scope="module")
def fitted():
    return MultiResolutionDetector(model(), **OPTIONS).fit(images(2), held_out=0)


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.events += 1
        self.log.append(f"{self.name} records {self.events - 1}")
        return str(self.events - 1)


@pytest.fixture
def log(monkeypatch):
    """What was done on which stream, as if the CPU had some. What crosses must have been lent to its reader."""
    found, lent, current = [], set(), []
    here, side = Stream("here", found), Stream("side", found)

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(_overlap, "has_streams", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: lent.add((id(self), stream.name)))
    encode, searched = PatchEncoder.encode, MultiResolutionDetector._scored_pair

    def noted_encode(self, group):
        found.append(f"encode on {current[-1].name if current else 'here'}")
        return encode(self, group)

    def noted_search(self, looked, of_image):
        assert not current
        for patches in of_image:
            assert patches.rows is None or (id(patches.rows), "here") in lent
        for tensor in (looked.pixels, *looked.kept):
            assert tensor is None or (id(tensor), "side") in lent
        found.append("search")
        return searched(self, looked, of_image)

    monkeypatch.setattr(PatchEncoder, "encode", noted_encode)
    monkeypatch.setattr(MultiResolutionDetector, "_scored_pair", noted_search)
    return found


def begun(i: int) -> list[str]:
    return ["side waits for here", "encode on side", f"side records {i}"]


def finished(i: int) -> list[str]:
    return [f"here waits for {i}", "search"]


END = ["here waits for side"]


def test_the_next_image_is_encoded_before_this_one_is_searched(fitted, log):
    several = images(3, seed=7)
    found = list(fitted.score_many(several, batch=1))
    assert log == [*begun(0), *begun(1), *finished(0), *begun(2), *finished(1), *finished(2), *END]
    for image, anomaly in zip(several, found, strict=True):
        single = fitted.score(image)
        assert torch.equal(anomaly.map, single.map)
        assert anomaly.score == single.score


def test_images_that_share_a_pass(fitted, log):
    assert len(list(fitted.score_many(images(3), batch=2))) == 3
    assert log == [*begun(0), *begun(1), *finished(0), "search", *finished(1), *END]


def test_foreground(log):
    """Numbers of patches cross, too; an image without any is not encoded."""

    def left(image):
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        mask[:, : 20 if float(image.float().mean()) > 1 else 0] = True
        return mask

    fitted = MultiResolutionDetector(model(), **OPTIONS, foreground=left).fit(images(2), held_out=0)
    several = [*images(1, seed=3), torch.zeros(3, 32, 40, dtype=torch.uint8), *images(1, seed=4)]
    found = list(fitted.score_many(several, batch=1))
    assert log.count("search") == 3
    for image, anomaly in zip(several, found, strict=True):
        assert torch.equal(anomaly.map, fitted.score(image).map)
    assert found[1].score == 0


def test_an_iterator_of_images_is_not_waited_for(fitted, log):
    """As those of a camera: the score of one comes before the next is asked for."""
    several = images(2)

    def source():
        for i, image in enumerate(several):
            log.append(f"asked for {i}")
            yield image

    found = fitted.score_many(source(), batch=1)
    next(found)
    assert log == ["asked for 0", *begun(0), *finished(0)]
    next(found)
    assert next(found, None) is None
    assert log[-6:] == [*begun(1), *finished(1), *END]


def test_errors_come_when_their_turn_does(fitted, log, monkeypatch):
    several = images(3)
    look_at = PatchEncoder.look_at

    def failing(self, image, name):
        if name == "`images[2]`":
            raise ValueError("broken")
        return look_at(self, image, name)

    monkeypatch.setattr(PatchEncoder, "look_at", failing)
    found = fitted.score_many(several, batch=1)
    assert len([next(found) for _ in range(2)]) == 2
    with pytest.raises(ValueError, match="broken"):
        next(found)
    assert log[-1:] == END


def test_who_stops_early_leaves_nothing_running(fitted, log):
    found = fitted.score_many(images(3), batch=1)
    next(found)
    found.close()
    assert log == [*begun(0), *begun(1), *finished(0), *END]


def test_no_more_than_two_groups_are_alive(fitted, log, monkeypatch):
    encode, made, most = PatchEncoder.encode, [], []

    def counted(self, group):
        gc.collect()
        most.append(sum(any(rows() is not None for rows in of_group) for of_group in made) + 1)
        result = encode(self, group)
        made.append([weakref.ref(p.rows) for of_image in result for p in of_image])
        return result

    monkeypatch.setattr(PatchEncoder, "encode", counted)
    for _ in fitted.score_many(images(6), batch=2):
        pass
    assert most == [1, 2, 2]


@pytest.mark.gpu_quick
def test_scores_on_a_gpu_are_those_of_single_images(gpu):
    """Bit by bit, however often: a search that began too early, or memory that was given away, would be seen."""
    several = [image.to(gpu) if i % 2 else image for i, image in enumerate(images(9, seed=3, size=(96, 88)))]
    fitted = MultiResolutionDetector(model().to(gpu), **OPTIONS).fit(images(2, size=(96, 88)), held_out=0)
    single = [fitted.score(image) for image in several]
    for _ in range(5):
        found = list(fitted.score_many(several, batch=1))
        for anomaly, expected in zip(found, single, strict=True):
            assert torch.equal(anomaly.map, expected.map)
            assert anomaly.score == expected.score
