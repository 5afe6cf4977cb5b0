"""A detector's settings in words, as they are printed when it is made and when it is looked at."""

from __future__ import annotations

from typing import Any

from murf_fast.anomaly.scoring import ScoringRules
from murf_fast.cli.anomaly._settings import left_out

METRICS = {"l2": "Euclidean", "l2sq": "squared Euclidean", "cosine": "cosine"}
SCORES = {
    "max": "the highest patch",
    "top1%": "mean of the highest hundredth of the patches",
    "reweighted": "PatchCore's weighted highest patch",
}


def described(settings: dict[str, Any]) -> list[str]:
    """Lines, of ``detector.settings`` or of an index."""
    rules = settings["rules"] if isinstance(settings["rules"], ScoringRules) else ScoringRules(**settings["rules"])
    lines = [
        f"method: {settings['method'] or 'none by name'}",
        f"features: layers {_numbers(settings['layers'])}{' with the final norm' if settings['norm'] else ''}; "
        f"{_sizes(settings)}",
        f"banks: {_banks(settings)}",
        f"scores: {_distance(rules)}; {_fusion(rules)}; image score: {SCORES[rules.image_score]}",
    ]
    missing = left_out(settings["method"])
    return [*lines, f"not part of it: {missing}"] if missing else lines


def _sizes(settings: dict[str, Any]) -> str:
    scales = f"scales {_numbers(settings['scales'])}" if settings["scales"] else "fixed sizes"
    if settings["shorter_side"] is not None:
        return f"{scales} of images with a shorter side of {settings['shorter_side']} pixels"
    if settings["pixels"] is None:
        return f"{scales} of images as they are"
    enlarged = "brought to about" if settings["enlarge"] else "of at most about"
    return f"{scales} of images {enlarged} {settings['pixels'] / 1e6:g} megapixels"


def _banks(settings: dict[str, Any]) -> str:
    kept = {
        "exact": "all rows, searched exactly",
        "cells": "all rows, searched exactly by cells",
        "ivf": "all rows, searched approximately (faiss)",
        "coreset": f"a coreset of {100 * settings['coreset']:g} % of the rows"
        f"{'' if settings['projection'] is None else ', chosen by a ' + settings['projection'] + ' projection'}",
    }[settings["index"]]
    if settings["references"] is None:
        return kept
    return f"{kept}, of {100 * settings['references']:g} % of the images, chosen by their CLS tokens"


def _distance(rules: ScoringRules) -> str:
    metric = f"{METRICS[rules.metric]} distance"
    if rules.k == 1:
        return f"{metric} to the nearest row"
    return f"{metric} to the {rules.k} nearest rows, {'their mean' if rules.neighbors == 'mean' else 'the largest'}"


def _fusion(rules: ScoringRules) -> str:
    weights = ", weighted" if rules.scale_weights or rules.layer_weights else ""
    smooth = f", smoothed by {rules.sigma:g} pixels" if rules.sigma else ""
    return f"{'mean' if rules.fusion == 'mean' else 'maximum'} of all maps{weights}{smooth}"


def _numbers(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)
