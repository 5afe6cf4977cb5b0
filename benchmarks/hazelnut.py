"""Does fusing scales find defects better than one scale? The detector on images in MVTec AD's folder layout.

    python benchmarks/hazelnut.py DATA WEIGHTS [--pixels 262144,1e6] [--out FOLDER]

DATA holds train/good, test/<kind> and ground_truth/<kind> (masks of the same name, .png); WEIGHTS is the folder of a
Hugging Face Dinov2Model. Prints AU-PRO and AU-ROC up to a false-positive rate of 0.05, and the image AUROC, of every
scale by itself and of the fusion, from the same banks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from murf_fast import _pillow
from murf_fast.anomaly import MultiResolutionDetector, au_pro, au_roc
from murf_fast.cli.demo.backbone import load

LIMIT = 0.05


def mask_of(data: Path, image: Path, shape: tuple[int, int]) -> np.ndarray:
    kind = image.parent.name
    if kind == "good":
        return np.zeros(shape, dtype=np.uint8)
    return _pillow.read(data / "ground_truth" / kind / f"{image.stem}.png").any(axis=2)


def measures(maps: list[np.ndarray], masks: list[np.ndarray], image_scores: list[float]) -> dict:
    defect = np.array([[mask.any()] for mask in masks])
    return {
        f"AU-PRO_{LIMIT:g}": au_pro(maps, masks, LIMIT),
        f"AU-ROC_{LIMIT:g}": au_roc(maps, masks, LIMIT),
        "AU-ROC": au_roc(maps, masks),
        "image AUROC": au_roc([np.array([[s]]) for s in image_scores], list(defect[:, :, None])),
    }


def compare(data: Path, backbone, layers: list[int], scales: list[float], pixels: float) -> dict[str, dict]:
    """Measures of the maps of every scale and of their mean, from detectors of one set of banks."""
    detector = MultiResolutionDetector(backbone.model, layers, scales, pixels=pixels, enlarge=True)
    detector.fit(_pillow.read(path) for path in sorted((data / "train" / "good").iterdir()))
    found: dict[str, list] = {**{f"scale {s:g}": [] for s in scales}, "fusion": []}
    masks = []
    for path in sorted(path for path in (data / "test").glob("*/*") if path.is_file()):
        image = _pillow.read(path)
        masks.append(mask_of(data, path, image.shape[:2]))
        for results, anomaly in zip(found.values(), detector.score_each_scale(image), strict=True):
            results.append(anomaly)
    return {
        name: measures([a.map.numpy() for a in results], masks, [a.score for a in results])
        for name, results in found.items()
    }


def table(rows: dict[str, dict]) -> str:
    names = list(next(iter(rows.values())))
    lines = [f"| maps | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [f"| {row} | {' | '.join(f'{values[name]:.4f}' for name in names)} |" for row, values in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--pixels", default="262144,1e6", help="sizes that images are brought to; one table for each")
    parser.add_argument("--scales", default="0.3,0.4,0.5,0.6,0.7")
    parser.add_argument("--layers", default="7,9,11")
    parser.add_argument("--out", type=Path, help="folder for README.md and scores.json")
    options = parser.parse_args()
    scales = [float(s) for s in options.scales.split(",")]
    layers = [int(layer) for layer in options.layers.split(",")]
    backbone = load(options.weights)
    title = f"{options.data.name}, layers {layers}; {backbone.description}"
    results, text = {}, [f"# Anomaly detection: single scales and their fusion\n\n{title}"]
    for pixels in map(float, options.pixels.split(",")):
        results[f"{pixels:g}"] = compare(options.data, backbone, layers, scales, pixels)
        text.append(f"Images of {pixels / 1e6:.2g} Mpx:\n\n{table(results[f'{pixels:g}'])}")
        print(text[-1], flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        setting = {"data": title, "limit": LIMIT, "pixels": results}
        (options.out / "scores.json").write_text(json.dumps(setting, indent=1) + "\n")
        text.append("Written by `benchmarks/hazelnut.py`.")
        (options.out / "README.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
