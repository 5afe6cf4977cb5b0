"""The vision transformers of the DINO hubs, of timm and of OpenCLIP, whose forward is the model's own code."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from murf_fast.annotations import PositionFlavor
from murf_fast.nn.vit.families._family import Family, Rotation, convolutions_in, tokens_in
from murf_fast.nn.vit.families._layout import BlockLayout, Layout, Weights, find
from murf_fast.ops.resample_pos_embed import resample_pos_embed

_BLOCK = BlockLayout(
    norm1="norm1",
    projections=(("attn.qkv",),),
    query_norm="attn.q_norm",
    key_norm="attn.k_norm",
    inner_norm="attn.norm",
    output="attn.proj",
    scale1="ls1",
    norm2="norm2",
    mlp="mlp",
    scale2="ls2",
    heads="attn.num_heads",
    scale="attn.scale",
)
_dino = Layout(
    name="DINO and DINOv2 of torch.hub (VisionTransformer, DinoVisionTransformer)",
    models=("VisionTransformer", "DinoVisionTransformer"),
    projection="patch_embed.proj",
    embedders=("patch_embed", "pos_drop"),
    prefix=("cls_token", "register_tokens"),
    positions="pos_embed",
    blocks="blocks",
    block=_BLOCK,
    norm="norm",
    marks=("pos_embed", "cls_token", "norm"),
)
_timm = replace(
    _dino,
    name="ViT of timm (VisionTransformer)",
    models=("VisionTransformer",),
    holders=(("TimmModel", "trunk"), ("TimmWrapperModel", "timm_model")),
    embedders=("patch_embed", "pos_drop", "patch_drop", "norm_pre"),
    pre_norm="norm_pre",
    prefix=("cls_token", "dist_token", "reg_token"),
    flavor="timm",
    marks=("patch_embed.grid_size", "pos_drop", "norm"),
)

LAYOUTS = (
    Layout(
        name="CLIP of OpenAI and OpenCLIP (VisionTransformer)",
        models=("VisionTransformer",),
        holders=(("CLIP", "visual"), ("CustomTextCLIP", "visual"), ("CoCa", "visual")),
        projection="conv1",
        embedders=("conv1", "patch_dropout", "ln_pre"),
        pre_norm="ln_pre",
        prefix=("class_embedding",),
        positions="positional_embedding",
        container="transformer",
        blocks="transformer.resblocks",
        block=BlockLayout(
            norm1="ln_1",
            projections=(
                (Weights("attn.in_proj_weight", ("attn.in_proj_bias",)),),
                (Weights("attn.in_proj_weight"),),
            ),
            query_norm="attn.ln_q",
            key_norm="attn.ln_k",
            inner_norm="attn.ln_inner",
            output="attn.out_proj",
            scale1="ls_1",
            norm2="ln_2",
            mlp="mlp",
            scale2="ls_2",
            heads="attn.num_heads",
        ),
        norm="ln_post",
        is_normed=False,  # as in transformers, which has the same weights
        marks=("class_embedding", "positional_embedding"),
    ),
    replace(
        _dino,
        name="DINOv3 of torch.hub (DinoVisionTransformer)",
        models=("DinoVisionTransformer",),
        prefix=("cls_token", "storage_tokens"),
        positions="",
        rotary="dinov3",
        rope="rope_embed",
        marks=("rope_embed", "cls_token", "norm"),
    ),
    _timm,
    _dino,
    replace(
        _timm,
        name="EVA and DINOv3 of timm (Eva)",
        models=("Eva",),
        rotary="timm",
        rope="rope",
        block=replace(
            _BLOCK,
            projections=(
                (Weights("attn.qkv.weight", ("attn.q_bias", "attn.k_bias", "attn.v_bias")),),
                ("attn.qkv",),
                ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            ),
            scale1="gamma_1",
            scale2="gamma_2",
        ),
    ),
)


class Hub(Family):
    """A model that makes its tokens of patches, positions and prefix itself."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__(model, layout)
        model = self.model
        if layout.container == "" and isinstance(self.blocks, nn.Sequential):
            self.container = self.blocks
        self.checkpoints = any(getattr(m, "grad_checkpointing", False) for m in (model, self.container))
        self.is_batch_first = getattr(getattr(self.blocks[0], "attn", None), "batch_first", True)
        positions = self.positions()
        rows = 0 if positions is None else positions.shape[-2]
        embedding = self.embedders[0]
        if layout.flavor:
            self.source_grid = tuple(embedding.grid_size)
        elif hasattr(model, "positional_embedding"):
            # The package of OpenAI has no rule of its own, nor a grid.
            self.flavor = "open-clip" if hasattr(model, "grid_size") else "clip"
            self.source_grid = tuple(model.grid_size) if hasattr(model, "grid_size") else None
        elif positions is not None:
            self.flavor = _flavor_of(model)
            self.source_grid = _declared_grid(embedding, self.patch_size, rows - 1)
        rotary = find(model, layout.rope)
        names = ("shift_coords", "jitter_coords", "rescale_coords")
        self.augments_positions = any(getattr(rotary, name, None) is not None for name in names)

    def rotation(self, grid: Any, dtype: Any, device: Any) -> Any:
        # By the model's own module, once per grid and pass; cosine and sine stay in its dtype.
        rope = find(self.model, self.kind.rope)
        if rope is None:
            return None
        if self.kind.rotary == "dinov3":
            sin, cos = rope(H=grid[0], W=grid[1])
            return Rotation(cos, sin, rounds=True)
        if getattr(rope, "_use_cached_embed", False) and tuple(rope.feat_shape) != tuple(grid):
            raise ValueError(
                f"murf_fast.MultiResolutionEncoder: `model` must be made with dynamic_img_size=True for other grids "
                f"than {tuple(rope.feat_shape)}, that of its kept rotary positions, got {tuple(grid)} patches"
            )
        sin, cos = rope.get_embed(shape=list(grid)).chunk(2, dim=-1)
        return Rotation(cos, sin, is_interleaved=not getattr(self.blocks[0].attn, "rotate_half", False))

    def call_embeddings(self, patches: Any, grid: Any) -> Any:
        pixels, embedding = self.pixels(patches, grid), self.embedders[0]
        has_call = type(embedding).forward is not nn.Module.forward or "forward" in embedding.__dict__
        x = embedding(pixels) if has_call else self.projection(pixels)
        if x.ndim == 4:
            x = x.flatten(1, 2) if tuple(x.shape[1:3]) == grid else x.flatten(2).mT
        prefix, table = self.prefix(), None
        if self.positions() is not None:
            rows = self.num_position_prefix
            table = resample_pos_embed(
                cast("Tensor", self.positions()),
                grid,
                flavor=cast("PositionFlavor", self.flavor),
                num_prefix_tokens=rows,
                source_grid=self.source_grid,
                keep="checked",
            ).flatten(0, -2)
            x = x + table[rows:]
            if prefix is not None:
                prefix = torch.cat([prefix[:rows] + table[:rows], prefix[rows:]])
        if prefix is not None:
            x = torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        for embedder in self.embedders[1:]:
            x = tokens_in(embedder(x))
        return x

    def call_block(self, block: Any, x: Any, rotation: Any) -> Any:
        if not self.is_batch_first:
            return tokens_in(block(x.transpose(0, 1))).transpose(0, 1)
        if rotation is None:
            return tokens_in(block(x))
        if self.kind.rotary == "timm":
            return tokens_in(block(x, rope=torch.cat([rotation.sin, rotation.cos], dim=-1)))
        return tokens_in(block([x], [(rotation.sin, rotation.cos)]))

    def call_container(self, x: Any, rotation: Any, wanted: Any) -> Any:
        last = len(self.blocks) - 1
        if set(wanted) != {last}:
            raise ValueError(
                "murf_fast.MultiResolutionEncoder: `layers` must be the last block only: the model's "
                f"{type(self.container).__name__} of blocks has hooks or a forward of its own, and is called as one"
            )
        if self.is_batch_first or hasattr(self.container, "batch_first"):
            return {last: self.container(x)}
        return {last: self.container(x.transpose(0, 1)).transpose(0, 1)}

    def call_model(self, model: Any, patches: Any, grid: Any) -> Any:
        forward = getattr(model, "forward_features", model)
        return forward(self.pixels(patches, grid))


