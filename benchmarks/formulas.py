"""Floating-point operations of whatever a call runs, ours (``murf_fast/ops/_flops.py``) and PyTorch's.

``FEWER`` says where a kernel may do with less than its definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from murf_fast.ops import _flops
from murf_fast.ops._flops import dtype_of

FEWER = {
    "k_center_greedy": "bounds from eight-bit codes skip rows",
    "nearest_distance_cells": "cells that cannot hold a neighbour are skipped",
    "image_queries": "the 3x3 convolution by minimal filtering takes a third of its products",
    "image_rectangle": "the 3x3 convolution by minimal filtering takes a third of its products",
    "naf_queries": "the 3x3 convolutions by minimal filtering take a third of their products",
    "naf_rectangle": "the 3x3 convolutions by minimal filtering take a third of their products",
    "naf_statistics": "the 3x3 convolutions by minimal filtering take a third of their products",
}


def operations_of(func: Callable, args: tuple, kwargs: dict, result: object) -> dict[str, int]:
    """Operations by the dtype of their operands; nothing for what does not count."""
    namespace, name = func._schema.name.split("::")
    if namespace == "murf_fast":
        found = _flops.operations_of(name, args, kwargs, result)
    else:
        found = _pytorch(func, args, kwargs, result)
    return {unit: int(count) for unit, count in found.items() if count}


def _pytorch(func: Callable, args: tuple, kwargs: dict, result: object) -> dict[str, float]:
    name = func._schema.name
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        q, k, v = args[:3]
        return {dtype_of(q): 2 * math.prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])}
    if name == "mkldnn::_linear_pointwise":
        x, out = args[0], result
        return {dtype_of(x): 2 * x.numel() * out.shape[-1]}
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return {}
    operand = next(x for x in reversed(args) if isinstance(x, Tensor))
    return {dtype_of(operand): formula(*args, **kwargs, out_val=result)}
