"""Pictures of a category's test images: photo, heat map, both, and mask, all on one scale of scores."""

from __future__ import annotations

from pathlib import Path

from murf_fast import _pillow
from murf_fast.anomaly.evaluation import Scored
from murf_fast.anomaly.subsets import Subset
from murf_fast.cli.anomaly import _picture
from murf_fast.cli.anomaly._images import shown


def draw(scored: Scored, subset: Subset, threshold: float | None, folder: Path) -> None:
    """Writes ``folder/KIND/FILE.png`` of every sample: the photo, its heat map, both, its mask, and a colour bar.

    Black is the smallest score of all maps and yellow the largest, so that a good part looks as good as it is. The
    line is where a score reaches the threshold of the best F1; none where the set has no defect.
    """
    ranges = [(float(a.map.min()), float(a.map.max())) for _, a, _ in scored.anomalies(subset)]
    scale = _picture.Scale(min(r[0] for r in ranges), max(r[1] for r in ranges), threshold)
    note = f"colours: scores of all {len(ranges)} test images"
    if threshold is not None:
        note += f"; line: {threshold:.4g}, the pixel threshold of the best F1"
    for sample, anomaly, mask in scored.anomalies(subset):
        path = folder / sample.kind / f"{sample.path.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = _picture.panels(_pillow.read(sample.path), anomaly.map.cpu().numpy(), scale, mask)
        title = f"{shown(Path(sample.kind, sample.path.name))}: image score {anomaly.score:.4g}"
        _picture.draw(drawn, scale, title, note, path)
