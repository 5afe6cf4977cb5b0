"""FeatSharp end to end: from images to features as fine as those of larger images, seen tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.annotations import SharpInput, Size
from murf_fast.nn._checkpoints import load_into
from murf_fast.nn._options import SharpArguments, SharpOptions
from murf_fast.nn.featsharp import _checkpoint
from murf_fast.nn.featsharp.bias_buffer import BiasBuffer
from murf_fast.nn.featsharp.conditional_bias import ConditionalBias
from murf_fast.nn.featsharp.phis import PHIS
from murf_fast.nn.featsharp.tiles import levels_of, merge_tiles, split_tiles
from murf_fast.nn.featsharp.upsampler import FeatSharpUpsampler, checked_inputs
from murf_fast.nn.vit import _images
from murf_fast.nn.vit.families import is_supported
from murf_fast.nn.vit.multi_resolution_encoder import MultiResolutionEncoder
from murf_fast.ops import _checks
from murf_fast.ops.patch_embed import PackedTokens
from murf_fast.ops.resize import resize

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FeatSharp(nn.Module):
    """A frozen encoder's features, ``factor`` times as fine: of the whole image and of its tiles, in one batch.

    ``f(view) = debias(normalize(encoder(view)))`` of the whole image and of the tiles of :func:`split_tiles`, all at
    the encoder's own resolution; then ``upsampler(f(whole), image, merge(f(tiles)))``.

    Args:
        encoder: A vision transformer that :class:`MultiResolutionEncoder` takes, or such an encoder (of one layer): all
            views then are one packed pass. Or any callable from views (n, 3, height, width) to maps (n, C, h, w). It is
            not trained here: freeze it (``requires_grad_(False)``), or gradients are kept for it; :meth:`train` leaves
            it in eval mode. Its maps have the dtype of the other parts, or autocast is on.
        factor: Cells of the result per cell of the encoder's map, at least 1; or the factors of (height, width).
        size: (height, width) of a view in pixels, or one number for a square. None: that of an encoder's one size, or
            of the images.
        channels: C, for callables; else it is known.
        inputs, progressive, num_heads, window, norm: As for :class:`FeatSharpUpsampler`, which is ``upsampler``.
        normalizer: :class:`PHIS` of the encoder's features, or None.
        bias_buffer: :class:`BiasBuffer` of C channels, or None.
        conditional_bias: :class:`ConditionalBias` of C channels, or None (the paper's model).
        options: For vision transformers: other options of the encoder (layers, norm, mean, std, attention); one layer.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: FeatSharp (Ranzinger et al., arXiv 2502.16025), sections 3.2 to 3.4.
    """

    def __init__(
        self,
        encoder: nn.Module | Callable[[Tensor], Tensor],
        factor: Size,
        *,
        size: Size | None = None,
        channels: int | None = None,
        inputs: Sequence[SharpInput] = ("jbu", "tiles"),
        progressive: bool = False,
        num_heads: int = 16,
        window: int = 7,
        norm: bool = True,
        normalizer: PHIS | None = None,
        bias_buffer: BiasBuffer | None = None,
        conditional_bias: ConditionalBias | None = None,
        **options: Unpack[SharpOptions],
    ) -> None:
        super().__init__()
        what = "FeatSharp"
        self.factor = _arguments.pair(what, "factor", factor)
        self.size = _checks.optional_grid(what, "size", size)
        inputs = checked_inputs(what, inputs)
        # Tiles (rows, columns) of what the encoder sees.
        self.levels = levels_of(what, self.factor if "tiles" in inputs else (1, 1), progressive)
        self.is_packed = _is_packed(encoder)
        self.encoder: Any = (
            self._packed(encoder, channels, dict(options))
            if self.is_packed
            else _called(encoder, channels, dict(options))
        )
        if self.is_packed:
            width = cast("Any", self.encoder).family.width
        else:
            width = _checks.integer(what, "channels", channels, 1)
        self.upsampler = FeatSharpUpsampler(
            width, self.factor, inputs, progressive=progressive, num_heads=num_heads, window=window, norm=norm
        )
        self.normalizer: PHIS | None = _part("normalizer", normalizer, PHIS, width)
        self.bias_buffer: BiasBuffer | None = _part("bias_buffer", bias_buffer, BiasBuffer, width)
        self.conditional_bias: ConditionalBias | None = _part(
            "conditional_bias", conditional_bias, ConditionalBias, width
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | PathLike[str] | Mapping[str, Any],
        encoder: nn.Module | Callable[[Tensor], Tensor],
        inputs: Sequence[SharpInput] = ("jbu", "tiles"),
        *,
        factor: Size | None = None,
        num_heads: int = 16,
        window: int = 7,
        **arguments: Unpack[SharpArguments],
    ) -> FeatSharp:
        """Trained weights around the encoder they were trained for, in eval mode.

        What the training stored under ``model_state`` is opened (``state_dict``, ``model``, ``teacher`` as well), and
        the prefixes ``upsampler.``, ``normalizer.``, ``bias_buffer.`` and ``cond_bias_transform.`` with a ``module.``
        behind them; what lies under ``encoder.`` is passed over. Channels, factor, levels and norms follow from the
        weights. Spectral norms, which the original trains with, are folded into them.

        Args:
            checkpoint: A file of torch.save, a ``.safetensors`` file, or a state dict.
            encoder: As for the class.
            inputs: Those it was trained with, in their order, which the weights do not tell.
            factor: Where there are no tiles, which tell it.
            num_heads, window: As for the class.
            arguments: Others of the class: size, and options of the encoder.

        Raises:
            TypeError: ``checkpoint`` is neither a path nor a state dict.
            ValueError: Keys are missing or unexpected, or a shape is wrong (all of them are listed); ``inputs`` are not
                those of the weights; or the file is missing, empty, damaged, no checkpoint, or a pickle of more than
                tensors and plain values, which is not loaded (``weights_only=True``).
        """
        inputs = checked_inputs("FeatSharp", inputs)
        parts = _checkpoint.read("FeatSharp", checkpoint, inputs, factor)
        made: dict[str, Any] = dict(parts.arguments)
        channels = made.pop("channels")
        found: dict[str, Any] = {}
        for name, weights in parts.others.items():
            if name == "normalizer":
                found[name] = PHIS(channels)
            elif name == "conditional_bias":
                found[name] = ConditionalBias(channels, num_heads)
            else:
                shape = getattr(weights.weights.get("buffer"), "shape", ())
                found[name] = BiasBuffer(channels, *(shape[2:] if len(shape) == 4 else (1, 1)))
            load_into(found[name], weights)
        if not _is_packed(encoder):
            arguments = cast("SharpArguments", {"channels": channels, **arguments})
        model = cls(
            encoder,
            made.pop("factor"),
            inputs=inputs,
            num_heads=num_heads,
            window=window,
            **found,
            **made,
            **arguments,
        )
        load_into(model.upsampler, parts.upsampler)
        return model.eval()

    def forward(self, images: Tensor, *, raw: bool = False) -> Tensor:
        """The refined features.

        Args:
            images: (B, 3, H, W) or (B, H, W, 3), uint8 or floating point, normalized or as the encoder's ``mean`` and
                ``std`` make them; for callables normalized. They should have the pixels of the finest tiles.
            raw: Undo the normalizer: features in the encoder's own space.

        Returns:
            (B, C, factor * h, factor * w) for an encoder's map of (h, w), channels_last by strides; differentiable with
            respect to all parameters.

        Raises:
            TypeError, ValueError: ``images`` are wrong, or a view is no whole number of patches.

        Memory: what the encoder takes of all views; then the maps of the tiles, put together, and as
        :class:`FeatSharpUpsampler`.
        """
        _checks.flag("FeatSharp", "raw", raw)
        low, tiles = self.encode(images)
        guidance = self.guidance(images, low) if "jbu" in self.upsampler.inputs else None
        result = self.upsampler(low, guidance, tiles)
        return self.normalizer.inverse(result) if raw and self.normalizer is not None else result

    if TYPE_CHECKING:
        __call__ = forward

    def train(self, mode: bool = True) -> FeatSharp:
        """The mode of all parts but the encoder, which is put in eval mode."""
        super().train(mode)
        if isinstance(self.encoder, nn.Module):
            self.encoder.eval()
        return self

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The normalized, de-biased map of the whole image (B, C, h, w), and those of the tiles, one for every level.

        For baselines (:func:`blend_tiles`) and for training: ``upsampler(low, guidance(images, low), tiles)``.
        Arguments and errors are those of :meth:`forward`. At a factor of 1 the one tile is the whole image; an
        upsampler without tiles gets none.
        """
        maps = self.features(self._views(images))
        low, *tiles = merge_tiles(maps, self.levels[-1], progressive=self.upsampler.progressive)
        if tiles:  # a view would keep the maps of all tiles
            return low.clone(), tiles
        return low, [low] * ("tiles" in self.upsampler.inputs)

    def features(self, maps: Tensor) -> Tensor:
        """What becomes of an encoder's maps (n, C, h, w) before they are put together: normalized and de-biased."""
        for part in (self.normalizer, self.bias_buffer, self.conditional_bias):
            maps = maps if part is None else part(maps)
        return maps

    def guidance(self, images: Tensor, low: Tensor) -> Tensor:
        """Normalized images as the upsampler takes them, (B, 3, height, width), in float32 at least: at the size of the
        result, or, where there are levels between, at their own.
        """
        pixels = _images.as_floats(images).to(torch.promote_types(low.dtype, torch.float32))
        if len(self.upsampler.ups) == 1:  # each level resizes for itself; and few pixels are soon normalized
            size = tuple(n * f for n, f in zip(low.shape[2:], self.factor, strict=True))
            pixels = resize(pixels, size, memory_format=torch.contiguous_format)
        how = self.encoder.resize if self.is_packed else {"mean": None, "std": None}
        if how["mean"] is not None:
            pixels = torch.stack([pixels[:, c] - m for c, m in enumerate(how["mean"])], 1)
        if how["std"] is not None:
            pixels = torch.stack([pixels[:, c] / d for c, d in enumerate(how["std"])], 1)
        return pixels

    def _views(self, images: Tensor) -> Tensor:
        """The encoder's maps of all views, in the order of :func:`split_tiles`."""
        size = self.size or _images.size_of("FeatSharp", images)
        if self.is_packed:
            self._check_patches("images", size)
        # A packed pass cuts tiles itself, of one factor for both sides.
        if not (self.is_packed and _are_square(self.levels)):
            how: dict[str, Any] = (
                {name: self.encoder.resize[name] for name in ("mode", "antialias")} if self.is_packed else {}
            )
            dtype = images.dtype if images.is_floating_point() else torch.float32
            images = split_tiles(images, self.levels[-1], size, progressive=self.upsampler.progressive, **how).to(dtype)
        if self.is_packed:
            return _map_of_all(self.encoder(images, merge=False).tokens[0])
        maps = self.encoder(images)
        _checks.map_("FeatSharp", "encoder(views)", maps)
        if maps.shape[1] != self.upsampler.channels:
            raise ValueError(
                f"murf_fast.FeatSharp: `encoder` must give maps of `channels`, {self.upsampler.channels}, it gave "
                f"{tuple(maps.shape)}"
            )
        return maps

    def extra_repr(self) -> str:
        described = f"factor={self.factor}, size={self.size}"
        if isinstance(self.encoder, nn.Module):
            return described
        return f"encoder={getattr(self.encoder, '__name__', type(self.encoder).__name__)}, {described}"

    def _packed(self, encoder: Any, channels: object, options: dict[str, Any]) -> MultiResolutionEncoder:
        """The encoder at the sizes of the levels, or of the views where these are cut for it."""
        what = "FeatSharp"
        if channels is not None:
            raise ValueError(f"murf_fast.{what}: `channels` is known for this encoder; leave it out")
        counts = [rows for rows, _ in self.levels] if _are_square(self.levels) else [1]
        if not isinstance(encoder, MultiResolutionEncoder):
            encoder = MultiResolutionEncoder(encoder, scales=counts, tiles=counts, **options)
        elif options:
            raise ValueError(f"murf_fast.{what}: `encoder` has options of its own; leave out {', '.join(options)}")
        elif self.size is None:
            if encoder.sizes is None or len(encoder.sizes) != 1:
                raise ValueError(
                    f"murf_fast.{what}: `size` is needed for an `encoder` that has not one size of its own"
                )
            self.size = encoder.sizes[0]
        if len(encoder.layers) != 1:
            raise ValueError(f"murf_fast.{what}: `encoder` must have one layer, got {encoder.layers}")
        if self.size is None:
            return encoder
        self._check_patches("size", self.size, encoder)
        return encoder.at([tuple(n * side for side in self.size) for n in counts], counts)

    def _check_patches(self, name: str, size: tuple[int, int], encoder: MultiResolutionEncoder | None = None) -> None:
        patch = (encoder or self.encoder).family.patch_size
        if size[0] % patch or size[1] % patch:
            raise ValueError(
                f"murf_fast.FeatSharp: `{name}` must be a multiple of the encoder's patch of {patch} pixels in height "
                f"and width, got {tuple(size)}"
            )


def _called(encoder: object, channels: object, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    what = "FeatSharp"
    if not callable(encoder):
        raise TypeError(f"murf_fast.{what}: `encoder` must be a module or a callable, got {type(encoder).__name__}")
    if options:
        raise ValueError(f"murf_fast.{what}: {', '.join(options)} are for vision transformers, `encoder` is a callable")
    if channels is None:
        raise ValueError(f"murf_fast.{what}: `channels` is needed for a callable: those of its maps")
    return encoder


def _are_square(levels: Sequence[tuple[int, int]]) -> bool:
    return all(rows == columns for rows, columns in levels)


def _is_packed(encoder: object) -> bool:
    """Whether an encoder's tokens are those of a packed pass."""
    return isinstance(encoder, MultiResolutionEncoder) or (isinstance(encoder, nn.Module) and is_supported(encoder))


def _part(name: str, part: object, kind: type[nn.Module], channels: int) -> Any:
    if part is None:
        return None
    if not isinstance(part, kind):
        raise TypeError(f"murf_fast.FeatSharp: `{name}` must be a {kind.__name__} or None, got {type(part).__name__}")
    if part.channels != channels:
        raise ValueError(
            f"murf_fast.FeatSharp: `{name}` must have {channels} channels, as the encoder, got {part.channels}"
        )
    return part


def _map_of_all(packed: PackedTokens) -> Tensor:
    """(sequences, D, h, w): the patches of all sequences, which are of one grid; a view."""
    first = packed.blocks[0]
    sequences = packed.tokens.unflatten(0, (-1, first.length(packed.prefix)))
    return sequences[:, packed.prefix :].mT.unflatten(2, first.grid)
