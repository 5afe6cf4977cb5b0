"""Labels of pixels, as arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.ops import _checks

LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_target(op: str, target: object, first: Tensor) -> None:
    if not isinstance(target, Tensor) or target.dtype not in LABELS:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"murf_fast.{op}: `target` must be an integer tensor of labels (B, H, W), got {got}")
    _checks.dense(op, "target", target)
    if target.ndim != 3 or target.shape[0] != first.shape[0] or target.shape[1] < 1 or target.shape[2] < 1:
        raise ValueError(
            f"murf_fast.{op}: `target` must be (B, H, W) with the batch size of `features`, {first.shape[0]}, and at "
            f"least one pixel, got {tuple(target.shape)}"
        )
    if target.device != first.device:
        raise ValueError(f"murf_fast.{op}: `target` must be on {first.device}, got {target.device}")


def check_labels(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Labels out of range raise on the CPU; on CUDA looking at them would stall the stream."""
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        raise ValueError(
            f"murf_fast.{op}: `target` must hold labels in [0, {classes}) or ignore_index "
            f"{ignore_index}, got {int(target[wrong][0])}"
        )
