"""What heads are judged by: overlap of classes, errors of depth, angles of normals. Sums are float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from murf_fast.nn.heads.depth_losses import check_target
from murf_fast.ops import _checks


class SegmentationScores(NamedTuple):
    """What :func:`segmentation_scores` returns; float64.

    Attributes:
        mean_iou: Mean of ``iou`` over the classes that occur, mIoU.
        mean_accuracy: Mean of ``accuracy`` over the classes that are labelled, mAcc.
        pixel_accuracy: Share of all pixels in the right class, aAcc.
        iou: (K,), NaN for a class that neither is labelled nor predicted.
        accuracy: (K,), share of the pixels of a label in the right class; NaN for one that is not labelled.
    """

    mean_iou: Tensor
    mean_accuracy: Tensor
    pixel_accuracy: Tensor
    iou: Tensor
    accuracy: Tensor


class DepthScores(NamedTuple):
    """What :func:`depth_scores` returns: (B,) each, float64, over the valid pixels of an image; NaN without any.

    Attributes:
        rmse: ``sqrt(mean (d - t)^2)``.
        abs_rel, sq_rel: ``mean |d - t| / t`` and ``mean (d - t)^2 / t``.
        rmse_log: ``sqrt(mean (log d - log t)^2)``.
        log10: ``mean |log10 d - log10 t|``.
        silog: ``100 sqrt(var(log d - log t))``, KITTI's.
        delta1, delta2, delta3: Share of pixels with ``max(d / t, t / d) < 1.25^n``.
    """

    rmse: Tensor
    abs_rel: Tensor
    sq_rel: Tensor
    rmse_log: Tensor
    log10: Tensor
    silog: Tensor
    delta1: Tensor
    delta2: Tensor
    delta3: Tensor


class NormalScores(NamedTuple):
    """What :func:`normal_scores` returns: (B,) each, float64, over the valid pixels of an image; NaN without any.

    Attributes:
        mean, median, rmse: Of the angles, in degrees.
        within: (B, 3), shares of the pixels below 11.25, 22.5 and 30 degrees.
    """

    mean: Tensor
    median: Tensor
    rmse: Tensor
    within: Tensor


ANGLES = (11.25, 22.5, 30.0)


def segmentation_scores(counts: Tensor) -> SegmentationScores:
    """Overlaps and accuracies of a confusion matrix, as from :func:`murf_fast.upsample_confusion`, or a sum of them.

    ``iou_k = c_kk / (sum_p c_kp + sum_t c_tk - c_kk)``, ``accuracy_k = c_kk / sum_p c_kp``.

    Args:
        counts: (K, K), integer; rows are labels, columns classes.

    Raises:
        TypeError, ValueError: ``counts`` is no such matrix.

    Source: mmsegmentation's ``IoUMetric`` (mIoU, mAcc, aAcc; classes that do not occur are left out of the means).
    """
    if not isinstance(counts, Tensor) or counts.dtype.is_floating_point or counts.dtype.is_complex:
        got = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"murf_fast.segmentation_scores: `counts` must be an integer tensor, got {got}")
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"murf_fast.segmentation_scores: `counts` must be (K, K), got {tuple(counts.shape)}")
    if counts.dtype == torch.bool or bool((counts < 0).any()):
        raise ValueError("murf_fast.segmentation_scores: `counts` must count pixels, got bools or negative numbers")
    right, labelled, predicted = (c.double() for c in (counts.diagonal(), counts.sum(1), counts.sum(0)))
    iou, accuracy = right / (labelled + predicted - right), right / labelled
    return SegmentationScores(iou.nanmean(), accuracy.nanmean(), right.sum() / labelled.sum(), iou, accuracy)


def depth_scores(
    depth: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    min_depth: float = 1e-3,
    max_depth: float | None = None,
) -> DepthScores:
    """Errors of depth, per image: what papers report is their mean over a data set.

    Args:
        depth: (B, H, W), floating point, such as :meth:`DepthHead.forward` gives; limited to the range of depths first.
        target: (B, H, W), in any floating dtype and in the unit of ``depth``.
        mask: (B, H, W), bool: False where a pixel does not count whatever its target; None counts all.
        min_depth, max_depth: Pixels count whose target lies between them, without ``min_depth`` itself and with
            ``max_depth``; None: any finite one.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: a few float64 maps of one image.

    Source: Eigen et al. 2014, as in DINOv2's ``calculate``; KITTI's SILog.
    """
    op = "depth_scores"
    _checks.tensor(op, "depth", depth)
    check_target(op, target, mask, max_depth)
    if depth.shape != target.shape:
        raise ValueError(
            f"murf_fast.{op}: `depth` must have the shape of `target`, {tuple(target.shape)}, got {tuple(depth.shape)}"
        )
    _checks.same_device(op, "target", target, "depth", depth)
    least = _checks.number(op, "min_depth", min_depth)
    most = math.inf if max_depth is None else float(max_depth)
    if not 0 < least < most:
        raise ValueError(f"murf_fast.{op}: `min_depth` must be above 0 and below `max_depth`, got {min_depth!r}")
    images = [
        _of_depth(d.double(), t.double(), None if mask is None else mask[i], least, most)
        for i, (d, t) in enumerate(zip(depth.detach(), target.detach(), strict=True))
    ]
    return DepthScores(*(_stacked(column, depth) for column in _columns(images, len(DepthScores._fields))))


def _of_depth(depth: Tensor, target: Tensor, mask: Tensor | None, least: float, most: float) -> list[Tensor]:
    valid = (target > least) & (target <= most) & target.isfinite()
    valid = valid if mask is None else valid & mask
    t, d = target[valid], depth[valid].clamp(least, most)
    error, logs = d - t, d.log() - t.log()
    ratio = torch.maximum(d / t, t / d)
    return [
        error.square().mean().sqrt(),
        (error.abs() / t).mean(),
        (error.square() / t).mean(),
        logs.square().mean().sqrt(),
        logs.abs().mean() / math.log(10),
        100 * (logs - logs.mean()).square().mean().sqrt(),
        *((ratio < 1.25**n).double().mean() for n in (1, 2, 3)),
    ]


def normal_scores(normals: Tensor, target: Tensor, *, mask: Tensor | None = None) -> NormalScores:
    """Angles between surface normals and their labels, per image.

    Args:
        normals: (B, 3, H, W), floating point, of any length but zero, such as :func:`murf_fast.upsample_sum` gives.
        target: The same, floating point; pixels with a zero or NaN do not count.
        mask: (B, H, W), bool: False where a pixel does not count whatever its target; None counts all.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: a few float64 maps of one image.

    Source: Eigen and Fergus 2015, as in Probe3D's evaluation.
    """
    op = "normal_scores"
    for name, x in (("normals", normals), ("target", target)):
        _checks.tensor(op, name, x)
        if x.ndim != 4 or x.shape[1] != 3 or x.shape != normals.shape:
            raise ValueError(
                f"murf_fast.{op}: `{name}` must be (B, 3, H, W), both of one shape, got {tuple(x.shape)}"
                + ("" if x is normals else f" beside {tuple(normals.shape)}")
            )
    _checks.same_device(op, "target", target, "normals", normals)
    if mask is not None:
        check_target(op, normals[:, 0], mask, None)
    images = [
        _of_normals(n.double(), t.double(), None if mask is None else mask[i])
        for i, (n, t) in enumerate(zip(normals.detach(), target.detach(), strict=True))
    ]
    return NormalScores(*(_stacked(column, normals) for column in _columns(images, len(NormalScores._fields))))


def _of_normals(normals: Tensor, target: Tensor, mask: Tensor | None) -> list[Tensor]:
    length = target.norm(dim=0)
    valid = (length > 0) & length.isfinite()
    valid = valid if mask is None else valid & mask
    n, t = normals[:, valid], target[:, valid]
    # The arc cosine of a rounded product loses half the digits of a small angle; this does not.
    angles = torch.atan2(torch.linalg.cross(n, t, dim=0).norm(dim=0), (n * t).sum(0)).rad2deg()
    within = torch.stack([(angles < a).double().mean() for a in ANGLES])
    # NaN of no pixel, as the means are; the lower of two middles, as torch's median is.
    median = angles.median() if angles.numel() else angles.mean()
    return [angles.mean(), median, angles.square().mean().sqrt(), within]


def _columns(images: list[list[Tensor]], count: int) -> list[list[Tensor]]:
    return [[scores[i] for scores in images] for i in range(count)]


def _stacked(column: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(column) if column else like.new_zeros(0, dtype=torch.float64)
