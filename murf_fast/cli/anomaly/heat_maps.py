"""Pictures of a category's test images: photo, heat map and mask, all on one scale of scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from murf_fast import _pillow
from murf_fast.anomaly.evaluation import Scored
from murf_fast.anomaly.subsets import Subset

MOST_PIXELS = 768  # of a panel's longer side
GAP = 8
OUTLINE = (0, 255, 255)


def draw(scored: Scored, subset: Subset, threshold: float | None, folder: Path) -> None:
    """Writes ``folder/KIND/FILE.png`` of every sample: the photo, its heat map over it, its mask.

    Black is the smallest score of all maps and yellow the largest, so that a good part looks as good as it is. The
    line is where a score reaches the threshold of the best F1.
    """
    ranges = [(float(a.map.min()), float(a.map.max())) for _, a, _ in scored.anomalies(subset)]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    for sample, anomaly, mask in scored.anomalies(subset):
        photo = _shrunk(Image.fromarray(_pillow.read(sample.path)))
        heat = np.asarray(Image.fromarray(anomaly.map.cpu().numpy()).resize(photo.size))
        colours = colormaps["inferno"]((heat - low) / max(high - low, 1e-12))[..., :3]
        gray = np.asarray(photo.convert("L"))[..., None] / 255  # colours are those of the scores
        blend = np.uint8(255 * (0.4 * gray + 0.6 * colours))
        if threshold is not None:
            blend[_edge(heat >= threshold)] = OUTLINE
        white = np.asarray(Image.fromarray(mask).resize(photo.size).convert("RGB"))
        gap = np.full((photo.height, GAP, 3), 255, dtype=np.uint8)
        path = folder / sample.kind / f"{sample.path.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([np.asarray(photo), gap, blend, gap, white], axis=1)).save(path)


def _shrunk(photo: Image.Image) -> Image.Image:
    factor = min(1.0, MOST_PIXELS / max(photo.size))
    return photo.resize([max(1, round(n * factor)) for n in photo.size]) if factor < 1 else photo


def _edge(region: np.ndarray) -> np.ndarray:
    """The pixels of a region that have one outside it beside them."""
    padded = np.pad(region, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inside
