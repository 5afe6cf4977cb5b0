"""Maps of three resolutions concatenated on one grid."""

from __future__ import annotations

import torch
from inputs import CL, compiled, feature_maps, up
from registry import Contenders, Target, case, configurations, side, smallest
from tiny import PLANAR, SIZE, backward, differentiated, wide_maps

import murf_fast


def concat(device, dtype, memory_format) -> Contenders:
    maps = feature_maps(device, dtype, 768)
    planar = [m.contiguous() for m in maps]
    size = (side(518), side(518))
    total = sum(m.shape[1] for m in maps)
    out = torch.empty(1, total, *size, dtype=dtype, device=device).to(memory_format=memory_format)
    theirs = torch.empty_like(out, memory_format=CL)
    contiguous = torch.empty_like(out, memory_format=torch.contiguous_format)

    def plain(*maps):
        return torch.cat([up(m, size) for m in maps], dim=1)

    def oracle():
        begin = 0
        for m in maps:
            yield (slice(None), slice(begin, begin + m.shape[1])), up(m.double(), size)
            begin += m.shape[1]

    return Contenders(
        lambda: murf_fast.upsample_concat(maps if memory_format == CL else planar, size, out=out),
        {
            "eager channels_last": lambda: torch.cat([up(m, size) for m in maps], dim=1, out=theirs),
            "eager contiguous": lambda: torch.cat([up(m, size) for m in planar], dim=1, out=contiguous),
            "compile": compiled(plain, *maps),
        },
        oracle,
        out.numel() * out.element_size(),
    )


@case(
    "upsample_concat",
    "3 x 768 channels (18, 37, 55) -> 518, channels_last, out=",
    targets=(Target("eager", 8.0),),
    write_target=0.6,
)
def concat_channels_last(device, dtype):
    return concat(device, dtype, CL)


@case("upsample_concat", "the same, planar")
def concat_planar(device, dtype):
    return concat(device, dtype, torch.contiguous_format)


@case("upsample_concat", "the same, channels_last, bfloat16", dtype=torch.bfloat16)
def concat_bfloat16(device, dtype):
    return concat(device, dtype, CL)


@smallest("upsample_concat")
def tiny(device: str) -> None:
    differentiated(device, lambda m: murf_fast.upsample_concat(m, (7, 9)))


@configurations("upsample_concat")
def shapes(device: str, dtype: torch.dtype) -> None:
    for layout in (CL, PLANAR):
        backward(murf_fast.upsample_concat(wide_maps(device, dtype, layout), SIZE))
