"""Small data sets of anomaly detection in the layouts of the field: gray noise, red where it is defect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (28, 42)


def image(path: Path, seed: int, defect: bool = False, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Writes an image, and returns the mask (H, W) of its defect."""
    g = np.random.default_rng(seed)
    pixels = np.uint8(g.integers(90, 130, (*size, 3)))
    mask = np.zeros(size, dtype=bool)
    if defect:
        top, left = g.integers(0, size[0] - 12), g.integers(0, size[1] - 14)
        mask[top : top + 12, left : left + 14] = True
        pixels[mask] = (250, 20, 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return mask


def save_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(255 * mask)).save(path)


def mvtec(root: Path, name: str = "nut", train: int = 3, seed: int = 0) -> Path:
    folder = root / name
    for i in range(train):
        image(folder / "train" / "good" / f"{i:03}.png", 100 * seed + i)
    for i in range(2):
        image(folder / "test" / "good" / f"{i:03}.png", 100 * seed + 10 + i)
        for kind in ("cut", "dent"):
            mask = image(folder / "test" / kind / f"{i:03}.png", 100 * seed + 20 + i, defect=True)
            save_mask(folder / "ground_truth" / kind / f"{i:03}_mask.png", mask)
    (folder / "readme.txt").write_text("no image")
    return folder


def mvtec2(root: Path, name: str = "can") -> Path:
    folder = root / name
    for i in range(3):
        image(folder / "train" / "good" / f"{i:03}_regular.png", i)
        image(folder / "test_private" / f"{i:03}_regular.png", i)
    image(folder / "test_public" / "good" / "000_regular.png", 10)
    mask = image(folder / "test_public" / "bad" / "000_regular.png", 20, defect=True)
    save_mask(folder / "test_public" / "ground_truth" / "bad" / "000_regular_mask.png", mask)
    return folder


def visa(root: Path, name: str = "candle", split: bool = True) -> Path:
    images, rows = root / name / "Data" / "Images", ["object,split,label,image,mask"]
    for i in range(6):
        image(images / "Normal" / f"{i:04}.JPG", i)
        part = "test" if i in (0, 5) else "train"
        rows.append(f"{name},{part},normal,{name}/Data/Images/Normal/{i:04}.JPG,")
    mask = image(images / "Anomaly" / "000.JPG", 20, defect=True)
    save_mask(root / name / "Data" / "Masks" / "Anomaly" / "000.png", mask)
    rows.append(f"{name},test,anomaly,{name}/Data/Images/Anomaly/000.JPG,{name}/Data/Masks/Anomaly/000.png")
    if split:
        (root / "split_csv").mkdir(exist_ok=True)
        (root / "split_csv" / "1cls.csv").write_text("\n".join(rows) + "\n")
    return root / name
