"""SigLIP-HD in small: a student that sees one scale learns the average of its teacher's two.

    python examples/siglip_hd_student.py [--steps 60]

Teacher and student begin as the same small tower with seeded random weights; for a real one load
``SiglipVisionModel.from_pretrained(...)`` in its place. The loss falls on crops that were never trained on.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from _shared import photo
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import SiglipVisionConfig, SiglipVisionModel

from murf_fast.nn import MultiResolutionEncoder, fine_to_coarse_loss, multi_scale_target

BASE, FACTORS, BATCH = 64, (1, 2), 8
WARM_UP = 5  # steps
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def crops(images: list[torch.Tensor], side: int) -> torch.Tensor:
    """(BATCH, 3, side, side) uint8."""
    found = []
    for _ in range(BATCH):
        image = images[int(torch.randint(len(images), ()))]
        top, left = (int(torch.randint(n - side + 1, ())) for n in image.shape[1:])
        found.append(image[:, top : top + side, left : left + side])
    return torch.stack(found)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    asked.add_argument("--steps", type=int, default=60)
    options = asked.parse_args()
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=BASE, patch_size=8
    )
    teacher = SiglipVisionModel(config).eval().requires_grad_(False)
    tower = copy.deepcopy(teacher).requires_grad_(True)
    student = MultiResolutionEncoder(tower, [BASE], antialias=True, **HALF)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.04)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP))
    images = [photo(name)[0] for name in ("coffee", "chelsea")]
    held_out = crops(images, max(FACTORS) * BASE)

    def loss_on(batch: torch.Tensor) -> torch.Tensor:
        target = multi_scale_target(teacher, batch, FACTORS, size=BASE, **HALF)
        return fine_to_coarse_loss(student(batch).maps[0], target)

    losses = []
    for step in range(options.steps + 1):
        with torch.no_grad():
            losses.append(float(loss_on(held_out)))
        if step % 20 == 0 or step == options.steps:
            print(f"step {step:3d}: loss on held-out crops {losses[-1]:.4f}")
        if step < options.steps:
            optimizer.zero_grad()
            loss_on(crops(images, max(FACTORS) * BASE)).backward()
            optimizer.step()
            warm_up.step()

    figure = Figure(figsize=(6, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(losses, color="#1f4e79")
    axes.set_xlabel("step")
    axes.set_ylabel("L1 to the teacher, held-out crops")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "siglip_hd_student.png", dpi=80)
    print(f"picture: {options.out / 'siglip_hd_student.png'}")


if __name__ == "__main__":
    main()
