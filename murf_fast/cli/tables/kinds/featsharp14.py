"""FeatSharp's Figure 14: an image by the size of its features, beside the encoder at that resolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import murf_fast
from murf_fast.cli.tables.case import OURS, PLAIN, Case, Setting, Table, Work
from murf_fast.cli.tables.vits import Vit, counted_or_problem, own_features, vits
from murf_fast.nn import FeatSharp, MultiResolutionEncoder, merge_tiles, split_tiles

SHARP, WHOLE = "FeatSharp", "encoder at that size"


def _cases(setting: Setting) -> list[Case]:
    view = setting.sizes[0]
    odd = [size for size in setting.sizes if size % view]
    if odd:
        raise ValueError(f"--sizes: the first, {view}, is a view's; {odd[0]} must be a multiple of it")
    found = []
    for vit in vits(setting):
        vit.check(setting.sizes)
        for size in setting.sizes:
            found += _group(setting, vit, view, size // view)
    return found


def _group(setting: Setting, vit: Vit, view: int, factor: int) -> list[Case]:
    size, count = view * factor, 1 if factor == 1 else 1 + factor**2
    patch, width = vit.family.patch_size, vit.family.width

    def empty(images: int, side: int) -> Tensor:
        return torch.empty(images, 3, side, side, dtype=setting.dtype, device="meta")

    whole, problem = counted_or_problem(_whole, vit, empty(setting.batch, size))
    views, _ = counted_or_problem(_whole, vit, empty(setting.batch * count, view))
    # Of a token of the result: the block's matrices (:class:`FeatSharpBlock`, G = 2 C) and its map with its inputs.
    tokens = setting.batch * (size // patch) ** 2
    block = 2.0 * width**2 * (3 * 4 + 4 + 2 * 2 * 16 / 3 + 16 / 3)
    sharp = Work(views.operations + tokens * block, views.bytes + 8.0 * tokens * width * setting.dtype.itemsize)
    found = []
    for method, work in ((SHARP, sharp), (WHOLE, whole)):
        for code in (OURS, PLAIN):
            labels = {"model": vit.name, "size": size, "method": method, "code": code}
            facts = {"factor": float(factor), "views": float(count if method == SHARP else 1)}
            build = _build(setting, vit, view, factor, method, code)
            found.append(Case(labels, build, facts, work, problem if code == PLAIN else None))
    return found


@torch.no_grad()
def _whole(model: nn.Module, images: Tensor) -> Tensor:
    return own_features(model, images)[0]


def _build(setting: Setting, vit: Vit, view: int, factor: int, method: str, code: str) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        model, size = vit.make(), view * factor
        images = torch.randn(setting.batch, 3, size, size, device=setting.device).to(setting.dtype)
        if method == WHOLE:
            encoder = MultiResolutionEncoder(model, [size])
            call = (lambda: encoder(images).maps[0]) if code == OURS else (lambda: _whole(model, images))
            return {"image": torch.no_grad()(call)}
        sharp = FeatSharp(model, factor, size=view).requires_grad_(False).eval().to(setting.device, setting.dtype)
        call = (lambda: sharp(images)) if code == OURS else (lambda: _plain(sharp, model, images, view, factor))
        return {"image": torch.no_grad()(call)}

    return build


def _plain(sharp: FeatSharp, model: nn.Module, images: Tensor, view: int, factor: int) -> Tensor:
    """The model's own forward of all views, and the rest in plain PyTorch."""
    with murf_fast.use_backend("reference"):
        maps = _whole(model, images if factor == 1 else split_tiles(images, factor, view))
        low, tiles = (maps, maps) if factor == 1 else merge_tiles(sharp.features(maps), factor)
        return sharp.upsampler(low, images, tiles)


def crossover(factors: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The factor from which FeatSharp takes less time than its encoder, between two rows on a line of the ratio's
    logarithm; None if it does not up to the last one.
    """
    excess = [math.log(ratio) for ratio in ratios]
    first = next((i for i in range(len(excess)) if all(e < 0 for e in excess[i:])), None)
    if not first:  # at once, or never
        return None if first is None else float(factors[0])
    before, after = excess[first - 1], excess[first]
    return factors[first - 1] + before / (before - after) * (factors[first] - factors[first - 1])


def _remark(rows: Sequence[dict[str, Any]]) -> str | None:
    """Per model, from which factor on ours of FeatSharp is faster than ours of its encoder."""
    times: dict[str, dict[float, dict[str, float]]] = {}
    for row in rows:
        if row["labels"]["code"] == OURS and "image" in row["parts"]:
            labels, factor = row["labels"], row["facts"]["factor"]
            times.setdefault(labels["model"], {}).setdefault(factor, {})[labels["method"]] = row["parts"]["image"][
                "median_s"
            ]
    found = []
    for model, of_model in times.items():
        both = {factor: t[SHARP] / t[WHOLE] for factor, t in sorted(of_model.items()) if len(t) == 2}
        if not both:
            continue
        at = crossover(list(both), list(both.values()))
        says = f"no crossover up to a factor of {max(both):g}" if at is None else f"from a factor of {at:.1f} on"
        found.append(f"{model}: {says}")
    return f"FeatSharp faster than its encoder at that size: {'; '.join(found)}." if found else None


TABLE = Table(
    title="FeatSharp beside its encoder, as FeatSharp's Figure 14",
    labels=("model", "size", "method", "code"),
    parts={"image": "image"},
    facts={"factor": ("factor", 1.0), "views": ("views", 1.0)},
    x="size",
    sizes=(448, 896, 1344, 1792),
    models=("ViT-S/14",),
    size="side of the image in pixels; the smallest is a view's",
    cases=_cases,
    notes=(
        "image: features of an image, as fine as those of the encoder at its size.",
        "PyTorch: the model's own forward, of FeatSharp on all views in one batch, and its block row after row.",
    ),
    remark=_remark,
    half_on_gpu=True,
    replaces=True,
)
