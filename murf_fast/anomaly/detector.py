"""The training-free detector: banks of normal patches at several resolutions, and distances to them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.anomaly import _files, _images
from murf_fast.anomaly._fingerprint import fingerprint
from murf_fast.anomaly.scoring import ScoringRules, mean_top, reweighted_score, rules_of
from murf_fast.anomaly.sharded_index import ShardedIndex
from murf_fast.nn import MultiResolutionEncoder
from murf_fast.ops import _checks
from murf_fast.ops._ivf import IVFIndex
from murf_fast.ops.gaussian_blur import gaussian_blur
from murf_fast.ops.k_center_greedy import k_center_greedy
from murf_fast.ops.nearest_distance import NearestIndex, nearest_distance
from murf_fast.ops.upsample_mean import upsample_mean

WHAT = "MultiResolutionDetector"
INDICES = ("exact", "coreset", "ivf")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """What :meth:`MultiResolutionDetector.score` returns: ``map`` (H, W) at the image's size, and the image's score."""

    map: Tensor
    score: float


class MultiResolutionDetector:
    """Anomaly scores of an image from the distances of its patches to those of normal images (MRF-AD, MuRF).

    One bank per scale and layer holds the patches of all training images. A patch's score is the distance to its
    nearest row; the maps of all banks are brought to the image and averaged.

    Args:
        encoder: A frozen ViT that :class:`MultiResolutionEncoder` takes, in eval mode; or such an encoder, which then
            decides about layers, scales and normalization.
        layers: 0-based blocks whose outputs are used, without the final norm.
        scales: Factors of the (prescaled) image's size.
        index: ``"exact"``: all rows. ``"coreset"``: a share of the rows of every bank, chosen by
            :func:`k_center_greedy`, searched exactly. ``"ivf"``: all rows, searched approximately by faiss.
        foreground: Called with an image (3, H, W); gives an (H, W) mask, true on the object. Patches that are mostly
            background are in no bank and score 0.
        pixels: Images are resized to about this many pixels first, larger or smaller, keeping their shape; those
            within 10 % per side stay, as in the paper's Table 5. None: never.
        rules: ``"mrf-ad"``, ``"patchcore"``, ``"anomaly-dino"`` or :class:`ScoringRules`.
        coreset: Share of the rows that a coreset keeps.
        background: ``"black"`` blackens the background before encoding, as in MRF-AD; ``"keep"`` leaves it.
        precision: As for :class:`NearestIndex`.

    Attributes:
        banks_: (rows, D) per scale and layer (layers fastest), mapped from disk.
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
    ) -> None:
        if not isinstance(encoder, MultiResolutionEncoder):
            encoder = MultiResolutionEncoder(encoder, scales=scales, layers=layers, norm=False, **IMAGENET)
        if index not in INDICES:
            raise ValueError(f"murf_fast.{WHAT}: `index` must be one of {INDICES}, got {index!r}")
        if background not in ("black", "keep"):
            raise ValueError(f'murf_fast.{WHAT}: `background` must be "black" or "keep", got {background!r}')
        if pixels is not None and not pixels > 0:
            raise ValueError(f"murf_fast.{WHAT}: `pixels` must be positive or None, got {pixels!r}")
        if not 0 < coreset <= 1:
            raise ValueError(f"murf_fast.{WHAT}: `coreset` must be in (0, 1], got {coreset!r}")
        if foreground is not None and not callable(foreground):
            raise TypeError(f"murf_fast.{WHAT}: `foreground` must be callable, got {type(foreground).__name__}")
        self.encoder, self.index, self.foreground, self.pixels = encoder, index, foreground, pixels
        self.rules, self.coreset, self.background, self.precision = rules_of(rules), coreset, background, precision
        self.banks_: list[Tensor] = []
        self.images_ = 0
        self._indices: list[NearestIndex | IVFIndex | ShardedIndex] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._group = None

    def fit(
        self,
        images: Iterable,
        *,
        folder: str | Path | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> MultiResolutionDetector:
        """Fills the banks with the patches of normal images; returns itself.

        Args:
            images: Of any sizes: tensors (3, H, W), arrays (H, W, 3) or PIL images, uint8 or in [0, 1].
            folder: Where the rows are kept; None: a temporary folder, removed with the detector.
            progress: Called with (images done, images in all or None) after every image.
        """
        self._folder = None if folder else tempfile.TemporaryDirectory(prefix="murf_fast-")
        place = Path(folder or self._folder.name)
        place.mkdir(parents=True, exist_ok=True)
        total = len(images) if hasattr(images, "__len__") else None
        files: list[_files.RowFile] = []
        count = 0
        for count, image in enumerate(images, start=1):
            for i, (rows, mask) in enumerate(self._rows(_images.as_tensor(image))[0]):
                if i == len(files):
                    files.append(_files.RowFile(place / f"rows-{i}.bin"))
                files[i].append(rows if mask is None else rows[mask])
            if progress is not None:
                progress(count, total)
        if not count:
            raise ValueError(f"murf_fast.{WHAT}: `images` must hold at least one image")
        self.banks_, self.images_, self._group = [f.tensor() for f in files], count, None
        if self.index == "coreset":
            self.banks_ = [b[k_center_greedy(b, fraction=self.coreset)] for b in self.banks_]
        self._indices = []
        return self

    def score(self, image: object) -> Anomaly:
        """The anomaly map of an image (as for :meth:`fit`), at its own size, and its score."""
        image = _images.as_tensor(image)
        return self._anomaly(image, *self._distances(image))

    def score_each_scale(self, image: object) -> list[Anomaly]:
        """What every scale says by itself and, last, what :meth:`score` says; from one encoding."""
        image = _images.as_tensor(image)
        maps, weighted = self._distances(image)
        n = len(self.encoder.layers)
        parts = [slice(i, i + n) for i in range(0, len(maps), n)]
        return [self._anomaly(image, maps[part], weighted[part]) for part in (*parts, slice(None))]

    def save(self, folder: str | Path) -> None:
        """Writes the banks (safetensors) and a description (JSON) into a folder, which :meth:`load` reads."""
        self._fitted()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"bank-{i:03d}.safetensors" for i in range(len(self.banks_))]
        for name, bank in zip(names, self.banks_, strict=True):
            _files.write_rows(folder / name, bank)
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
                "foreground": self.foreground is not None,
                "banks": [{"file": n, "shape": list(b.shape)} for n, b in zip(names, self.banks_, strict=True)],
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
    ) -> MultiResolutionDetector:
        """A saved detector; its banks are mapped, not read.

        Args:
            folder: As given to :meth:`save`.
            encoder: The model, or encoder, that the banks were made with.
            foreground: Again, where the detector had one: functions are not saved.
            group: A ``torch.distributed`` process group (``dist.group.WORLD`` for all ranks): every rank searches its
                part of every bank, and all get the same scores for the same images.

        Raises:
            ValueError: The folder holds no detector, one of another version or for another encoder, or damaged files.
        """
        folder = Path(folder)
        told = _files.read_description(folder)
        detector = cls(
            encoder,
            told["layers"],
            told["scales"] or (1.0,),
            told["index"],
            foreground,
            told["pixels"],
            rules=rules_of(told["rules"]),
            coreset=told["coreset"],
            background=told["background"],
            precision=told["precision"],
        )
        expected, found = told["fingerprint"], fingerprint(detector.encoder)
        if found != expected:
            raise ValueError(
                f"murf_fast.{WHAT}: {folder} was made with another encoder: its fingerprint is {expected[:12]}, "
                f"that of `encoder` {found[:12]}"
            )
        if told["foreground"] and foreground is None:
            raise ValueError(f"murf_fast.{WHAT}: {folder} was made with a `foreground` function; give it again")
        for bank in told["banks"]:
            rows = _files.read_rows(folder / bank["file"])
            if list(rows.shape) != bank["shape"]:
                raise ValueError(
                    f"murf_fast.{WHAT}: {folder / bank['file']} has shape {list(rows.shape)}, expected {bank['shape']}"
                )
            detector.banks_.append(rows)
        detector.images_, detector._group = told["images"], group
        return detector

    @torch.no_grad()
    def _distances(self, image: Tensor) -> tuple[list[Tensor], list[float]]:
        """Per bank, a (1, 1, h, w) map of distances and, where the rules want them, PatchCore's image scores."""
        self._fitted()
        maps, weighted = [], []
        for i, ((rows, mask), grid) in enumerate(zip(*self._rows(image), strict=True)):
            distances = rows.new_zeros(len(rows), dtype=torch.float32)
            kept = rows if mask is None else rows[mask]
            score = 0.0
            if len(kept):
                found, indices = self._search(i, kept)
                distances[slice(None) if mask is None else mask] = found.mean(1)
                if self.rules.image_score == "reweighted":
                    score = reweighted_score(kept, found[:, 0], indices[:, 0], self._indices[i])
            maps.append(distances.view(1, 1, *grid))
            weighted.append(score)
        return maps, weighted

    def _anomaly(self, image: Tensor, maps: list[Tensor], weighted: list[float]) -> Anomaly:
        rules = self.rules
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

    @torch.no_grad()
    def _rows(self, image: Tensor) -> tuple[list[tuple[Tensor, Tensor | None]], list[tuple[int, int]]]:
        """Patches (N, D) per bank with the mask (N,) of those that count, and the banks' grids."""
        device = next(self.encoder.model.parameters()).device
        image = image.to(device)
        mask = self._mask(image)
        if mask is not None and self.background == "black":
            image = image * mask.to(image.dtype)
        maps = self.encoder(_images.prescaled(image, self.pixels)).maps
        patches, grids = [], []
        for m in maps:
            grid = tuple(m.shape[2:])
            kept = None if mask is None else F.interpolate(mask.float(), grid, mode="area").flatten() >= 0.5
            patches.append((m[0].flatten(1).T, kept))
            grids.append(grid)
        return patches, grids

    def _mask(self, image: Tensor) -> Tensor | None:
        """(1, 1, H, W)"""
        if self.foreground is None:
            return None
        mask = self.foreground(image[0])
        mask = mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device="cpu")
        if tuple(mask.shape) != tuple(image.shape[2:]):
            raise ValueError(
                f"murf_fast.{WHAT}: `foreground` must give a mask of the image's size, {tuple(image.shape[2:])}, got "
                f"{tuple(mask.shape)}"
            )
        return (mask != 0).to(image.device)[None, None]

    def _search(self, i: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not self._indices:
            self._indices = [self._prepare(bank, rows.device) for bank in self.banks_]
        index = self._indices[i]
        _checks.integer(WHAT, "rules.k", self.rules.k, 1)
        if isinstance(index, ShardedIndex):
            return index.search(rows, k=self.rules.k, metric=self.rules.metric)
        return nearest_distance(rows, index, k=self.rules.k, metric=self.rules.metric)

    def _prepare(self, bank: Tensor, device: torch.device) -> NearestIndex | IVFIndex | ShardedIndex:
        cosine = self.rules.metric == "cosine"
        if self.index == "ivf":
            if self._group is not None:
                raise ValueError(f'murf_fast.{WHAT}: banks with index="ivf" cannot be sharded')
            if self.rules.image_score == "reweighted":
                raise ValueError(f'murf_fast.{WHAT}: "reweighted" scores need index="exact" or "coreset"')
            return IVFIndex(bank, nlist=min(512, len(bank)), nprobe=min(32, len(bank)), cosine=cosine)
        options = {"cosine": cosine, "precision": self.precision, "device": device}
        if self._group is None:
            return NearestIndex(bank, **options)
        if self.rules.image_score == "reweighted":
            raise ValueError(f'murf_fast.{WHAT}: "reweighted" scores need whole banks, these are sharded')
        rank, ranks = torch.distributed.get_rank(self._group), torch.distributed.get_world_size(self._group)
        part = bank[len(bank) * rank // ranks : len(bank) * (rank + 1) // ranks]
        return ShardedIndex(part, group=self._group, **options)
