from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import murf_fast
from murf_fast.nn import SegmentationHead, depth_scores, normal_scores, segmentation_scores


def test_overlaps_of_a_matrix_by_hand():
    counts = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 4, 0, 0]])
    scores = segmentation_scores(counts)
    expected = torch.tensor([6 / 9, 3 / 10, torch.nan, 0.0], dtype=torch.float64)
    torch.testing.assert_close(scores.iou, expected, equal_nan=True, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        scores.accuracy, torch.tensor([6 / 8, 3 / 4, torch.nan, 0.0]).double(), equal_nan=True, rtol=0, atol=1e-15
    )
    assert float(scores.mean_iou) == pytest.approx((6 / 9 + 3 / 10) / 3, abs=1e-15)
    assert float(scores.mean_accuracy) == pytest.approx(0.5, abs=1e-15)
    assert float(scores.pixel_accuracy) == pytest.approx(9 / 16, abs=1e-15)


def test_a_class_that_is_only_predicted_counts_in_the_overlap():
    scores = segmentation_scores(torch.tensor([[3, 1], [0, 0]]))
    assert scores.iou.tolist() == [0.75, 0.0]
    assert math.isnan(scores.accuracy[1])


def test_no_pixel_at_all_is_nan():
    scores = segmentation_scores(torch.zeros(3, 3, dtype=torch.int64))
    assert all(bool(s.isnan().all()) for s in scores)


@pytest.mark.parametrize(
    ("counts", "error", "words"),
    [
        (torch.zeros(3, 3), TypeError, "integer tensor"),
        (torch.zeros(3, 2).long(), ValueError, r"\(K, K\)"),
        ([[1]], TypeError, "list"),
        (-torch.eye(3).long(), ValueError, "negative"),
        (torch.eye(3).bool(), ValueError, "bools"),
    ],
)
def test_what_is_no_matrix_of_counts(counts, error, words):
    with pytest.raises(error, match=words):
        segmentation_scores(counts)


@pytest.mark.parametrize("grid", ["largest", "first", "image"])
def test_confusion_of_a_head_is_that_of_its_labels(grid):
    torch.manual_seed(0)
    head = SegmentationHead(8, 5, grid=grid).eval()
    maps = [torch.randn(2, 4, 3, 4), torch.randn(2, 4, 6, 5)]
    target = torch.randint(0, 6, (2, 19, 23))
    counts = head.confusion(maps, target, ignore_index=5)
    labels, used = head.predict(maps, (19, 23)).long(), target != 5
    expected = torch.bincount(5 * target[used] + labels[used], minlength=25).view(5, 5)
    assert torch.equal(counts, expected)
    assert not counts.requires_grad


def errors_of(d: np.ndarray, t: np.ndarray) -> list[float]:
    """The scores, pixel by pixel."""
    ratio = np.maximum(d / t, t / d)
    logs = np.log(d) - np.log(t)
    return [
        math.sqrt(np.mean((d - t) ** 2)),
        np.mean(np.abs(d - t) / t),
        np.mean((d - t) ** 2 / t),
        math.sqrt(np.mean(logs**2)),
        np.mean(np.abs(np.log10(d) - np.log10(t))),
        100 * math.sqrt(np.mean(logs**2) - np.mean(logs) ** 2),
        np.mean(ratio < 1.25),
        np.mean(ratio < 1.25**2),
        np.mean(ratio < 1.25**3),
    ]


def test_errors_of_depth():
    generator = torch.Generator().manual_seed(0)
    target = 12 * torch.rand(3, 11, 13, generator=generator)
    depth = target * (0.6 + 0.8 * torch.rand(target.shape, generator=generator))
    target[0, :3], target[1, 2, 2], target[2, 0] = 0, torch.inf, torch.nan
    mask = torch.rand(target.shape, generator=generator) < 0.7
    scores = depth_scores(depth, target, mask=mask, max_depth=10)
    for i in range(3):
        t, d = target[i].double().numpy(), depth[i].double().numpy()
        valid = mask[i].numpy() & (t > 1e-3) & (t <= 10)
        expected = errors_of(d[valid].clip(1e-3, 10), t[valid])
        np.testing.assert_allclose([float(s[i]) for s in scores], expected, rtol=1e-10)
    assert scores.rmse.shape == (3,)
    assert scores.rmse.dtype == torch.float64


def test_the_largest_depth_counts():
    target = torch.tensor([[[1.0, 2.0, 10.0, 10.5]]])
    depth = target + torch.tensor([[[0.0, 0.0, -3.0, 7.0]]])
    assert float(depth_scores(depth, target, max_depth=10).rmse) == pytest.approx(math.sqrt(3), abs=1e-12)


