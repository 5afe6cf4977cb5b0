"""The vision towers of SigLIP and SigLIP 2 in transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from murf_fast.nn.vit.families._family import Layer
from murf_fast.nn.vit.families._transformers import Transformers, attention_parts, is_usual_attention

MODELS = ("SiglipVisionModel", "Siglip2VisionModel")


class HuggingFaceSiglip(Transformers):
    """SiglipVisionModel and Siglip2VisionModel (NaFlex): no prefix tokens."""

    def __init__(self, model: nn.Module) -> None:
        model = getattr(model, "vision_model", model)  # transformers 4 wraps the tower
        self.config = model.config
        self.has_usual_attention = is_usual_attention(model.config)
        self.embeddings = model.embeddings
        self.embedders = (model.embeddings,)
        self.projection = model.embeddings.patch_embedding
        self.is_naflex = hasattr(model.config, "num_patches")
        self.flavor, self.layout = ("siglip2", "yxc") if self.is_naflex else ("siglip", "cyx")
        self.patch_size = model.config.patch_size
        self.final_norm = model.post_layernorm
        self.container = model.encoder
        self.blocks = model.encoder.layers

    def layer(self, block):
        attention, *rest = attention_parts(block.self_attn, self.config)
        return Layer(block.layer_norm1, *attention, None, block.layer_norm2, block.mlp, None, *rest)

    def positions(self) -> Tensor:
        return self.embeddings.position_embedding.weight

    def call_embeddings(self, patches, grid):
        if self.is_naflex:
            return self.embeddings(patches, torch.tensor([grid] * len(patches), device=patches.device))
        return self.embeddings(self.pixels(patches, grid), interpolate_pos_encoding=True)

    def call_container(self, x, rotation, wanted):
        return self._encoded(wanted, self.container, inputs_embeds=x)

    def call_model(self, model, patches, grid):
        if not self.is_naflex:
            return model(self.pixels(patches, grid), interpolate_pos_encoding=True)
        mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
        return model(patches, mask, torch.tensor([grid] * len(patches), device=patches.device))
