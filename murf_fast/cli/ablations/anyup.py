"""AnyUp's Tables 8 and 9 and Figure 8 at the level of features: upsampled maps against those of a larger image.

The papers' numbers are scores of probes behind features that were upsampled; these are the similarity of upsampled
features to those of crops at twice the resolution, which the model never sees, on photos' right halves, after a short
training on their left halves (the demo's). Longer trainings tell more: ``--steps``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from murf_fast.cli.ablations._inputs import Model, cosine
from murf_fast.cli.ablations._table import Table
from murf_fast.cli.demo.anyup import MEAN, RATE, REGULARIZERS, STD, Task, bilinear, normalized
from murf_fast.nn import (
    AnyUp,
    MultiResolutionEncoder,
    augment_colors,
    cosine_mse_loss,
    input_consistency_loss,
    local_crops,
    self_consistency_loss,
)

DIM = 64  # of the models that are trained here; the paper's is 128
BASIS = (64, 32, 16, 8, 0)
RATIOS = (0.05, 0.1, 0.2, 0.4, 0.0)  # half a window's side, as a share of the map's; 0: no window
SEED = 0  # of weights; batches have that of the task
Upsample = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Variant:
    """What of the model or of its training is there."""

    window_ratio: float = 0.1
    lfu_dim: int | None = None
    crops: bool = True  # as targets; else the whole image at twice the size
    input_consistency: bool = True
    self_consistency: bool = True


# Table 8's rows.
PARTS = {
    "AnyUp": Variant(),
    "without window attention": Variant(window_ratio=0.0),
    "without crops as targets": Variant(crops=False),
    "without self-consistency": Variant(self_consistency=False),
    "without any regularization": Variant(input_consistency=False, self_consistency=False),
    "without features in the keys": Variant(lfu_dim=0),
}


class VariantTask(Task):
    """The demo's task with the losses of a variant."""

    def loss_of(self, model: AnyUp, variant: Variant) -> Tensor:
        batch = self._batch()
        crops = local_crops(batch, self.size, self.patch_size, generator=self._generator)
        features, target = self._features(crops)
        image = normalized(crops.guidance)
        upsampled = model(image, features, crops.grid)
        if variant.crops:
            loss = cosine_mse_loss(crops.cut(upsampled), target)
        else:
            with torch.no_grad():
                loss_target = self._whole(batch).maps[0]
            loss = cosine_mse_loss(upsampled, loss_target)
        if variant.input_consistency:
            loss = loss + REGULARIZERS * input_consistency_loss(upsampled, features)
        if variant.self_consistency:
            augmented = normalized(augment_colors(crops.guidance, generator=self._generator))
            loss = loss + REGULARIZERS * self_consistency_loss(model, image, augmented, features)
        return loss

    @functools.cached_property
    def _whole(self) -> MultiResolutionEncoder:
        """Of images at the size that crops are cut from: JAFAR's targets, at a size the backbone was not made for."""
        return MultiResolutionEncoder(self.backbone, [2 * self.size], mean=MEAN, std=STD)

    @torch.no_grad()
    def similarity(self, upsample: Upsample) -> float:
        """Mean cosine of upsampled features and those of the held-out crops."""
        features, target = self._held_out_maps
        upsampled = upsample(normalized(self._held_out.guidance), features, self._held_out.grid)
        return cosine(self._held_out.cut(upsampled), target)

    def scores(self, upsample: Upsample) -> tuple[float, float]:
        return self.similarity(upsample), self.held_out_loss(upsample)


def _trained(model: Model, patches: int, steps: int, variant: Variant) -> tuple[float, float]:
    """The scores after some steps; every variant sees the same batches."""
    task = VariantTask(model.tower, model.patch, patches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        upsampler = AnyUp(DIM, window_ratio=variant.window_ratio, lfu_dim=variant.lfu_dim)
        optimizer = torch.optim.AdamW([p for p in upsampler.parameters() if p.requires_grad], lr=RATE)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            optimizer.zero_grad()
            task.loss_of(upsampler, variant).backward()
            optimizer.step()
    return task.scores(upsampler)


def _note(model: Model, patches: int, how: str) -> str:
    return (
        f"backbone: {model.description}; {patches} x {patches} patches to {2 * patches} x {2 * patches}, against crops "
        f"at that resolution from photos' right halves; {how}"
    )


def _table(title: str, model: Model, patches: int, steps: int, variants: dict[str, Variant]) -> Table:
    rows = [("bilinear", *VariantTask(model.tower, model.patch, patches).scores(bilinear))]
    rows += [(name, *_trained(model, patches, steps, variant)) for name, variant in variants.items()]
    how = f"{steps} steps on the left halves, {DIM} channels"
    return Table(title, ("variant", "cosine", "loss"), rows, _note(model, patches, how))


def parts(model: Model, patches: int, steps: int) -> Table:
    return _table("AnyUp, Table 8: without parts of model and training", model, patches, steps, PARTS)


def basis(model: Model, patches: int, steps: int) -> Table:
    variants = {f"M = {m}": Variant(lfu_dim=m) for m in BASIS}
    return _table("AnyUp, Table 9: filters of the feature-agnostic layer", model, patches, steps, variants)


def windows(model: Model, patches: int, upsampler: Path) -> Table:
    """One model's weights under every window, as the artifacts of Figure 8 are those of attention without one."""
    task, rows = VariantTask(model.tower, model.patch, patches), []
    rows.append(("bilinear", *task.scores(bilinear)))
    for ratio in RATIOS:
        anyup = AnyUp.from_checkpoint(upsampler, window_ratio=ratio).eval()
        rows.append((f"{ratio:g} of the map" if ratio else "the whole map", *task.scores(anyup)))
    note = _note(model, patches, f"AnyUp's weights: {upsampler.name}, trained with windows of 0.1")
    return Table("AnyUp, Figure 8: windows of the attention", ("window", "cosine", "loss"), rows, note)
