"""What a packed pass needs to know of a vision transformer: where each family keeps its parts, and how it calls them.

A family is a view of a model as it is now, made anew for every pass: it holds modules of the user's model, never copies
of their parameters, and none of it outlives the pass. So whatever was put in the place of a module is what is used.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from murf_fast.nn.vit._plain import is_inert
from murf_fast.ops.resample_pos_embed import resample_pos_embed

SUPPORTED = (
    "transformers Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, SiglipVisionModel and Siglip2VisionModel, and "
    "the VisionTransformer of the DINO and DINOv2 hubs and of timm"
)

Rotation = tuple[Tensor, Tensor]  # (cos, sin), (N, head dimension) each

# The attentions of transformers that all mean softmax(scale q k^T) v without a mask.
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass(frozen=True)
class Layer:
    """The modules of one pre-norm block that a packed pass calls.

    ``x + scale1(output(attention(projections(norm1(x)))))``, then ``x + scale2(mlp(norm2(x)))``. ``projections`` are
    (q, k, v), or one fused module.
    """

    norm1: nn.Module
    projections: tuple[nn.Module, ...]
    output: nn.Module
    scale1: nn.Module | None
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module | None
    heads: int
    scale: float | None  # of the scores; None: one over the root of a head's width

    @property
    def modules(self) -> list[nn.Module]:
        parts = (self.norm1, *self.projections, self.output, self.scale1, self.norm2, self.mlp, self.scale2)
        return [part for part in parts if part is not None]


class Family:
    """One backbone; the attributes are those of a ViT with absolute positions and no prefix tokens."""

    flavor: str | None = None
    layout = "cyx"
    num_position_prefix = 0  # rows of the table before the patches
    source_grid: tuple[int, int] | None = None
    augments_positions = False  # at random in training
    container: nn.Module | None = None  # what calls the blocks, if it is no plain list
    rope: nn.Module | None = None
    checkpoints = False  # whether the model wraps each block in a checkpoint
    has_usual_attention = True  # or one of the user's, which only the model's own attention modules call

    patch_size: int
    projection: nn.Module
    embedders: tuple[nn.Module, ...]  # called by the model before the first block, left out by a packed pass
    final_norm: nn.Module
    blocks: Sequence[nn.Module]

    def layer(self, block: nn.Module) -> Layer:
        """The parts of a block. AttributeError: it is built otherwise."""
        raise NotImplementedError

    def prefix(self) -> Tensor | None:
        """(P, D): CLS, then registers."""
        return None

    def positions(self) -> Tensor | None:
        """The table of absolute positions."""
        return None

    def rotation(self, grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Rotation | None:
        """(cos, sin), (N, head dimension) each, for the patches of a grid."""
        return None

    def call_rope(self, pixels: Tensor) -> Rotation | None:
        """:meth:`rotation` by the model's own module."""
        return None if self.rope is None else self.rope(pixels)

    def call_embeddings(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(S, P + N, D) by the model's own modules, from patches (S, N, 3 p p) in ``layout``."""
        raise NotImplementedError

    def call_block(self, block: nn.Module, x: Tensor, rotation: Rotation | None) -> Tensor:
        """A block's output for (S, P + N, D), by its own call with the model's arguments."""
        raise NotImplementedError

    def call_container(self, x: Tensor, rotation: Rotation | None, wanted: Collection[int]) -> dict[int, Tensor]:
        """The ``wanted`` blocks' outputs for (S, P + N, D), by the container's own call."""
        raise NotImplementedError

    def call_model(self, model: nn.Module, patches: Tensor, grid: tuple[int, int]) -> object:
        """What the model's own forward returns for patches (S, N, 3 p p) in ``layout``."""
        raise NotImplementedError

    @property
    def like(self) -> Tensor:
        """A tensor of the model's dtype and device."""
        weight = getattr(self.projection, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
        positions = self.positions()
        return self.prefix() if positions is None else positions

    @property
    def width(self) -> int:
        """Channels of a token."""
        channels = getattr(self.projection, "out_channels", None)
        return self.projection.out_features if channels is None else channels

    def pixels(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(S, 3, h p, w p): the images that patches (S, N, 3 p p) were cut from."""
        p = self.patch_size
        if self.layout == "yxc":
            cut = patches.unflatten(2, (p, p, 3)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
        else:
            cut = patches.unflatten(2, (3, p, p)).unflatten(1, grid).permute(0, 3, 1, 4, 2, 5)
        return cut.flatten(4, 5).flatten(2, 3)


class Transformers(Family):
    """What the families of transformers have in common."""

    def call_block(self, block, x, rotation):
        return _first(block(x, None))

    def call_container(self, x, rotation, wanted):
        return self._encoded(wanted, self.container, x)

    def call_model(self, model, patches, grid):
        return model(self.pixels(patches, grid))

    def _encoded(self, wanted: Collection[int], encoder: nn.Module, *arguments, **options) -> dict[int, Tensor]:
        last = len(self.blocks) - 1
        if set(wanted) == {last}:
            return {last: _first(encoder(*arguments, **options))}
        output = encoder(*arguments, **options, output_hidden_states=True)
        hidden = getattr(output, "hidden_states", None)
        if hidden is None or len(hidden) != last + 2:
            raise ValueError(
                f"murf_fast.MultiResolutionEncoder: `layers` must be the last block only: the model's "
                f"{type(encoder).__name__} has hooks or a forward of its own, and returns no hidden states"
            )
        return {i: _first(output) if i == last else hidden[i + 1] for i in wanted}


class HuggingFaceDinov2(Transformers):
    """Dinov2Model and Dinov2WithRegistersModel."""

    num_position_prefix = 1

    def __init__(self, model: nn.Module) -> None:
        self.embeddings = embeddings = model.embeddings
        self.flavor = "dinov2-reg" if hasattr(embeddings, "register_tokens") else "dinov2-hf"
        self.config = model.config
        self.has_usual_attention = _is_usual(model.config)
        self.embedders = (embeddings,)
        self.projection = embeddings.patch_embeddings.projection
        self.patch_size = _patch_size(self.projection)
        self.final_norm = model.layernorm
        self.container = model.encoder
        self.blocks = model.encoder.layer

    def layer(self, block):
        attention, *rest = _attention(block.attention, self.config)
        return Layer(block.norm1, *attention, block.layer_scale1, block.norm2, block.mlp, block.layer_scale2, *rest)

    def prefix(self) -> Tensor:
        return _prefix(self.embeddings.cls_token, getattr(self.embeddings, "register_tokens", None))

    def positions(self) -> Tensor:
        return self.embeddings.position_embeddings

    def call_embeddings(self, patches, grid):
        return self.embeddings(self.pixels(patches, grid))


class HuggingFaceDinov3(Transformers):
    """DINOv3ViTModel: rotary positions, none in the embeddings."""

    def __init__(self, model: nn.Module) -> None:
        self.embeddings, self.rope = model.embeddings, model.rope_embeddings
        self.config = model.config
        self.has_usual_attention = _is_usual(model.config)
        names = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
        self.augments_positions = any(getattr(model.config, name, None) is not None for name in names)
        self.embedders = (model.embeddings,)
        self.projection = model.embeddings.patch_embeddings
        self.patch_size = _patch_size(self.projection)
        self.final_norm = model.norm
        self.container = None if hasattr(model, "layer") else model.model  # transformers 4 | 5
        self.blocks = model.layer if self.container is None else self.container.layer

    def layer(self, block):
        attention, *rest = _attention(block.attention, self.config)
        return Layer(block.norm1, *attention, block.layer_scale1, block.norm2, block.mlp, block.layer_scale2, *rest)

    def prefix(self) -> Tensor:
        return _prefix(self.embeddings.cls_token, self.embeddings.register_tokens)

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
        return _first(block(x, position_embeddings=rotation))

    def call_container(self, x, rotation, wanted):
        return self._encoded(wanted, self.container, x, position_embeddings=rotation)


class HuggingFaceSiglip(Transformers):
    """SiglipVisionModel and Siglip2VisionModel (NaFlex): no prefix tokens."""

    def __init__(self, model: nn.Module) -> None:
        model = getattr(model, "vision_model", model)  # transformers 4 wraps the tower
        self.config = model.config
        self.has_usual_attention = _is_usual(model.config)
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
        attention, *rest = _attention(block.self_attn, self.config)
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


class Hub(Family):
    """The layout of the DINO and DINOv2 hubs and of timm: ``patch_embed.proj``, ``blocks.{i}.attn.qkv``, ``ls1.gamma``.

    They differ in their positions. timm's models have a ``pos_drop`` and their grid in ``patch_embed.grid_size``,
    DINO's the first only.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.patch_embed = model.patch_embed
        self.projection = model.patch_embed.proj
        self.patch_size = _patch_size(self.projection)
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
        return _prefix(self.model.cls_token, registers)

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
        return _first(block(x))

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


def family_of(model: nn.Module) -> type[Family]:
    """The family of a model.

    Raises:
        TypeError: It is none of the supported ones; the message says what it lacks.
    """
    kind, reason = _family_class(model)
    if kind is None:
        reason = f": {reason}" if reason else ""
        raise TypeError(
            f"murf_fast.MultiResolutionEncoder: `model` must be one of {SUPPORTED}, got {type(model).__name__}{reason}"
        )
    return kind


def is_supported(model: nn.Module) -> bool:
    return _family_class(model)[0] is not None


def left_out(family: Family, block: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The modules of a block that a packed pass does not call, and whether they hold some that it calls."""
    called = {id(part) for part in family.layer(block).modules}

    def walk(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
        holds = any(id(m) in called for m in module.modules())
        yield module, holds
        for child in module.children():
            if id(child) not in called:
                yield from walk(child)

    return walk(block)


FAMILIES = {
    "Dinov2Model": HuggingFaceDinov2,
    "Dinov2WithRegistersModel": HuggingFaceDinov2,
    "DINOv3ViTModel": HuggingFaceDinov3,
    "SiglipVisionModel": HuggingFaceSiglip,
    "Siglip2VisionModel": HuggingFaceSiglip,
    "DinoVisionTransformer": Hub,
    "VisionTransformer": Hub,
}


def _family_class(model: nn.Module) -> tuple[type[Family] | None, str]:
    """The family, or None and what is in its way."""
    kinds = type(model).__mro__
    # A class that torch derives from a model's (for a parametrization, say) has the model's forward.
    kind = next((k for k in kinds if k.__name__ in FAMILIES and k.forward is kinds[0].forward), None)
    if kind is None:
        return None, ""
    family = FAMILIES[kind.__name__]
    reason = _against_hub(model) if family is Hub else ""
    return (None, reason) if reason else (family, "")


def _against_hub(model: nn.Module) -> str:
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
    if not isinstance(model.patch_embed.proj, nn.Module) or not _convolutions(model.patch_embed.proj):
        return "its `patch_embed.proj` is no convolution"
    if hasattr(model.patch_embed, "backbone"):
        return "its `patch_embed` has a backbone"
    if any(isinstance(block, nn.ModuleList) for block in model.blocks):
        return "its blocks come in chunks"
    return ""


def _attention(
    attention: nn.Module, config: object
) -> tuple[tuple[tuple[nn.Module, ...], nn.Module], int, float | None]:
    """((q, k, v), output), heads and scale, under the names of transformers 5, of its 4.x Dinov2 and of Siglip."""
    if hasattr(attention, "q_proj"):
        inner = attention
        output = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
        parts = (attention.q_proj, attention.k_proj, attention.v_proj), output
    else:
        inner = attention.attention
        parts = (inner.query, inner.key, inner.value), attention.output.dense
    heads = getattr(inner, "num_heads", None) or getattr(inner, "num_attention_heads", config.num_attention_heads)
    return parts, heads, getattr(inner, "scaling", getattr(inner, "scale", None))


def _is_usual(config: object) -> bool:
    """Whether attention is one of transformers' own."""
    name = getattr(config, "_attn_implementation", None)
    if name is None or name.startswith("kernels-community/"):
        return True
    if name not in ATTENTIONS:
        return False
    loaded = sys.modules.get("transformers.modeling_utils")
    function = None if loaded is None else loaded.ALL_ATTENTION_FUNCTIONS.get(name)
    return function is None or getattr(function, "__module__", "").startswith("transformers.")


def _scale(block: nn.Module, name: str) -> nn.Module | None:
    module = getattr(block, name, None)
    return None if module is None or is_inert(module) else module


def _prefix(cls_token: Tensor | None, registers: Tensor | None) -> Tensor | None:
    parts = [t[0] for t in (cls_token, registers) if t is not None]
    return torch.cat(parts) if parts else None


def _first(output: object) -> Tensor:
    """The tokens in what a block or an encoder returns."""
    return output if isinstance(output, Tensor) else output[0]


def _convolutions(projection: nn.Module) -> list[nn.Conv2d]:
    return [module for module in projection.modules() if isinstance(module, nn.Conv2d)]


def _patch_size(projection: nn.Module) -> int:
    """Pixels of a patch; of an adapter around the projection, those of the convolution in it."""
    size = projection.kernel_size if hasattr(projection, "kernel_size") else _convolutions(projection)[0].kernel_size
    if size[0] != size[1]:
        raise ValueError(f"murf_fast.MultiResolutionEncoder: `model` must have square patches, got {tuple(size)}")
    return size[0]


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
