"""``feature_unify``, channel after channel and filter after filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fuzz.cases_resize import check_layout
from fuzz.compare import Comparison, arithmetic
from fuzz.draw import Draw
from fuzz.evaluation import both_ways
from fuzz.maps import drawn_map, drawn_vector

__all__ = ["feature_unify"]


def feature_unify(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    channels, filters = d.choice("channels", (1, 2, 3, 7, 16, 17)), d.choice("filters", (1, 2, 3, 8, 17))
    if d.interpreted:
        channels, filters = min(channels, 3), min(filters, 3)
    side = d.choice("filter side", (1, 3, 5, 7), (1, 4, 2, 2)) if not d.interpreted else 3
    wants = d.chance("gradients", 0.35)
    shape = (d.batch(), channels, *d.grid("grid", 2 if d.interpreted else 11))
    features = drawn_map(d, "features", shape, dtype, ("normal", "offset", "small", "constant"), wants)
    basis = drawn_vector(d, "basis", (filters, side, side), (dtype, torch.float32, torch.bfloat16))
    basis = basis[:, None] if d.chance("basis (M, 1, k, k)", 0.6) else basis
    basis = basis.detach().requires_grad_(wants)
    variant = d.choice("variant", ("released", "paper"))
    result = d.call("feature_unify", features, basis, *([] if variant == "released" else [variant]))
    assert result.dtype == dtype
    check_layout(result, features, None)

    def formula(x, dtype):
        b, c, height, width = x["features"].shape
        radius = side // 2
        padded = F.pad(x["features"], [radius] * 4)
        ones = F.pad(torch.ones(height, width, dtype=dtype), [radius] * 4)
        taps = [(i, j) for i in range(side) for j in range(side)]
        inside = sum(ones[i : i + height, j : j + width] for i, j in taps)
        kernels = x["basis"].reshape(filters, side, side)
        responses = sum(
            padded[:, :, None, i : i + height, j : j + width] * kernels[:, i, j, None, None] for i, j in taps
        )
        flat = (responses / inside).reshape(b, c * filters, height, width)
        if variant == "paper":
            return {"result": flat.unflatten(1, (c, filters)).softmax(2).mean(1)}
        # out[i] = mean_j softmax_i flat[i C + j]
        read = torch.stack([flat[:, i * c : (i + 1) * c] for i in range(filters)], 1)
        return {"result": read.softmax(1).mean(2)}

    inputs = {"features": features, "basis": basis}
    return both_ways(formula, inputs, {"result": result}, d.generator, arithmetic(dtype))
