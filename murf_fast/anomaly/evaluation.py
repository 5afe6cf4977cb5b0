"""A detector on a category of a data set: scores of all test images, and the measures of the field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from murf_fast import _pillow
from murf_fast.anomaly.datasets import Sample
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.metrics import au_pro, au_roc, best_f1
from murf_fast.anomaly.subsets import Subset, anomaly_of, bank_distances

MEASURES = ("image AUROC", "AU-PRO_0.05", "AU-PRO_0.3", "AU-ROC_0.05", "AU-ROC", "F1", "F1 threshold")


class ArrayFile:
    """Arrays of any sizes and one type in a file, mapped: what is not looked at is not in memory."""

    def __init__(self, path: Path, dtype: type) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._shapes: list[tuple[int, ...]] = []
        self._file = path.open("wb")

    def append(self, array: np.ndarray) -> None:
        self._shapes.append(array.shape)
        self._file.write(np.ascontiguousarray(array, dtype=self.dtype).data)

    def arrays(self) -> list[np.ndarray]:
        """All of them, mapped; none can be appended after that."""
        self._file.close()
        if not self._shapes:
            return []
        flat = np.memmap(self.path, self.dtype, "r")
        ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), self._shapes, strict=True)]


def measures(
    maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], scores: Sequence[float], defects: Sequence[bool]
) -> dict[str, float | None]:
    """The entries of ``MEASURES``; None where the set does not say, as it has no defect, or nothing else.

    Args:
        maps, masks: As for :func:`au_pro`.
        scores: One number per image.
        defects: Whether an image has a defect.

    Raises:
        TypeError, ValueError: As :func:`au_pro`.

    Memory: as :func:`au_pro`.

    Source: MVTec AD 2 (AU-PRO and AU-ROC up to a false-positive rate of 0.05, F1), MVTec AD (0.3).
    """
    found: dict[str, float | None] = dict.fromkeys(MEASURES)
    if any(defects) and not all(defects):
        found["image AUROC"] = _image_auroc(np.asarray(scores, dtype=np.float64), np.asarray(defects))
    has_defects = any(mask.any() for mask in masks)
    if has_defects and not all(mask.all() for mask in masks):
        for limit in (0.05, 0.3):
            found[f"AU-PRO_{limit:g}"] = au_pro(maps, masks, limit)
        found["AU-ROC_0.05"], found["AU-ROC"] = au_roc(maps, masks, 0.05), au_roc(maps, masks)
        found["F1"], found["F1 threshold"] = best_f1(maps, masks)
    return found


def check_files(samples: Sequence[Sample]) -> None:
    """Refuses, by their headers, images and masks that cannot be read or do not belong together.

    Raises:
        OSError, ValueError: The message names the file.
    """
    for sample in samples:
        size = _pillow.size(sample.path)
        # A photo that is turned upright as it is read has the sides of its mask in the other order.
        if sample.mask is not None and sorted(_pillow.size(sample.mask)) != sorted(size):
            raise ValueError(
                f"{sample.mask} must have the size of its image {sample.path}, {size}, got {_pillow.size(sample.mask)}"
            )


def evaluate(
    detector: MultiResolutionDetector,
    samples: Sequence[Sample],
    subsets: Mapping[str, Subset],
    folder: Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    seen: Callable[[str, list[np.ndarray], list[np.ndarray], dict], None] | None = None,
) -> dict[str, dict[str, float | None]]:
    """The measures of every subset of a fitted detector's banks; the images are encoded and searched once.

    Args:
        detector: A fitted one.
        samples: The images to test.
        subsets: By name, as of :func:`subsets_of`.
        folder: Where masks and the maps of one subset at a time are kept meanwhile: 5 bytes per pixel of all images.
        progress: Called with ("images" or "subsets", done, in all).
        seen: Called with the name, maps, masks and measures of every subset, while its maps are there.

    Returns:
        What :func:`measures` gives, by the subset's name.

    Raises:
        OSError, ValueError: As :func:`check_files`, for damaged pixels too.

    Memory: the distances of all images' patches, and what :func:`au_pro` takes; maps and masks are mapped.
    """
    distances, found, masks_file = [], {}, ArrayFile(folder / "masks.bin", np.bool_)

    def images() -> Iterator[np.ndarray]:
        for sample in samples:
            image = _pillow.read(sample.path)
            masks_file.append(sample.read_mask(image.shape[:2]))
            yield image

    for of_image in bank_distances(detector, images()):
        distances.append(of_image)
        if progress is not None:
            progress("images", len(distances), len(samples))
    masks, defects = masks_file.arrays(), [sample.is_defect for sample in samples]
    for name, subset in subsets.items():
        scores, maps_file = [], ArrayFile(folder / f"maps-{len(found)}.bin", np.float32)
        for of_image in distances:
            anomaly = anomaly_of(detector, of_image, subset)
            maps_file.append(anomaly.map.cpu().numpy())
            scores.append(anomaly.score)
        maps = maps_file.arrays()
        found[name] = measures(maps, masks, scores, defects)
        if seen is not None:
            seen(name, maps, masks, found[name])
        del maps
        maps_file.path.unlink()
        if progress is not None:
            progress("subsets", len(found), len(subsets))
    return found


def _image_auroc(scores: np.ndarray, defects: np.ndarray) -> float:
    """The share of pairs of a defect's image and a good one that are in order; equal scores count half."""
    bad, good = scores[defects][:, None], scores[~defects][None]
    return float(((bad > good) + 0.5 * (bad == good)).mean())
