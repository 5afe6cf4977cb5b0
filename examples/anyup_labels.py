"""AnyUp at 1024 x 1024: labels of every pixel, without features or logits of that size.

    python examples/anyup_labels.py [--weights FOLDER] [--upsampler anyup_paper.pth] [--size 1024] [--classes 6]

The classes are found in the features themselves: the nearest of a few rows that lie far from each other. That is a
linear head, ``argmax_k 2 c_k . f - |c_k|^2``, so it may run before the upsampling. Without ``--upsampler`` the weights
of AnyUp are random: windows and times are the same, edges are not.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from _shared import IMAGENET, normalized, painted, parser, photo, save, vit

import murf_fast
from murf_fast.nn import AnyUp, MultiResolutionEncoder


def centres(rows: torch.Tensor, count: int, rounds: int = 10) -> torch.Tensor:
    """(count, D): k-means from far rows on, by exact nearest neighbours."""
    found = rows[murf_fast.k_center_greedy(rows, count=count)]
    for _ in range(rounds):
        nearest = murf_fast.nearest_distance(rows, found)[1][:, 0]
        sums = torch.zeros_like(found).index_add_(0, nearest, rows)
        counts = torch.bincount(nearest, minlength=count)[:, None]
        found = torch.where(counts > 0, sums / counts.clamp_min(1), found)
    return found


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--upsampler", type=Path, help="a checkpoint of AnyUp's")
    asked.add_argument("--size", type=int, default=1024, help="of the labels, in pixels")
    asked.add_argument("--encode", type=int, default=448, help="of the square that the backbone sees")
    asked.add_argument("--classes", type=int, default=6)
    options = asked.parse_args()
    torch.manual_seed(0)
    upsampler = AnyUp.from_checkpoint(options.upsampler) if options.upsampler else AnyUp().eval()
    print(f"AnyUp: {options.upsampler.name if options.upsampler else 'RANDOM weights'}")
    image = photo("coffee")
    large = murf_fast.resize(normalized(image), options.size, mode="bicubic", antialias=True)
    with torch.no_grad():
        features = MultiResolutionEncoder(vit(options.weights), [options.encode], **IMAGENET)(image).maps[0]
        rows = centres(features.flatten(2)[0].T.contiguous(), options.classes)

        begun = time.perf_counter()
        labels = upsampler.predict(large, features, 2 * rows, -(rows * rows).sum(1), reduce="argmax")
        seconds = time.perf_counter() - begun

        coarse = murf_fast.upsample_argmax(
            [torch.nn.functional.conv2d(features, 2 * rows[:, :, None, None])],
            options.size,
            bias=-(rows * rows).sum(1),
        )
    print(f"{tuple(features.shape)} -> {tuple(labels.shape)} {labels.dtype} in {seconds:.1f} s")
    print(f"logits of that size would be {4 * options.classes * options.size**2 / 1e6:.0f} MB, features "
          f"{4 * features.shape[1] * options.size**2 / 1e6:.0f} MB")  # fmt: skip
    shown = murf_fast.resize(image.float(), options.size, antialias=True).clamp(0, 255).to(torch.uint8)
    parts = [shown[0].permute(1, 2, 0), painted(shown, coarse[0]), painted(shown, labels[0])]
    save(parts, options.out / "anyup_labels.jpg")


if __name__ == "__main__":
    main()
