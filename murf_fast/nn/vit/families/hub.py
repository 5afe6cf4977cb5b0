"""The vision transformers of the DINO and DINOv2 hubs and of timm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from murf_fast.nn._signatures import is_inert
from murf_fast.nn.vit.families._family import Family, Layer, convolutions_in, patch_size_of, prefix_of, tokens_in
from murf_fast.ops.resample_pos_embed import resample_pos_embed

MODELS = ("DinoVisionTransformer", "VisionTransformer")


class Hub(Family):
    """The layout of the DINO and DINOv2 hubs and of timm: ``patch_embed.proj``, ``blocks.{i}.attn.qkv``, ``ls1.gamma``.

    They differ in their positions. timm's models have a ``pos_drop`` and their grid in ``patch_embed.grid_size``,
    DINO's the first only.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.patch_embed = model.patch_embed
        self.projection = model.patch_embed.proj
        self.patch_size = patch_size_of(self.projection)
        self.final_norm = model.norm
        self.blocks = model.blocks
        self.container = model.blocks if isinstance(model.blocks, nn.Sequential) else None
        self.checkpoints = bool(getattr(model, "grad_checkpointing", False))
        drop = getattr(model, "pos_drop", None)
        self.embedders = (self.patch_embed,) if drop is None else (self.patch_embed, drop)
        self.is_timm = drop is not None and hasattr(self.patch_embed, "grid_size")
        rows = model.pos_embed.shape[1]
        if self.is_timm:
            self.flavor = "timm"
            self.source_grid = tuple(self.patch_embed.grid_size)
            self.num_position_prefix = rows - self.source_grid[0] * self.source_grid[1]
        else:
            self.flavor = self._hub_flavor(model)
            self.num_position_prefix = 1
            self.source_grid = _declared_grid(self.patch_embed, self.patch_size, rows - 1)

    @staticmethod
    def _hub_flavor(model: nn.Module) -> str:
        antialias, offset = getattr(model, "interpolate_antialias", False), getattr(model, "interpolate_offset", 0.1)
        flavors = {(False, 0.1): "dinov2-hub", (False, 0.0): "dinov2-hf", (True, 0.0): "dinov2-reg"}
        if (bool(antialias), float(offset)) not in flavors:
            raise ValueError(
                f"murf_fast.MultiResolutionEncoder: `model` must resize its positions as one of {list(flavors)} "
                f"(interpolate_antialias, interpolate_offset), got {(antialias, offset)}"
            )
        return flavors[bool(antialias), float(offset)]

    def layer(self, block):
        attention = block.attn
        scales = (_scale(block, "ls1"), _scale(block, "ls2"))
        parts = (block.norm1, (attention.qkv,), attention.proj, scales[0], block.norm2, block.mlp, scales[1])
        return Layer(*parts, attention.num_heads, getattr(attention, "scale", None))

    def prefix(self) -> Tensor | None:
        registers = getattr(self.model, "reg_token", None) if self.is_timm else None
        registers = getattr(self.model, "register_tokens", None) if registers is None else registers
        return prefix_of(self.model.cls_token, registers)

    def positions(self) -> Tensor:
        return self.model.pos_embed

    def call_embeddings(self, patches, grid):
        pixels = self.pixels(patches, grid)
        has_call = type(self.patch_embed).forward is not nn.Module.forward or "forward" in self.patch_embed.__dict__
        x = self.patch_embed(pixels) if has_call else self.projection(pixels)
        if x.ndim == 4:
            x = x.flatten(1, 2) if tuple(x.shape[1:3]) == grid else x.flatten(2).mT
        table = resample_pos_embed(
            self.positions(),
            grid,
            flavor=self.flavor,
            num_prefix_tokens=self.num_position_prefix,
            source_grid=self.source_grid,
            keep="checked",
        ).flatten(0, -2)
        rows, prefix = self.num_position_prefix, self.prefix()
        x = x + table[rows:]
        if prefix is not None:
            prefix = torch.cat([prefix[:rows] + table[:rows], prefix[rows:]])
            x = torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return x if len(self.embedders) == 1 else self.embedders[1](x)

    def call_block(self, block, x, rotation):
        return tokens_in(block(x))

    def call_container(self, x, rotation, wanted):
        last = len(self.blocks) - 1
        if set(wanted) != {last}:
            raise ValueError(
                "murf_fast.MultiResolutionEncoder: `layers` must be the last block only: the model's `blocks` have "
                "hooks or a forward of their own, and are called as one"
            )
        return {last: self.container(x)}

    def call_model(self, model, patches, grid):
        forward = getattr(model, "forward_features", model)
        return forward(self.pixels(patches, grid))


def reason_against(model: nn.Module) -> str:
    """What keeps a model of a hub or of timm from being a plain ViT: rotary positions, chunked blocks and others."""
    for name in ("patch_embed", "blocks", "pos_embed", "cls_token", "norm"):
        if not hasattr(model, name):
            return f"it has no `{name}`"
    if hasattr(model, "rope") or hasattr(model, "rope_embed") or model.pos_embed is None:
        return "its positions are no table"
    for name in ("norm_pre", "patch_drop"):
        if not isinstance(getattr(model, name, None) or nn.Identity(), nn.Identity):
            return f"its `{name}` is a {type(getattr(model, name)).__name__}"
    if not hasattr(model.patch_embed, "proj"):
        return "its `patch_embed` has no `proj`"
    if not isinstance(model.patch_embed.proj, nn.Module) or not convolutions_in(model.patch_embed.proj):
        return "its `patch_embed.proj` is no convolution"
    if hasattr(model.patch_embed, "backbone"):
        return "its `patch_embed` has a backbone"
    if any(isinstance(block, nn.ModuleList) for block in model.blocks):
        return "its blocks come in chunks"
    return ""


def _scale(block: nn.Module, name: str) -> nn.Module | None:
    module = getattr(block, name, None)
    return None if module is None or is_inert(module) else module


def _declared_grid(patch_embed: nn.Module, patch_size: int, rows: int) -> tuple[int, int] | None:
    """The grid of a table of positions under the names of the hubs; None for a square one."""
    grid = getattr(patch_embed, "patches_resolution", None) or getattr(patch_embed, "grid_size", None)
    image = getattr(patch_embed, "img_size", None)
    if grid is None and image is not None:
        image = (image, image) if isinstance(image, int) else image
        grid = tuple(n // patch_size for n in image)
    if grid is not None and len(grid) == 2 and grid[0] * grid[1] == rows:
        return tuple(grid)
    if math.isqrt(rows) ** 2 != rows:
        raise ValueError(
            f"murf_fast.MultiResolutionEncoder: `model` must name the grid of its {rows} positions, which is no "
            "square, in `patch_embed.patches_resolution`, `grid_size` or `img_size`"
        )
    return None
