"""What a packed pass needs to know about a vision transformer: where each family keeps its parts.

A family holds modules of the user's model, never copies of their parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SUPPORTED = (
    "transformers Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, SiglipVisionModel and Siglip2VisionModel, and "
    "the DINOv2 hub's and timm's VisionTransformer"
)


@dataclass(frozen=True)
class Layer:
    """The modules of one pre-norm block. ``projections`` are (q, k, v), or one fused module."""

    norm1: nn.Module
    projections: tuple[nn.Module, ...]
    output: nn.Module
    scale1: nn.Module | None
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module | None


class Family:
    """One backbone; the attributes are those of a ViT with absolute positions and no prefix tokens."""

    flavor: str | None = None
    layout = "cyx"
    num_position_prefix = 0  # rows of the table before the patches
    source_grid: tuple[int, int] | None = None
    augments_positions = False  # at random in training

    heads: int
    patch_size: int
    projection: nn.Module
    final_norm: nn.Module
    layers: list[Layer]

    def prefix(self) -> Tensor | None:
        """(P, D): CLS, then registers."""
        return None

    def positions(self) -> Tensor | None:
        """The table of absolute positions."""
        return None

    def rotation(self, grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(cos, sin), (N, head dimension) each, for the patches of a grid."""
        return None


class HuggingFaceDinov2(Family):
    """Dinov2Model and Dinov2WithRegistersModel."""

    num_position_prefix = 1

    def __init__(self, model: nn.Module) -> None:
        self.embeddings = model.embeddings
        self.flavor = "dinov2-reg" if hasattr(model.embeddings, "register_tokens") else "dinov2-hf"
        self.heads = model.config.num_attention_heads
        self.projection = model.embeddings.patch_embeddings.projection
        self.patch_size = _square(self.projection.kernel_size)
        self.final_norm = model.layernorm
        self.layers = [
            Layer(b.norm1, *_attention(b.attention), b.layer_scale1, b.norm2, b.mlp, b.layer_scale2)
            for b in model.encoder.layer
        ]

    def prefix(self) -> Tensor:
        return _prefix(self.embeddings.cls_token, getattr(self.embeddings, "register_tokens", None))

    def positions(self) -> Tensor:
        return self.embeddings.position_embeddings


