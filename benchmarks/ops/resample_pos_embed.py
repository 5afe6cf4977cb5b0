"""A model's position table brought to three grids, computed and kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import compiled, randn
from registry import Contenders, Rows, Target, case, classes, side, smallest

import murf_fast


def pos_embed(flavor: str, antialias: bool, keep: bool):
    def build(device, dtype):
        m, grids = side(37), [(side(n), side(n)) for n in (16, 28, 55)]
        table = randn(device, dtype, 1, 1 + m * m, classes(768))

        def plain(table):
            map_ = table[:, 1:].unflatten(1, (m, m)).permute(0, 3, 1, 2)
            results = []
            for grid in grids:
                resized = F.interpolate(map_, grid, mode="bicubic", antialias=antialias, align_corners=False)
                results.append(torch.cat([table[:, :1], resized.flatten(2).mT], dim=1))
            return Rows(results)

        def oracle():
            yield (), plain(table.double()).joined()

        def ours():
            options = {"flavor": flavor, "num_prefix_tokens": 1, "keep": keep}
            return Rows(murf_fast.resample_pos_embed(table, grids, **options))

        return Contenders(
            ours,
            {"eager": lambda: plain(table), "compile": compiled(plain, table)},
            oracle,
            sum(1 + h * w for h, w in grids) * table.shape[2] * table.element_size(),
        )

    return build


for _flavor, _antialias, _mode in (("dinov2-hf", False, "bicubic"), ("dinov2-reg", True, "antialiased bicubic")):
    _name = f"DINOv2 table, 768 channels, 37 -> 16, 28, 55, {_mode}"
    case("resample_pos_embed", _name, targets=(Target("eager", 5),))(pos_embed(_flavor, _antialias, False))
    case("resample_pos_embed", f"{_name}, kept", targets=(Target("eager", 100),))(pos_embed(_flavor, _antialias, True))


@smallest("resample_pos_embed")
def tiny(device: str) -> None:
    table = torch.randn(1, 10, 19, device=device, requires_grad=True)
    murf_fast.resample_pos_embed(table, (4, 2), flavor="dinov2-hub", num_prefix_tokens=1).sum().backward()
