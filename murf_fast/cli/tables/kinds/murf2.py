"""MuRF's Table 2: every resolution by itself and their fusion, images to depth and the training of the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast import reference
from murf_fast.cli.tables.case import OURS, PLAIN, Case, Setting, Table
from murf_fast.cli.tables.vits import Vit, counted_or_problem, own_features, vits
from murf_fast.nn import DepthHead, MuRF
from murf_fast.nn.heads.depth_losses import EPS

BINS, FARTHEST = 256, 10.0  # of MuRF's head for NYU Depth V2


def _cases(setting: Setting) -> list[Case]:
    found, sizes = [], list(setting.sizes)
    for vit in vits(setting):
        vit.check(sizes)
        for chosen in ([size] for size in sizes) if len(sizes) == 1 else (*([size] for size in sizes), sizes):
            found += _pair(setting, vit, chosen, sizes[len(sizes) // 2])
    return found


def _pair(setting: Setting, vit: Vit, sizes: Sequence[int], image: int) -> list[Case]:
    """Images of the middle size, at the chosen ones."""
    width, has_cls = vit.family.width, vit.family.prefix() is not None
    columns = len(sizes) * width * (2 if has_cls else 1)
    labels = {"model": vit.name, "resolution": " + ".join(map(str, sizes))}
    facts = {"parameters": float(columns * BINS + BINS)}
    images = torch.empty(setting.batch, 3, image, image, dtype=setting.dtype, device="meta")
    work, problem = counted_or_problem(lambda model, x: _plain_maps(model, x, sizes), vit, images)
    work = type(work)(2 * work.operations, work.bytes)  # of both parts

    def build(code: str) -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        model = vit.make()
        images = torch.randn(setting.batch, 3, image, image, device=setting.device).to(setting.dtype)
        target = 0.1 + (FARTHEST - 0.1) * torch.rand(setting.batch, image, image, device=setting.device)
        head = DepthHead(columns, BINS, depth_range=(1e-3, FARTHEST)).to(setting.device, setting.dtype)
        return (_ours if code == OURS else _plain)(model, sizes, head, images, target)

    return [
        Case(labels | {"code": OURS}, lambda: build(OURS), facts, work),
        Case(labels | {"code": PLAIN}, lambda: build(PLAIN), facts, work, problem),
    ]


def _ours(
    model: nn.Module, sizes: Sequence[int], head: DepthHead, images: Tensor, target: Tensor
) -> dict[str, Callable[[], object]]:
    murf = MuRF(model, sizes, head)

    def train() -> tuple[Any, ...]:
        with torch.no_grad():
            features = murf.encode(images)
        loss = head.loss(features.maps, target, features.cls)
        return torch.autograd.grad(loss, list(head.parameters()))

    return {"inference": torch.no_grad()(lambda: murf.depth(images)), "training": train}


def _plain(
    model: nn.Module, sizes: Sequence[int], head: DepthHead, images: Tensor, target: Tensor
) -> dict[str, Callable[[], object]]:
    """MuRF's order: one pass for each resolution, maps and CLS tokens on the largest grid, their concatenation, the
    head, the expectation there, and depth to the image.
    """
    image, values = tuple(images.shape[2:]), head.values(images.device)
    valid = torch.ones_like(target, dtype=torch.bool)

    def depth(fused: Tensor) -> Tensor:
        weights = head.classifier(fused).float().softmax(1)
        return _up((weights * values[:, None, None]).sum(1, keepdim=True), image)[:, 0]

    def train() -> tuple[Any, ...]:
        found = depth(_plain_maps(model, images, sizes))
        loss = reference.scale_invariant_log_loss(found, target, valid, False, 0.15, EPS)
        loss = loss + 0.5 * reference.log_gradient_loss(found, target, valid, (1, 2, 4, 6), EPS)
        return torch.autograd.grad(loss, list(head.parameters()))

    return {"inference": torch.no_grad()(lambda: depth(_plain_maps(model, images, sizes))), "training": train}


@torch.no_grad()
def _plain_maps(model: nn.Module, images: Tensor, sizes: Sequence[int]) -> Tensor:
    maps = []
    for size in sizes:
        pixels = images if size == images.shape[2] else _up(images, (size, size))
        patches, cls = own_features(model, pixels)
        maps.append(patches if cls is None else torch.cat([patches, cls[:, :, None, None].expand_as(patches)], 1))
    return torch.cat([_up(x, tuple(maps[-1].shape[2:])) for x in maps], 1)


def _up(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


TABLE = Table(
    title="Single resolutions and their fusion, as MuRF's Table 2",
    labels=("model", "resolution", "code"),
    parts={"inference": "inference", "training": "head training"},
    facts={"parameters": ("head params, M", 1e-6)},
    x="resolution",
    sizes=(266, 518, 784),
    models=("ViT-B/14",),
    size="sides of the image in pixels at which it is encoded; it comes in the middle one",
    cases=_cases,
    notes=(
        "inference: images to depth. head training: frozen encoding, the head's loss and the gradients of its "
        "parameters. Maps with their CLS tokens, 256 bins.",
        "PyTorch: MuRF's order: one pass per resolution, everything concatenated on the largest grid.",
    ),
    half_on_gpu=True,
    replaces=True,
)
