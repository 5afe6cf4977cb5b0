"""Seconds of the multi-resolution anomaly detector's parts: a fit's and a score's, per category."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast import reference
from murf_fast.anomaly import Category, MultiResolutionDetector, categories
from murf_fast.anomaly._coreset import coresets
from murf_fast.anomaly._encoder import PatchAtLeast, normalization_of
from murf_fast.anomaly._images import as_tensor
from murf_fast.cli.tables.case import OURS, PARTS, PLAIN, Case, Setting, Table, Work
from murf_fast.cli.tables.vits import Vit, counted_or_problem, own_layers, vits

SCALES = (0.3, 0.4, 0.5, 0.6, 0.7)
CORESET = 0.1
SYNTHETIC = "synthetic"
TRAIN, MOST = 8, 32  # images of the synthetic category, and of any


@dataclass(frozen=True)
class _Category:
    """Images (3, H, W), uint8: normal ones, and one to score."""

    name: str
    train: Callable[[], list[Tensor]]
    test: Callable[[], Tensor]
    count: int


def _cases(setting: Setting) -> list[Case]:
    if setting.batch != 1:
        raise ValueError(f"--batch: mrfad scores images one by one, got {setting.batch}")
    found = []
    for vit in vits(setting):
        layers = _layers(len(vit.family.blocks))
        for size in setting.sizes:
            for category in _categories(setting, size):
                found += _pair(setting, vit, layers, size, category)
    return found


def _layers(blocks: int) -> list[int]:
    """MRF-AD's 7, 9 and 11 of twelve, at the same depths of others."""
    return sorted({max(0, round(blocks * n / 12) - 1) for n in (8, 10, 12)})


def _categories(setting: Setting, size: int) -> list[_Category]:
    if setting.data is None:

        def images(count: int, seed: int) -> list[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            return list(torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8))

        return [_Category(SYNTHETIC, lambda: images(TRAIN, 0), lambda: images(1, 1)[0], TRAIN)]
    return [
        _Category(
            c.name,
            functools.partial(_train, c),
            functools.partial(_tested, c),
            min(MOST, len(c.train)),
        )
        for c in categories(setting.data)
    ]


def _train(category: Category) -> list[Tensor]:
    return [as_tensor(path)[0] for path in category.train[:MOST]]


def _tested(category: Category) -> Tensor:
    return as_tensor(category.test[0].path)[0]


