"""Data sets of anomaly detection on disk: which images are normal, which are tested, and where their masks lie."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from murf_fast._image_paths import SUFFIXES

WHAT = "murf_fast.anomaly.datasets"
# Where a set does not say which normal images are tested, every fifth is, in the order of their names.
TEST_EVERY = 5
GOOD = ("good", "normal", "ok")
MASKS = ("ground_truth", "masks", "mask")
# Folders of a plain layout that are no kind of defect.
NO_DEFECTS = (*GOOD, *MASKS, "train", "val", "validation", "test")
KNOWN = (
    "MVTec AD (train/good, test/KIND, ground_truth/KIND), MVTec AD 2 (train/good, test_public/good and bad, "
    "test_public/ground_truth/bad), VisA (Data/Images/Normal and Anomaly, Data/Masks/Anomaly), plain (good or "
    "train/good beside folders of defects, ground_truth/KIND)"
)


@dataclass(frozen=True)
class Sample:
    """An image to test.

    Attributes:
        path: The image's file.
        kind: ``"good"`` or the name of its kind of defect.
        mask: The file of its mask; None for a good image, in which no pixel is a defect.
    """

    path: Path
    kind: str
    mask: Path | None = None

    @property
    def is_defect(self) -> bool:
        return self.mask is not None

    def read_mask(self, size: tuple[int, int]) -> np.ndarray:
        """(height, width), bool: the defect's pixels of an image of ``size``.

        Raises:
            OSError, ValueError: The mask cannot be read, or has another size than the image.
        """
        if self.mask is None:
            return np.zeros(size, dtype=bool)
        from murf_fast import _pillow

        mask = _pillow.nonzero(self.mask)
        if mask.shape != tuple(size):
            raise ValueError(
                f"{self.mask} has {mask.shape[0]} x {mask.shape[1]} pixels, its image {self.path} {size[0]} x {size[1]}"
            )
        return mask


@dataclass(frozen=True)
class Category:
    """One object of a data set: the normal images its banks are made of, and the images to test."""

    name: str
    train: tuple[Path, ...]
    test: tuple[Sample, ...]


def categories(data: str | Path) -> list[Category]:
    """The categories of a data set, in the order of their names.

    Args:
        data: The folder of one category, or of several. Known layouts: MVTec AD, MVTec AD 2 (its public test images),
            VisA (by its ``split_csv/1cls.csv`` where it is there, else every fifth normal image is tested), and plain
            folders: ``good`` (every fifth is tested) or ``train/good``, beside folders of defects. Masks lie in
            ``ground_truth/KIND`` or ``masks/KIND``, under the image's name or ``NAME_mask``, in plain layouts as
            ``NAME_mask`` beside the image, too. Files that are no images, and folders that are no categories, are left
            out.

    Raises:
        ValueError: ``data`` is no folder or has none of the layouts; a category has no normal image, or nothing to
            test; a defect's image has no mask, and the message names it.
    """
    data = Path(data).resolve()
    if not data.is_dir():
        raise ValueError(f"{WHAT}: {data} is not a folder")
    single = _category(data, _split_of_visa(data.parent))
    if single is not None:
        return [single]
    split = _split_of_visa(data)
    folders = sorted(p for p in data.iterdir() if p.is_dir())
    found = [c for c in (_category(folder, split) for folder in folders) if c is not None]
    if not found:
        raise ValueError(f"{WHAT}: neither {data} nor a folder in it is a category of a known layout: {KNOWN}")
    return found


def _category(folder: Path, split: dict[str, list[dict[str, str]]]) -> Category | None:
    """The category in a folder by the first layout it has; None: it has none."""
    for layout in (_visa_by_split(split), _visa, _mvtec2, _mvtec, _plain):
        category = layout(folder)
        if category is not None:
            _check(category, folder)
            return category
    return None


def _check(category: Category, folder: Path) -> None:
    for what, images in (("normal image to fit", category.train), ("image to test", category.test)):
        if not images:
            raise ValueError(f"{WHAT}: {folder} has no {what}")


def _mvtec(folder: Path) -> Category | None:
    good, test = folder / "train" / "good", folder / "test"
    if not good.is_dir() or not test.is_dir():
        return None
    return Category(folder.name, _images(good), _samples(test, [folder / name for name in MASKS]))


def _mvtec2(folder: Path) -> Category | None:
    good, test = folder / "train" / "good", folder / "test_public"
    if not good.is_dir() or not test.is_dir():
        return None
    return Category(folder.name, _images(good), _samples(test, [test / name for name in MASKS]))


def _visa(folder: Path) -> Category | None:
    images, masks = folder / "Data" / "Images", folder / "Data" / "Masks"
    if not (images / "Normal").is_dir() or not (images / "Anomaly").is_dir():
        return None
    train, tested = _held_out(_images(images / "Normal"))
    defects = _defects(images / "Anomaly", "Anomaly", [masks])
    return Category(folder.name, train, (*defects, *tested))


def _visa_by_split(split: dict[str, list[dict[str, str]]]) -> Callable[[Path], Category | None]:
    def category(folder: Path) -> Category | None:
        rows = split.get(folder.name, [])
        if not rows:
            return None
        root = folder.parent
        train = tuple(root / row["image"] for row in rows if row["split"] == "train")
        test = []
        for row in (row for row in rows if row["split"] == "test"):
            is_good = row["label"] == "normal"
            if not is_good and not row["mask"]:
                raise ValueError(f"{WHAT}: the split of {root} names no mask for {row['image']}")
            test.append(
                Sample(root / row["image"], "good" if is_good else "Anomaly", None if is_good else root / row["mask"])
            )
        missing = [p for p in (*train, *(p for s in test for p in (s.path, s.mask) if p)) if not p.is_file()]
        if missing:
            raise ValueError(f"{WHAT}: the split of {root} names {missing[0]}, which is not there")
        return Category(folder.name, train, tuple(test))

    return category


def _split_of_visa(root: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of a split of VisA by category; none where there is no such file."""
    path = root / "split_csv" / "1cls.csv"
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{WHAT}: {path} is no table in UTF-8: {error}") from error
    missing = {"object", "split", "label", "image", "mask"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{WHAT}: {path} has no column {', '.join(sorted(missing))}")
    found: dict[str, list[dict[str, str]]] = {}
    for number, row in enumerate(rows, start=2):
        row = {name: (row[name] or "").strip() for name in ("object", "split", "label", "image", "mask")}
        row |= {name: row[name].lower() for name in ("split", "label")}
        if not row["image"] or row["split"] not in ("train", "test") or row["label"] not in ("normal", "anomaly"):
            raise ValueError(
                f"{WHAT}: line {number} of {path} must name an image, train or test, normal or anomaly, got {row}"
            )
        found.setdefault(row["object"], []).append(row)
    return found


def _plain(folder: Path) -> Category | None:
    beside = [p for p in sorted(folder.iterdir()) if p.is_dir()]
    defects = [p for p in beside if p.name.lower() not in NO_DEFECTS and _images(p)]
    train = next((folder / "train" / name for name in GOOD if (folder / "train" / name).is_dir()), None)
    good = next((p for p in beside if p.name.lower() in GOOD), None)
    if not defects or (train is None and good is None):
        return None
    if train is None:
        normal, tested = _held_out(_images(cast("Path", good)))
    else:
        normal, tested = _images(train), _good(good) if good is not None else ()
    masks = [folder / name for name in MASKS]
    return Category(
        folder.name, normal, (*tested, *(s for p in defects for s in _defects(p, p.name, masks, beside=True)))
    )


def _samples(test: Path, masks: Sequence[Path]) -> tuple[Sample, ...]:
    """The images of folders of kinds, the good ones among them."""
    found: list[Sample] = []
    for folder in sorted(p for p in test.iterdir() if p.is_dir() and p.name not in MASKS):
        found += _good(folder) if folder.name.lower() in GOOD else _defects(folder, folder.name, masks)
    return tuple(found)


def _good(folder: Path) -> tuple[Sample, ...]:
    return tuple(Sample(path, "good") for path in _images(folder))


def _held_out(paths: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[Sample, ...]]:
    """Normal images to fit, and every fifth of them to test."""
    train = tuple(p for i, p in enumerate(paths) if i % TEST_EVERY != TEST_EVERY - 1)
    return train, tuple(Sample(p, "good") for p in paths[TEST_EVERY - 1 :: TEST_EVERY])


def _defects(folder: Path, kind: str, masks: Iterable[Path], beside: bool = False) -> tuple[Sample, ...]:
    """The images of a kind of defect, each with its mask."""
    places = [mask / kind if (mask / kind).is_dir() else mask for mask in masks if mask.is_dir()]
    files = [_by_stem(place) for place in places]
    own = _by_stem(folder) if beside else {}
    images = [p for p in _images(folder) if not (beside and _is_mask_of_another(p, own))]
    found, without = [], []
    for path in images:
        candidates = [of_place.get(stem) for of_place in files for stem in (f"{path.stem}_mask", path.stem)]
        candidates.append(own.get(f"{path.stem}_mask"))
        mask = next((c for c in candidates if c is not None), None)
        if mask is None:
            without.append(path)
        found.append(Sample(path, kind, mask))
    if without:
        more = f", and {len(without) - 1} more" if len(without) > 1 else ""
        raise ValueError(
            f"{WHAT}: {without[0]} is a defect's image without a mask{more}; expected {without[0].stem}_mask or "
            f"{without[0].stem} in {' or '.join(map(str, places)) or f'one of {MASKS} beside it'}"
        )
    return tuple(found)


def _is_mask_of_another(path: Path, files: dict[str, Path]) -> bool:
    return path.stem.endswith("_mask") and path.stem.removesuffix("_mask") in files


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in _images(folder)}


def _images(folder: Path) -> tuple[Path, ...]:
    """Links that lead nowhere among them: they are named when they are opened."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return tuple(sorted(p for p in inside if _is_image(p)))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name[0] != "." and not path.is_dir()
