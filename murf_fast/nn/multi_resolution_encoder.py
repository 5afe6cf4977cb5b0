"""A frozen ViT at several resolutions in one packed pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from murf_fast.nn import _attention, _blocks
from murf_fast.nn._families import Family, family_of
from murf_fast.ops import _checks
from murf_fast.ops.patch_embed import PackedTokens, patch_embed

ROUNDINGS = ("floor", "murf")


@dataclass(frozen=True)
class MultiResolutionFeatures:
    """What an encoder returns. Lists run over resolutions and, within one, over the chosen layers (MuRF's order).

    Attributes:
        maps: (B, D, h_s, w_s) each: channels_last views of the token buffers.
        cls: (B, D) each, or None for models without a CLS token; as the heads take them.
        tokens: The packed tokens of every chosen layer.
    """

    maps: list[Tensor]
    cls: list[Tensor | None]
    tokens: list[PackedTokens]


class MultiResolutionEncoder(nn.Module):
    """Every resolution of an image batch through one ViT, with the model's own parameters (shared, not copied).

    Equal to running ``model`` once per resolution on the resized, normalized images: all token-wise work sees one
    packed buffer, attention sees each sequence by itself.

    Args:
        model: transformers Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, SiglipVisionModel or
            Siglip2VisionModel, or the DINOv2 hub's or timm's VisionTransformer (without rotary positions or q/k norms).
        sizes: (height, width) in pixels per resolution, or one integer for a square. Or
        scales: factors of the image's size, which ``rounding`` turns into pixels.
        rounding: ``"floor"``: the largest multiple of the patch (and tiles) within ``scale * size``; ``"murf"``:
            ``ceil(scale * size)`` pixels, of which patches beyond the last whole one are dropped, as in MuRF.
        layers: 0-based indices of the blocks whose outputs are wanted; negative ones count from the end. None: the
            last. transformers' ``hidden_states[k]`` is layer ``k - 1`` with ``norm=False``.
        norm: Apply the model's final norm to every chosen layer.
        tiles: Per resolution, t: t x t tiles as sequences of their own (S2, SigLIP-HD). CLS tokens are averaged.
        remainder: For ``sizes``, as for :func:`patch_embed`: ``"raise"`` or ``"drop"``.
        mode, antialias, mean, std: As for :func:`image_to_patches`. Without ``mean`` and ``std`` images are taken as
            they are (uint8 divided by 255).
        attention: ``"sdpa"``: one scaled_dot_product_attention per distinct grid. ``"varlen"``: one launch of
            ``torch.nn.attention.varlen`` for all sequences (CUDA, bfloat16 and float16).

    Raises:
        TypeError, ValueError: An argument is wrong (an unsupported model: the supported ones are listed).

    Memory (no gradients wanted): four to five times the tokens of all resolutions, beside one copy per chosen layer.
    Hooks on the model's submodules see rows of the packed buffer, on CPUs in chunks.

    Source: MuRF, section 3; SigLIP-HD, section 2.
    """

    def __init__(
        self,
        model: nn.Module,
        sizes: Sequence[int | tuple[int, int]] | None = None,
        *,
        scales: Sequence[float] | None = None,
        rounding: str = "floor",
        layers: Sequence[int] | None = None,
        norm: bool = True,
        tiles: Sequence[int] | None = None,
        remainder: str = "raise",
        mode: str = "bilinear",
        antialias: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        what = "MultiResolutionEncoder"
        self.family: Family = family_of(model)
        self.model = model
        if (sizes is None) == (scales is None):
            raise ValueError(f"murf_fast.{what}: give either `sizes` or `scales`")
        if rounding not in ROUNDINGS:
            raise ValueError(f"murf_fast.{what}: `rounding` must be one of {ROUNDINGS}, got {rounding!r}")
        self.sizes = None if sizes is None else [tuple(_checks.grid(what, "sizes", size)) for size in sizes]
        self.scales = None if scales is None else _checks.numbers(what, "scales", scales)
        if self.scales is not None and not all(scale > 0 for scale in self.scales):
            raise ValueError(f"murf_fast.{what}: `scales` must be > 0, got {list(scales)}")
        self.rounding, self.norm, self.tiles = rounding, norm, None if tiles is None else list(tiles)
        self.remainder = "drop" if scales is not None else remainder
        if attention not in _attention.KINDS:
            raise ValueError(f"murf_fast.{what}: `attention` must be one of {_attention.KINDS}, got {attention!r}")
        self.attention = attention
        depth = len(self.family.layers)
        asked = [depth - 1] if layers is None else list(layers)
        asked = [_checks.integer(what, "layers", i) for i in asked]
        if not asked or any(not -depth <= i < depth for i in asked):
            raise ValueError(f"murf_fast.{what}: `layers` must be indices of {depth} blocks, got {layers!r}")
        self.layers = [i % depth for i in asked]
        self.resize = {"mode": mode, "antialias": antialias, "mean": mean, "std": std}

    def sizes_for(self, height: int, width: int) -> list[tuple[int, int]]:
        """Pixels (height, width) of every resolution of an image."""
        if self.sizes is not None:
            return self.sizes
        if self.rounding == "murf":
            return [(math.ceil(height * s), math.ceil(width * s)) for s in self.scales]
        tiles = self.tiles or [1] * len(self.scales)
        units = [self.family.patch_size * t for t in tiles]
        return [
            (int(height * s) // unit * unit, int(width * s) // unit * unit)
            for s, unit in zip(self.scales, units, strict=True)
        ]

    def forward(self, images: Tensor) -> MultiResolutionFeatures:
        """Features of images (B, 3, H, W) or (B, H, W, 3), uint8 or floating point; see :class:`PackedTokens`."""
        packed = self.embed(images)
        outputs = _blocks.run(
            packed, self.family.layers, self.family.heads, self._rotations(packed), set(self.layers), self.attention
        )
        if self.norm:
            outputs = {i: self.family.final_norm(tokens) for i, tokens in outputs.items()}
        tokens = [packed.with_tokens(outputs[i]) for i in self.layers]
        resolutions = range(len(packed))
        return MultiResolutionFeatures(
            maps=[t.map(s) for s in resolutions for t in tokens],
            cls=[t.prefix_tokens(s)[:, 0] if packed.prefix else None for s in resolutions for t in tokens],
            tokens=tokens,
        )

    def embed(self, images: Tensor) -> PackedTokens:
        """The tokens before the first block."""
        family = self.family
        self._check_attention(family.projection.weight)
        if self.model.training and family.augments_positions:
            raise ValueError(
                "murf_fast.MultiResolutionEncoder: `model` shifts or rescales its rotary positions at random in "
                "training mode; call model.eval()"
            )
        if self.model.training and any(_drops(module) for module in self.model.modules()):
            raise ValueError(
                "murf_fast.MultiResolutionEncoder: `model` has dropout and is in training mode; call model.eval()"
            )
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"murf_fast.MultiResolutionEncoder: `images` must be (B, 3, H, W) or (B, H, W, 3), got {got}"
            )
        height, width = images.shape[2:] if images.shape[1] == 3 else images.shape[1:3]
        return patch_embed(
            images,
            self.sizes_for(height, width),
            family.projection.weight,
            family.projection.bias,
            family.positions(),
            patch_size=family.patch_size,
            flavor=family.flavor,
            num_prefix_tokens=family.num_position_prefix,
            source_grid=family.source_grid,
            prefix=family.prefix(),
            tiles=self.tiles,
            remainder=self.remainder,
            layout=family.layout,
            **self.resize,
        )

    def _check_attention(self, weight: Tensor) -> None:
        reasons = _attention.varlen_reasons(weight.device, weight.dtype) if self.attention == "varlen" else []
        if reasons:
            raise ValueError(
                f'murf_fast.MultiResolutionEncoder: `attention="varlen"` cannot be used: {"; ".join(reasons)}'
            )

    def _rotations(self, packed: PackedTokens) -> list[tuple[Tensor, Tensor] | None]:
        tokens = packed.tokens
        return [self.family.rotation(grid, tokens.dtype, tokens.device) for grid in packed.grids]


def _drops(module: nn.Module) -> bool:
    """Whether a module is random in training: dropout, of attention too, and stochastic depth."""
    rates = (getattr(module, name, 0) for name in ("p", "drop_prob", "attention_dropout", "dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