def _pair(setting: Setting, vit: Vit, layers: Sequence[int], size: int, category: _Category) -> list[Case]:
    patch = vit.family.patch_size
    if min(SCALES) * size < patch:
        raise ValueError(f"--sizes: {size} at a scale of {min(SCALES)} has no patch of {patch} pixels of {vit.name}")
    sizes = [int(scale * size) // patch * patch for scale in SCALES]
    of_image, problem, peak = 0.0, None, 0.0
    for side in sizes:
        x = torch.empty(1, 3, side, side, dtype=setting.dtype, device="meta")
        work, problem = counted_or_problem(lambda model, x: _own(model, x, layers), vit, x)
        of_image, peak = of_image + work.operations, max(peak, work.bytes)
    patches = [(side // patch) ** 2 for side in sizes]
    width, banks = vit.family.width, len(layers)
    rows = [n * category.count for n in patches]
    greedy = sum(3.0 * banks * width * n * CORESET * n for n in rows)
    searched = sum(2.0 * banks * width * n * CORESET * m for n, m in zip(patches, rows, strict=True))
    held = 2.0 * banks * width * sum(rows) * 4 + max(CORESET * n * m * 4 for n, m in zip(rows, patches, strict=True))
    work = Work(of_image * (category.count + 1) + greedy + searched, peak + held)
    facts = {"images": float(category.count), "rows": float(banks * sum(rows))}
    labels = {"model": vit.name, "size": size, "category": category.name}

    def build(code: str) -> dict[str, Callable[[], object]]:
        encoder = PatchAtLeast(vit.make(), scales=SCALES, layers=layers, norm=False, **normalization_of(vit.meta))
        detector = MultiResolutionDetector(encoder, index="coreset", coreset=CORESET, pixels=size**2, enlarge=True)
        return (_Ours if code == OURS else _Plain)(detector, category.train(), category.test()).parts()

    return [
        Case(labels | {"code": OURS}, lambda: build(OURS), facts, work),
        Case(labels | {"code": PLAIN}, lambda: build(PLAIN), facts, work, problem),
    ]


class _Ours:
    """The detector's own parts, one after another as a fit and a score call them."""

    def __init__(self, detector: MultiResolutionDetector, train: list[Tensor], test: Tensor) -> None:
        self.detector, self.train, self.test = detector, train, test
        self.rows: list[Tensor] = []
        self.looked: Any = None
        self.of_image: Any = None
        self.found: Any = None

    def parts(self) -> dict[str, Callable[[], object]]:
        calls: dict[str, Callable[[], object]] = {
            "encode": self.encode,
            "coreset": self.coreset,
            "features": self.features,
            "search": self.search,
            "map": self.map,
        }
        return {name: torch.no_grad()(call) for name, call in calls.items()}

    def encode(self) -> None:
        patches = self.detector._patches
        images = [[p.rows for p in found] for _, found in patches.encode_each(patches.look_at_each(self.train))]
        self.rows = [torch.cat(rows) for rows in zip(*images, strict=True)]

    def coreset(self) -> None:
        chosen = coresets(self.rows, CORESET, None, None)
        self.detector.banks_ = [rows[c] for rows, c in zip(self.rows, chosen, strict=True)]
        self.detector._indices = []

    def features(self) -> None:
        self.looked, self.of_image = self.detector._patches.encode_one(self.test)

    def search(self) -> None:
        self.found = self.detector._searched(self.of_image)

    def map(self) -> object:
        return self.detector._anomaly(self.looked.size, *self.found)


class _Plain(_Ours):
    """The same in plain PyTorch: one forward per image and scale, one distance per row and centre, whole matrices of
    distances, one map after another.
    """

    def encode(self) -> None:
        images = [self._encoded(image) for image in self.train]
        self.rows = [torch.cat(rows) for rows in zip(*images, strict=True)]

    def coreset(self) -> None:
        start = torch.zeros(1, dtype=torch.int64)
        counts = [max(1, int(CORESET * len(rows))) for rows in self.rows]
        self.banks = [
            rows[reference.k_center_greedy(rows, n, start).to(rows.device)]
            for rows, n in zip(self.rows, counts, strict=True)
        ]

    def features(self) -> None:
        self.of_image = self._encoded(self.test)

    def search(self) -> None:
        self.found = [
            torch.cdist(rows.float(), bank.float()).amin(1)
            for rows, bank in zip(self.of_image, self.banks, strict=True)
        ]

    def map(self) -> Tensor:
        size = (self.test.shape[1], self.test.shape[2])
        grids = self.detector.grids(size)
        maps = [
            F.interpolate(d.view(1, 1, *grids[i // len(self.detector.encoder.layers)]), size, mode="bilinear")
            for i, d in enumerate(self.found)
        ]
        return torch.stack(maps).mean(0)

    def _encoded(self, image: Tensor) -> list[Tensor]:
        """Rows (N, D) per bank, layers fastest."""
        encoder = self.detector.encoder
        pixels: Any = self.detector._patches.look_at(as_tensor(image), "an image").pixels
        pixels = pixels.float() / (1 if pixels.is_floating_point() else 255)
        like = next(encoder.model.parameters())
        mean, std = (normalization_of(encoder.model)[name] for name in ("mean", "std"))
        if mean is not None:
            pixels = (pixels - _channels(mean, like)) / _channels(std, like)
        pixels = pixels.to(like.dtype)
        found = []
        for size in encoder.sizes_for(*pixels.shape[2:]):
            resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
            found += [m[0].flatten(1).T for m in _own(encoder.model, resized, encoder.layers)]
        return found


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None, None]


@torch.no_grad()
def _own(model: nn.Module, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
    return own_layers(model, pixels, layers)


def _remark(rows: Sequence[dict[str, Any]]) -> str | None:
    """What a fit and a score are altogether."""
    found = []
    for row in rows:
        parts = {name: part["median_s"] for name, part in row["parts"].items()}
        if len(parts) == len(TABLE.parts):
            fit, score = parts["encode"] + parts["coreset"], sum(parts[n] for n in ("features", "search", "map"))
            found.append(f"{', '.join(map(str, row['labels'].values()))}: {fit:.3g} s and {score:.3g} s")
    return f"a fit and a score: {'; '.join(found)}." if found else None


TABLE = Table(
    title="Parts of the multi-resolution anomaly detector",
    labels=("model", "size", "category", "code"),
    parts={
        "encode": "fit: encode",
        "coreset": "fit: coreset",
        "features": "score: encode",
        "search": "score: search",
        "map": "score: map",
    },
    facts={"images": ("images", 1.0), "rows": ("rows", 1.0)},
    x=PARTS,
    sizes=(448,),
    models=("ViT-S/14",),
    size="root of the pixels that images are brought to",
    cases=_cases,
    notes=(
        f"fit: of all images, at most {MOST} of a category, at scales {', '.join(map(str, SCALES))}; coreset: a tenth "
        "of the rows of every bank. score: of one image.",
        "PyTorch: one forward per image and scale, torch.cdist to whole banks, a resize per bank.",
    ),
    remark=_remark,
    half_on_gpu=True,
    replaces=True,
    takes_data=True,
    shows_memory=False,
)
