"""From a photo to feature maps at several resolutions, by MuRF's rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from murf_fast import _pillow
from murf_fast.cli.demo.backbone import Backbone

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_photo(path: Path) -> Image.Image:
    """An RGB photo, upright."""
    return Image.fromarray(_pillow.read(path))


def normalized(photo: Image.Image) -> Tensor:
    """(1, 3, height, width), float32, with ImageNet's statistics."""
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255
    mean, std = (
        torch.tensor(v, dtype=torch.float32, device="cpu").reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (pixels - mean) / std


def grid_of(photo: Image.Image, longest: int) -> tuple[int, int]:
    """(height, width) of the photo with its longer side at ``longest`` pixels at most."""
    factor = min(1.0, longest / max(photo.size))
    return max(1, round(photo.height * factor)), max(1, round(photo.width * factor))


@torch.no_grad()
def encode(backbone: Backbone, image: Tensor, resolution: int) -> Tensor:
    """Patch tokens of the image at resolution x resolution, as a map (1, C, h, w): a channels_last view of the tokens.

    As MuRF's code does it, the normalized image is resized bilinearly, without antialiasing and to a square.
    """
    square = F.interpolate(image, (resolution, resolution), mode="bilinear", align_corners=False)
    tokens = backbone.model(pixel_values=square).last_hidden_state[:, 1:]
    side = resolution // backbone.patch
    return tokens.mT.unflatten(2, (side, side))
