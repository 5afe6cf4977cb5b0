"""A detector on the test images of a data set: scores of all, and the measures of the field for any of its subsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from murf_fast import _pillow
from murf_fast.anomaly.datasets import Sample
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.metrics import au_roc
from murf_fast.anomaly.pixel_curves import PixelCurves
from murf_fast.anomaly.result import Anomaly
from murf_fast.anomaly.subsets import BankDistances, Subset, anomaly_of, bank_distances

MEASURES = ("image AUROC", "AU-PRO_0.05", "AU-PRO_0.3", "AU-ROC_0.05", "AU-ROC", "F1", "F1 threshold")


def check_files(samples: Sequence[Sample]) -> None:
    """Refuses, by their headers, images and masks that cannot be read or do not belong together.

    Raises:
        OSError, ValueError: The message names the file.
    """
    with_masks = [sample for sample in samples if sample.mask is not None]
    sizes = _pillow.survey([path for sample in with_masks for path in (sample.path, sample.mask) if path is not None])
    for error in (found for found in sizes if isinstance(found, Exception)):
        raise error
    for sample, size, of_mask in zip(with_masks, sizes[::2], sizes[1::2], strict=True):
        if of_mask != size:
            raise ValueError(f"{sample.mask} must have the size of its image {sample.path}, {size}, got {of_mask}")


class Scored:
    """Test images that a detector has encoded and searched once; what any of its subsets says of them, and how well.

    Args:
        detector: A fitted one.
        samples: The images.
        batch: As for ``detector.score_many``.
        progress: Called with (images done, images in all) after every image.

    Raises:
        OSError, ValueError: An image or a mask cannot be read, or they have different sizes; the message names it.

    Memory: as ``detector.score``; of every image the distances of its patches to all banks, and one bit per pixel of
    those with a defect.
    """

    def __init__(
        self,
        detector: MultiResolutionDetector,
        samples: Sequence[Sample],
        *,
        batch: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.detector, self.samples = detector, samples
        self._distances: list[BankDistances] = []
        self._masks: list[np.ndarray | None] = []
        for distances in bank_distances(detector, (sample.path for sample in samples), batch=batch):
            mask = samples[len(self._masks)].read_mask(distances.size)
            self._masks.append(np.packbits(mask) if mask.any() else None)
            self._distances.append(distances)
            if progress is not None:
                progress(len(self._distances), len(samples))

    def anomalies(self, subset: Subset) -> Iterator[tuple[Sample, Anomaly, np.ndarray]]:
        """Every image, what the banks of a subset say of it, and its mask (H, W), bool; made as they are asked for."""
        for sample, distances, bits in zip(self.samples, self._distances, self._masks, strict=True):
            height, width = distances.size
            mask = np.zeros((height, width), dtype=bool)
            if bits is not None:
                mask = np.unpackbits(bits, count=height * width).view(bool).reshape(height, width)
            yield sample, anomaly_of(self.detector, distances, subset), mask

    def measures(self, subset: Subset, folder: Path | None = None) -> dict[str, float | None]:
        """The entries of ``MEASURES``; None where the set does not say, as it has no defect, or nothing else.

        Args:
            subset: Whose banks count.
            folder: Where scores are kept that are too many for the memory, as for :class:`PixelCurves`.

        Raises:
            ValueError: All pixels have one score.

        Memory: as :class:`PixelCurves`, and one map.

        Source: MVTec AD 2 (AU-PRO and AU-ROC up to a false-positive rate of 0.05, F1), MVTec AD (0.3).
        """
        curves, scores, defects = PixelCurves(folder=folder), [], []
        for sample, anomaly, mask in self.anomalies(subset):
            curves.update(anomaly.map, mask)
            scores.append(anomaly.score)
            defects.append(sample.is_defect)
        found: dict[str, float | None] = dict.fromkeys(MEASURES)
        if any(defects) and not all(defects):
            found["image AUROC"] = _image_auroc(np.asarray(scores), np.asarray(defects))
        if any(mask is not None for mask in self._masks):
            for limit in (0.05, 0.3):
                found[f"AU-PRO_{limit:g}"] = curves.au_pro(limit)
            found["AU-ROC_0.05"], found["AU-ROC"] = curves.au_roc(0.05), curves.au_roc()
            found["F1"], found["F1 threshold"] = curves.best_f1()
        return found


def _image_auroc(scores: np.ndarray, defects: np.ndarray) -> float:
    """Images that all score alike are in no order: one half."""
    return au_roc(scores, defects) if np.ptp(scores) else 0.5
