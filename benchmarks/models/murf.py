"""Whole models, as in Table 2 of the MuRF paper: images to labels at single resolutions and at all of them together;
and 16 images of 16 sizes to fused tokens, in shared passes or one after another.

The baseline is MuRF's order of operations on the same transformers model (attention by SDPA): resize the normalized
image, run the model, once per resolution; bring the maps to the largest grid and concatenate them; batch norm, 1x1
convolution, resize the logits to the image, argmax. Beside it, for the fusions, torch.compile of the same and, where it
is installed, OpenVINO's CPU runtime. Weights are random: they do not change the cost.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch
from inputs import openvino, randn, up
from registry import Contenders, Rows, Target, case, classes, side
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


class _Labels(torch.nn.Module):
    """``logits(images, *parts)`` and their argmax, as one module."""

    def __init__(self, logits: Callable[..., Tensor], parts: torch.nn.ModuleList) -> None:
        super().__init__()
        self.logits, self.parts = logits, parts

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images, *self.parts).argmax(1)


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
        if device == "cuda" or len(factors) > 1:
            graph = torch.compile(plain)
            others["MuRF compile"] = lambda: graph(images)
        if device == "cpu" and len(factors) > 1 and importlib.util.find_spec("openvino"):
            parts = copy.deepcopy(torch.nn.ModuleList([model, head])).float()
            others["OpenVINO"] = openvino(_Labels(logits, parts), images)
        return Contenders(lambda: murf.segment(images), others, oracle, batch * image * image, logits=baseline)

    return build


def mixed(backbone: str, scales: list[float], smallest: int):
    """A case's builder: 16 normalized images of 16 shapes, whose sides grow from ``smallest`` patches."""

    def build(device: str, dtype: torch.dtype) -> Contenders:
        model = _model(BACKBONES[backbone], device, dtype)
        shapes = [(PATCH * side(smallest + i), PATCH * side(smallest + 15 - i)) for i in range(16)]
        images = [randn(device, dtype, 3, *shape) for shape in shapes]
        murf = murf_fast.MuRF(model, scales=scales)
        sizes = [murf.encoder.sizes_for(*shape) for shape in shapes]
        grids = [tuple(max(n // PATCH for n in axis) for axis in zip(*its, strict=True)) for its in sizes]

        @torch.no_grad()
        def plain(images: list[Tensor], model) -> Rows:
            rows = Rows()
            for image, its_sizes, grid in zip(images, sizes, grids, strict=True):
                maps = []
                for size in its_sizes:
                    x = image[None] if size == tuple(image.shape[1:]) else up(image[None], size)
                    tokens = model(pixel_values=x).last_hidden_state[:, 1:]
                    maps.append(tokens.mT.unflatten(2, (size[0] // PATCH, size[1] // PATCH)))
                rows.append(torch.cat([up(m, grid) for m in maps], dim=1).flatten(2).mT)
            return rows

        def oracle():
            yield (), plain([image.double() for image in images], copy.deepcopy(model).double()).joined()

        def alone() -> Rows:
            return Rows(murf.tokens(image[None]) for image in images)

        others = {"MuRF one by one": lambda: plain(images, model), "murf_fast one by one": torch.no_grad()(alone)}
        tokens = sum(h * w for h, w in grids)
        ours = torch.no_grad()(lambda: Rows(rows[None] for rows in murf.tokens(images)))
        result = tokens * len(scales) * model.config.hidden_size * dtype.itemsize
        return Contenders(ours, others, oracle, result)

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


for _backbone, _ratio in {"ViT-S/14": 1.1, "ViT-B/14": 1.05}.items():
    for _factor in FACTORS:
        _register(_backbone, [_factor], targets=(Target("MuRF", 1.0),), devices=("cpu",))
    _goals = {"less_memory": ("MuRF", 0.4), "devices": ("cpu",)}
    for _batch in (1, 4):
        _register(_backbone, list(FACTORS), _batch, targets=(Target("MuRF", _ratio),), **_goals)
    _register(_backbone, list(FACTORS), dtype=torch.bfloat16, targets=(Target("MuRF", 1.2),), **_goals)
    for _factor in FACTORS:
        _register(_backbone, [_factor], dtype=torch.bfloat16, devices=("cuda",))
    _register(_backbone, list(FACTORS), 1, torch.bfloat16, targets=(Target("MuRF", 2.0),), devices=("cuda",))
    _register(_backbone, list(FACTORS), 8, torch.bfloat16, targets=(Target("MuRF", 1.2),), devices=("cuda",))

_SINGLE, _FUSION = [1.0], [0.5, 1.0, 1.5]
for _smallest, _sides, _scales, _dtype, _device, _ratio in (
    (4, "56 to 266", _SINGLE, torch.float32, "cpu", 1.3),
    (4, "56 to 266", _FUSION, torch.float32, "cpu", 1.3),
    (4, "56 to 266", _FUSION, torch.bfloat16, "cpu", 1.3),
    (4, "56 to 266", _FUSION, torch.bfloat16, "cuda", 3.0),
    (16, "224 to 434", _SINGLE, torch.float32, "cpu", 1.3),
    (16, "224 to 434", _FUSION, torch.float32, "cpu", 1.3),
):
    _name = f"ViT-S/14, 16 sizes of {_sides} x {', '.join(f'{x:g}' for x in _scales)}"
    _options = {"devices": (_device,), "targets": (Target("murf_fast one by one", _ratio),)}
    case("murf", f"{_name}, {str(_dtype).removeprefix('torch.')}", dtype=_dtype, **_options)(
        mixed("ViT-S/14", _scales, _smallest)
    )
