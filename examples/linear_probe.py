"""MuRF features of two photos and a linear probe, trained on a few marked rectangles.

    python examples/linear_probe.py [--weights FOLDER] [--sizes 266,518] [--steps 60]

A probe needs labels of pixels. A dozen rectangles are enough: all other pixels are ignored by the loss, whose logits
exist at the features' resolution only.
"""

from __future__ import annotations

import torch
from _shared import IMAGENET, colours, painted, parser, photo, save, vit

import murf_fast

IGNORED = 255
CLASSES = ("background", "cat", "saucer", "table", "coffee", "cup", "spoon")
# left, top, right, bottom in pixels of the photo
MARKED = {
    "coffee": {
        "table": [(5, 230, 60, 340), (480, 30, 590, 220), (470, 330, 590, 390), (250, 5, 420, 15)],
        "saucer": [(95, 180, 140, 250), (240, 330, 310, 375), (435, 170, 465, 240), (150, 290, 190, 330)],
        "coffee": [(220, 120, 350, 180)],
        "cup": [(185, 75, 205, 150), (240, 215, 310, 260), (240, 25, 330, 50)],
        "spoon": [(345, 265, 390, 310)],
    },
    "chelsea": {
        "cat": [(60, 60, 320, 240), (90, 5, 250, 60)],
        "background": [(385, 60, 450, 110), (400, 180, 450, 260), (2, 2, 25, 90)],
    },
}


def target(name: str, size: tuple[int, int]) -> torch.Tensor:
    """(1, H, W) labels, IGNORED where nothing is marked."""
    labels = torch.full((1, *size), IGNORED)
    for label, boxes in MARKED[name].items():
        for left, top, right, bottom in boxes:
            labels[:, top:bottom, left:right] = CLASSES.index(label)
    return labels


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--sizes", default="266,518", help="resolutions in pixels")
    asked.add_argument("--steps", type=int, default=60)
    options = asked.parse_args()
    torch.manual_seed(0)
    model, sizes = vit(options.weights), [int(s) for s in options.sizes.split(",")]
    columns = len(sizes) * model.config.hidden_size
    head = murf_fast.nn.SegmentationHead(columns, len(CLASSES))
    murf = murf_fast.MuRF(model, sizes, head, **IMAGENET)

    names = list(MARKED)
    images = [photo(name)[0] for name in names]  # of different sizes: they share passes all the same
    with torch.no_grad():
        encoded = murf.encode(images)
    targets = [target(name, image.shape[1:]) for name, image in zip(names, images, strict=True)]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-3)
    for step in range(options.steps):
        optimizer.zero_grad()
        losses = [head.loss(e.maps, t, ignore_index=IGNORED) for e, t in zip(encoded, targets, strict=True)]
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step:3d}: loss {loss.item():.4f}")

    head.eval()
    labels = murf.segment(images)
    for found, marked, name in zip(labels, targets, names, strict=True):
        known = marked[0] != IGNORED
        print(f"{name}: {float((found[known] == marked[0][known]).float().mean()):.1%} of the marked pixels are right")
    components = murf.pca(images)
    parts = []
    for image, component, found in zip(images, components, labels, strict=True):
        parts += [image.permute(1, 2, 0), colours(component), painted(image[None], found)]
    save(parts, options.out / "linear_probe.jpg", 200)


if __name__ == "__main__":
    main()
