"""DINOv2 of transformers."""

from __future__ import annotations

from torch import Tensor, nn

from murf_fast.nn.vit.families._family import Layer, patch_size_of, prefix_of
from murf_fast.nn.vit.families._transformers import Transformers, attention_parts, is_usual_attention

MODELS = ("Dinov2Model", "Dinov2WithRegistersModel")


class HuggingFaceDinov2(Transformers):
    """Dinov2Model and Dinov2WithRegistersModel."""

    num_position_prefix = 1

    def __init__(self, model: nn.Module) -> None:
        self.embeddings = embeddings = model.embeddings
        self.flavor = "dinov2-reg" if hasattr(embeddings, "register_tokens") else "dinov2-hf"
        self.config = model.config
        self.has_usual_attention = is_usual_attention(model.config)
        self.embedders = (embeddings,)
        self.projection = embeddings.patch_embeddings.projection
        self.patch_size = patch_size_of(self.projection)
        self.final_norm = model.layernorm
        self.container = model.encoder
        self.blocks = model.encoder.layer

    def layer(self, block):
        attention, *rest = attention_parts(block.attention, self.config)
        return Layer(block.norm1, *attention, block.layer_scale1, block.norm2, block.mlp, block.layer_scale2, *rest)

    def prefix(self) -> Tensor:
        return prefix_of(self.embeddings.cls_token, getattr(self.embeddings, "register_tokens", None))

    def positions(self) -> Tensor:
        return self.embeddings.position_embeddings

    def call_embeddings(self, patches, grid):
        return self.embeddings(self.pixels(patches, grid))
