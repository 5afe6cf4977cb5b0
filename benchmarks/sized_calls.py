"""A call of every operation at sizes that the user names: what roofline.py counts beside the cases of the suites.

A size is a number, a grid a side or ``HxW``, grids several of them with commas. The names are those of SIZES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from inputs import CL, MEAN, STD
from torch import Tensor

import murf_fast as mf

Grid = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """Of a call; an operation takes those that its entry in CALLS names."""

    batch: int = 1
    channels: int = 768
    grid: Grid = (37, 37)  # of the map that comes in
    grids: tuple[Grid, ...] = ((18, 18), (37, 37), (55, 55))
    size: Grid = (518, 518)  # of the result
    sizes: tuple[Grid, ...] = ((266, 266), (518, 518), (784, 784))
    image: Grid = (480, 640)
    patch: int = 14
    classes: int = 150
    bins: int = 256
    heads: int = 4
    depth: int = 128  # channels of queries and keys, all heads together
    window: int = 7
    radius: int = 3
    filters: int = 128
    taps: int = 5
    sigma: int = 4
    rows: int = 100_000
    queries: int = 2048
    count: int = 1000


def parsed(op: str, texts: list[str]) -> Sizes:
    """From ``name=value``; raises a ValueError that names what is wrong."""
    kinds = {f.name: f.type for f in fields(Sizes)}
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in CALLS[op][0]:
            raise ValueError(f"{op} takes the sizes {', '.join(CALLS[op][0])} as name=value, got {text!r}")
        try:
            found[name] = _value(kinds[name], value)
        except ValueError:
            raise ValueError(f"{name} must be {_KINDS[kinds[name]]}, got {value!r}") from None
    return replace(Sizes(), **found)


_KINDS = {
    "int": "a whole number from 1",
    "Grid": "a side or HxW, from 1",
    "tuple[Grid, ...]": "sides or HxW with commas between them, from 1",
}


def _value(kind: str, text: str) -> int | Grid | tuple[Grid, ...]:
    if kind == "tuple[Grid, ...]":
        return tuple(_value("Grid", part) for part in text.split(","))
    if kind == "Grid":
        sides = [_value("int", part) for part in text.split("x")]
        if len(sides) > 2:
            raise ValueError
        return sides[0], sides[-1]
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def call_of(op: str, s: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """To be made, and called, without memory (work.Outlined)."""
    return CALLS[op][1](s, dtype)


def _map(s: Sizes, t: torch.dtype, channels: int, grid: Grid) -> Tensor:
    return torch.zeros(s.batch, channels, *grid, dtype=t).contiguous(memory_format=CL)


def _maps(s: Sizes, t: torch.dtype, channels: int) -> list[Tensor]:
    return [_map(s, t, channels, grid) for grid in s.grids]


def _params(s: Sizes, t: torch.dtype) -> mf.BilateralParams:
    taps = (2 * s.radius + 1) ** 2
    shapes = (), (), (32, 3), (32,), (32, 32), (32,), (taps, taps + 3), (taps,), (taps, taps), (taps,)
    return mf.BilateralParams(*(torch.ones(shape, dtype=t) for shape in shapes))


def _adaptive_conv(s, t):
    source, kernels = _map(s, t, s.channels, s.grid), _map(s, t, (2 * s.radius + 1) ** 2, s.size)
    return lambda: mf.adaptive_conv(source, kernels)


def _bilateral_kernels(s, t):
    guidance, params = _map(s, t, 3, s.size), _params(s, t)
    return lambda: mf.bilateral_kernels(guidance, params, radius=s.radius)


def _joint_bilateral_upsample(s, t):
    source, guidance, params = _map(s, t, s.channels, s.grid), _map(s, t, 3, s.size), _params(s, t)
    return lambda: mf.joint_bilateral_upsample(source, guidance, params, radius=s.radius)


def _feature_unify(s, t):
    features, basis = _map(s, t, s.channels, s.grid), torch.zeros(s.filters, 1, s.taps, s.taps, dtype=t)
    return lambda: mf.feature_unify(features, basis)


def _gaussian_bilateral(s, t):
    features, guidance = _map(s, t, s.channels, s.grid), _map(s, t, 3, s.size)
    maps = [torch.ones(s.batch, 1, *s.grid) for _ in range(4)]
    return lambda: mf.gaussian_bilateral_upsample(features, guidance, *maps, radius=s.radius)


def _gaussian_blur(s, t):
    x = torch.zeros(s.batch, 1, *s.size, dtype=t)
    return lambda: mf.gaussian_blur(x, float(s.sigma))


def _images(s: Sizes) -> Tensor:
    return torch.zeros(s.batch, *s.image, 3, dtype=torch.uint8)


def _image_to_patches(s, t):
    images, sizes = _images(s), list(s.sizes)
    return lambda: mf.image_to_patches(images, sizes, s.patch, mean=MEAN, std=STD, dtype=t)


def _patch_embed(s, t):
    images, sizes = _images(s), list(s.sizes)
    weight, bias = torch.zeros(s.channels, 3, s.patch, s.patch, dtype=t), torch.zeros(s.channels, dtype=t)
    table = torch.zeros(1, 1 + s.grid[0] * s.grid[1], s.channels, dtype=t)
    cls = torch.zeros(1, s.channels, dtype=t)
    options = {
        "flavor": "dinov2-hf",
        "num_prefix_tokens": 1,
        "prefix": cls,
        "source_grid": s.grid,
        "mean": MEAN,
        "std": STD,
    }
    return lambda: mf.patch_embed(images, sizes, weight, bias, table, patch_size=s.patch, **options).tokens


def _resample_pos_embed(s, t):
    table = torch.zeros(1, s.grid[0] * s.grid[1], s.channels, dtype=t)
    return lambda: mf.resample_pos_embed(table, s.size, flavor="timm", source_grid=s.grid)


def _resize(s, t):
    x = _map(s, t, s.channels, s.grid)
    return lambda: mf.resize(x, s.size)


def _linear_head(s, t):
    maps = _maps(s, t, s.channels)
    weight, bias = torch.zeros(s.classes, s.channels * len(maps), dtype=t), torch.zeros(s.classes, dtype=t)
    return lambda: mf.linear_head(maps, weight, bias, size=s.size)


def _upsample_concat(s, t):
    maps = _maps(s, t, s.channels)
    return lambda: mf.upsample_concat(maps, s.size)


def _upsample_sum(s, t):
    maps = _maps(s, t, s.classes)
    return lambda: mf.upsample_sum(maps, s.size)


def _upsample_mean(s, t):
    maps = _maps(s, t, s.classes)
    return lambda: mf.upsample_mean(maps, s.size)


def _upsample_argmax(s, t):
    maps = _maps(s, t, s.classes)
    return lambda: mf.upsample_argmax(maps, s.size)


def _targets(s: Sizes) -> Tensor:
    return torch.zeros(s.batch, *s.size, dtype=torch.int64)


def _upsample_confusion(s, t):
    maps, target = _maps(s, t, s.classes), _targets(s)
    return lambda: mf.upsample_confusion(maps, target)


def _upsample_cross_entropy(s, t):
    maps, target = _maps(s, t, s.classes), _targets(s)
    return lambda: mf.upsample_cross_entropy(maps, target)


def _upsample_expectation(s, t):
    maps, values = _maps(s, t, s.bins), torch.ones(s.bins)
    return lambda: mf.upsample_expectation(maps, s.size, values)


def _attention(s: Sizes, t: torch.dtype, channels: int) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    maps = _map(s, t, s.depth, s.size), _map(s, t, s.depth, s.grid), _map(s, t, channels, s.grid)
    return maps, {"windows": mf.windows.ratio(s.size, s.grid, 0.1), "num_heads": s.heads}


def _window_attention(s, t):
    maps, options = _attention(s, t, s.channels)
    return lambda: mf.window_attention(*maps, **options)


def _window_attention_argmax(s, t):
    maps, options = _attention(s, t, s.classes)
    return lambda: mf.window_attention_argmax(*maps, **options)


def _neighborhood_attention(s, t):
    q, k, v = (torch.zeros(s.batch, *s.grid, s.heads, s.depth // s.heads, dtype=t) for _ in range(3))
    return lambda: mf.neighborhood_attention(q, k, v, kernel_size=s.window)


def _nearest_distance(s, t):
    query, index = torch.zeros(s.queries, s.channels, dtype=t), mf.NearestIndex(torch.ones(s.rows, s.channels, dtype=t))
    return lambda: mf.nearest_distance(query, index)


def _k_center_greedy(s, t):
    rows = torch.zeros(s.rows, s.channels, dtype=t)
    return lambda: mf.k_center_greedy(rows, count=s.count)


_FUSED = ("batch", "classes", "grids", "size")
_GUIDED = ("batch", "channels", "grid", "size", "radius")
_TOKENS = ("batch", "channels", "image", "sizes", "patch")
CALLS: dict[str, tuple[tuple[str, ...], Callable[[Sizes, torch.dtype], Callable[[], object]]]] = {
    "adaptive_conv": (_GUIDED, _adaptive_conv),
    "bilateral_kernels": (("batch", "size", "radius"), _bilateral_kernels),
    "feature_unify": (("batch", "channels", "grid", "filters", "taps"), _feature_unify),
    "gaussian_bilateral_upsample": (_GUIDED, _gaussian_bilateral),
    "gaussian_blur": (("batch", "size", "sigma"), _gaussian_blur),
    "image_to_patches": (("batch", "image", "sizes", "patch"), _image_to_patches),
    "joint_bilateral_upsample": (_GUIDED, _joint_bilateral_upsample),
    "k_center_greedy": (("rows", "channels", "count"), _k_center_greedy),
    "linear_head": (("batch", "channels", "grids", "classes", "size"), _linear_head),
    "nearest_distance": (("queries", "rows", "channels"), _nearest_distance),
    "neighborhood_attention": (("batch", "grid", "heads", "depth", "window"), _neighborhood_attention),
    "patch_embed": ((*_TOKENS, "grid"), _patch_embed),
    "resample_pos_embed": (("channels", "grid", "size"), _resample_pos_embed),
    "resize": (("batch", "channels", "grid", "size"), _resize),
    "upsample_argmax": (_FUSED, _upsample_argmax),
    "upsample_concat": (("batch", "channels", "grids", "size"), _upsample_concat),
    "upsample_confusion": (_FUSED, _upsample_confusion),
    "upsample_cross_entropy": (_FUSED, _upsample_cross_entropy),
    "upsample_expectation": (("batch", "bins", "grids", "size"), _upsample_expectation),
    "upsample_mean": (_FUSED, _upsample_mean),
    "upsample_sum": (_FUSED, _upsample_sum),
    "window_attention": (("batch", "channels", "grid", "size", "heads", "depth"), _window_attention),
    "window_attention_argmax": (("batch", "classes", "grid", "size", "heads", "depth"), _window_attention_argmax),
}