def test_right_depth_has_no_error_and_none_is_nan():
    target = torch.rand(2, 4, 5) + 0.1
    target[1] = 0
    scores = depth_scores(target.clamp(min=0.05), target)
    assert [float(s[0]) for s in scores] == pytest.approx([0, 0, 0, 0, 0, 0, 1, 1, 1], abs=1e-9)
    assert all(math.isnan(s[1]) for s in scores)
    assert all(s.shape == (0,) for s in depth_scores(target[:0], target[:0]))


def test_depth_of_the_fused_expectation():
    bins, values = [torch.randn(2, 16, 5, 6)], torch.linspace(0.1, 8, 16)
    depth = murf_fast.upsample_expectation(bins, (20, 30), values)
    full = torch.nn.functional.interpolate(bins[0].double(), (20, 30), mode="bilinear")
    plain = (full.softmax(1) * values.double()[:, None, None]).sum(1)
    target = 8 * torch.rand(2, 20, 30) + 0.01
    for ours, theirs in zip(depth_scores(depth, target), depth_scores(plain, target), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"depth": torch.ones(1, 3, 4).long()}, TypeError, "`depth`"),
        ({"depth": torch.ones(1, 3, 5)}, ValueError, "shape of `target`"),
        ({"mask": torch.ones(1, 3, 4)}, TypeError, "`mask` must be a tensor of bools"),
        ({"min_depth": 0}, ValueError, "`min_depth`"),
        ({"max_depth": 1e-4}, ValueError, "`min_depth` must be above 0 and below `max_depth`"),
    ],
)
def test_bad_depth(change, error, words):
    with pytest.raises(error, match=words):
        depth_scores(**{"depth": torch.ones(1, 3, 4), "target": torch.ones(1, 3, 4), **change})


def rotated(target: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Every normal by its angle, around an axis at right angles to it."""
    other = torch.tensor([0.3, -0.8, 0.5]).double().expand_as(target)
    axis = torch.nn.functional.normalize(torch.linalg.cross(target, other), dim=-1)
    angle = degrees.double().deg2rad()[..., None]
    return target * angle.cos() + torch.linalg.cross(axis, target) * angle.sin()


def test_angles_of_normals():
    generator = torch.Generator().manual_seed(1)
    target = torch.nn.functional.normalize(torch.randn(2, 9, 7, 3, generator=generator).double(), dim=-1)
    degrees = 60 * torch.rand(2, 9, 7, generator=generator)
    degrees[0, 0, :3] = torch.tensor([1e-6, 179.0, 11.25 - 1e-6])
    lengths = 0.1 + torch.rand(2, 9, 7, 1, generator=generator)
    found = rotated(target, degrees) * lengths
    target[1, 3] = 0
    mask = torch.rand(2, 9, 7, generator=generator) < 0.8
    scores = normal_scores(found.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2), mask=mask)
    for i in range(2):
        angles = degrees[i][mask[i] & (target[i].norm(dim=-1) > 0)].double()
        assert float(scores.mean[i]) == pytest.approx(float(angles.mean()), rel=1e-9)
        assert float(scores.median[i]) == pytest.approx(float(angles.median()), rel=1e-9)
        assert float(scores.rmse[i]) == pytest.approx(float(angles.square().mean().sqrt()), rel=1e-9)
        assert scores.within[i].tolist() == [float((angles < a).double().mean()) for a in (11.25, 22.5, 30.0)]


def test_a_small_angle_keeps_its_digits():
    target = torch.tensor([0.0, 0.6, 0.8]).view(1, 3, 1, 1)
    found = rotated(target.double().view(1, 1, 1, 3), torch.tensor([[[1e-5]]])).permute(0, 3, 1, 2)
    assert float(normal_scores(found, target.double()).mean) == pytest.approx(1e-5, rel=1e-6)


def test_no_normal_is_nan():
    scores = normal_scores(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
    assert all(bool(s.isnan().all()) for s in scores)
    assert scores.within.shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normals": torch.ones(1, 4, 2, 2)}, r"\(B, 3, H, W\)"),
        ({"target": torch.ones(1, 3, 2, 3)}, r"both of one shape, got \(1, 3, 2, 3\) beside \(1, 3, 2, 2\)"),
        ({"mask": torch.ones(1, 3, 2).bool()}, "`mask` must have the shape"),
    ],
)
def test_bad_normals(change, words):
    with pytest.raises(ValueError, match=words):
        normal_scores(**{"normals": torch.ones(1, 3, 2, 2), "target": torch.ones(1, 3, 2, 2), **change})
