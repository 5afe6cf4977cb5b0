"""MuRF from images to fused features, labels, depth or tokens in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from murf_fast import backends
from murf_fast.annotations import Backend, Mode, Size, Sizes
from murf_fast.nn._options import EncoderOptions, FusionOptions, GraphedOptions
from murf_fast.nn.heads.depth_head import DepthHead
from murf_fast.nn.heads.segmentation_head import SegmentationHead
from murf_fast.nn.vit import _images
from murf_fast.nn.vit._inputs import Images, ImageSizes, images_of
from murf_fast.nn.vit._pretrained import frozen
from murf_fast.nn.vit.graphed import GraphedCall, check_capturable
from murf_fast.nn.vit.multi_resolution_encoder import MultiResolutionEncoder, MultiResolutionFeatures
from murf_fast.nn.vit.principal import common_projection, fused_projection
from murf_fast.ops import _checks
from murf_fast.ops._library import wants_channels_last
from murf_fast.ops.upsample_concat import upsample_concat

if TYPE_CHECKING:
    from typing_extensions import Unpack

Method = Literal["features", "tokens", "segment", "depth"]
GRAPHED = ("features", "tokens", "segment", "depth")


class MuRF(nn.Module):
    """A frozen vision transformer at several resolutions, fused on one grid, with an optional linear head.

    ``F = cat_s U_s f(resize(image, s))``: every resolution through the same model ``f``, every map resized to one grid.

    Args:
        model: A model that :class:`MultiResolutionEncoder` takes, or an encoder (then without ``sizes`` and options).
        sizes: Resolutions in pixels, as for the encoder (one integer: one square); or give its ``scales``.
        head: :class:`SegmentationHead` for :meth:`segment` or :class:`DepthHead` for :meth:`depth`, with columns for
            the maps or for the maps and their CLS tokens. MuRF's segmentation takes the last block with ``norm=True``
            (the default), its depth ``norm=False`` and, as its code counts ``hidden_states``, the block before the one
            named (``layers=[10]`` for its ``[11]``).
        options: The other options of the encoder. Its defaults are MuRF's pyramid: bilinear without antialias.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it. Calls check what they are given, and the
            head, before the model runs.

    Source: MuRF, section 3 and equation 2; its segmentation and depth models, and its MLLM tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        sizes: Sizes | None = None,
        head: SegmentationHead | DepthHead | None = None,
        **options: Unpack[EncoderOptions],
    ) -> None:
        super().__init__()
        if isinstance(model, MultiResolutionEncoder):
            if sizes is not None or options:
                given = ["sizes"] * (sizes is not None) + list(options)
                raise ValueError(f"murf_fast.MuRF: `model` is an encoder, which has its own {', '.join(given)}")
            self.encoder = model
        else:
            self.encoder = MultiResolutionEncoder(model, sizes, **options)
        if head is not None and not isinstance(head, (SegmentationHead, DepthHead)):
            raise TypeError(
                f"murf_fast.MuRF: `head` must be a SegmentationHead or a DepthHead, got {type(head).__name__}"
            )
        self.head = head

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | PathLike[str],
        sizes: Sizes | None = None,
        head: SegmentationHead | DepthHead | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = True,
        **options: Unpack[EncoderOptions],
    ) -> MuRF:
        """A model of transformers with its weights, its family found and its images normalized as it was trained.

        ``mean`` and ``std`` are the ``image_mean`` and ``image_std`` of the processor's configuration that lies beside
        the weights; where none does, or it says nothing of them, those of the family's pretrained models; and where
        given as ``options``, those.

        Args:
            name_or_folder: A folder as ``save_pretrained`` writes it, of which nothing else is needed; or the name of
                a model of the Hugging Face hub.
            sizes, head, options: As for the class.
            dtype: Of the model, whatever that of the file.
            local_files_only: Take a name from the local cache alone, so that no call waits for a network or brings
                other weights than yesterday's; ``False`` downloads what the cache lacks, as transformers does.

        Returns:
            The model in eval mode on the CPU, its backbone without gradients.

        Raises:
            TypeError, ValueError: An argument is wrong, the model is of no known family, weights are missing or
                damaged, or the processor's ``patch_size`` is not the model's; the message says which.
            FileNotFoundError: There is no such folder, or no such name in the cache.
            ModuleNotFoundError: transformers is missing.

        Memory: the weights.
        """
        _checks.flag("MuRF.from_pretrained", "local_files_only", local_files_only)
        model, normalization = frozen("MuRF.from_pretrained", name_or_folder, dtype, local_files_only)
        return cls(model, sizes, head, **cast("EncoderOptions", {**normalization, **options})).eval()

    @overload
    def forward(
        self,
        images: Tensor,
        grid: Size | Sequence[Size] | None = None,
        *,
        image_sizes: None = None,
        **options: Unpack[FusionOptions],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        images: Sequence[Tensor],
        grid: Size | Sequence[Size] | None = None,
        *,
        image_sizes: None = None,
        **options: Unpack[FusionOptions],
    ) -> list[Tensor]: ...
    @overload
    def forward(
        self,
        images: Images,
        grid: Size | Sequence[Size] | None = None,
        *,
        image_sizes: ImageSizes | None = None,
        **options: Unpack[FusionOptions],
    ) -> Tensor | list[Tensor]: ...
    def forward(
        self,
        images: Images,
        grid: Size | Sequence[Size] | None = None,
        *,
        image_sizes: ImageSizes | None = None,
        **options: Unpack[FusionOptions],
    ) -> Tensor | list[Tensor]:
        """:meth:`features`."""
        return self.features(images, grid, image_sizes=image_sizes, **options)

    if TYPE_CHECKING:
        __call__ = forward

    @overload
    def encode(self, images: Tensor, *, image_sizes: None = None) -> MultiResolutionFeatures: ...
    @overload
    def encode(self, images: Sequence[Tensor], *, image_sizes: None = None) -> list[MultiResolutionFeatures]: ...
    @overload
    def encode(
        self, images: Images, *, image_sizes: ImageSizes | None = None
    ) -> MultiResolutionFeatures | list[MultiResolutionFeatures]: ...
    def encode(
        self, images: Images, *, image_sizes: ImageSizes | None = None
    ) -> MultiResolutionFeatures | list[MultiResolutionFeatures]:
        """The maps of every resolution as they come, for what has no method here (a head's ``loss``, say).

        Arguments, result, errors and memory are those of :meth:`MultiResolutionEncoder.forward`.
        """
        return self.encoder(images, image_sizes=image_sizes)

    @overload
    def features(
        self,
        images: Tensor,
        grid: Size | Sequence[Size] | None = None,
        *,
        image_sizes: None = None,
        **options: Unpack[FusionOptions],
    ) -> Tensor: ...
    @overload
    def features(
        self,
        images: Sequence[Tensor],
        grid: Size | Sequence[Size] | None = None,
        *,
        image_sizes: None = None,
        **options: Unpack[FusionOptions],
    ) -> list[Tensor]: ...
    @overload
    def features(
        self,
        images: Images,
        grid: Size | Sequence[Size] | None = None,
        *,
        image_sizes: ImageSizes | None = None,
        **options: Unpack[FusionOptions],
    ) -> Tensor | list[Tensor]: ...
    def features(
        self,
        images: Images,
        grid: Size | Sequence[Size] | None = None,
        *,
        image_sizes: ImageSizes | None = None,
        mode: Mode = "bilinear",
        antialias: bool = False,
        via: Size | None = None,
        memory_format: torch.memory_format | None = None,
        out: Tensor | None = None,
        backend: Backend | None = None,
    ) -> Tensor | list[Tensor]:
        """The maps of all resolutions and layers, on one grid and concatenated.

        Args:
            images: (B, 3, H, W) or (B, H, W, 3), uint8 or floating point; or images of mixed sizes, as for
                :meth:`MultiResolutionEncoder.forward`, without ``out``.
            grid: (height, width) of the result, or one integer for a square. None: the largest grid of the maps, as in
                MuRF's code; its paper takes the image's size. For images of mixed sizes also a list, one for each.
            image_sizes: (height, width) of every image in a padded batch.
            mode, antialias, via, memory_format, out, backend: As for :func:`murf_fast.upsample_concat`.

        Returns:
            (B, sum D, height, width), resolutions outermost and layers within; in the dtype of the model. For images of
            mixed sizes a list in their order, of (sum D, height, width).

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.
            BackendUnavailableError: ``backend`` cannot take this call.

        Memory: what the encoder takes; then the maps and the result.
        """
        op, like = "MuRF.features", self.encoder.family.like
        images = images_of(op, images, image_sizes, self.encoder.family)
        grids = self._targets(op, "grid", grid, images, self._largest_grid)
        via = _checks.optional_grid(op, "via", via)
        _checks.mode(op, mode, antialias)
        wants_channels_last(op, memory_format, images if isinstance(images, Tensor) else images[0])
        backends.resolve(backend, like.device.type, like.dtype)
        if out is not None and not isinstance(images, Tensor):
            raise ValueError(f"murf_fast.{op}: `out` must be None for images of mixed sizes")
        if out is not None and not torch.is_autocast_enabled(like.device.type):
            _checks.out(op, out, (cast("Tensor", images).shape[0], self._columns(), *grids[0]), [like])
        options: dict[str, Any] = {"mode": mode, "antialias": antialias, "via": via, "memory_format": memory_format}
        options |= {"out": out, "backend": backend}
        return self._each(images, lambda features, i: upsample_concat(features.maps, grids[i], **options))

    @overload
    def tokens(self, images: Tensor, *, image_sizes: None = None) -> Tensor: ...
    @overload
    def tokens(self, images: Sequence[Tensor], *, image_sizes: None = None) -> list[Tensor]: ...
    @overload
    def tokens(self, images: Images, *, image_sizes: ImageSizes | None = None) -> Tensor | list[Tensor]: ...
    def tokens(self, images: Images, *, image_sizes: ImageSizes | None = None) -> Tensor | list[Tensor]:
        """(B, N, sum D) for a language model's projector: N tokens of the largest grid, whatever the resolutions.

        They are :meth:`features` on that grid, in raster order; arguments, errors and memory as there. For images of
        mixed sizes a list of (N, sum D).
        """
        images = images_of("MuRF.tokens", images, image_sizes, self.encoder.family)
        grids = self._targets("MuRF.tokens", "grid", None, images, self._largest_grid)

        def of_image(features: MultiResolutionFeatures, i: int) -> Tensor:
            fused = upsample_concat(features.maps, grids[i], memory_format=torch.channels_last)
            return fused.permute(0, 2, 3, 1).flatten(1, 2)

        return self._each(images, of_image)

    @overload
    def segment(
        self, images: Tensor, size: Size | Sequence[Size] | None = None, *, image_sizes: None = None
    ) -> Tensor: ...
    @overload
    def segment(
        self, images: Sequence[Tensor], size: Size | Sequence[Size] | None = None, *, image_sizes: None = None
    ) -> list[Tensor]: ...
    @overload
    def segment(
        self, images: Images, size: Size | Sequence[Size] | None = None, *, image_sizes: ImageSizes | None = None
    ) -> Tensor | list[Tensor]: ...
    def segment(
        self,
        images: Images,
        size: Size | Sequence[Size] | None = None,
        *,
        image_sizes: ImageSizes | None = None,
    ) -> Tensor | list[Tensor]:
        """Labels of the image by the segmentation head, without gradients; no logits at its size exist.

        Args:
            images: (B, 3, H, W) or (B, H, W, 3), uint8 or floating point; or images of mixed sizes, as for
                :meth:`MultiResolutionEncoder.forward`.
            size: (height, width) of the result, or one integer for a square; None: that of the images, each its own.
                For images of mixed sizes also a list, one for each.
            image_sizes: (height, width) of every image in a padded batch.

        Returns:
            (B, height, width), uint8 up to 256 classes, int16 up to 32768, int32 above. For images of mixed sizes a
            list in their order, of (height, width).

        Raises:
            TypeError, ValueError: An argument is wrong, or the head is of another kind, device, dtype or number of
                columns; the message names it.

        Memory: what the encoder takes; then the maps and what :meth:`SegmentationHead.predict` takes. Of images of
        mixed sizes the maps of one pass at a time.
        """
        return self._predict("segment", SegmentationHead, images, size, image_sizes)

    @overload
    def depth(
        self, images: Tensor, size: Size | Sequence[Size] | None = None, *, image_sizes: None = None
    ) -> Tensor: ...
    @overload
    def depth(
        self, images: Sequence[Tensor], size: Size | Sequence[Size] | None = None, *, image_sizes: None = None
    ) -> list[Tensor]: ...
    @overload
    def depth(
        self, images: Images, size: Size | Sequence[Size] | None = None, *, image_sizes: ImageSizes | None = None
    ) -> Tensor | list[Tensor]: ...
    def depth(
        self,
        images: Images,
        size: Size | Sequence[Size] | None = None,
        *,
        image_sizes: ImageSizes | None = None,
    ) -> Tensor | list[Tensor]:
        """Depth of the image by the depth head, without gradients.

        Arguments and errors as for :meth:`segment`.

        Returns:
            (B, height, width) in the unit of the head's range, float32 (float64 for a float64 model). For images of
            mixed sizes a list in their order, of (height, width).

        Memory: what the encoder takes; then the maps and what :meth:`DepthHead.forward` takes.
        """
        return self._predict("depth", DepthHead, images, size, image_sizes)

    @overload
    def pca(
        self,
        images: Tensor,
        size: Size | Sequence[Size] | None = None,
        components: int = 3,
        *,
        image_sizes: None = None,
    ) -> Tensor: ...
    @overload
    def pca(
        self,
        images: Sequence[Tensor],
        size: Size | Sequence[Size] | None = None,
        components: int = 3,
        *,
        image_sizes: None = None,
    ) -> list[Tensor]: ...
    @overload
    def pca(
        self,
        images: Images,
        size: Size | Sequence[Size] | None = None,
        components: int = 3,
        *,
        image_sizes: ImageSizes | None = None,
    ) -> Tensor | list[Tensor]: ...
    @torch.no_grad()
    def pca(
        self,
        images: Images,
        size: Size | Sequence[Size] | None = None,
        components: int = 3,
        *,
        image_sizes: ImageSizes | None = None,
    ) -> Tensor | list[Tensor]:
        """The leading principal components of the fused features, of all images together; without gradients.

        Args:
            images, size, image_sizes: As for :meth:`segment`.
            components: How many, at most sum D.

        Returns:
            (B, components, height, width) in the dtype of the model. Signs are arbitrary but reproducible. For images
            of mixed sizes a list in their order, of (components, height, width).

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.

        Memory: what the encoder takes; then the fused map on the largest grid, two copies of it in float64, and a few
        (sum D, sum D) matrices in float64.
        """
        components = _checks.integer("MuRF.pca", "components", components, 1, self._columns())
        images = images_of("MuRF.pca", images, image_sizes, self.encoder.family)
        sizes = self._targets("MuRF.pca", "size", size, images, _same)
        if isinstance(images, Tensor):
            return fused_projection(self.encoder(images).maps, sizes[0], components)
        maps = [features.maps for features in self.encoder([image[0] for image in images])]
        return [projected[0] for projected in common_projection(maps, sizes, components)]

    def graphed(self, images: Tensor, method: Method | None = None, **options: Unpack[GraphedOptions]) -> GraphedCall:
        """A method captured in one CUDA graph, for images of this shape, dtype and device: encoding, fusion and head.

        At batch 1 a GPU waits for the host's launches; a replay is one. The method is called a few times first.

        Args:
            images: Such as will come; their values do not matter, but must be those of images.
            method: ``"features"``, ``"tokens"``, ``"segment"`` or ``"depth"``; None: what the head is for, else
                ``"features"``.
            options: Arguments of the method behind ``images``; ``out`` is not one of them.

        Returns:
            :class:`GraphedCall`, which takes images and returns what the method does, without gradients.

        Raises:
            TypeError, ValueError: An argument is wrong, images are not on a CUDA device, autocast is on, or another
                capture is under way; the message says which.

        Memory: that of :class:`GraphedCall`.
        """
        op = "MuRF.graphed"
        if method is None:
            kinds: tuple[tuple[Method, type], ...] = (("segment", SegmentationHead), ("depth", DepthHead))
            method = next((name for name, kind in kinds if isinstance(self.head, kind)), "features")
        _checks.choice(op, "method", method, GRAPHED)
        if "out" in options:
            raise ValueError(f"murf_fast.{op}: `out` cannot be given, the graph has a result of its own")
        _images.size_of(op, images)
        check_capturable(images)
        return GraphedCall(self, lambda x: getattr(self, str(method))(x, **options), images)

    def _each(self, images: Tensor | list[Tensor], function: Callable[[MultiResolutionFeatures, int], Tensor]) -> Any:
        """``function`` of features and index: of a batch, or of every image of a list, without its batch dimension."""
        if isinstance(images, Tensor):
            return function(self.encoder(images), 0)
        found: dict[int, Tensor] = {}
        for of_pass in self.encoder.passes([image[0] for image in images]):
            found.update((i, function(features, i)[0]) for i, features in of_pass.items())
        return [found[i] for i in range(len(images))]

    def _targets(
        self,
        op: str,
        name: str,
        given: Any,
        images: Tensor | list[Tensor],
        default: Callable[[tuple[int, int]], tuple[int, int]],
    ) -> list[tuple[int, int]]:
        """(height, width) of the result for a batch or for every image of a list: ``default`` of its own if None."""
        batches = [images] if isinstance(images, Tensor) else images
        own = [_images.size_of(op, batch) for batch in batches]
        if given is None:
            return [default(size) for size in own]
        is_listed = _checks.is_sequence(given) and any(_checks.is_sequence(g) for g in given)
        if not is_listed or isinstance(images, Tensor):
            return [_checks.grid(op, name, given)] * len(own)
        if len(given) != len(own):
            raise ValueError(
                f"murf_fast.{op}: `{name}` must hold one (height, width) for each of {len(own)} images, got "
                f"{len(given)}"
            )
        return [_checks.grid(op, f"{name}[{i}]", g) for i, g in enumerate(given)]

    def _predict(
        self, method: str, kind: type[SegmentationHead | DepthHead], images: Images, size: Any, image_sizes: Any
    ) -> Tensor | list[Tensor]:
        if not isinstance(self.head, kind):
            got = "none" if self.head is None else type(self.head).__name__
            raise ValueError(f"murf_fast.MuRF.{method}: `head` must be a {kind.__name__}, this model has {got}")
        images = images_of(f"MuRF.{method}", images, image_sizes, self.encoder.family)
        sizes = self._targets(f"MuRF.{method}", "size", size, images, _same)
        head, takes_cls = self.head, self._takes_cls(method)

        def of_image(features: MultiResolutionFeatures, i: int) -> Tensor:
            return head.predict(features.maps, sizes[i], features.cls if takes_cls else None)

        with torch.no_grad():
            return self._each(images, of_image)

    def _takes_cls(self, method: str) -> bool:
        """Whether the head has columns for CLS tokens; raises where it has columns for neither."""
        head, family = cast("SegmentationHead | DepthHead", self.head).classifier, self.encoder.family
        like = family.like
        if head.weight.device != like.device:
            raise ValueError(
                f"murf_fast.MuRF.{method}: `head` must be on the device of `model`, {like.device}, "
                f"got {head.weight.device}"
            )
        if head.weight.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
            raise TypeError(
                f"murf_fast.MuRF.{method}: `head` must have the dtype of `model`, {like.dtype}, got {head.weight.dtype}"
            )
        columns, channels = head.in_channels, self._columns()
        has_cls = family.prefix() is not None
        if columns == channels or (columns == 2 * channels and has_cls):
            return columns != channels
        or_both = ", or twice as many with CLS tokens," if has_cls else ""
        raise ValueError(
            f"murf_fast.MuRF.{method}: `head` must have {channels} columns{or_both} for {self._maps()} maps, it has "
            f"{columns}"
        )

    def _maps(self) -> int:
        return len(self.encoder.layers) * len(self.encoder.sizes or self.encoder.scales or ())

    def extra_repr(self) -> str:
        return f"channels={self._columns()}" + (", head=None" if self.head is None else "")

    def _columns(self) -> int:
        """Channels of all maps together."""
        return self._maps() * self.encoder.family.width

    def _largest_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in patches of the largest resolution, per axis."""
        patch, sizes = self.encoder.family.patch_size, self.encoder.sizes_for(*size)
        return max(h for h, _ in sizes) // patch, max(w for _, w in sizes) // patch


def _same(size: tuple[int, int]) -> tuple[int, int]:
    return size
