"""A frozen ViT at several resolutions in one packed pass."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from murf_fast.annotations import Attention, Keep, Mode, Remainder, Rounding, Sizes
from murf_fast.nn._signatures import has_global_hooks, is_customized, signature
from murf_fast.nn.vit import _attention, _blocks, _images, _mixed, _resolutions
from murf_fast.nn.vit._inputs import Images, ImageSizes, images_of
from murf_fast.nn.vit._verify import packable_parts
from murf_fast.nn.vit.families import resolved
from murf_fast.nn.vit.families._family import Family, Rotation
from murf_fast.ops import _checks
from murf_fast.ops.patch_embed import PackedTokens, cut_sequences
from murf_fast.ops.resample_pos_embed import KEEPS
from murf_fast.scales import Ratio

WHAT = "MultiResolutionEncoder"
ROUNDINGS = ("floor", "murf")

# Patches of a pass over a list of images. Of 1024, 2048, 4096 and 8192 that of CPUs was the fastest on one thread of an
# AMX core (ViT-S, 32 images of 98 to 336 pixels), by little in float32, in a trial by hand.
# A GPU's were not measured: 32768 rows are two waves of tiles of 128 x 128 on 132 multiprocessors for a product of one
# such tile's columns, many more for all that a model has, and hold 32 images of 448 x 448 in patches of 14.
CPU_TOKENS, OTHER_TOKENS = 4096, 32768

# The packable parts of models, as their first encoder found them: classes, no reference to a model.
_verified: weakref.WeakKeyDictionary[nn.Module, frozenset[Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class MultiResolutionFeatures:
    """What an encoder returns. Lists run over resolutions and, within one, over the chosen layers (MuRF's order).

    Attributes:
        maps: (B, D, h_s, w_s) each: channels_last views of the token buffers.
        cls: (B, D) each, or None for models without a CLS token; as the heads take them.
        tokens: The packed tokens of every chosen layer.
        attentions: (B, heads, h_s, w_s) each, float32: how much CLS attends to every patch in the block, if asked for.
    """

    maps: list[Tensor]
    cls: list[Tensor | None]
    tokens: list[PackedTokens]
    attentions: list[Tensor] | None = None


class MultiResolutionEncoder(nn.Module):
    """Every resolution of an image batch through one ViT, with the model's own parameters (shared, not copied).

    Equal to running ``model`` once per resolution on the resized, normalized images: all token-wise work sees one
    packed buffer, attention sees each sequence by itself.

    Every pass looks the modules up in the model as it is then. A block whose classes are those of a block that was
    there at construction, and into which nobody has put a hook, a ``forward``, a checkpoint or another module, runs
    packed, by its parts. Every other block, and embeddings, encoder and norm likewise, is called as the model calls it,
    once per resolution, with (sequences, tokens, channels) and the model's arguments: adapters, quantized layers,
    hooks (those on all modules too), compiled and checkpointed modules and DataParallel's replicas work as in the
    model's own forward, at the speed of the model run once per resolution. What is in place at construction runs packed
    if that gives the same. The model itself is never called: hooks on it, or a ``forward`` of the instance, are
    refused; what a model does behind its final norm (heads) is not run.

    Args:
        model: A vision transformer. Of transformers Dinov2Model and Dinov2Backbone, with and without registers,
            DINOv3ViTModel and DINOv3ViTBackbone, CLIPVisionModel, SiglipVisionModel, Siglip2VisionModel, ViTModel (DINO
            too), DeiTModel, IJepaModel and RadioModel; the models of the DINO, DINOv2 and DINOv3 hubs; timm's
            VisionTransformer and Eva (with its DINOv3); the image towers of OpenCLIP and of OpenAI's CLIP. Or what
            holds one: a compiled model, DataParallel, a frozen DistributedDataParallel, and models with heads or a text
            tower behind which one of these is (CLIPModel, Dinov2ForImageClassification, timm in OpenCLIP, ...); of
            them only the vision transformer is run and kept, by its parts.
        sizes: A list, for every resolution (height, width) in pixels or one integer for a square; one integer alone is
            one square resolution. Or
        scales: factors of the image's size, which ``rounding`` turns into pixels: the numbers as they are written, 0.7
            being 7/10 and not the float next to it.
        rounding: ``"floor"``: the largest multiple of the patch (and tiles) within ``scale * size``; ``"murf"``:
            ``ceil(scale * size)`` pixels, of which patches beyond the last whole one are dropped, as in MuRF.
        layers: 0-based indices of the blocks whose outputs are wanted; negative ones count from the end. None: the
            last. transformers' ``hidden_states[k]`` is layer ``k - 1`` with ``norm=False``.
        norm: Apply the model's final norm to every chosen layer. None: where the model's own last tokens have it,
            which is everywhere but in CLIP, whose norm is that of the pooled token, and in RadioModel, which has none.
        tiles: Per resolution (rows, columns), or one integer for as many of both: so many tiles as sequences of their
            own (S2, SigLIP-HD, AnyRes). CLS tokens are averaged.
        remainder: For ``sizes``, as for :func:`patch_embed`: ``"raise"`` or ``"drop"``.
        mode, antialias, mean, std: As for :func:`image_to_patches`. Without ``mean`` and ``std`` images are taken as
            they are (uint8 divided by 255), which is right for normalized ones and for RadioModel, which normalizes
            them itself; others are warned of, once per model.
        attention: ``"sdpa"``: one scaled_dot_product_attention per distinct grid. ``"varlen"`` and ``"xformers"``: one
            launch for all sequences, of ``torch.nn.attention.varlen`` (CUDA, bfloat16 and float16) or of
            ``xformers.ops.memory_efficient_attention`` (CUDA) with its ``BlockDiagonalMask``. None: in every call
            "varlen" if it can be used with the model as it is then, else "xformers", else "sdpa"; under autocast,
            compilers, ``torch.func`` and forward-mode derivatives "sdpa". The module's ``repr`` says which.
        attentions: Also return what CLS attends to, in every chosen layer.
        keep_positions: Whether resized tables of positions are kept from pass to pass, as for
            :func:`resample_pos_embed`: ``"checked"`` compares the table with a copy each time, and keeps nothing
            on other devices than CPUs; ``True`` trusts its version counter, there too; ``False`` resizes every time.
        tokens_per_pass: Patches of all resolutions that are in one pass over images of mixed sizes; images are sorted
            by size, and one that is larger by itself is a pass of its own. None: 4096 on CPUs, where twice as many gain
            nothing more, elsewhere 32768. A batch is one pass whatever its size.
        verify: Compare what is packed with the model's own forward, on a stand-in with the model's classes and
            settings, one block of each kind, numbers in place of the parameters and six patches, on the CPU. Blocks
            that differ are called, a model that differs is refused; one that cannot be run so is warned of. Hooks on
            the model are not called, hooks on all modules are.

    Raises:
        TypeError, ValueError: An argument is wrong (an unsupported model: what is unknown of it is named, or where in
            it a supported one is); in a call, before any work: images of another type or layout, smaller than a patch
            at some scale, or, normalized, more than 20 deviations from the mean, as floats in 0..255 are.

    ``torch.compile(fullgraph=True)`` takes it, and MuRF's methods: a second size of images compiles a graph for all, a
    third needs none. Models of the DINO and DINOv2 hubs without registers, whose positions are resized by a factor and
    not to a size, are compiled for every size of images if that decides those of the resolutions (``scales``).

    Memory: without gradients the tokens of all resolutions, one copy more for every layer after the first and beside a
    block that is called; on CPUs four times the tokens of a segment (the fewest whole sequences of 1024 tokens or
    more), the hidden layer of 512 tokens and, where weights are packed, those of a block; elsewhere four times all
    tokens and the hidden layer of 16384. Where gradients are needed what
    the model itself keeps, about twenty times the tokens per block. For images of mixed sizes that of one pass at a
    time (where gradients are needed of all), and the features of all.

    Source: MuRF, section 3; SigLIP-HD, section 2.
    """

    def __init__(
        self,
        model: nn.Module,
        sizes: Sizes | None = None,
        *,
        scales: Sequence[float] | None = None,
        rounding: Rounding = "floor",
        layers: Sequence[int] | None = None,
        norm: bool | None = None,
        tiles: Sizes | None = None,
        remainder: Remainder = "raise",
        mode: Mode = "bilinear",
        antialias: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: Attention | None = None,
        attentions: bool = False,
        keep_positions: Keep = "checked",
        tokens_per_pass: int | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__()
        what = WHAT
        model, self._family = resolved(model)
        self._forward_of_model = type(model).forward
        self.model = model
        family = self.family
        norm = family.norms_last if norm is None else norm
        for name, value in (("norm", norm), ("attentions", attentions), ("verify", verify)):
            _checks.flag(what, name, value)
        if norm and family.final_norm is None:
            raise ValueError(f"murf_fast.{what}: `norm` must be False or None, `model` has no final norm, got {norm}")
        if not isinstance(keep_positions, (bool, str)) or keep_positions not in KEEPS:
            raise ValueError(f"murf_fast.{what}: `keep_positions` must be one of {KEEPS}, got {keep_positions!r}")
        if attentions and family.prefix() is None:
            raise ValueError(f"murf_fast.{what}: `attentions` need a model with a CLS token")
        self.attentions, self.keep_positions = attentions, keep_positions
        if tokens_per_pass is not None:
            tokens_per_pass = _checks.integer(what, "tokens_per_pass", tokens_per_pass, 1)
        self._tokens_per_pass = tokens_per_pass
        if rounding not in ROUNDINGS:
            raise ValueError(f"murf_fast.{what}: `rounding` must be one of {ROUNDINGS}, got {rounding!r}")
        self.rounding, self.norm = rounding, norm
        self._set_resolutions(sizes, scales, tiles, remainder)
        if attention is not None and attention not in _attention.KINDS:
            raise ValueError(
                f"murf_fast.{what}: `attention` must be None or one of {_attention.KINDS}, got {attention!r}"
            )
        self.attention = attention
        self.layers = _indices(what, layers, len(family.blocks))
        _checks.mode(what, mode, antialias)
        mean, std = _images.three_numbers(what, "mean", mean), _images.three_numbers(what, "std", std)
        self.resize: dict[str, Any] = {"mode": mode, "antialias": antialias, "mean": mean, "std": std}
        self._packable = packable_parts(self._family, model, verify)

    @property
    def family(self) -> Family:
        """The model's parts as they are now."""
        return self._family(self.model)

    @property
    def tokens_per_pass(self) -> int:
        """Patches of all resolutions that are in one pass over images of mixed sizes, on the model's device."""
        is_on_cpu = self.family.like.device.type == "cpu"
        return self._tokens_per_pass or (CPU_TOKENS if is_on_cpu else OTHER_TOKENS)

    def at(self, sizes: Sizes, tiles: Sizes | None = None) -> MultiResolutionEncoder:
        """This encoder at other ``sizes`` and ``tiles``, which are checked as by the class; all else is shared."""
        other = copy.copy(self)
        other._set_resolutions(sizes, None, tiles, "raise")
        return other

    def _set_resolutions(self, sizes: Any, scales: Any, tiles: Any, remainder: Remainder) -> None:
        what = "MultiResolutionEncoder"
        if (sizes is None) == (scales is None):
            raise ValueError(f"murf_fast.{what}: give either `sizes` or `scales`")
        self.sizes = None if sizes is None else _resolutions.checked_sizes(what, "sizes", sizes)
        self._ratios: list[Ratio] = [] if scales is None else _resolutions.checked_scales(what, scales)
        self.scales: list[float] | None = None if scales is None else [n / d for n, d in self._ratios]
        self.tiles = _resolutions.checked_tiles(what, tiles, len(self.sizes or self.scales or ()))
        self.remainder: Remainder = "drop" if scales is not None else remainder
        if self.sizes is not None:
            _resolutions.check_whole_patches(what, self.sizes, self._units(), self.tiles, remainder)

    def sizes_for(self, height: int, width: int) -> list[tuple[int, int]]:
        """Pixels (height, width) of every resolution of an image.

        Scales are the numbers that were written, and multiplied exactly: 0.7 times 180 is 126.

        Raises:
            ValueError: A resolution is smaller than a patch; the message names scale, image and patch.
        """
        if self.sizes is not None:
            return self.sizes
        what = "MultiResolutionEncoder"
        return _resolutions.scaled_sizes(what, self._ratios, self._units(), (height, width), self.rounding)

    def _units(self) -> list[tuple[int, int]]:
        """Pixels of a patch times tiles, per resolution and axis."""
        patch = self.family.patch_size
        return [(patch * h, patch * w) for h, w in self.tiles or [(1, 1)] * len(self.sizes or self.scales or ())]

    @overload
    def forward(self, images: Tensor, *, image_sizes: None = None, merge: bool = True) -> MultiResolutionFeatures: ...
    @overload
    def forward(
        self, images: Sequence[Tensor], *, image_sizes: None = None, merge: bool = True
    ) -> list[MultiResolutionFeatures]: ...
    @overload
    def forward(
        self, images: Images, *, image_sizes: ImageSizes | None = None, merge: bool = True
    ) -> MultiResolutionFeatures | list[MultiResolutionFeatures]: ...
    def forward(
        self, images: Images, *, image_sizes: ImageSizes | None = None, merge: bool = True
    ) -> MultiResolutionFeatures | list[MultiResolutionFeatures]:
        """Features at every resolution, of a batch or of images of mixed sizes.

        Args:
            images: A batch (B, 3, H, W) or (B, H, W, 3) on the model's device; uint8 or any floating-point dtype. Or a
                list of single images, (3, H, W) or (H, W, 3), each of its own size and dtype. Or what a processor of
                transformers returns, a dict with ``pixel_values`` (normalized already: leave ``mean`` and ``std`` out)
                as a batch or a list; with a ``pixel_mask`` (B, H, W) a padded batch; with ``spatial_shapes`` (B, 2),
                and ``pixel_attention_mask`` (B, N) or without, the patches (B, N, 3 p p) of NaFlex for
                Siglip2VisionModel, of which scale 1 is the model's own input. They get no gradient, and must not want
                one.
            image_sizes: (height, width) in pixels of every image in a batch that is padded at the bottom and right.
            merge: Put maps of tiles together (a copy of each); else they are views, (tiles B, D, h, w), tile-major.

        Returns:
            :class:`MultiResolutionFeatures` in the dtype of the model (under autocast, as its modules give them);
            differentiable with respect to the model's parameters. For everything but a batch a list of them in the
            order of the images, each equal to that of the image as a batch of one, in memory of its own.

        Raises:
            TypeError, ValueError: As the class says; the message names the argument, the image or the part of the
                model. All images of a list are checked before the first is encoded.
        """
        _checks.flag("MultiResolutionEncoder", "merge", merge)
        family = self._checked_family()
        images = images_of(WHAT, images, image_sizes, family)
        if not isinstance(images, Tensor):
            found = {}
            for of_pass in self._passes(family, images, self._checked_sizes(family, images), merge):
                found.update(of_pass)
            return [found[i] for i in range(len(images))]
        packed, rotations, owns = self._embed(family, [images], self._checked_sizes(family, [images], is_batch=True))
        outputs, seen = self._outputs(family, packed, rotations, owns)
        return self._features([packed.with_tokens(tokens) for tokens in outputs], seen, merge)

    if TYPE_CHECKING:
        __call__ = forward

    def passes(
        self, images: Images, *, image_sizes: ImageSizes | None = None, merge: bool = True
    ) -> Iterator[dict[int, MultiResolutionFeatures]]:
        """What :meth:`forward` returns for images of mixed sizes, pass by pass: by index, small images first.

        For lists whose features are not wanted all at once; arguments and errors are those of :meth:`forward`, and
        images are checked before the first pass.

        Memory: that of one pass, see ``tokens_per_pass``, and its features.
        """
        family = self._checked_family()
        images = images_of(WHAT, images, image_sizes, family)
        if isinstance(images, Tensor):
            raise TypeError(f"murf_fast.{WHAT}: `images` must be a list or a padded batch for `passes`, got one batch")
        _checks.flag(WHAT, "merge", merge)
        return self._passes(family, images, self._checked_sizes(family, images), merge)

    def _passes(
        self, family: Family, images: list[Tensor], sizes: list[list[tuple[int, int]]], merge: bool
    ) -> Iterator[dict[int, MultiResolutionFeatures]]:
        """The features of a list, pass by pass."""
        patch = family.patch_size
        grids = [[(h // patch, w // patch) for h, w in its_sizes] for its_sizes in sizes]
        for indices in _mixed.passes(grids, self.tokens_per_pass):
            features = self._of_list(family, [images[i] for i in indices], [sizes[i] for i in indices], merge)
            yield dict(zip(indices, features, strict=True))

    def _of_list(
        self, family: Family, images: list[Tensor], sizes: list[list[tuple[int, int]]], merge: bool
    ) -> list[MultiResolutionFeatures]:
        """One pass over images of mixed sizes, in which sequences of one grid lie together."""
        by_grid = _mixed.ByGrid.of(*self._embed(family, images, sizes)[:2])
        outputs, seen = self._outputs(family, by_grid.packed, by_grid.rotations, True)
        found, resolutions = [], len(sizes[0])
        for i in range(len(images)):
            its_outputs = [by_grid.image(i, resolutions, values) for values in outputs]
            its_seen = seen and [by_grid.image(i, resolutions, values).tokens for values in seen]
            found.append(self._features(its_outputs, its_seen, merge))
        return found

    def _outputs(
        self, family: Family, packed: PackedTokens, rotations: list[Rotation | None], owns: bool
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """(T, D) of every chosen layer, normed if asked for, and (T, heads) of what CLS attends to, likewise."""
        attention = self._attention_for(family)
        seen: dict[int, Tensor] | None = {} if self.attentions else None
        outputs = _blocks.run(
            packed, family, rotations, set(self.layers), self._packable, attention, owns=owns, attentions=seen
        )
        if self.norm:
            outputs = {i: self._normed(family, packed.with_tokens(tokens)) for i, tokens in outputs.items()}
        return [outputs[i] for i in self.layers], [seen[i] for i in self.layers] if seen else None

    def _features(self, tokens: list[PackedTokens], seen: list[Tensor] | None, merge: bool) -> MultiResolutionFeatures:
        resolutions = range(len(tokens[0]))
        return MultiResolutionFeatures(
            maps=[t.map(s, merge=merge) for s in resolutions for t in tokens],
            cls=[t.prefix_tokens(s)[:, 0] if t.prefix else None for s in resolutions for t in tokens],
            tokens=tokens,
            attentions=seen and [tokens[0].with_tokens(x).map(s) for s in resolutions for x in seen],
        )

    def embed(self, images: Tensor) -> PackedTokens:
        """The tokens before the first block, of all resolutions of a batch; errors as for :meth:`forward`."""
        family = self._checked_family()
        return self._embed(family, [images], self._checked_sizes(family, [images], is_batch=True))[0]

    def _checked_sizes(
        self, family: Family, batches: list[Tensor], *, is_batch: bool = False
    ) -> list[list[tuple[int, int]]]:
        """Pixels of every resolution of every batch (or image of a list), all of which fit the model as it is."""
        self._attention_for(family)  # what cannot be used is refused before any work
        if self.model.training and family.augments_positions:
            raise ValueError(
                "murf_fast.MultiResolutionEncoder: `model` shifts or rescales its rotary positions at random in "
                "training mode; call model.eval()"
            )
        if self.model.training and any(_drops(module) for module in self.model.modules()):
            raise ValueError(
                "murf_fast.MultiResolutionEncoder: `model` has dropout and is in training mode; call model.eval()"
            )
        sizes = []
        for i, images in enumerate(batches):
            size = self._check_images(family, images, "`images`" if is_batch else f"`images[{i}]`")
            try:
                sizes.append(self.sizes_for(*size))
            except ValueError as error:
                if is_batch:
                    raise
                raise ValueError(f"{error}; it is `images[{i}]`") from error
        return sizes

    def _embed(
        self, family: Family, batches: list[Tensor], sizes: list[list[tuple[int, int]]]
    ) -> tuple[PackedTokens, list[Rotation | None], bool]:
        """The tokens before the first block, batch by batch (or image by image), their rotations, and whether the
        tokens are in nobody else's hands.
        """
        hooked = has_global_hooks()
        calls = hooked or any(signature(module) not in self._packable for module in family.embedders)
        calls_rope = family.rope is not None and (hooked or signature(family.rope) not in self._packable)
        if calls or calls_rope:
            return self._called(family, batches, sizes)
        packed = family.embed(
            batches, sizes, tiles=self.tiles, remainder=self.remainder, keep=self.keep_positions, **self.resize
        )
        return packed, self._rotations(packed, family), True

    def _called(
        self, family: Family, batches: list[Tensor], sizes: list[list[tuple[int, int]]]
    ) -> tuple[PackedTokens, list[Rotation | None], bool]:
        """:meth:`_embed` by the embeddings' own calls, one for every batch and resolution."""
        tokens, blocks, rotations, start = [], [], [], 0
        prefix = 0 if (prefix := family.prefix()) is None else len(prefix)
        for images, its_sizes in zip(batches, sizes, strict=True):
            cut = cut_sequences(
                images,
                its_sizes,
                patch_size=family.patch_size,
                prefix=prefix,
                tiles=self.tiles,
                remainder=self.remainder,
                layout=family.layout,
                dtype=family.like.dtype,
                **self.resize,
            )
            for block, patches in cut:
                blocks.append(replace(block, start=start))
                start += block.sequences * block.length(prefix)
                tokens.append(family.call_embeddings(patches, block.grid).flatten(0, 1))
                rotations.append(family.call_rope(family.pixels(patches, block.grid), block.grid))
        return PackedTokens(torch.cat(tokens), tuple(blocks), prefix), rotations, len(tokens) > 1

    def _check_images(self, family: Family, images: Tensor, name: str) -> tuple[int, int]:
        """(height, width) of images that fit the model."""
        what, device = WHAT, family.like.device
        size = _images.size_of(what, images)
        if torch.is_grad_enabled() and images.requires_grad:
            raise ValueError(
                f"murf_fast.{what}: {name} must want no gradient, images have none; detach them or call under "
                "torch.no_grad()"
            )
        if images.device != device:
            raise ValueError(
                f"murf_fast.{what}: {name} must be on the device of `model`, {device}, got {images.device}"
            )
        options: dict[str, Any] = {
            "mean": self.resize["mean"],
            "std": self.resize["std"],
            "normalizes": family.kind.normalizes,
        }
        _images.check_values(what, images, self.model, name=name, **options)
        return size

    def _normed(self, family: Family, packed: PackedTokens) -> Tensor:
        """The final norm, of all rows at once if it is what it was at construction."""
        if not has_global_hooks() and signature(family.final_norm) in self._packable:
            return family.final_norm(packed.tokens)
        return torch.cat([family.final_norm(packed.block(s)).flatten(0, 1) for s in range(len(packed))])

    def _checked_family(self) -> Family:
        model = self.model
        if type(model).forward is not self._forward_of_model or is_customized(model):
            raise ValueError(
                f"murf_fast.MultiResolutionEncoder: `model` ({type(model).__name__}) has hooks or a forward of its "
                "own, or another class than at construction, and is never called itself: only its parts are. Put "
                "hooks on its parts, or compile the encoder"
            )
        family = self.family
        if max(self.layers) >= len(family.blocks):
            raise ValueError(
                f"murf_fast.MultiResolutionEncoder: `layers` {self.layers} must be indices of `model`'s blocks, of "
                f"which {len(family.blocks)} are left"
            )
        return family

    def _attention_for(self, family: Family) -> str:
        """How sequences attend in the model as it is now."""
        like = family.like
        if self.attention == "sdpa" or (self.attention is None and like.device.type != "cuda"):
            return "sdpa"
        of_model = (like.device, like.dtype, family.head_width)
        if self.attention is None:
            return _attention.chosen(*of_model)
        reasons = _attention.reasons_against(self.attention, *of_model)
        if reasons:
            raise ValueError(
                f'murf_fast.MultiResolutionEncoder: `attention="{self.attention}"` cannot be used: {"; ".join(reasons)}'
            )
        return self.attention

    def extra_repr(self) -> str:
        where = f"sizes={self.sizes}" if self.scales is None else f"scales={self.scales}"
        chosen = f" ({self._attention_for(self.family)!r} now)" if self.attention is None else ""
        return f"{where}, layers={self.layers}, norm={self.norm}, attention={self.attention!r}{chosen}"

    def _rotations(self, packed: PackedTokens, family: Family | None = None) -> list[Rotation | None]:
        family, tokens = family or self.family, packed.tokens

        def of(grid: tuple[int, int]) -> Rotation | None:
            return family.rotation(grid, tokens.dtype, tokens.device)

        if torch.compiler.is_compiling():  # which would make a graph for every size that is looked up
            return [of(grid) for grid in packed.grids]
        of_grid = {grid: of(grid) for grid in dict.fromkeys(packed.grids)}
        return [of_grid[grid] for grid in packed.grids]


def encoder_of(model: nn.Module, sizes: Sizes, **options: Any) -> MultiResolutionEncoder:
    """For functions that make an encoder in every call: what a model's first one verified, the others take over."""
    verified = _verified.get(model)
    wanted = options.pop("verify", True)
    encoder = MultiResolutionEncoder(model, sizes, verify=wanted and verified is None, **options)
    if wanted and verified is not None:
        encoder._packable = verified
    elif wanted:
        _verified[model] = encoder._packable
    return encoder


def _indices(what: str, layers: Any, depth: int) -> list[int]:
    """Indices of blocks, counted from the front; the last if None."""
    if layers is not None and not _checks.is_sequence(layers):
        raise TypeError(f"murf_fast.{what}: `layers` must be a list of indices, got {layers!r}")
    asked = [depth - 1] if layers is None else [_checks.integer(what, "layers", i, -math.inf, math.inf) for i in layers]
    if not asked or not all(-depth <= i < depth for i in asked):
        raise ValueError(f"murf_fast.{what}: `layers` must be indices of {depth} blocks, got {layers!r}")
    return [i % depth for i in asked]


def _drops(module: nn.Module) -> bool:
    """Whether a module is random in training: dropout, of attention and of patches too, and stochastic depth."""
    names = ("p", "prob", "drop_prob", "sample_drop_ratio", "attention_dropout", "dropout")
    rates = (getattr(module, name, 0) for name in names)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
