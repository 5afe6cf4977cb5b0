"""``gaussian_blur`` beside SciPy's filter."""

from __future__ import annotations

import torch
from scipy import ndimage

from fuzz.cases_resize import check_layout
from fuzz.compare import Comparison, arithmetic, derived, unit
from fuzz.draw import Draw
from fuzz.maps import drawn_map

__all__ = ["gaussian_blur"]

BORDERS = {"symmetric": "reflect", "reflect": "mirror"}  # ours and SciPy's names


def gaussian_blur(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    x = drawn_map(d, "x", (d.batch(), d.choice("channels", (1, 2, 3, 17)), *d.grid("grid")), dtype)
    kind = d.choice("sigma.kind", ("any", "small", "large", "integer"), (5, 2, 1, 1))
    sigma = {
        "any": lambda: d.number("sigma", 0.3, 5.0),
        "small": lambda: d.number("sigma", 0.01, 0.3) or 0.05,
        "large": lambda: d.number("sigma", 5.0, 40.0),
        "integer": lambda: d.integer("sigma", 1, 4),
    }[kind]()
    sigma = max(sigma, 0.01)
    border = d.choice("border", tuple(BORDERS))
    given = {} if border == "symmetric" and d.chance("border left out", 0.3) else {"border": border}
    result = d.call("gaussian_blur", x, d.as_number("sigma", sigma), **given)
    x = x.resolve_neg()  # NumPy takes no other
    check_layout(result, x, None)
    wide = arithmetic(dtype)

    def smooth(y: torch.Tensor) -> torch.Tensor:
        out = y.contiguous().numpy().copy()
        for axis in (2, 3):
            out = ndimage.gaussian_filter1d(out, sigma, axis=axis, mode=BORDERS[border], truncate=4.0)
        return torch.from_numpy(out)

    if not x.numel():
        return [derived("result", result, x, 0.0, dtype)]
    # Weight, product and sums, along both axes; mirrored taps of one pixel are added up before.
    radius = int(4 * sigma + 0.5)
    roundings = 2 * (2 * radius + 1) + 8
    bound = roundings * unit(wide) * smooth(x.double().abs()) + 2 * roundings * torch.finfo(wide).tiny * unit(wide)
    # A tap is the exponential of a float64 number, whose roundings grow with it.
    exponent = 0.5 * (radius / sigma) ** 2
    bound = bound + 2 * 4 * exponent * unit(torch.float64) * smooth(x.double().abs())
    return [derived("result", result, smooth(x.double()), bound, dtype)]
