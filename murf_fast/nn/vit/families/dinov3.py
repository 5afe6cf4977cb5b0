"""DINOv3 of transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from murf_fast.nn.vit.families._family import Layer, patch_size_of, prefix_of, tokens_in
from murf_fast.nn.vit.families._transformers import Transformers, attention_parts, is_usual_attention

MODELS = ("DINOv3ViTModel",)


class HuggingFaceDinov3(Transformers):
    """DINOv3ViTModel: rotary positions, none in the embeddings."""

    def __init__(self, model: nn.Module) -> None:
        self.embeddings, self.rope = model.embeddings, model.rope_embeddings
        self.config = model.config
        self.has_usual_attention = is_usual_attention(model.config)
        names = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
        self.augments_positions = any(getattr(model.config, name, None) is not None for name in names)
        self.embedders = (model.embeddings,)
        self.projection = model.embeddings.patch_embeddings
        self.patch_size = patch_size_of(self.projection)
        self.final_norm = model.norm
        self.container = None if hasattr(model, "layer") else model.model  # transformers 4 | 5
        self.blocks = model.layer if self.container is None else self.container.layer

    def layer(self, block):
        attention, *rest = attention_parts(block.attention, self.config)
        return Layer(block.norm1, *attention, block.layer_scale1, block.norm2, block.mlp, block.layer_scale2, *rest)

    def prefix(self) -> Tensor:
        return prefix_of(self.embeddings.cls_token, self.embeddings.register_tokens)

    def rotation(self, grid, dtype, device):
        # Cosine and sine are rounded to the model's dtype, as in transformers; the hub keeps them in float32.
        axes = [2 * (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n - 1 for n in grid]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        angles = 2 * math.pi * points[:, :, None] * self.rope.inv_freq.to(device)
        angles = angles.flatten(1).tile(2)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def call_embeddings(self, patches, grid):
        return self.embeddings(self.pixels(patches, grid))

    def call_block(self, block, x, rotation):
        return tokens_in(block(x, position_embeddings=rotation))

    def call_container(self, x, rotation, wanted):
        return self._encoded(wanted, self.container, x, position_embeddings=rotation)
