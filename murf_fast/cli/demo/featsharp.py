"""FeatSharp in small: trained by multi-view consistency on one photo and measured on another, on a CPU in minutes.

    python -m murf_fast.cli.demo.featsharp [--weights FOLDER] [--patches 10] [--steps 200] [--out featsharp.pth]

The recipe is the paper's: PHI-S, random views, an attention downsampler for each upsampler, the squared error, NAdam.
Beside FeatSharp its neighbours are trained on the same batches: bilinear upsampling and the mosaic of tiles, of which
only the downsampler learns, and a joint bilateral upsampler. Features of the photo's crops and views are made once. The
backbone is the demo's; with random weights its features mean nothing and can be learned all the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.cli.demo import backbone as backbones
from murf_fast.cli.demo.anyup import MEAN, MOST_STEPS, STD, photos
from murf_fast.nn import (
    PHIS,
    AttentionDownsampler,
    FeatSharp,
    FeatSharpJBU,
    Fidelity,
    MultiResolutionEncoder,
    Views,
    consistency_loss,
    downsampled_views,
    random_views,
)
from murf_fast.ops import resize

FACTOR = 2
BATCH, VIEWS = 2, 4
HELD_OUT = 8  # batches of the photo that is measured on
KERNEL = 6  # pixels of the upsampled map; the paper's 7 has no middle in cells of two
RATE = 1e-3  # the paper's is 1e-4, for 9,000 steps
OF_SCALES = 10  # times that of layer scales and tile positions, which begin at nothing
WARM_UP = 20  # steps


class Batch(NamedTuple):
    """What is known of some crops before anything is learned: normalized features, guidance, views and their target."""

    low: Tensor
    tiles: list[Tensor]
    guidance: Tensor
    views: Views
    targets: Tensor


class Progress(NamedTuple):
    """After ``step`` steps: every upsampler's fidelity to the views of the other photo."""

    step: int
    fidelity: dict[str, float]


@dataclass
class Task:
    """A backbone, features of crops of one photo to learn from and of another one to measure on.

    Args:
        backbone: Frozen, one that :class:`MultiResolutionEncoder` takes.
        patch_size: Of the backbone.
        patches: Of a side of what the backbone sees.
        batches: Of training.
        seed: Of crops and views, and of the weights.
        window: Of FeatSharp's local attention.
    """

    backbone: nn.Module
    patch_size: int
    patches: int = 10
    batches: int = 24
    seed: int = 0
    window: int = 7

    def __post_init__(self) -> None:
        what = "demo.featsharp"
        _arguments.integer(what, "patches", self.patches, 4)
        _arguments.integer(what, "batches", self.batches, 1)
        self.size = self.patches * self.patch_size
        self._generator = torch.Generator().manual_seed(self.seed)
        held_out, trained = photos()
        narrowest = min(*held_out.shape[1:], *trained.shape[1:])
        if FACTOR * self.size > narrowest:
            raise ValueError(
                f"murf_fast.{what}: `patches` of {self.patch_size} pixels must be at most "
                f"{narrowest // (FACTOR * self.patch_size)}, as a photo has {narrowest} rows, got {self.patches}"
            )
        self._encoder = MultiResolutionEncoder(self.backbone, [self.size], mean=MEAN, std=STD, antialias=True)
        crops = [self._crops(trained) for _ in range(self.batches)]
        with torch.no_grad():
            normalizer = PHIS.fit(self._encoder(c).maps[0] for c in crops)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = FeatSharp(self._encoder, FACTOR, normalizer=normalizer, window=self.window)
            channels, fine = len(normalizer.mean), FACTOR * self.patches
            jbu = FeatSharpJBU(FACTOR)
            self.upsamplers: dict[str, Callable[[Batch], Tensor]] = {
                "bilinear": lambda b: resize(b.low, fine),
                "tiles": lambda b: b.tiles[-1],
                "JBU": lambda b: jbu(b.low, b.guidance),
                "FeatSharp": lambda b: self.model.upsampler(b.low, b.guidance, b.tiles),
            }
            self.downsamplers = {name: AttentionDownsampler(channels, KERNEL) for name in self.upsamplers}
        self.parts: dict[str, list[nn.Module]] = {
            "bilinear": [],
            "tiles": [],
            "JBU": [jbu],
            "FeatSharp": [self.model.upsampler],
        }
        self.learned = [self._batch(c) for c in crops]
        self.held_out = [self._batch(self._crops(held_out)) for _ in range(HELD_OUT)]

    def draw(self) -> Batch:
        return self.learned[self._integer(len(self.learned))]

    def loss(self, name: str, batch: Batch) -> Tensor:
        upsampled = self.upsamplers[name](batch)
        return consistency_loss(upsampled, batch.targets, batch.views, self.downsamplers[name])

    @torch.no_grad()
    def fidelity(self) -> dict[str, float]:
        """Of every upsampler, on the photo that is not learned from."""
        found = {}
        for name, upsample in self.upsamplers.items():
            downsampler, measure = self.downsamplers[name].eval(), Fidelity()
            for batch in self.held_out:
                seen = downsampled_views(upsample(batch), batch.views, downsampler, self.patches)
                measure.update(seen, batch.targets)
            downsampler.train()
            found[name] = float(measure.value())
        return found

    @torch.no_grad()
    def _batch(self, crops: Tensor) -> Batch:
        low, tiles = self.model.encode(crops)
        views = random_views(crops, VIEWS, generator=self._generator)
        targets = self.model.features(self._encoder(views(crops)).maps[0])
        return Batch(low, tiles, self.model.guidance(crops, low), views, targets)

    def _crops(self, photo: Tensor) -> Tensor:
        """(BATCH, 3, FACTOR size, FACTOR size) in 0..1, squares of any scale, some mirrored."""
        side, images = FACTOR * self.size, []
        (height, width) = photo.shape[1:]
        for _ in range(BATCH):
            square = side + self._integer(min(height, width) - side + 1)
            y, x = self._integer(height - square + 1), self._integer(width - square + 1)
            image = resize(photo[None, :, y : y + square, x : x + square], side, antialias=True)
            images.append(image.flip(3) if self._integer(2) else image)
        return torch.cat(images)

    def _integer(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))


