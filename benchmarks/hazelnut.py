"""Does fusing scales find defects better than one scale? The detector on one category of a data set.

    python benchmarks/hazelnut.py DATA WEIGHTS [--pixels 262144] [--out FOLDER]

DATA and WEIGHTS are as for `murf-fast anomaly evaluate`. Prints AU-PRO and AU-ROC up to a false-positive rate of 0.05,
and the image AUROC, of every scale by itself and of the fusion, from the same banks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from murf_fast.anomaly import Category, MultiResolutionDetector, Subset, categories
from murf_fast.anomaly.evaluation import Scored
from murf_fast.cli.anomaly.weights import Weights, load

LIMIT = 0.05
MEASURES = (f"AU-PRO_{LIMIT:g}", f"AU-ROC_{LIMIT:g}", "AU-ROC", "image AUROC")


def compare(category: Category, weights: Weights, layers: list[int], scales: list[float], pixels: float) -> dict:
    """Measures of the maps of every scale and of their mean, from one set of banks and one encoding."""
    detector = MultiResolutionDetector(weights.encoder(layers, scales), pixels=pixels, enlarge=True)
    scored = Scored(detector.fit(category.train, held_out=0), category.test)
    subsets = {f"scale {s:g}": Subset(tuple(layers), (s,)) for s in scales}
    subsets["fusion"] = Subset(tuple(layers), tuple(scales))
    measures = {name: scored.measures(subset) for name, subset in subsets.items()}
    return {name: {measure: found[measure] for measure in MEASURES} for name, found in measures.items()}


def table(rows: dict[str, dict]) -> str:
    names = list(next(iter(rows.values())))
    lines = [f"| maps | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [f"| {row} | {' | '.join(f'{values[name]:.4f}' for name in names)} |" for row, values in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights")
    parser.add_argument("--pixels", default="262144", help="sizes that images are brought to; one table for each")
    parser.add_argument("--scales", default="0.3,0.4,0.5,0.6,0.7")
    parser.add_argument("--layers", default="7,9,11")
    parser.add_argument("--out", type=Path, help="folder for README.md and scores.json")
    options = parser.parse_args()
    scales = [float(s) for s in options.scales.split(",")]
    layers = [int(layer) for layer in options.layers.split(",")]
    weights = load(options.weights)
    (category,) = categories(options.data)
    title = f"{category.name}, layers {layers}; {weights.description}"
    results, text = {}, [f"# Anomaly detection: single scales and their fusion\n\n{title}"]
    for pixels in map(float, options.pixels.split(",")):
        results[f"{pixels:g}"] = compare(category, weights, layers, scales, pixels)
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
