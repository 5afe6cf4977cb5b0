"""Folder names as labels, and how well scores tell them apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from rich.console import Console

from murf_fast.cli.anomaly._images import find
from murf_fast.cli.anomaly._labels import is_defective, separation

FOLDERS = {"good/a.png": False, "Normal/deep/b.png": False, "hole/c.png": True, "c.png": True}


@pytest.mark.parametrize("given", ["root", "folders"])
def test_labels_are_folder_names(tmp_path, given):
    for name in FOLDERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    roots = (
        [tmp_path] if given == "root" else [*(p for p in sorted(tmp_path.iterdir()) if p.is_dir()), tmp_path / "c.png"]
    )
    found = {
        file.path.relative_to(tmp_path).as_posix(): is_defective(file) for file in find(roots, Console(quiet=True))
    }
    assert found == FOLDERS


def test_separation_is_the_best_of_all_thresholds():
    scores, defective = np.array([0.1, 0.4, 0.4, 0.6, 0.2, 0.9]), np.array([False, False, True, True, False, False])

    def f1(threshold):
        taken = scores >= threshold
        return 2 * (taken & defective).sum() / (taken.sum() + defective.sum())

    found = separation(scores, defective)
    assert found.f1 == max(map(f1, scores)) == f1(found.threshold)
    pairs = list(itertools.product(scores[defective], scores[~defective]))
    assert found.auroc == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))
    equal = separation(np.zeros(6), defective)
    assert (equal.auroc, equal.f1, equal.threshold) == (0.5, pytest.approx(2 * 2 / (6 + 2)), 0.0)
