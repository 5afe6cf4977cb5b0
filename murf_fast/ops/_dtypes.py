"""Dtypes by name, which is how they stand in schemas.

A ``ScalarType`` in a package of AOTInductor is read back as its neighbour by torch 2.11, float32 as float64.
"""

from __future__ import annotations

import torch

NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
BY_NAME = {name: dtype for dtype, name in NAMES.items()}
