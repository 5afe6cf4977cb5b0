"""The training-free detector: banks of normal patches at several resolutions, and distances to them."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.anomaly import _description, _files, _images
from murf_fast.anomaly._encoder import PatchAtLeast
from murf_fast.anomaly._fingerprint import fingerprint
from murf_fast.anomaly.scoring import ScoringRules, mean_top, reweighted_score, rules_of
from murf_fast.anomaly.sharded_index import ShardedIndex
from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit import _resolutions
from murf_fast.ops._ivf import IVFIndex
from murf_fast.ops.gaussian_blur import gaussian_blur
from murf_fast.ops.k_center_greedy import k_center_greedy
from murf_fast.ops.nearest_distance import PRECISIONS, NearestIndex, nearest_distance
from murf_fast.ops.upsample_mean import upsample_mean

WHAT = "MultiResolutionDetector"
INDICES = ("exact", "cells", "coreset", "ivf")
ON_EMPTY = ("skip", "raise")
BACKGROUNDS = ("black", "keep")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """What :meth:`MultiResolutionDetector.score` returns.

    Attributes:
        map: (H, W), float32, at the image's own size: the score of every pixel, larger where it is less like the banks.
        score: The image's.
    """

    map: Tensor
    score: float


@dataclasses.dataclass(frozen=True)
class _Patches:
    """The patches (N, D) of one bank's layer and scale, the mask (N,) of those that count, and their grid.

    ``rows`` is None where an image has no patch that counts at any scale: it is not encoded then.
    """

    rows: Tensor | None
    kept: Tensor | None
    grid: tuple[int, int]

    @property
    def counting(self) -> Tensor | None:
        if self.rows is None or self.kept is None:
            return self.rows
        return self.rows[self.kept]


@dataclasses.dataclass(frozen=True)
class _LookedAt:
    """An image (1, 3, H, W) at the size it is encoded in, and of every scale the mask of patches and their grid.

    ``pixels`` is None where no patch counts at any scale.
    """

    pixels: Tensor | None
    kept: list[Tensor | None]
    grids: list[tuple[int, int]]


class MultiResolutionDetector:
    """Anomaly scores of an image from the distances of its patches to those of normal images (MRF-AD, MuRF).

    ``map = blur(mean_b U_b d_b)``, where ``d_b(p)`` is the mean distance of patch p's feature to the ``rules.k``
    nearest rows of bank b, and ``U_b`` resizes to the image. One bank per scale and layer holds the patches of all
    training images.

    Args:
        encoder: A frozen ViT that :class:`MultiResolutionEncoder` takes, in eval mode; or such an encoder, which then
            decides about layers, scales and normalization.
        layers: 0-based blocks whose outputs are used, without the final norm.
        scales: Factors of the (prescaled) image's size.
        index: ``"exact"``: all rows. ``"cells"``: the same answers, by ``NearestIndex(cells="auto")``. ``"coreset"``: a
            share of the rows of every bank, chosen by :func:`k_center_greedy`, searched exactly. ``"ivf"``: all rows,
            searched approximately by faiss.
        foreground: Called with an image (3, H, W); gives an (H, W) mask, true on the object. Patches that are mostly
            background are in no bank and score 0.
        pixels: Images are resized to about this many pixels first, larger or smaller, keeping their shape; those
            within 10 % per side stay, as in the paper's Table 5. None: never.
        rules: ``"mrf-ad"``, ``"patchcore"``, ``"anomaly-dino"`` or :class:`ScoringRules`.
        coreset: Share of the rows that a coreset keeps.
        background: ``"black"`` blackens the background before encoding, as in MRF-AD; ``"keep"`` leaves it.
        precision: As for :class:`NearestIndex`.
        on_empty: Where an image has no patch at a scale, as the image is smaller than a patch there, or no patch is
            mostly foreground. ``"skip"``: a small image is enlarged to one patch; without foreground the scale is left
            out for this image, and a scale without any row altogether, with a warning; an image without foreground
            at all scores 0. ``"raise"``: a ValueError that names image and scale, before the image is encoded.

    Attributes:
        banks_: (rows, D) per scale and layer (layers fastest), mapped from disk; no rows where a scale is left out.
        images_: Number of images they come from.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: features of one image; banks are files, of which searches hold a copy in ``precision``.

    Source: MRF-AD sections 4 and 5; MuRF section 3.2.
    """

    def __init__(
        self,
        encoder: nn.Module,
        layers: Sequence[int] = (7, 9, 11),
        scales: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7),
        index: str = "exact",
        foreground: Callable[[Tensor], Tensor] | None = None,
        pixels: float | None = 5e6,
        *,
        rules: str | ScoringRules = "mrf-ad",
        coreset: float = 0.1,
        background: str = "black",
        precision: str = "auto",
        on_empty: str = "skip",
    ) -> None:
        _arguments.choice(WHAT, "on_empty", on_empty, ON_EMPTY)
        _arguments.choice(WHAT, "index", index, INDICES)
        _arguments.choice(WHAT, "background", background, BACKGROUNDS)
        _arguments.choice(WHAT, "precision", precision, PRECISIONS)
        if pixels is not None:
            pixels = _arguments.number(WHAT, "pixels", pixels)
            if pixels <= 0:
                raise ValueError(f"murf_fast.{WHAT}: `pixels` must be positive or None, got {pixels!r}")
        coreset = _arguments.number(WHAT, "coreset", coreset)
        if not 0 < coreset <= 1:
            raise ValueError(f"murf_fast.{WHAT}: `coreset` must be in (0, 1], got {coreset!r}")
        if foreground is not None and not callable(foreground):
            raise TypeError(f"murf_fast.{WHAT}: `foreground` must be callable, got {type(foreground).__name__}")
        rules = rules_of(rules)
        if index == "ivf" and rules.image_score == "reweighted":
            raise ValueError(f'murf_fast.{WHAT}: `rules` with "reweighted" scores need index="exact" or "coreset"')
        if not isinstance(encoder, MultiResolutionEncoder):
            _resolutions.checked_scales(WHAT, scales)
            kind = PatchAtLeast if on_empty == "skip" else MultiResolutionEncoder
            encoder = kind(encoder, scales=scales, layers=layers, norm=False, **IMAGENET)
        self.encoder, self.index, self.foreground, self.pixels = encoder, index, foreground, pixels
        self.rules, self.coreset, self.background, self.precision = rules, coreset, background, precision
        self.on_empty = on_empty
        self.banks_: list[Tensor] = []
        self.images_ = 0
        self._indices: list[NearestIndex | IVFIndex | ShardedIndex | None] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._group = None

    def fit(
        self,
        images: Iterable,
        *,
        folder: str | Path | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> MultiResolutionDetector:
        """Fills the banks with the patches of normal images.

        Args:
            images: Several, of any sizes, as a list or any iterable: tensors (3, H, W), arrays (H, W, 3), PIL images or
                paths of image files; uint8 or in [0, 1].
            folder: Where the rows are kept; None: a temporary folder, removed with the detector.
            progress: Called with (images done, images in all or None) after every image.

        Returns:
            The detector itself.

        Raises:
            TypeError, ValueError: An image is none, or has no patch at a scale (see ``on_empty``); those that lie in
                memory as a list are checked before the first is encoded. ``rules.k`` is more than the rows of a bank.

        Memory: the features of one image, or of small ones that share a pass (up to the encoder's ``tokens_per_pass``
        patches together), and what the encoder takes; rows go to files, which are mapped. A coreset beside that the
        rows it keeps, and what :func:`k_center_greedy` takes for one bank.
        """
        place = None if folder is None else _files.folder_of(folder)
        if progress is not None and not callable(progress):
            raise TypeError(f"murf_fast.{WHAT}: `progress` must be callable, got {type(progress).__name__}")
        images = self._checked(_images.many(images))
        self._folder = tempfile.TemporaryDirectory(prefix="murf_fast-") if place is None else None
        place = place or Path(self._folder.name)
        place.mkdir(parents=True, exist_ok=True)
        total = len(images) if hasattr(images, "__len__") else None
        files = [_files.RowFile(place / f"rows-{i}.bin") for i in range(len(_description.places(self.encoder)))]
        count = 0
        for count, of_image in enumerate(self._patches_of_each(images), start=1):
            for file, patches in zip(files, of_image, strict=True):
                if patches.rows is not None:
                    file.append(patches.counting)
            if progress is not None:
                progress(count, total)
        if not count:
            raise ValueError(f"murf_fast.{WHAT}: `images` must hold at least one image")
        banks = [f.tensor() for f in files]
        self._tell_empty(banks)
        if self.index == "coreset":
            banks = [b[k_center_greedy(b, fraction=self.coreset)] if len(b) else b for b in banks]
        self._check_rows([len(bank) for bank in banks[:: len(self.encoder.layers)]])
        self.banks_, self.images_, self._group, self._indices = banks, count, None, []
        return self

    def score(self, image: object) -> Anomaly:
        """The anomaly map of an image, at its own size, and its score.

        Args:
            image: One, of any size: a tensor (3, H, W), an array (H, W, 3), a PIL image or the path of an image file;
                uint8 or in [0, 1].

        Raises:
            TypeError, ValueError: It is no image, or has no patch at a scale (see ``on_empty``); or neither
                :meth:`fit` nor :meth:`load` was called.

        Memory: the features of the image, what the encoder takes, and a few maps of the image's size. The first call
        prepares the banks for searches: a copy in ``precision`` where that is not float32 (with ``"ivf"`` always).
        """
        self._fitted()
        image = _images.as_tensor(image)
        return self._anomaly(image, *self._distances(image))

    def score_each_scale(self, image: object) -> list[Anomaly]:
        """What every scale says by itself and, last, what :meth:`score` says; from one encoding.

        Arguments, errors and memory are those of :meth:`score`.
        """
        self._fitted()
        image = _images.as_tensor(image)
        maps, weighted = self._distances(image)
        n = len(self.encoder.layers)
        parts = [slice(i, i + n) for i in range(0, len(maps), n)]
        return [self._anomaly(image, maps[part], weighted[part]) for part in (*parts, slice(None))]

    def grids(self, size: tuple[int, int], name: str = "an image") -> list[tuple[int, int]]:
        """Patches (rows, columns) per resolution of an image of ``size`` (height, width); a ValueError where none."""
        patch = self.encoder.family.patch_size
        try:
            scaled = self.encoder.sizes_for(*_images.prescaled_size(*size, self.pixels))
        except ValueError as error:
            small = min(range(len(self.encoder.scales)), key=lambda i: self.encoder.scales[i])
            raise ValueError(
                f"murf_fast.{WHAT}: {name} of {size[0]} x {size[1]} pixels is smaller than a patch of {patch} at "
                f"{self._resolution(small)}"
            ) from error
        return [(h // patch, w // patch) for h, w in scaled]

    def save(self, folder: str | Path) -> None:
        """Writes the banks (safetensors) and a description (JSON) with their checksums, which :meth:`load` reads.

        Raises:
            TypeError, ValueError: ``folder`` is no path or no folder, or there is nothing to save.

        Memory: a few megabytes.
        """
        self._fitted()
        folder = _files.folder_of(folder)
        folder.mkdir(parents=True, exist_ok=True)
        banks = []
        for i, (bank, at) in enumerate(zip(self.banks_, _description.places(self.encoder), strict=True)):
            name = f"bank-{i:03d}.safetensors"
            digest = _files.write_rows(folder / name, bank, at)
            banks.append({"file": name, "shape": list(bank.shape), "place": at, "sha256": digest})
        _files.write_description(
            folder,
            {
                "fingerprint": fingerprint(self.encoder),
                "images": self.images_,
                "layers": self.encoder.layers,
                "scales": self.encoder.scales,
                "index": self.index,
                "pixels": self.pixels,
                "rules": dataclasses.asdict(self.rules),
                "coreset": self.coreset,
                "background": self.background,
                "precision": self.precision,
                "on_empty": self.on_empty,
                "foreground": self.foreground is not None,
                "banks": banks,
            },
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        encoder: nn.Module,
        *,
        foreground: Callable[[Tensor], Tensor] | None = None,
        group=None,
        verify: bool = True,
    ) -> MultiResolutionDetector:
        """A saved detector; its banks are mapped.

        Only regular files that lie in the folder are opened. Folders of version 1, without checksums, load with a
        warning.

        Args:
            folder: As given to :meth:`save`.
            encoder: The model, or encoder, that the banks were made with.
            foreground: Again, where the detector had one: functions are not saved.
            group: A ``torch.distributed`` process group (``dist.group.WORLD`` for all ranks): every rank searches its
                part of every bank, and all get the same scores for the same images.
            verify: Read every bank once, in blocks, to compare its sha256. False, for banks too large for that, still
                checks their number, order, shapes and types.

        Raises:
            TypeError: ``folder`` is no path, or ``encoder`` no supported model.
            ValueError: The folder holds no detector, one of another version or for another encoder, or damaged files.

        Memory: the banks are mapped; a block of 4 MB while they are verified.
        """
        folder = _files.folder_of(folder)
        told = _description.told(folder)
        detector = cls(
            encoder,
            told["layers"],
            told["scales"] or (1.0,),
            told["index"],
            foreground,
            told["pixels"],
            rules=told["rules"],
            coreset=told["coreset"],
            background=told["background"],
            precision=told["precision"],
            on_empty=told["on_empty"],
        )
        expected, found = told["fingerprint"], fingerprint(detector.encoder)
        if found != expected:
            raise ValueError(
                f"murf_fast.{WHAT}: {folder} was made with another encoder: its fingerprint is {expected[:12]}, "
                f"that of `encoder` {found[:12]}"
            )
        if told["foreground"] and foreground is None:
            raise ValueError(f"murf_fast.{WHAT}: {folder} was made with a `foreground` function; give it again")
        banks = _description.banks(folder, told, detector.encoder, verify)
        detector._check_rows([len(bank) for bank in banks[:: len(detector.encoder.layers)]])
        detector.banks_ = banks
        detector.images_, detector._group = told["images"], group
        return detector

    @torch.no_grad()
    def _distances(self, image: Tensor) -> tuple[list[Tensor | None], list[float]]:
        """Per bank, a (1, 1, h, w) map of distances and, where the rules want them, PatchCore's image scores.

        None where the scale is left out: the bank is empty, or no patch of the image counts.
        """
        maps, weighted = [], []
        (of_image,) = self._encoded([self._looked_at(image, "the image")])
        for i, patches in enumerate(of_image):
            counting = patches.counting
            if counting is None or not len(counting) or not len(self.banks_[i]):
                maps.append(None)
                weighted.append(0.0)
                continue
            found, indices = self._search(i, counting)
            distances = patches.rows.new_zeros(len(patches.rows), dtype=torch.float32)
            distances[slice(None) if patches.kept is None else patches.kept] = found.mean(1).float()
            maps.append(distances.view(1, 1, *patches.grid))
            reweighted = self.rules.image_score == "reweighted"
            weighted.append(
                reweighted_score(counting, found[:, 0], indices[:, 0], self._indices[i]) if reweighted else 0.0
            )
        return maps, weighted

    def _anomaly(self, image: Tensor, maps: list[Tensor | None], weighted: list[float]) -> Anomaly:
        rules = self.rules
        weighted = [w for w, m in zip(weighted, maps, strict=True) if m is not None]
        maps = [m for m in maps if m is not None]
        if not maps:
            return Anomaly(torch.zeros(image.shape[2:], dtype=torch.float32, device=self._device()), 0.0)
        fused = upsample_mean(maps, tuple(image.shape[2:]), mode=rules.mode)
        if rules.sigma:
            fused = gaussian_blur(fused, rules.sigma, border=rules.border)
        if rules.image_score == "reweighted":
            return Anomaly(fused[0, 0], sum(weighted) / len(weighted))
        finest = max((m.shape[2:] for m in maps), key=lambda grid: grid[0] * grid[1])
        patches = upsample_mean(maps, tuple(finest))
        score = float(patches.max()) if rules.image_score == "max" else mean_top(patches)
        return Anomaly(fused[0, 0], score)

    def _fitted(self) -> None:
        if not self.banks_:
            raise ValueError(f"murf_fast.{WHAT}: call fit() or load() first")

    def _checked(self, images: Iterable) -> Iterable:
        """``images``; what can be known of those in memory is checked before the first is encoded."""
        if not isinstance(images, (list, tuple)):
            return images
        grids = []
        for i, image in enumerate(images):
            size = _images.size_of(image, f"`images[{i}]`")
            if size is not None:
                _images.check_values(image, self.encoder, f"`images[{i}]`")
                grids.append(self.grids(size, f"`images[{i}]`"))
        if images and len(grids) == len(images):
            self._check_rows([sum(h * w for h, w in of_scale) for of_scale in zip(*grids, strict=True)])
        return images

    def _check_rows(self, rows: Sequence[int]) -> None:
        """Every resolution with rows must have as many as a patch is compared with. ``rows``: those of each."""
        for i, count in enumerate(rows):
            if 0 < count < self.rules.k:
                raise ValueError(
                    f"murf_fast.{WHAT}: `rules.k` must be at most the {count} rows of a bank of {self._resolution(i)}, "
                    f"got {self.rules.k}"
                )

    def _resolution(self, i: int) -> str:
        return f"size {self.encoder.sizes[i]}" if self.encoder.sizes is not None else f"scale {self.encoder.scales[i]}"

    def _device(self) -> torch.device:
        return next(self.encoder.model.parameters()).device

    def _tell_empty(self, banks: list[Tensor]) -> None:
        """Scales that no row came from, as the foreground covers no patch there."""
        empty = [
            self._resolution(i)
            for i in range(0, len(banks) // len(self.encoder.layers))
            if not len(banks[i * len(self.encoder.layers)])
        ]
        if len(empty) * len(self.encoder.layers) == len(banks):
            raise ValueError(f"murf_fast.{WHAT}: `foreground` covers no patch of any image at any scale")
        if empty:
            warnings.warn(
                f"murf_fast.{WHAT}: `foreground` covers no patch of any image at {', '.join(empty)}: left out",
                stacklevel=3,
            )

    def _patches_of_each(self, images: Iterable) -> Iterator[list[_Patches]]:
        """The patches of every image per bank, in order. Neighbours share a pass as far as it takes them.

        Images of up to some 250 pixels gain from it; large ones go alone.
        """
        group, patches = [], 0
        for i, image in enumerate(images):
            name = f"`images[{i}]`"
            looked = self._looked_at(_images.as_tensor(image, name), name)
            count = 0 if looked.pixels is None else sum(rows * columns for rows, columns in looked.grids)
            if group and patches + count > self.encoder.tokens_per_pass:
                yield from self._encoded(group)
                group, patches = [], 0
            group.append(looked)
            patches += count
            if patches >= self.encoder.tokens_per_pass:  # a large image does not wait while the next one is read
                yield from self._encoded(group)
                group, patches = [], 0
        if group:
            yield from self._encoded(group)

    @torch.no_grad()
    def _looked_at(self, image: Tensor, name: str) -> _LookedAt:
        """An image as it is to be encoded."""
        grids = self.grids(tuple(image.shape[2:]), name)
        _images.check_values(image, self.encoder, name)
        image = image.to(self._device())
        mask = self._mask(image)
        kept = [None if mask is None else _covered(mask, grid) for grid in grids]
        if mask is not None:
            covered = [bool(k.any()) for k in kept]
            if self.on_empty == "raise" and not all(covered):
                raise ValueError(
                    f"murf_fast.{WHAT}: `foreground` covers no patch of {name} at "
                    f"{self._resolution(covered.index(False))}, where it has {grids[covered.index(False)]} patches"
                )
            if not any(covered):
                return _LookedAt(None, kept, grids)
            if self.background == "black":
                image = image * mask.to(image.dtype)
        return _LookedAt(_images.prescaled(image, self.pixels), kept, grids)

    @torch.no_grad()
    def _encoded(self, group: Sequence[_LookedAt]) -> list[list[_Patches]]:
        """The patches of every image of a group per bank."""
        pixels = [looked.pixels for looked in group if looked.pixels is not None]
        if len(pixels) == 1:
            features = iter([self.encoder(pixels[0])])
        else:
            features = iter(self.encoder([image[0] for image in pixels]) if pixels else ())
        n, found = len(self.encoder.layers), []
        for looked in group:
            rows = [None] * (n * len(looked.grids))
            if looked.pixels is not None:
                rows = [m[0].flatten(1).T for m in next(features).maps]
            found.append([_Patches(r, looked.kept[i // n], looked.grids[i // n]) for i, r in enumerate(rows)])
        return found

    def _mask(self, image: Tensor) -> Tensor | None:
        """(1, 1, H, W)"""
        if self.foreground is None:
            return None
        mask = self.foreground(image[0])
        if not isinstance(mask, Tensor):
            try:
                mask = torch.as_tensor(mask, device="cpu")
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"murf_fast.{WHAT}: `foreground` must give a mask (H, W), a tensor or an array, got "
                    f"{type(mask).__name__}"
                ) from error
        if tuple(mask.shape) != tuple(image.shape[2:]):
            raise ValueError(
                f"murf_fast.{WHAT}: `foreground` must give a mask of the image's size, {tuple(image.shape[2:])}, got "
                f"{tuple(mask.shape)}"
            )
        return (mask != 0).to(image.device)[None, None]

    def _search(self, i: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not self._indices:
            self._indices = [self._prepare(bank, rows.device) if len(bank) else None for bank in self.banks_]
        index = self._indices[i]
        if isinstance(index, ShardedIndex):
            return index.search(rows, k=self.rules.k, metric=self.rules.metric)
        return nearest_distance(rows, index, k=self.rules.k, metric=self.rules.metric)

    def _prepare(self, bank: Tensor, device: torch.device) -> NearestIndex | IVFIndex | ShardedIndex:
        cosine = self.rules.metric == "cosine"
        if self.index == "ivf":
            if self._group is not None:
                raise ValueError(f'murf_fast.{WHAT}: banks with index="ivf" cannot be sharded')
            return IVFIndex(bank, nlist=min(512, len(bank)), nprobe=min(32, len(bank)), cosine=cosine)
        options = {"cosine": cosine, "precision": self.precision, "device": device}
        if self.index == "cells":
            options["cells"] = "auto"
        if self._group is None:
            return NearestIndex(bank, **options)
        if self.rules.image_score == "reweighted":
            raise ValueError(f'murf_fast.{WHAT}: "reweighted" scores need whole banks, these are sharded')
        rank, ranks = torch.distributed.get_rank(self._group), torch.distributed.get_world_size(self._group)
        part = bank[len(bank) * rank // ranks : len(bank) * (rank + 1) // ranks]
        return ShardedIndex(part, group=self._group, **options)


def _covered(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N,): the patches that a mask (1, 1, H, W) covers by half or more."""
    return F.interpolate(mask.float(), grid, mode="area").flatten() >= 0.5
