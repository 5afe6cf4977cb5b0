"""What makes two encoders the same for a bank or a folder of features: every weight, and how images become tokens."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from murf_fast.nn.vit.multi_resolution_encoder import MultiResolutionEncoder


def fingerprint(encoder: MultiResolutionEncoder, dtype: torch.dtype | None = None) -> str:
    """With a ``dtype`` that of the encoder whose weights are rounded to it, as ``model.to(dtype)`` does."""
    settings: dict[str, Any] = {
        "model": type(encoder.model).__name__,
        "sizes": encoder.sizes,
        "scales": encoder.scales,
        "rounding": encoder.rounding,
        "layers": encoder.layers,
        "norm": encoder.norm,
        # As it was written before tiles could be other than square: banks of then are still those of the encoder.
        "tiles": encoder.tiles and [t[0] if t[0] == t[1] else t for t in encoder.tiles],
        "resize": {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in encoder.resize.items()},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in encoder.model.state_dict().items():
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rounded(encoder: MultiResolutionEncoder) -> dict[str, str]:
    """Fingerprints of the narrower copies of an encoder, by dtype, by which a bank tells them from other encoders."""
    own = encoder.family.like.dtype
    narrower = [d for d in (torch.float32, torch.bfloat16, torch.float16) if d.itemsize < own.itemsize]
    return {str(dtype).removeprefix("torch."): fingerprint(encoder, dtype) for dtype in narrower}
