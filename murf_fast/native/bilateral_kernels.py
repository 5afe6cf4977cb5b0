"""Kernels of joint bilateral upsampling, predicted from the guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, empty, extension, strided
from murf_fast.native.adaptive_conv import kernels_dtype

__all__ = ["bilateral_kernels", "bilateral_kernels_backward"]


def bilateral_kernels(
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    radius: int,
    out: Tensor,
) -> None:
    """``out`` (B, D * D, H, W) of any strides, from ``guidance`` (B, G, H, W) and the networks' ``params``; the masks,
    (B, K) and (B, D * D), multiply hidden channels.
    """
    network = Network(guidance, params, range_mask, fixup_mask, radius)
    kernels_of_rows(network, guidance, (0, guidance.shape[2]), out)


def kernels_of_rows(network: Network, guidance: Tensor, rows: tuple[int, int], out: Tensor) -> None:
    batch, _, _, width = guidance.shape
    extension.bilateral_kernels(
        dtype=dtype_tag(guidance.dtype),
        out_dtype=dtype_tag(out.dtype),
        net=network.of_rows(*rows),
        guidance=strided(guidance, guidance.dtype),
        out=strided(out, kernels_dtype(out, guidance), (batch, network.taps, rows[1] - rows[0], width)),
        threads=_fork.threads(),
    )


def bilateral_kernels_backward(
    grad: Tensor,
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    radius: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the guidance (B, G, H, W) and of the concatenated parameters, both float32."""
    network = Network(guidance, params, range_mask, fixup_mask, radius)
    batch, guides, height, width = guidance.shape
    # Bands of rows sum up parameter gradients of their own; their number must not depend on that of the threads.
    bands = max(1, min(16, height // 16))
    grad_logits = empty((batch, height, network.taps, width), torch.float32)
    grad_guidance = empty((batch, height, guides, width), torch.float32)
    grad_params = empty((batch * bands, network.params.numel()), torch.float32)
    extension.bilateral_kernels_backward(
        dtype=dtype_tag(guidance.dtype),
        grad_dtype=dtype_tag(grad.dtype),
        net=network.of_rows(0, height),
        guidance=strided(guidance, guidance.dtype),
        grad=strided(grad, kernels_dtype(grad, guidance), (batch, network.taps, height, width)),
        bands=bands,
        grad_logits=address(grad_logits, torch.float32, grad_logits.numel()),
        grad_guidance=address(grad_guidance, torch.float32, grad_guidance.numel()),
        grad_params=address(grad_params, torch.float32, grad_params.numel()),
        threads=_fork.threads(),
    )
    return grad_guidance.transpose(1, 2), grad_params.sum(0)


class Network:
    """The extension's view of the networks of `bilateral_kernels`; keeps copies alive until the call is over."""

    def __init__(self, guidance: Tensor, params: list[Tensor], range_mask: Any, fixup_mask: Any, radius: int) -> None:
        self.params = torch.cat([p.detach().reshape(-1).float() for p in params])
        self.masks = [None if m is None else m.float().contiguous() for m in (range_mask, fixup_mask)]
        batch, guides, height, width = guidance.shape
        keys, self.taps = params[3].numel(), (2 * radius + 1) ** 2
        inputs, fixup = self.taps + guides, len(params) > 6
        count = 2 + keys * (guides + 1) + keys * (keys + 1)
        count += self.taps * (inputs + 1) + self.taps * (self.taps + 1) if fixup else 0
        range_mask, fixup_mask = self.masks
        self._fields = {
            "batch": batch,
            "height": height,
            "width": width,
            "guides": guides,
            "key": keys,
            "radius": radius,
            "fixup": fixup,
            "params": address(self.params, torch.float32, count),
            "range_mask": address(range_mask, torch.float32, batch * keys),
            "fixup_mask": address(fixup_mask, torch.float32, batch * self.taps),
        }

    def of_rows(self, begin: int, end: int) -> Any:
        """For the kernels of these rows."""
        return extension.Bilateral(**self._fields, rows=(begin, end))
