"""Anomaly detection on a folder of good images and a folder to look at.

    python examples/anomaly_folder.py [--weights FOLDER] [--normal FOLDER --test FOLDER]

Without folders it makes some: crops of a wooden table, of which one to look at gets a stain that was not there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from _shared import parser, photo, save, vit
from PIL import Image, ImageDraw, ImageFilter

from murf_fast.anomaly import MultiResolutionDetector

KINDS = (".png", ".jpg", ".jpeg")
SIDE, ENLARGED = 140, 280  # pixels of a crop, before and after


def made(folder: Path) -> tuple[Path, Path]:
    """Folders of normal crops and of two to look at, one of them stained."""
    wood = Image.fromarray(photo("coffee")[0].permute(1, 2, 0).numpy()).crop((440, 0, 600, 300))
    corners = [(x, y) for x in (0, 10, 20) for y in range(0, 150, 15)]
    crops = [wood.resize((ENLARGED, ENLARGED), Image.BICUBIC, (x, y, x + SIDE, y + SIDE)) for x, y in corners]
    normal, test = folder / "normal", folder / "test"
    for path in (normal, test):
        path.mkdir(parents=True, exist_ok=True)
    held, stained = crops.pop(17), crops.pop(8)
    for i, crop in enumerate(crops):
        crop.save(normal / f"{i:02d}.png")
    held.save(test / "good.png")
    stain = Image.new("L", stained.size)
    ImageDraw.Draw(stain).ellipse((120, 100, 190, 160), fill=200)
    stained.paste((60, 90, 70), mask=stain.filter(ImageFilter.GaussianBlur(6)))
    stained.save(test / "stained.png")
    return normal, test


def listed(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in KINDS)
    if not found:
        raise SystemExit(f"{folder} holds no image of the kinds {', '.join(KINDS)}")
    return found


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--normal", type=Path, help="folder of good images")
    asked.add_argument("--test", type=Path, help="folder of images to look at")
    asked.add_argument("--layers", default="4,6", help="blocks, counted from 0; MRF-AD takes 7,9,11")
    asked.add_argument("--scales", default="0.5,1.0", help="of the images' size")
    options = asked.parse_args()
    if (options.normal is None) != (options.test is None):
        asked.error("--normal and --test go together")
    normal, test = (options.normal, options.test) if options.normal else made(options.out / "anomaly_folder")

    layers, scales = [int(n) for n in options.layers.split(",")], [float(s) for s in options.scales.split(",")]
    detector = MultiResolutionDetector(vit(options.weights), layers=layers, scales=scales)
    detector.fit(listed(normal))
    rows = sum(len(bank) for bank in detector.banks_)
    print(f"{detector.images_} images, {rows:,} rows in {len(detector.banks_)} banks")

    images, parts = listed(test), []
    found = list(detector.score_many(images))
    # From the highest pixel of good images that were held out to the highest one here.
    low = detector.normal_.highest
    high = max(low + 1e-12, *(float(anomaly.map.max()) for anomaly in found))
    for path, anomaly in zip(images, found, strict=True):
        print(f"{path.name}: score {anomaly.score:.3f}")
        heat = (torch.as_tensor(anomaly.map) - low).div(high - low).clamp(0, 1)
        with Image.open(path) as image:
            picture = torch.from_numpy(np.array(image.convert("RGB")))
        red = torch.stack([heat, torch.zeros_like(heat), 1 - heat], 2)
        parts += [picture, (0.4 * picture + 0.6 * 255 * red).round().to(torch.uint8)]
    save(parts[:8], options.out / "anomaly_folder.jpg", 220)


if __name__ == "__main__":
    main()
