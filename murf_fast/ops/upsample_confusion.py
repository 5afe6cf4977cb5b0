"""Confusion matrix of low-resolution logits and full-resolution labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend, Mode, Size
from murf_fast.ops import _checks, _contract
from murf_fast.ops._labels import check_labels, check_target
from murf_fast.ops._library import axes_of_maps, float32_rows, register

OP = "upsample_confusion"
# Labels as kernels read them.
KERNEL_LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def upsample_confusion(
    features: Sequence[Tensor],
    target: Tensor,
    *,
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Tensor:
    """How many pixels of every label get every class; neither logits nor classes of full resolution exist.

    ``counts[t, p] = #{pixels : target = t, argmax_k (sum_s U_s F_s + bias)_k = p}``. Equal logits and NaN as for
    :func:`upsample_argmax`. The sum over batches is the matrix of a data set, from which
    :func:`murf_fast.nn.segmentation_scores` makes mIoU and accuracies.

    Args:
        features: Maps of logits (B, K, h_s, w_s), floating point, one batch size, class count, device and dtype.
        target: Labels (B, H, W), any integer dtype; their grid is the one that logits are resized to.
        bias: (K,), or (B, K) for a bias per image.
        mode, antialias, via, backend: As for :func:`upsample_concat`.
        ignore_index: Label of pixels that do not count.

    Returns:
        (K, K), int64: rows are labels, columns classes.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it. Labels out of range raise on CPU; on CUDA,
            where looking at them would stall the stream, they are in no count, and the matrix sums to less.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and a few low-resolution rows per thread; a copy of int8 labels or of those that are not dense.
    On a GPU also copies of maps as for :func:`upsample_argmax`.

    Source: ``bincount(K target + F.interpolate(logits, size).argmax(1))``, the evaluation of every segmentation code.
    """
    features = _checks.maps(OP, features, same_channels=True)
    check_target(OP, target, features[0])
    how = _checks.resize(OP, tuple(target.shape[1:]), mode, antialias, via, name="target")
    _checks.bias(OP, bias, features)
    ignore_index = _checks.integer(OP, "ignore_index", ignore_index)
    backend = _checks.backend(backend, features[0])
    # Counts have no gradient, and an op without an autograd formula must not see inputs that want one.
    features, bias = [f.detach() for f in features], None if bias is None else bias.detach()
    if backend == "reference":
        return _reference(features, bias, target, how, ignore_index, backend)
    target = target.short() if target.dtype == torch.int8 else target
    return _upsample_confusion(features, bias, target, how, ignore_index, backend)


def _requires(op, features, bias, target, how, ignore_index, backend) -> None:
    _contract.sum_of_maps(op, features, bias, how, backend)
    _contract.tensor(op, "target", target, features[0], (features[0].shape[0], None, None), KERNEL_LABELS)
    _contract.grid(op, "target's size", target.shape[1:])


def _empty(features, bias, target, how, ignore_index, backend) -> Tensor:
    classes = features[0].shape[1]
    return features[0].new_zeros((classes, classes), dtype=torch.int64)


def _launch(features, bias, target, how, ignore_index, backend, counts) -> None:
    if backend != "native":  # whose kernel looks by itself
        check_labels(OP, target if target.is_cuda else target.long(), features[0].shape[1], ignore_index)
    axes = axes_of_maps(features, *how._replace(size=tuple(target.shape[1:])))
    backends.launcher(backend).upsample_confusion(
        features, axes, float32_rows(bias), target.contiguous(), ignore_index, counts
    )


def _reference(features, bias, target, how, ignore_index, backend) -> Tensor:
    # Small label types do not hold every ignore_index.
    target = target.long()
    check_labels(OP, target, features[0].shape[1], ignore_index)
    return reference.upsample_confusion(features, target, bias, **how.options, ignore_index=ignore_index)


_upsample_confusion = register(
    "upsample_confusion(Tensor[] features, Tensor? bias, Tensor target, str interpolation, bool antialias, "
    "SymInt[]? via, int ignore_index, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    reference=_reference,
    checked=True,
)
