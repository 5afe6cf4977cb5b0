"""A frozen vision transformer at any sizes: the packed pass beside the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from murf_fast.cli.tables.case import OURS, PLAIN, Case, Setting, Table
from murf_fast.cli.tables.vits import SHAPES, Vit, counted_or_problem, own_features, vits
from murf_fast.nn import MultiResolutionEncoder


def _cases(setting: Setting) -> list[Case]:
    found = []
    for vit in vits(setting):
        vit.check(setting.sizes)
        facts = {"parameters": float(sum(p.numel() for p in vit.meta.parameters()))}
        for size in setting.sizes:
            images = torch.empty(setting.batch, 3, size, size, dtype=setting.dtype, device="meta")
            work, problem = counted_or_problem(_plain, vit, images)
            facts = facts | {"operations": work.operations or None}
            labels = {"model": vit.name, "size": size}
            # What ours holds is not more than the model itself.
            found.append(Case(labels | {"code": OURS}, _build(setting, vit, size, _packed), facts, work))
            found.append(Case(labels | {"code": PLAIN}, _build(setting, vit, size, _own), facts, work, problem=problem))
    return found


def _plain(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return own_features(model, images)[0]


def _packed(model: nn.Module, images: Tensor) -> Callable[[], object]:
    encoder = MultiResolutionEncoder(model, [images.shape[2]])
    return torch.no_grad()(lambda: encoder(images).maps[0])


def _own(model: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: _plain(model, images)


def _build(setting: Setting, vit: Vit, size: int, prepared: Callable[..., Any]) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        images = torch.randn(setting.batch, 3, size, size, device=setting.device).to(setting.dtype)
        return {"encode": prepared(vit.make(), images)}

    return build


TABLE = Table(
    title="A frozen vision transformer by size",
    labels=("model", "size", "code"),
    parts={"encode": "images to map"},
    facts={"parameters": ("params, M", 1e-6), "operations": ("GFLOP", 1e-9)},
    x="size",
    sizes=(224, 448, 896),
    models=tuple(SHAPES)[:2],
    size="side of the image in pixels",
    cases=_cases,
    notes=("PyTorch: the model's own forward. GFLOP: of its products, two for a multiply-add.",),
    half_on_gpu=True,
    replaces=True,
)
