"""What people write, for tests/test_typing.py: a comment behind ``reveal_type`` is the type that a checker finds there,
``error: code`` the error. Nothing here is run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import reveal_type

import murf_fast
from murf_fast import windows
from murf_fast.annotations import Backend, Mode, Size
from murf_fast.anomaly import METHODS, MultiResolutionDetector, NormalRange, PixelCurves, au_pro, subset_scores
from murf_fast.data import Features
from murf_fast.nn import (
    PHIS,
    AnyUp,
    DepthHead,
    FeatSharp,
    JBUStack,
    MultiResolutionEncoder,
    MuRF,
    SegmentationHead,
    UpsampleAnything,
    random_views,
    segmentation_scores,
)


def operations(x: Tensor, maps: list[Tensor], labels: Tensor, asked: bool) -> None:
    reveal_type(murf_fast.resize(x, (8, 8), mode="bicubic", antialias=True))  # Tensor
    reveal_type(murf_fast.resize(x, x.shape[-2:]))  # Tensor
    reveal_type(murf_fast.upsample_concat(maps, 8, memory_format=torch.channels_last))  # Tensor
    reveal_type(murf_fast.upsample_argmax(maps, 8))  # Tensor
    reveal_type(murf_fast.upsample_argmax(maps, 8, return_values=True))  # tuple[Tensor, Tensor]
    reveal_type(murf_fast.upsample_argmax(maps, 8, return_values=asked))  # Tensor | tuple[Tensor, Tensor]
    reveal_type(murf_fast.upsample_cross_entropy(maps, labels, reduction="none"))  # Tensor
    reveal_type(murf_fast.image_to_patches(x, [224, (448, 448)], 14))  # list[Tensor]
    reveal_type(murf_fast.resample_pos_embed(x, (8, 8), flavor="timm"))  # Tensor
    reveal_type(murf_fast.resample_pos_embed(x, [(8, 8), (16, 16)], flavor="timm"))  # list[Tensor]
    w = windows.ratio(x.shape[-2:], 16)
    reveal_type(w)  # Windows
    reveal_type(murf_fast.window_attention(x, x, x, windows=w, num_heads=4))  # Tensor
    reveal_type(murf_fast.window_attention(x, x, x, windows=w, num_heads=4, return_lse=True))  # tuple[Tensor, Tensor]
    reveal_type(murf_fast.nearest_distance(x, murf_fast.NearestIndex(x), k=2))  # tuple[Tensor, Tensor]
    reveal_type(murf_fast.neighborhood_attention(x, x, x, kernel_size=7, backend="natten"))  # Tensor
    murf_fast.resize(x, 8, mode="linear")  # error: arg-type
    murf_fast.resize(x, 8, backend="cuda")  # error: arg-type
    murf_fast.resize(x, "8")  # error: arg-type
    murf_fast.upsample_sum(maps, 8, meode="area")  # error: call-arg
    murf_fast.nearest_distance(x, x, metric="euclid")  # error: arg-type
    murf_fast.upsample_argmx(maps, 8)  # error: attr-defined
    with murf_fast.use_backend("reference"):
        pass
    with murf_fast.use_backend("refrence"):  # error: arg-type
        pass


def numpy_sizes(
    x: Tensor, vit: nn.Module, size: NDArray[np.int64], side: np.int32, sides: NDArray[np.uint16], ratio: np.float32
) -> None:
    reveal_type(murf_fast.resize(x, size))  # Tensor
    reveal_type(murf_fast.resize(x, np.array(x.shape[-2:]) // 2))  # Tensor
    reveal_type(murf_fast.resize(x, (side, 9), via=side))  # Tensor
    reveal_type(murf_fast.upsample_argmax([x], side))  # Tensor
    reveal_type(murf_fast.image_to_patches(x, [size, side, 9], 4))  # list[Tensor]
    reveal_type(murf_fast.image_to_patches(x, sides, 4))  # list[Tensor]
    reveal_type(murf_fast.resample_pos_embed(x, size, flavor="timm", source_grid=[4, 4]))  # Tensor
    reveal_type(murf_fast.resample_pos_embed(x, [size, (8, side)], flavor="timm"))  # list[Tensor]
    reveal_type(windows.ratio(size, side).tables(out=size))  # tuple[AxisWindow, ...]
    reveal_type(MuRF(vit, sides, tiles=[1, side])(x, image_sizes=[size, size]))  # Tensor | list[Tensor]
    reveal_type(AnyUp()(x, x, size, region=size))  # Tensor
    murf_fast.resize(x, np.zeros(2))  # error: arg-type
    murf_fast.resize(x, ratio)  # error: arg-type
    murf_fast.resize(x, x)  # error: arg-type
    murf_fast.resize(x, (8.0, 8))  # error: arg-type


def passes_on(x: Tensor, size: Size, mode: Mode = "area", backend: Backend | None = None) -> Tensor:
    return murf_fast.resize(x, size, mode=mode, backend=backend)


def encoders(vit: nn.Module, images: Tensor, mixed: list[Tensor], sizes: list[tuple[int, int]]) -> None:
    murf = MuRF(vit, [224, 448], SegmentationHead(768, 21), layers=[11], norm=True)
    reveal_type(murf)  # MuRF
    reveal_type(MuRF.from_pretrained("a/folder", [224]))  # MuRF
    reveal_type(murf(images))  # Tensor
    reveal_type(murf(mixed))  # list[Tensor]
    reveal_type(murf.features(images, 32, mode="bicubic"))  # Tensor
    reveal_type(murf.segment(images))  # Tensor
    reveal_type(murf.segment(mixed))  # list[Tensor]
    reveal_type(murf.segment(images, image_sizes=sizes))  # Tensor | list[Tensor]
    reveal_type(murf.tokens(images))  # Tensor
    reveal_type(murf.encode(images))  # MultiResolutionFeatures
    reveal_type(murf.encode(images).maps)  # list[Tensor]
    reveal_type(murf.graphed(images, "segment")(images))  # Tensor
    reveal_type(murf.encoder.sizes)  # None | list[tuple[int, int]]
    encoder = MultiResolutionEncoder(vit, scales=[0.5, 1.0], attention="sdpa")
    reveal_type(encoder(images).cls)  # list[Tensor | None]
    reveal_type([features.maps for features in encoder(mixed)])  # list[list[Tensor]]
    MuRF(vit, [224], layers="last")  # error: arg-type
    MuRF(vit, [224], nrom=True)  # error: call-arg
    murf.graphed(images, "depths")  # error: arg-type


def modules(image: Tensor, features: Tensor, several: list[Tensor], path: Path) -> None:
    upsampler = AnyUp.from_checkpoint(path, windows="natten")
    reveal_type(upsampler(image, features, (224, 224)))  # Tensor
    reveal_type(upsampler(image, several))  # list[Tensor]
    reveal_type(upsampler.eval()(image, features))  # Tensor
    reveal_type(upsampler.predict(image, features, features, reduce="argmax"))  # Tensor
    reveal_type(upsampler.encode_image(image))  # EncodedImage
    reveal_type(JBUStack(384)(features, image, scale=4))  # Tensor
    reveal_type(FeatSharp(nn.Identity(), 2, channels=8)(image))  # Tensor
    reveal_type(UpsampleAnything()(image, features))  # Tensor
    reveal_type(PHIS.fit(several).fold(nn.Linear(4, 4)))  # Linear
    reveal_type(DepthHead(384, 256, depth_range=(0.1, 10.0))(several, 224))  # Tensor
    reveal_type(SegmentationHead.from_state_dict({}).folded())  # tuple[Tensor, Tensor]
    reveal_type(segmentation_scores(features).mean_iou)  # Tensor
    reveal_type(random_views(image, flip=0.0)(features, 8))  # Tensor
    AnyUp(values="all")  # error: arg-type
    upsampler(image, features, size=(224, 224))  # error: call-overload
    upsampler(image)  # error: call-overload


def detectors(vit: nn.Module, image: Tensor, photo: np.ndarray, folder: Path) -> None:
    detector = MultiResolutionDetector(vit, layers=[7, 9], index="coreset", rules="patchcore").fit([folder / "a.png"])
    reveal_type(detector.score(photo))  # Anomaly
    reveal_type(detector.score("photo.png").score)  # float
    reveal_type(detector.score(image).map)  # Tensor
    reveal_type([found.score for found in detector.score_many([image, photo, folder])])  # list[float]
    reveal_type(detector.normal_)  # NormalRange | None
    reveal_type(MultiResolutionDetector.by_name("superad", vit, precision="bfloat16"))  # MultiResolutionDetector
    reveal_type(MultiResolutionDetector.load(folder, vit, verify=False).banks_)  # list[Tensor]
    reveal_type(subset_scores(detector, image, "layers"))  # dict[str, Anomaly]
    reveal_type(METHODS["mrf-ad"].layers(12))  # list[int]
    reveal_type(NormalRange.of([]))  # NormalRange | None
    reveal_type(PixelCurves().update(image, photo).au_pro(0.3))  # float
    reveal_type(au_pro([image], ["mask.npy"]))  # float
    reveal_type(murf_fast.anomaly.au_roc([0.1, 0.9], [0, 1]))  # float
    MultiResolutionDetector(vit, index="approximate")  # error: arg-type
    MultiResolutionDetector.by_name("mrfad", vit)  # error: arg-type
    MultiResolutionDetector.by_name("mrf-ad", vit, presision="auto")  # error: call-arg
    detector.score(3)  # error: arg-type


def data(folder: Path) -> None:
    features = Features(folder)
    reveal_type(features[0])  # dict[str, Tensor | str]
    reveal_type(len(features))  # int
    reveal_type(next(features.failed()))  # tuple[str, str]
    reveal_type(list(features.names()))  # list[str]
