"""What makes two encoders the same for a bank: every weight, and how images become tokens."""

from __future__ import annotations

import hashlib
import json

import torch

from murf_fast.nn import MultiResolutionEncoder


def fingerprint(encoder: MultiResolutionEncoder) -> str:
    settings = {
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
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
