"""Export of a MuRF segmenter: images in, labels out, as one file that needs no model code.

    python examples/export_segmenter.py [--weights FOLDER] [--sizes 266,518]

The graph has fixed sizes. Its nodes are PyTorch's and this library's, so a process that loads it imports murf_fast.
"""

from __future__ import annotations

import time

import torch
from _shared import IMAGENET, painted, parser, photo, save, vit
from torch import Tensor, nn

import murf_fast


class Segmenter(nn.Module):
    """uint8 images (1, 3, H, W) to labels (1, H, W)."""

    def __init__(self, murf: murf_fast.MuRF) -> None:
        super().__init__()
        self.murf = murf

    def forward(self, images: Tensor) -> Tensor:
        return self.murf.segment(images)


def head_of(murf: murf_fast.MuRF, images: Tensor, classes: int) -> murf_fast.nn.SegmentationHead:
    """A head without training: the nearest of a few far apart pixels of the fused map."""
    with torch.no_grad():
        fused = murf.features(images)[0].flatten(1).T.contiguous()
    far = fused[murf_fast.k_center_greedy(fused, count=classes)]
    head = murf_fast.nn.SegmentationHead(fused.shape[1], classes, norm=False).requires_grad_(False)
    head.classifier.weight.copy_(2 * far[:, :, None, None])
    head.classifier.bias.copy_(-(far * far).sum(1))
    return head.eval()


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--sizes", default="266,518", help="resolutions in pixels")
    asked.add_argument("--classes", type=int, default=6)
    options = asked.parse_args()
    images = photo("coffee")
    murf = murf_fast.MuRF(vit(options.weights), [int(s) for s in options.sizes.split(",")], **IMAGENET)
    murf.head = head_of(murf, images, options.classes)
    segmenter = Segmenter(murf).eval()

    begun = time.perf_counter()
    with torch.no_grad():  # a graph made outside of it has regions that cannot be saved
        program = torch.export.export(segmenter, (images,))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "segmenter.pt2"
    torch.export.save(program, path)
    print(f"exported in {time.perf_counter() - begun:.1f} s: {path}, {path.stat().st_size / 1e6:.0f} MB")
    ours = sorted({str(n.target) for n in program.graph.nodes if "murf_fast" in str(n.target)})
    print(f"nodes of this library: {', '.join(ours)}")

    loaded = torch.export.load(path).module()
    with torch.no_grad():
        expected, found = segmenter(images), loaded(images)
    if not torch.equal(expected, found):
        raise SystemExit("the exported program gives other labels than the model")
    print(f"labels {tuple(found.shape)} {found.dtype} of the loaded program are those of the model")
    save([images[0].permute(1, 2, 0), painted(images, found[0])], options.out / "export_segmenter.jpg")


if __name__ == "__main__":
    main()