def reason_against(model: nn.Module, layout: Layout) -> str:
    """What keeps a model that has a layout's names from being a plain ViT."""
    embedding, blocks = find(model, layout.embedders[0]), find(model, layout.blocks)
    projection = find(model, layout.projection)
    if not isinstance(projection, nn.Module) or not convolutions_in(projection):
        return f"its `{layout.projection}` is no convolution"
    if hasattr(embedding, "backbone"):
        return "its `patch_embed` has a backbone"
    if any(isinstance(block, nn.ModuleList) for block in blocks):
        return "its blocks come in chunks (`block_chunks`)"
    if find(model, "patch_generator") is not None:
        return "its `patch_generator` makes the tokens; C-RADIO is taken as RadioModel of transformers"
    if not layout.rotary and (find(model, "rope") is not None or find(model, "rope_embed") is not None):
        return "its positions are rotary (`rope`), those of its kind are a table"
    if getattr(model, "rope_mixed", False):
        return "its rotary positions differ from block to block (`rope_mixed`)"
    if find(model, "cls_norm") is not None:
        return "its CLS and storage tokens have a norm of their own (`cls_norm`)"
    return ""


def _flavor_of(model: nn.Module) -> PositionFlavor:
    """The rule of a DINO hub."""
    antialias, offset = getattr(model, "interpolate_antialias", False), getattr(model, "interpolate_offset", 0.1)
    flavors: dict[tuple[bool, float], PositionFlavor] = {
        (False, 0.1): "dinov2-hub",
        (False, 0.0): "dinov2-hf",
        (True, 0.0): "dinov2-reg",
    }
    if (bool(antialias), float(offset)) not in flavors:
        raise ValueError(
            f"murf_fast.MultiResolutionEncoder: `model` must resize its positions as one of {list(flavors)} "
            f"(interpolate_antialias, interpolate_offset), got {(antialias, offset)}"
        )
    return flavors[bool(antialias), float(offset)]


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
