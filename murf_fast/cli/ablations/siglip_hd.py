"""SigLIP-HD's Tables 2, 3, 4, 8 and 10 at the level of features: a student's map against every choice of a target.

The papers' numbers are scores of language models; these say how far each target is from what a student sees at the base
scale, which is how much there is to learn, and whether it keeps the student's space. The student is the teacher at the
base scale, where the training begins, or trained weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from murf_fast.cli.ablations._inputs import Model, cka, cosine, distance, load, squares
from murf_fast.cli.ablations._table import Table
from murf_fast.nn import MultiResolutionEncoder, fine_to_coarse_loss, multi_scale_target
from murf_fast.nn.vit.siglip_hd import LOSSES

PAPER_FACTORS = ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (2,), (3,))
TILINGS = {
    "disjoint": "sliding, no overlap",
    "half_overlap": "sliding, half overlap",
    "whole": "entire, positions resized",
}
FUSIONS = {"average": "interpolate + average", "concat": "interpolate + concat", "unshuffle": "unshuffle + concat"}
WEIGHTS = ((1, 1), (1, 2), (2, 1))


def _student(model: Model, student: Path | None, size: int, images: Tensor) -> tuple[Tensor, str]:
    """Its map of the images at the base scale."""
    own = model if student is None else load(student, "--student")
    if own.patch != model.patch:
        raise ValueError(f"--student has patches of {own.patch} pixels, the teacher's have {model.patch}")
    encoder = MultiResolutionEncoder(own.tower, [size], antialias=True, **own.normalization)
    with torch.no_grad():
        found = encoder(images).maps[0]
    if encoder.family.width != _width(model):
        raise ValueError(f"--student has {encoder.family.width} channels, the teacher {_width(model)}")
    return found, "the teacher at the base scale" if student is None else own.description


def _width(model: Model) -> int:
    return cast("Any", model.tower).config.hidden_size


def _alike(student: Tensor, target: Tensor) -> tuple[float | None, float | None, float]:
    """Cosine and L1 where the target has the student's channels, and linear CKA always."""
    if student.shape != target.shape:
        return None, None, cka(student, target)
    return cosine(student, target), distance(student, target), cka(student, target)


def _compared(
    title: str, choices: Sequence[tuple[str, dict[str, Any]]], model: Model, student: Path | None, patches: int
) -> Table:
    """Of the student and the target of every choice of options."""
    size = patches * model.patch
    most = max(max(options.get("factors", (1, 2))) for _, options in choices)
    images = squares(most * size)
    own, what = _student(model, student, size, images)
    rows = []
    for name, options in choices:
        target = multi_scale_target(model.tower, images, size=size, **options, **model.normalization)
        rows.append((name, *_alike(own, target)))
    note = f"teacher: {model.description}; student: {what}; base scale {size} pixels, {len(images)} bundled photos"
    return Table(title, ("target", "cosine", "L1", "linear CKA"), rows, note)


def scales(model: Model, student: Path | None, patches: int) -> Table:
    choices = [(" + ".join(f"{f}x" for f in factors), {"factors": factors}) for factors in PAPER_FACTORS]
    return _compared("SigLIP-HD, Table 2 (and 9): scales of the target", choices, model, student, patches)


def tilings(model: Model, student: Path | None, patches: int) -> Table:
    choices = [(name, {"tiling": kind}) for kind, name in TILINGS.items()]
    return _compared("SigLIP-HD, Table 3: how the high resolution is seen", choices, model, student, patches)


def fusions(model: Model, student: Path | None, patches: int) -> Table:
    choices = [(name, {"fusion": kind}) for kind, name in FUSIONS.items()]
    return _compared("SigLIP-HD, Table 4: how scales are put together", choices, model, student, patches)


def weights(model: Model, student: Path | None, patches: int) -> Table:
    choices = [(f"{base}:{high}", {"weights": (base, high)}) for base, high in WEIGHTS]
    return _compared("SigLIP-HD, Table 10: base:high", choices, model, student, patches)


def losses(model: Model, student: Path | None, patches: int) -> Table:
    """The losses' values, and how much of its gradient each has in common with L1's: what a first step would differ."""
    size = patches * model.patch
    images = squares(2 * size)
    target = multi_scale_target(model.tower, images, size=size, **model.normalization)
    own, what = _student(model, student, size, images)
    gradients, values = {}, {}
    for kind in LOSSES:
        features = own.detach().clone().requires_grad_()
        loss = fine_to_coarse_loss(features, target, cast("Any", kind))
        (gradients[kind],) = torch.autograd.grad(loss, features)
        values[kind] = float(loss.detach())
    rows = [
        (kind, values[kind], float(torch.cosine_similarity(g.flatten(), gradients["l1"].flatten(), dim=0)))
        for kind, g in gradients.items()
    ]
    note = f"teacher: {model.description}; student: {what}; base scale {size} pixels, {len(images)} bundled photos"
    return Table("SigLIP-HD, Table 8: alignment losses", ("loss", "value", "gradient's cosine to L1's"), rows, note)