class HuggingFaceDinov3(Family):
    """DINOv3ViTModel: rotary positions, none in the embeddings."""

    def __init__(self, model: nn.Module) -> None:
        self.embeddings, self.rope = model.embeddings, model.rope_embeddings
        self.heads = model.config.num_attention_heads
        names = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
        self.augments_positions = any(getattr(model.config, name, None) is not None for name in names)
        self.projection = model.embeddings.patch_embeddings
        self.patch_size = _square(self.projection.kernel_size)
        self.final_norm = model.norm
        blocks = model.layer if hasattr(model, "layer") else model.model.layer  # transformers 4 | 5
        self.layers = [
            Layer(b.norm1, *_attention(b.attention), b.layer_scale1, b.norm2, b.mlp, b.layer_scale2) for b in blocks
        ]

    def prefix(self) -> Tensor:
        return _prefix(self.embeddings.cls_token, self.embeddings.register_tokens)

    def rotation(self, grid, dtype, device):
        # Cosine and sine are rounded to the model's dtype, as in transformers; the hub keeps them in float32.
        axes = [2 * (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n - 1 for n in grid]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        angles = 2 * math.pi * points[:, :, None] * self.rope.inv_freq.to(device)
        angles = angles.flatten(1).tile(2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class HuggingFaceSiglip(Family):
    """SiglipVisionModel and Siglip2VisionModel (NaFlex): no prefix tokens."""

    def __init__(self, model: nn.Module) -> None:
        model = getattr(model, "vision_model", model)  # transformers 4 wraps the tower
        self.embeddings = model.embeddings
        self.projection = model.embeddings.patch_embedding
        naflex = isinstance(self.projection, nn.Linear)
        self.flavor, self.layout = ("siglip2", "yxc") if naflex else ("siglip", "cyx")
        self.patch_size = model.config.patch_size
        self.heads = model.config.num_attention_heads
        self.final_norm = model.post_layernorm
        self.layers = [
            Layer(b.layer_norm1, *_attention(b.self_attn), None, b.layer_norm2, b.mlp, None)
            for b in model.encoder.layers
        ]

    def positions(self) -> Tensor:
        return self.embeddings.position_embedding.weight


class Hub(Family):
    """The layout of the DINOv2 hub and of timm: ``patch_embed.proj``, ``blocks.{i}.attn.qkv``, ``ls1.gamma``, ..."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.projection = model.patch_embed.proj
        self.patch_size = _square(self.projection.kernel_size)
        self.final_norm = model.norm
        self.heads = model.blocks[0].attn.num_heads
        self.is_timm = hasattr(model, "pos_drop")
        if self.is_timm:
            self.flavor = "timm"
            self.source_grid = tuple(model.patch_embed.grid_size)
        else:
            self.flavor = "dinov2-reg" if getattr(model, "interpolate_antialias", False) else "dinov2-hub"
            if self.flavor == "dinov2-hub" and getattr(model, "interpolate_offset", 0.1) == 0:
                self.flavor = "dinov2-hf"
        rows = self.source_grid[0] * self.source_grid[1] if self.source_grid else None
        self.num_position_prefix = 1 if rows is None else model.pos_embed.shape[1] - rows
        self.layers = [
            Layer(b.norm1, (b.attn.qkv,), b.attn.proj, _scale(b, "ls1"), b.norm2, b.mlp, _scale(b, "ls2"))
            for b in model.blocks
        ]

    def prefix(self) -> Tensor | None:
        registers = getattr(self.model, "reg_token", None) if self.is_timm else None
        registers = getattr(self.model, "register_tokens", None) if registers is None else registers
        return _prefix(self.model.cls_token, registers)

    def positions(self) -> Tensor:
        return self.model.pos_embed


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        TypeError: It is none of the supported ones.
    """
    family = _family_class(model)
    if family is None:
        raise TypeError(
            f"murf_fast.MultiResolutionEncoder: `model` must be one of {SUPPORTED}, got {type(model).__name__}"
        )
    return family(model)


def is_supported(model: nn.Module) -> bool:
    return _family_class(model) is not None


def _family_class(model: nn.Module) -> type[Family] | None:
    kind = type(model).__name__
    if kind in ("Dinov2Model", "Dinov2WithRegistersModel"):
        return HuggingFaceDinov2
    if kind == "DINOv3ViTModel":
        return HuggingFaceDinov3
    if kind in ("SiglipVisionModel", "Siglip2VisionModel"):
        return HuggingFaceSiglip
    if kind in ("DinoVisionTransformer", "VisionTransformer") and _is_plain(model):
        return Hub
    return None


def _is_plain(model: nn.Module) -> bool:
    """Whether a hub or timm ViT is made of the parts above: rotary DINOv3, chunked blocks, q/k norms and others not."""
    if not all(hasattr(model, name) for name in ("patch_embed", "blocks", "pos_embed", "cls_token", "norm")):
        return False
    if hasattr(model, "rope") or hasattr(model, "rope_embed") or getattr(model, "pos_embed", None) is None:
        return False
    return all(
        hasattr(b, "attn")
        and hasattr(b.attn, "qkv")
        and all(isinstance(getattr(b.attn, n, nn.Identity()), nn.Identity) for n in ("q_norm", "k_norm", "norm"))
        for b in model.blocks
    ) and all(isinstance(getattr(model, n, nn.Identity()), nn.Identity) for n in ("norm_pre", "patch_drop"))


def _attention(attention: nn.Module) -> tuple[tuple[nn.Module, ...], nn.Module]:
    """((q, k, v), output) under the names of transformers 5, of its 4.x Dinov2 and of Siglip."""
    if hasattr(attention, "q_proj"):
        output = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
        return (attention.q_proj, attention.k_proj, attention.v_proj), output
    inner = attention.attention
    return (inner.query, inner.key, inner.value), attention.output.dense


def _scale(block: nn.Module, name: str) -> nn.Module | None:
    module = getattr(block, name, None)
    return None if isinstance(module, nn.Identity) else module


def _prefix(cls_token: Tensor | None, registers: Tensor | None) -> Tensor | None:
    parts = [t[0] for t in (cls_token, registers) if t is not None]
    return torch.cat(parts) if parts else None


def _square(size: tuple[int, int]) -> int:
    if size[0] != size[1]:
        raise ValueError(f"murf_fast.MultiResolutionEncoder: `model` must have square patches, got {tuple(size)}")
    return size[0]
