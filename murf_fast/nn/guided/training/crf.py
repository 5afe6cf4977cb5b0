"""The conditional random field's loss: pixels of one colour, near each other, should have one feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from murf_fast import _arguments, reference
from murf_fast.nn.guided.training import _pairs
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import differentiable_gradients, in_transform
from murf_fast.ops.resize import resize


def crf_loss(
    features: Tensor,
    images: Tensor,
    *,
    samples: int | None = 1000,
    appearance: float = 10.0,
    smoothness: float = 3.0,
    far: float = 0.25,
    color: float = 0.25,
    near: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How unlike features are where the image is alike, at any distance.

    ``mean_(i != j) k_ij |f_i - f_j|^2 / C`` over pairs of ``samples`` pixels of every image, with the kernel of the
    fully connected CRF, ``k_ij = appearance exp(-|p_i - p_j|^2 / 2 far^2 - |I_i - I_j|^2 / 2 color^2)
    + smoothness exp(-|p_i - p_j|^2 / 2 near^2)``.

    Args:
        features: (B, C, H, W), floating point; two pixels at least.
        images: (B, 3, H', W'), the images of the features, averaged to their grid; no gradients go to them. They may
            be normalized.
        samples: Pixels of an image, drawn without replacement, so that the loss of all is what it is on average; all
            if there are fewer, or None.
        appearance, smoothness: Weights of the two kernels, at least 0.
        far, near: Deviations of positions p, as shares of the longer side of the map; above 0.
        color: Deviation of colours I, in the unit of the images; above 0. (The papers' Tables do not say which kernel
            they measure by; the weights are those of STEGO's CRF.)
        generator: On the CPU; None: torch's own.

    Returns:
        A scalar in float32 (float64 if ``features`` are). Twice differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the sampled features twice, one copy of them kept for the backward, and 1024 rows of pairs. The loss is a
    quadratic form of the features whose matrix, the kernel's Laplacian, is made once: no differences of features, and
    nothing is computed again. Second derivatives, ``torch.func`` and ``torch.compile`` are given plain PyTorch.

    Source: Krähenbühl and Koltun 2011, equation 3, on sampled pixels as in STEGO; FeatSharp, Tables 8 and 9.
    """
    op = "crf_loss"
    _checks.map_(op, "features", features)
    _checks.map_(op, "images", images)
    count = features.shape[2] * features.shape[3]
    if images.shape[:2] != (len(features), 3):
        raise ValueError(
            f"murf_fast.{op}: `images` must be (B, 3, H, W) with the batch of `features`, {len(features)}, got "
            f"{tuple(images.shape)}"
        )
    _checks.same_device(op, "images", images, "features", features)
    if len(features) == 0 or count < 2:
        raise ValueError(
            f"murf_fast.{op}: `features` must be of one image and two pixels at least, got {tuple(features.shape)}"
        )
    if samples is not None:
        samples = _checks.integer(op, "samples", samples, 2)
    given = {"appearance": appearance, "smoothness": smoothness, "far": far, "color": color, "near": near}
    given = {name: _checks.number(op, name, value) for name, value in given.items()}
    for name, value in given.items():
        if value < 0 or (value == 0 and name in ("far", "color", "near")):
            least = "at least" if name in ("appearance", "smoothness") else "above"
            raise ValueError(f"murf_fast.{op}: `{name}` must be {least} 0, got {value}")
    _arguments.generator(op, generator)
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        colors = resize(images.detach().to(dtype), tuple(features.shape[2:]), mode="area")
        positions = _positions(features.shape[2:], colors)
        maps = [features, positions.expand(len(features), -1, -1, -1), colors]
        if samples is not None and samples < count:
            # Drawn on the CPU: the same pixels on every device.
            drawn = [torch.randperm(count, generator=generator, device="cpu")[:samples] for _ in range(len(features))]
            index = torch.stack(drawn).to(features.device, non_blocking=True)[:, None]
            f, p, i = (m.flatten(2).gather(2, index.expand(-1, m.shape[1], -1)).mT for m in maps)
        else:
            f, p, i = (m.flatten(2).mT for m in maps)
        options = (given["appearance"], given["smoothness"]), (given["far"], given["color"], given["near"])
        f = f.to(dtype)
        if torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0:
            return reference.crf_loss(f, p, i, *options)
        return _CRF.apply(f, p, i, *options)


def _positions(size: Sequence[int], like: Tensor) -> Tensor:
    """(1, 2, H, W), pixels by the longer side."""
    axes = (torch.arange(n, dtype=like.dtype, device=like.device) / max(size) for n in size)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


class _CRF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        positions: Tensor,
        colors: Tensor,
        weights: tuple[float, float],
        deviations: tuple[float, float, float],
    ) -> Tensor:
        batch, count, channels = features.shape
        pulled = torch.zeros_like(features, memory_format=torch.contiguous_format)
        total = features.new_zeros((), dtype=torch.float64)
        share = 2 / (batch * count * (count - 1) * channels)
        for b in range(batch):
            f, p, i = (t[b] - t[b].mean(0) for t in (features, positions, colors))
            for rows in _pairs.blocks(count):
                kernel = _kernel(p[rows], i[rows], p, i, weights, deviations)
                # (D - K) f, the Laplacian's product.
                pulled[b, rows] = torch.addmm(kernel.sum(1, keepdim=True) * f[rows], kernel, f, alpha=-1).mul_(share)
                total += (pulled[b, rows] * f[rows]).sum(1).sum(dtype=torch.float64)
        ctx.save_for_backward(features, positions, colors, pulled)
        ctx.options = weights, deviations
        return total.to(features.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, positions, colors, pulled = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = differentiable_gradients(
                lambda f: reference.crf_loss(f, positions, colors, *ctx.options), [features], [True], grad
            )
            return *found, None, None, None, None
        return pulled * (2 * grad), None, None, None, None


def _kernel(
    p: Tensor, i: Tensor, others_p: Tensor, others_i: Tensor, weights: tuple[float, float], deviations: tuple[Any, ...]
) -> Tensor:
    """(rows, n)."""
    (appearance, smoothness), (far, color, near) = weights, deviations
    apart = _pairs.squared_distances(p, others_p)
    exponent = _pairs.squared_distances(i, others_i).mul_(-0.5 / color**2).add_(apart, alpha=-0.5 / far**2)
    kernel = exponent.exp_().mul_(appearance)
    return kernel.add_(apart.mul_(-0.5 / near**2).exp_(), alpha=smoothness)
