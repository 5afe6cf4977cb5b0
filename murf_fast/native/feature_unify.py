"""AnyUp's filter bank: features of any channels to as many as the basis has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, extension, strided, wanted

__all__ = ["feature_unify", "feature_unify_backward"]


def feature_unify(features: Tensor, basis: Tensor, released: bool, out: Tensor) -> None:
    """``features`` (B, C, H, W) and ``out`` (B, M, H, W) of any strides; ``basis`` (M, k, k) float32."""
    extension.feature_unify(
        dtype=dtype_tag(features.dtype),
        unify=_unify(features, basis, released),
        out=strided(out, features.dtype, (len(features), len(basis), *features.shape[2:])),
        threads=_fork.threads(),
    )


def feature_unify_backward(
    grad: Tensor, features: Tensor, basis: Tensor, released: bool, shares: int, results: list[Tensor]
) -> None:
    """``results``: gradients of features and (float32) basis; an empty one is not wanted. That of the basis is summed
    here from parts (B * shares, M, k, k) float32.
    """
    parts = basis.new_empty((len(features) * shares, *basis.shape)) if results[1].numel() else None
    extension.feature_unify_backward(
        dtype=dtype_tag(features.dtype),
        unify=_unify(features, basis, released),
        grad_out=strided(grad, features.dtype, (len(features), len(basis), *features.shape[2:])),
        grad_features=wanted(results[0], features),
        grad_basis=address(parts, torch.float32, 0),
        shares=shares,
        threads=_fork.threads(),
    )
    if parts is not None:
        results[1].copy_(parts.sum(0))


def _unify(features: Tensor, basis: Tensor, released: bool) -> Any:
    filters, kernel = len(basis), basis.shape[-1]
    return extension.FeatureUnify(
        shape=features.shape,
        filters=filters,
        kernel=kernel,
        released=released,
        features=strided(features, features.dtype),
        basis=address(basis, torch.float32, filters * kernel**2),
    )
