"""Models that the tests of the tables name by ``--model``."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def vit():
    """Two blocks, patches of 14 pixels."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    return Dinov2Model(config)


def backbone():
    """One whose forward returns maps and no tokens."""
    from transformers import Dinov2Backbone, Dinov2Config

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    return Dinov2Backbone(config)


class Nearest(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, image, features):
        return self.gain * F.interpolate(features, image.shape[2:], mode="nearest")


def upsampler():
    return Nearest()


def broken():
    def forward(image, features):
        raise RuntimeError("no such layer\nand more")

    return forward
