"""FeatUp in two lines: features sixteen times as fine, along the edges of the photo.

    python examples/featup.py [--weights FOLDER] [--upsampler clip_jbu_stack_cocostuff.ckpt] [--size 266]

Without a checkpoint of FeatUp's the levels that come with this package are taken, which were trained for CLIP and fit
features of any width, as their kernels see the photo alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _shared import colours, normalized, parser, photo, save, vit

import murf_fast
from murf_fast.cli.demo import jbu
from murf_fast.nn import JBUStack, MultiResolutionEncoder


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--upsampler", type=Path, help="a checkpoint of FeatUp's, for this backbone")
    asked.add_argument("--size", type=int, default=266, help="of the square that is encoded, in pixels")
    options = asked.parse_args()
    image = murf_fast.resize(normalized(photo("coffee")), options.size, antialias=True)
    with torch.no_grad():
        features = MultiResolutionEncoder(vit(options.weights), [options.size])(image).maps[0]

        stack = JBUStack.from_checkpoint(options.upsampler) if options.upsampler else jbu.bundled()
        fine = stack(features, image)

    print(f"{tuple(features.shape)} -> {tuple(fine.shape)}")
    # The components of the coarse map, of both.
    centre = features - features.mean((2, 3), keepdim=True)
    axes = torch.linalg.svd(centre.flatten(2)[0].double(), full_matrices=False)[0][:, :3].to(features.dtype)
    shown = [torch.einsum("chw,ck->khw", x[0], axes) for x in (features, fine)]
    shown = [colours(murf_fast.resize(x[None], 300, mode="nearest")[0]) for x in shown]
    square = murf_fast.resize(photo("coffee").float(), 300, antialias=True)[0].clamp(0, 255).to(torch.uint8)
    save([square.permute(1, 2, 0), *shown], options.out / "featup.jpg")


if __name__ == "__main__":
    main()