def train(task: Task, steps: int, every: int) -> Iterator[Progress]:
    """Trains everything in place; the fidelities before the first step, after every ``every`` ones and after the last.

    The rate rises for the first steps and falls to zero in a straight line.
    """
    steps = _arguments.integer("demo.featsharp", "steps", steps, 0, MOST_STEPS)
    every = _arguments.integer("demo.featsharp", "every", every, 1)
    optimizers = [torch.optim.NAdam(_groups(task, name)) for name in task.upsamplers]
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            yield Progress(step, task.fidelity())
        if step < steps:
            batch, share = task.draw(), min(1, (step + 1) / WARM_UP) * (1 - step / steps)
            for name, optimizer in zip(task.upsamplers, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = share * group["top"]
                optimizer.zero_grad()
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(task.seed + step)  # of the downsampler's dropout
                    task.loss(name, batch).backward()
                optimizer.step()


def _groups(task: Task, name: str) -> list[dict[str, Any]]:
    fast, others = list[Any](), list(task.downsamplers[name].parameters())
    for part in task.parts[name]:
        for key, parameter in part.named_parameters():
            (fast if key.endswith(("gamma", "tile_pos")) else others).append(parameter)
    groups = [{"params": others, "top": RATE}, {"params": fast, "top": OF_SCALES * RATE}]
    return [g for g in groups if g["params"]]


def _steps(text: str) -> int:
    steps = int(text)
    if not 0 <= steps <= MOST_STEPS:
        raise argparse.ArgumentTypeError(f"must be 0 to {MOST_STEPS:,}, got {steps}")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="the backbone, a Dinov2Model's folder")
    parser.add_argument(
        "--patches", type=int, default=10, metavar="N", help="of a side of what the backbone sees, 4 to 10 of 14 pixels"
    )
    parser.add_argument("--steps", type=_steps, default=200, metavar="N", help="optimizer steps, 0 to 1,000,000")
    parser.add_argument("--out", type=Path, default=Path("featsharp.pth"), metavar="FILE", help="where the weights go")
    arguments = parser.parse_args()
    backbone = backbones.load(arguments.weights)
    print(f"backbone: {backbone.description}", flush=True)
    begin = time.perf_counter()
    try:
        task = Task(backbone.model, backbone.patch, arguments.patches)
    except ValueError as error:
        parser.error(str(error))
    for step, fidelity in train(task, arguments.steps, 25):
        shown = ", ".join(f"{name} {value:.3f}" for name, value in fidelity.items())
        seconds = time.perf_counter() - begin
        print(f"step {step:4d}: fidelity on a photo not trained on: {shown}; {seconds:.0f} s", flush=True)
    weights = {k: v for k, v in task.model.state_dict().items() if not k.startswith("encoder.")}
    torch.save(weights, arguments.out)
    FeatSharp.from_checkpoint(arguments.out, backbone.model)  # reads what was written
    print(f"weights: {arguments.out}")


if __name__ == "__main__":
    main()
