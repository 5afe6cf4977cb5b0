"""MuRF from images to fused features, labels, depth or tokens in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from murf_fast.nn.depth_head import DepthHead
from murf_fast.nn.multi_resolution_encoder import MultiResolutionEncoder, MultiResolutionFeatures
from murf_fast.nn.principal import fused_projection
from murf_fast.nn.segmentation_head import SegmentationHead
from murf_fast.ops import _checks
from murf_fast.ops.upsample_concat import upsample_concat


class MuRF(nn.Module):
    """A frozen vision transformer at several resolutions, fused on one grid, with an optional linear head.

    ``F = cat_s U_s f(resize(image, s))``: every resolution through the same model ``f``, every map resized to one grid.

    Args:
        model: A model that :class:`MultiResolutionEncoder` takes, or an encoder (then without ``sizes`` and options).
        sizes: Resolutions in pixels, as for the encoder; or give its ``scales``.
        head: :class:`SegmentationHead` for :meth:`segment` or :class:`DepthHead` for :meth:`depth`, with columns for
            the maps or for the maps and their CLS tokens. MuRF's segmentation takes the last block with ``norm=True``
            (the default), its depth ``norm=False`` and, as its code counts ``hidden_states``, the block before the one
            named (``layers=[10]`` for its ``[11]``).
        options: The other options of the encoder. Its defaults are MuRF's pyramid: bilinear without antialias.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: MuRF, section 3 and equation 2; its segmentation and depth models, and its MLLM tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        sizes: Sequence[int | tuple[int, int]] | None = None,
        head: SegmentationHead | DepthHead | None = None,
        **options,
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

    def forward(self, images: Tensor, grid: int | tuple[int, int] | None = None, **options) -> Tensor:
        """:meth:`features`."""
        return self.features(images, grid, **options)

    def encode(self, images: Tensor) -> MultiResolutionFeatures:
        """The maps of every resolution as they come, for what has no method here (a head's ``loss``, say)."""
        return self.encoder(images)

    def features(self, images: Tensor, grid: int | tuple[int, int] | None = None, **options) -> Tensor:
        """(B, sum D, h, w) at ``grid``; None for the largest grid of the maps (MuRF), or the image's size (its paper).

        Args:
            images: (B, 3, H, W) or (B, H, W, 3), uint8 or floating point.
            grid: (height, width) of the result, or one integer for a square.
            options: Those of :func:`murf_fast.upsample_concat` (mode, antialias, memory_format, out, backend).
        """
        maps = self.encoder(images).maps
        return upsample_concat(maps, _largest(maps) if grid is None else grid, **options)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, N, sum D) for a language model's projector: N tokens of the largest grid, whatever the resolutions."""
        maps = self.encoder(images).maps
        fused = upsample_concat(maps, _largest(maps), memory_format=torch.channels_last)
        return fused.permute(0, 2, 3, 1).flatten(1, 2)

    def segment(self, images: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Labels (B, height, width), of the image's size if ``size`` is None; no logits at that size exist."""
        return self._predict("segment", SegmentationHead, images, size)

    def depth(self, images: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Depth (B, height, width) in the unit of the head's range, of the image's size if ``size`` is None."""
        return self._predict("depth", DepthHead, images, size)

    @torch.no_grad()
    def pca(self, images: Tensor, size: int | tuple[int, int] | None = None, components: int = 3) -> Tensor:
        """(B, components, height, width): leading principal components of the fused features of the whole batch.

        At the image's size if ``size`` is None. Signs are arbitrary but reproducible.
        """
        columns = len(self.encoder.layers) * self.encoder.family.projection.weight.shape[0]
        columns *= len(self.encoder.sizes or self.encoder.scales)
        components = _checks.integer("MuRF.pca", "components", components)
        if not 1 <= components <= columns:
            raise ValueError(f"murf_fast.MuRF.pca: `components` must be in [1, {columns}], got {components!r}")
        size = _image_size(images) if size is None else tuple(_checks.grid("MuRF.pca", "size", size))
        return fused_projection(self.encoder(images).maps, size, components)

    def _predict(self, method: str, kind: type, images: Tensor, size) -> Tensor:
        if not isinstance(self.head, kind):
            got = "none" if self.head is None else type(self.head).__name__
            raise ValueError(f"murf_fast.MuRF.{method}: `head` must be a {kind.__name__}, this model has {got}")
        with torch.no_grad():
            features = self.encoder(images)
            cls = self._cls_for_head(method, features)
            return self.head.predict(features.maps, _image_size(images) if size is None else size, cls)

    def _cls_for_head(self, method: str, features: MultiResolutionFeatures) -> list[Tensor] | None:
        """The CLS tokens if the head has columns for them."""
        columns, channels = self.head.classifier.in_channels, sum(m.shape[1] for m in features.maps)
        if columns == channels:
            return None
        if columns == 2 * channels and features.cls[0] is not None:
            return features.cls
        raise ValueError(
            f"murf_fast.MuRF.{method}: `head` must have {channels} columns, or twice as many with CLS tokens, for "
            f"{len(features.maps)} maps, it has {columns}"
        )


def _largest(maps: Sequence[Tensor]) -> tuple[int, int]:
    return max(m.shape[2] for m in maps), max(m.shape[3] for m in maps)


def _image_size(images: Tensor) -> tuple[int, int]:
    """(height, width) of images in either layout; the encoder checks the rest."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"murf_fast.MuRF: `images` must be (B, 3, H, W) or (B, H, W, 3), got {got}")
    return tuple(images.shape[2:] if images.shape[1] == 3 else images.shape[1:3])
