"""Does fusing scales find defects better than one scale? The detector on images in MVTec AD's folder layout.

    python benchmarks/hazelnut.py DATA WEIGHTS [--pixels 1e6] [--out results.json]

DATA holds train/good, test/<kind> and ground_truth/<kind> (masks of the same name, .png); WEIGHTS is the folder of a
Hugging Face Dinov2Model. Prints AU-PRO and AU-ROC up to a false-positive rate of 0.05, and the image AUROC, of every
scale by itself and of the fusion, from the same banks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from murf_fast.anomaly import MultiResolutionDetector, au_pro, au_roc
from murf_fast.demo.backbone import load

LIMIT = 0.05


def pixels_of(path: Path, mode: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert(mode))


def mask_of(data: Path, image: Path, shape: tuple[int, int]) -> np.ndarray:
    kind = image.parent.name
    if kind == "good":
        return np.zeros(shape, dtype=np.uint8)
    return pixels_of(data / "ground_truth" / kind / f"{image.stem}.png", "L") > 0


def measures(maps: list[np.ndarray], masks: list[np.ndarray], image_scores: list[float]) -> dict:
    defect = np.array([[mask.any()] for mask in masks])
    return {
        f"AU-PRO_{LIMIT:g}": au_pro(maps, masks, LIMIT),
        f"AU-ROC_{LIMIT:g}": au_roc(maps, masks, LIMIT),
        "AU-ROC": au_roc(maps, masks),
        "image AUROC": au_roc([np.array([[s]]) for s in image_scores], list(defect[:, :, None])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--pixels", type=float, default=1e6)
    parser.add_argument("--scales", default="0.3,0.4,0.5,0.6,0.7")
    parser.add_argument("--layers", default="7,9,11")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    scales = [float(s) for s in options.scales.split(",")]
    layers = [int(layer) for layer in options.layers.split(",")]
    backbone = load(options.weights)
    detector = MultiResolutionDetector(backbone.model, layers, scales, pixels=options.pixels)
    train = sorted((options.data / "train" / "good").iterdir())
    start = time.perf_counter()
    detector.fit(pixels_of(path, "RGB") for path in train)
    fitted = time.perf_counter()
    test = sorted(path for path in (options.data / "test").glob("*/*") if path.is_file())
    found: dict[str, list] = {**{f"scale {s:g}": [] for s in scales}, "fusion": []}
    masks = []
    for path in test:
        image = pixels_of(path, "RGB")
        masks.append(mask_of(options.data, path, image.shape[:2]))
        for results, anomaly in zip(found.values(), detector.score_each_scale(image), strict=True):
            results.append(anomaly)
    seconds = {"fit": fitted - start, "score": time.perf_counter() - fitted}
    rows = {
        name: measures([a.map.numpy() for a in results], masks, [a.score for a in results])
        for name, results in found.items()
    }
    names = list(next(iter(rows.values())))
    print(f"{len(train)} training and {len(test)} test images; {backbone.description}")
    print(f"| maps | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for row, values in rows.items():
        print(f"| {row} | {' | '.join(f'{values[name]:.4f}' for name in names)} |")
    print({name: round(value, 1) for name, value in seconds.items()})
    if options.out:
        setting = {"pixels": options.pixels, "scales": scales, "layers": layers, "backbone": backbone.description}
        options.out.write_text(json.dumps({**setting, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
