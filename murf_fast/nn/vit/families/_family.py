"""What a packed pass needs to know of a vision transformer: where each family keeps its parts, and how it calls them.

A family is a view of a model as it is now, made anew for every pass: it holds modules of the user's model, never copies
of their parameters, and none of it outlives the pass. So whatever was put in the place of a module is what is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from murf_fast.ops.patch_embed import PackedTokens, patch_embed

Rotation = tuple[Tensor, Tensor]  # (cos, sin), (N, head dimension) each


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

    def embed(self, images: Tensor, sizes: Sequence[tuple[int, int]], **options) -> PackedTokens:
        """Tokens of all images at all sizes in one packed pass, with the ``options`` of :func:`patch_embed`."""
        return patch_embed(
            images,
            sizes,
            self.projection.weight,
            self.projection.bias,
            self.positions(),
            patch_size=self.patch_size,
            flavor=self.flavor,
            num_prefix_tokens=self.num_position_prefix,
            source_grid=self.source_grid,
            prefix=self.prefix(),
            layout=self.layout,
            **options,
        )

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


def prefix_of(cls_token: Tensor | None, registers: Tensor | None) -> Tensor | None:
    parts = [t[0] for t in (cls_token, registers) if t is not None]
    return torch.cat(parts) if parts else None


def tokens_in(output: object) -> Tensor:
    """The tokens in what a block or an encoder returns."""
    return output if isinstance(output, Tensor) else output[0]


def convolutions_in(projection: nn.Module) -> list[nn.Conv2d]:
    return [module for module in projection.modules() if isinstance(module, nn.Conv2d)]


def patch_size_of(projection: nn.Module) -> int:
    """Pixels of a patch; of an adapter around the projection, those of the convolution in it."""
    size = projection.kernel_size if hasattr(projection, "kernel_size") else convolutions_in(projection)[0].kernel_size
    if size[0] != size[1]:
        raise ValueError(f"murf_fast.MultiResolutionEncoder: `model` must have square patches, got {tuple(size)}")
    return size[0]
