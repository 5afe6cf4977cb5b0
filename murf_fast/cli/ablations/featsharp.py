"""FeatSharp's Figures 13 and 15 on the bundled photos. (Figure 14 is ``murf-fast bench featsharp``.)"""

from __future__ import annotations

from typing import Any

from murf_fast.cli.ablations._inputs import Model, squares
from murf_fast.cli.ablations._table import Table
from murf_fast.cli.demo.featsharp import Task, train
from murf_fast.nn import over_tiling_error

WINDOWS = (1, 3, 5, 7, 9, 11)
LEVELS = (1, 2, 3, 4)
BATCHES = 24  # of crops to learn from


def windows(model: Model, patches: int, steps: int) -> Table:
    """Fidelity by the size of the local attention's window: each trained on the same batches."""
    rows: list[Any] = []
    for window in WINDOWS:
        task = Task(model.tower, model.patch, patches, BATCHES, window=window)
        if rows:  # the others have no window, and are trained already
            task.upsamplers = {"FeatSharp": task.upsamplers["FeatSharp"]}
        *_, last = train(task, steps, max(1, steps))
        if not rows:
            rows += [(name, last.fidelity[name]) for name in ("bilinear", "tiles", "JBU")]
        rows.append((f"FeatSharp, window {window}", last.fidelity["FeatSharp"]))
    note = (
        f"backbone: {model.description}; {patches} x {patches} patches, twice as fine, {steps} steps on one photo, "
        "fidelity to views of the other"
    )
    return Table("FeatSharp, Figure 13: window of the local attention", ("upsampler", "fidelity"), rows, note)


def tiles(model: Model, patches: int) -> Table:
    """The squared error between an image's map and that of its tiles at the same resolution."""
    size = patches * model.patch
    errors = over_tiling_error(model.tower, squares(max(LEVELS) * size), LEVELS, size=size, **model.normalization)
    rows = [(f"{n} x {n}", float(error)) for n, error in zip(LEVELS, errors.mean(0), strict=True)]
    note = f"backbone: {model.description}; tiles of {size} pixels; mean over {len(errors)} bundled photos"
    return Table("FeatSharp, Figure 15: tiles against the whole", ("tiles", "squared error"), rows, note)
