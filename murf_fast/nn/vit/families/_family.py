"""What a packed pass needs to know of a vision transformer: where it keeps its parts, and how it calls them.

A family is a view of a model as it is now, made anew for every pass: it holds modules of the user's model, never copies
of their parameters, and none of it outlives the pass. So whatever was put in the place of a module is what is used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from murf_fast.annotations import Layout as PatchLayout
from murf_fast.annotations import PositionFlavor
from murf_fast.nn._signatures import is_inert
from murf_fast.nn.vit.families._layout import Factor, Layout, Product, Weights, find, part
from murf_fast.ops.patch_embed import PackedTokens, patch_embed

if TYPE_CHECKING:
    from murf_fast.nn.vit._products import Products


class Rotation(NamedTuple):
    """Rotary positions of the patches of one grid, (N, head dimension) each."""

    cos: Tensor
    sin: Tensor
    is_interleaved: bool = False  # pairs are neighbours; else halves of a head
    rounds: bool = False  # queries and keys are rounded to the dtype of the rotation; else the wider of both is taken


@dataclass(frozen=True)
class Layer:
    """The modules of one pre-norm block that a packed pass calls.

    ``x + scale1(output(inner_norm(attention(projections(norm1(x))))))``, then ``x + scale2(mlp(norm2(x)))``.
    ``projections`` are (q, k, v), or one fused; ``query_norm`` and ``key_norm`` see one head at a time.
    """

    norm1: nn.Module
    projections: tuple[nn.Module | Product, ...]
    output: nn.Module
    scale1: nn.Module | Factor | None
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module | Factor | None
    heads: int
    scale: float | None = None  # of the scores; None: one over the root of a head's width
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    inner_norm: nn.Module | None = None

    def attention_branch(self, attended: Tensor, products: Products | None = None) -> Tensor:
        """What is added to the tokens of what their heads attended to, (T, D)."""
        attended = attended if self.inner_norm is None else self.inner_norm(attended)
        y = None if products is None else products.linear(attended, self.output)
        y = self.output(attended) if y is None else y
        return y if self.scale1 is None else self.scale1(y)

    def mlp_branch(self, x: Tensor, products: Products | None = None) -> Tensor:
        normed = self.norm2(x)
        y = self.mlp(normed) if products is None else products.mlp(normed, self.mlp)
        return y if self.scale2 is None else self.scale2(y)

    @property
    def modules(self) -> list[nn.Module]:
        parts = (self.norm1, *self.projections, self.query_norm, self.key_norm, self.inner_norm, self.output)
        parts = (*parts, self.scale1, self.norm2, self.mlp, self.scale2)
        # A layer whose weight is taken is not called; an attention that holds others of the parts is no part.
        parts = [p.owner if isinstance(p, Product) and not cast("nn.Module", p.owner)._modules else p for p in parts]
        return [p for p in parts if isinstance(p, nn.Module)]


class Family:
    """A model seen through the layout of its family; what is said here is that of a ViT with absolute positions."""

    source_grid: tuple[int, int] | None = None
    augments_positions = False  # at random in training
    checkpoints = False  # whether the model wraps each block in a checkpoint
    has_usual_attention = True  # or one of the user's, which only the model's own attention modules call
    is_batch_first = True  # or blocks take (N, S, D)

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        model = layout.root(model)
        self.model: Any = model
        self.kind = layout
        self.flavor: PositionFlavor | None = layout.flavor or None
        self.layout: PatchLayout = layout.patch_layout
        self.embedders = tuple(m for m in (find(model, path) for path in layout.embedders) if m is not None)
        self.pre_norm = active(find(model, layout.pre_norm))
        self.projection: Any = part(model, layout.projection)
        self.final_norm: Any = find(model, layout.norm)
        self.container: Any = find(model, layout.container)  # what calls the blocks, if no plain list
        self.blocks: Sequence[nn.Module] = part(model, layout.blocks)
        self.rope: Any = None  # if a packed pass does without its call
        self.patch_size: int = find(model, layout.patch_size) or patch_size_of(self.projection)

    @property
    def num_position_prefix(self) -> int:
        """Rows of the table of positions before the patches."""
        positions = self.positions()
        if positions is None:
            return 0
        if self.source_grid is not None:
            return positions.shape[-2] - self.source_grid[0] * self.source_grid[1]
        tokens = [find(self.model, path) for path in self.kind.prefix[: self.kind.positioned]]
        return sum(t.numel() // t.shape[-1] for t in tokens if t is not None)

    def layer(self, block: nn.Module) -> Layer:
        """The parts of a block. AttributeError: it is built otherwise."""
        at = self.kind.block
        return Layer(
            norm1=part(block, at.norm1),
            projections=_projections(block, at.projections),
            output=part(block, at.output),
            scale1=active(find(block, at.scale1)),
            norm2=part(block, at.norm2),
            mlp=part(block, at.mlp),
            scale2=active(find(block, at.scale2)),
            heads=part(block, at.heads),
            scale=find(block, at.scale),
            query_norm=active(find(block, at.query_norm)),
            key_norm=active(find(block, at.key_norm)),
            inner_norm=active(find(block, at.inner_norm)),
        )

    def prefix(self) -> Tensor | None:
        """(P, D): CLS, then registers."""
        tokens = [find(self.model, path) for path in self.kind.prefix]
        tokens = [t.reshape(-1, t.shape[-1]) for t in tokens if t is not None]
        return torch.cat(tokens) if tokens else None

    def positions(self) -> Tensor | None:
        """The table of absolute positions."""
        return find(self.model, self.kind.positions)

    def embed(self, images: Tensor | Sequence[Tensor], sizes: Sequence[Any], **options: Any) -> PackedTokens:
        """Tokens of all images at all sizes in one packed pass; arguments and ``options`` of :func:`patch_embed`."""
        packed = patch_embed(
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
        return packed if self.pre_norm is None else packed.with_tokens(self.pre_norm(packed.tokens))

    def rotation(self, grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Rotation | None:
        """Rotary positions of the patches of a grid."""
        return None

    def call_rope(self, pixels: Tensor, grid: tuple[int, int]) -> Rotation | None:
        """:meth:`rotation` by the model's own module, where a packed pass does without it."""
        if self.rope is None:
            return self.rotation(grid, pixels.dtype, pixels.device)
        return Rotation(*self.rope(pixels))

    def call_embeddings(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(S, P + N, D) by the model's own modules, from patches (S, N, 3 p p) in the family's order."""
        raise NotImplementedError

    def call_block(self, block: nn.Module, x: Tensor, rotation: Rotation | None) -> Tensor:
        """A block's output for (S, P + N, D), by its own call with the model's arguments."""
        raise NotImplementedError

    def call_container(self, x: Tensor, rotation: Rotation | None, wanted: Collection[int]) -> dict[int, Tensor]:
        """The ``wanted`` blocks' outputs for (S, P + N, D), by the container's own call."""
        raise NotImplementedError

    def call_model(self, model: nn.Module, patches: Tensor, grid: tuple[int, ...]) -> object:
        """What the model's own forward returns for patches (S, N, 3 p p) in the family's order."""
        raise NotImplementedError

    @property
    def norms_last(self) -> bool:
        """Whether the model's last tokens are those of its final norm."""
        return self.kind.is_normed and self.final_norm is not None

    @property
    def like(self) -> Tensor:
        """A tensor of the model's dtype and device."""
        weight = getattr(self.projection, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
        positions = self.positions()
        return cast("Tensor", self.prefix()) if positions is None else positions

    @property
    def width(self) -> int:
        """Channels of a token."""
        channels = getattr(self.projection, "out_channels", None)
        return self.projection.out_features if channels is None else channels

    @property
    def head_width(self) -> int:
        """Channels of a head in the first block; 0 if that is built otherwise and only called."""
        try:
            layer = self.layer(self.blocks[0])
            channels = cast("Any", layer.projections[0]).out_features
        except AttributeError:
            return 0
        return channels // (3 if len(layer.projections) == 1 else 1) // layer.heads

    def pixels(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(S, 3, h p, w p): the images that patches (S, N, 3 p p) were cut from."""
        p = self.patch_size
        if self.layout == "yxc":
            cut = patches.unflatten(2, (p, p, 3)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
        else:
            cut = patches.unflatten(2, (3, p, p)).unflatten(1, grid).permute(0, 3, 1, 4, 2, 5)
        return cut.flatten(4, 5).flatten(2, 3)


Make = Callable[[nn.Module], Family]


def left_out(family: Family, block: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The modules of a block that a packed pass does not call, and whether they hold some that it calls."""
    called = {id(m) for m in family.layer(block).modules}

    def walk(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
        holds = any(id(m) in called for m in module.modules())
        yield module, holds
        for child in module.children():
            if id(child) not in called:
                yield from walk(child)

    return walk(block)


def active(found: Any) -> Any:
    """An optional part of a block: None where it does nothing."""
    if isinstance(found, Tensor):
        return Factor(found)
    return None if found is None or is_inert(found) else found


def tokens_in(output: Any) -> Tensor:
    """The tokens in what a block or an encoder returns."""
    return output if isinstance(output, Tensor) else output[0]


def convolutions_in(projection: nn.Module) -> list[nn.Conv2d]:
    return [module for module in projection.modules() if isinstance(module, nn.Conv2d)]


def patch_size_of(projection: Any) -> int:
    """Pixels of a patch; of an adapter around the projection, those of the convolution in it."""
    size = projection.kernel_size if hasattr(projection, "kernel_size") else convolutions_in(projection)[0].kernel_size
    if size[0] != size[1]:
        raise ValueError(f"murf_fast.MultiResolutionEncoder: `model` must have square patches, got {tuple(size)}")
    return size[0]


def _projections(block: nn.Module, ways: tuple[tuple[str | Weights, ...], ...]) -> tuple[nn.Module | Product, ...]:
    for way in ways:
        found: tuple[Any, ...] = tuple(
            _product(block, at) if isinstance(at, Weights) else find(block, at) for at in way
        )
        if not any(f is None for f in found):
            return found
    raise AttributeError(f"{type(block).__name__} has none of `{ways}`")


def _product(block: nn.Module, at: Weights) -> Product | None:
    weight, biases = find(block, at.weight), [find(block, path) for path in at.biases]
    if weight is None or any(b is None for b in biases):
        return None
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    return Product(weight, bias, find(block, at.weight.rpartition(".")[0]))
