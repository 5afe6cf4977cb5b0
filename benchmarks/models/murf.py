"""Whole models, as in Table 2 of the MuRF paper: images to labels at single resolutions and at all of them together.

The baseline is MuRF's order of operations on the same transformers model (attention by SDPA): resize the normalized
image, run the model, once per resolution; bring the maps to the largest grid and concatenate them; batch norm, 1x1
convolution, resize the logits to the image, argmax. Weights are random: they do not change the cost.
"""

from __future__ import annotations

import copy

import torch
from inputs import randn, up
from registry import Contenders, Target, case, classes, side
from torch import Tensor

import murf_fast
from murf_fast.nn import SegmentationHead

PATCH = 14
BACKBONES = {"ViT-S/14": 6, "ViT-B/14": 12}  # heads of 64 channels
FACTORS = {"0.5": 18.5, "1": 37, "1.5": 55.5}  # of 518 pixels, in patches: the convolution drops what is no whole one
CLASSES = 150


def _pixels(patches: float) -> int:
    return PATCH * side(int(patches)) + (PATCH // 2 if patches % 1 else 0)


def _model(heads: int, device: str, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=64 * classes(heads),
        num_attention_heads=classes(heads),
        num_hidden_layers=classes(12),
        image_size=PATCH * side(37),
        patch_size=PATCH,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Dinov2Model(config).eval().requires_grad_(False).to(device, dtype)


def labels(backbone: str, factors: list[str], batch: int):
    """A case's builder: images (B, 3, 518, 518), normalized, to ADE20K-style labels of their size."""

    def build(device: str, dtype: torch.dtype) -> Contenders:
        model = _model(BACKBONES[backbone], device, dtype)
        width = model.config.hidden_size
        sizes = [_pixels(FACTORS[f]) for f in factors]
        image = _pixels(37)
        images = randn(device, dtype, batch, 3, image, image)
        head = SegmentationHead(len(sizes) * width, classes(CLASSES))
        with torch.no_grad():
            head.norm.running_mean.copy_(randn("cpu", torch.float32, len(sizes) * width) / 10)
            head.classifier.weight.copy_(randn("cpu", torch.float32, *head.classifier.weight.shape) / width**0.5)
        head = head.eval().requires_grad_(False).to(device, dtype)
        murf = murf_fast.MuRF(model, sizes, head, remainder="drop")

        def logits(images: Tensor, model, head) -> Tensor:
            maps = []
            for size in sizes:
                x = images if size == image else up(images, (size, size))
                tokens = model(pixel_values=x).last_hidden_state[:, 1:]
                n = size // PATCH
                maps.append(tokens.reshape(batch, n, n, -1).permute(0, 3, 1, 2))
            fused = torch.cat([up(m, tuple(maps[-1].shape[2:])) for m in maps], dim=1)
            return up(head.classifier(head.norm(fused)), (image, image))

        @torch.no_grad()
        def plain(images: Tensor) -> Tensor:
            return logits(images, model, head).argmax(1)

        @torch.no_grad()
        def baseline() -> Tensor:
            return logits(images, model, head)

        @torch.no_grad()
        def oracle():
            yield (), logits(images.double(), copy.deepcopy(model).double(), copy.deepcopy(head).double())

        others = {"MuRF": lambda: plain(images)}
        if device == "cuda":
            graph = torch.compile(plain)
            others["MuRF compile"] = lambda: graph(images)
        return Contenders(lambda: murf.segment(images), others, oracle, batch * image * image, logits=baseline)

    return build


def _register(backbone: str, factors: list[str], batch: int = 1, dtype=torch.float32, **options) -> None:
    what = "fusion" if len(factors) > 1 else "alone"
    name = f"{backbone}, {', '.join(factors)} x 518 {what}, batch {batch}, {str(dtype).removeprefix('torch.')}"
    width = 64 * BACKBONES[backbone]
    facts = {
        "model": backbone,
        "resolution": " + ".join(f"{f} x 518" for f in factors),
        "head parameters": len(factors) * width * (CLASSES + 2) + CLASSES,
    }
    case("murf", name, dtype=dtype, facts=facts, **options)(labels(backbone, factors, batch))


for _backbone, _ratio in {"ViT-S/14": 1.15, "ViT-B/14": 1.05}.items():
    for _factor in FACTORS:
        _register(_backbone, [_factor], devices=("cpu",))
    _goals = {"less_memory": ("MuRF", 0.7), "devices": ("cpu",)}
    _register(_backbone, list(FACTORS), targets=(Target("MuRF", _ratio),), **_goals)
    _register(_backbone, list(FACTORS), dtype=torch.bfloat16, targets=(Target("MuRF", 2.0),), **_goals)
    for _factor in FACTORS:
        _register(_backbone, [_factor], dtype=torch.bfloat16, devices=("cuda",))
    _register(_backbone, list(FACTORS), 1, torch.bfloat16, targets=(Target("MuRF", 2.0),), devices=("cuda",))
    _register(_backbone, list(FACTORS), 8, torch.bfloat16, targets=(Target("MuRF", 1.2),), devices=("cuda",))
