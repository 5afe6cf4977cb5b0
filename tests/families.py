"""Small models with random weights for tests of families, and stand-ins of those that no package has."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

PATCH, DIM, DEPTH, HEADS, SIDE = 4, 24, 3, 3, 6
SMALL = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "patch_size": PATCH,
    "intermediate_size": 2 * DIM,
    "image_size": SIDE * PATCH,
}


def randomized(model: nn.Module) -> nn.Module:
    """Zeros and ones of an initialization would hide what is left out."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(DIM))

    def forward(self, x):
        return x * self.gamma


# The hub of DINOv3.


class MaskedBias(nn.Linear):
    """Keys have no bias."""

    def __init__(self, dim):
        super().__init__(dim, 3 * dim)
        self.register_buffer("bias_mask", torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class RotaryAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = HEADS, (DIM // HEADS) ** -0.5
        self.qkv, self.proj, self.proj_drop = MaskedBias(DIM), nn.Linear(DIM, DIM), nn.Dropout(0.0)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = (self.rotated(t, *rope) for t in (q, k))
        return self.proj_drop(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    @staticmethod
    def rotated(x, sin, cos):
        dtype, first = x.dtype, x.shape[-2] - len(sin)
        x = x.to(sin.dtype)
        patches = x[..., first:, :]
        a, b = patches.chunk(2, -1)
        return torch.cat([x[..., :first, :], patches * cos + torch.cat([-b, a], -1) * sin], -2).to(dtype)


class RotaryBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-5), nn.LayerNorm(DIM, eps=1e-5)
        self.attn, self.ls1, self.ls2 = RotaryAttention(), Scale(), Scale()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.sample_drop_ratio = 0.0

    def forward(self, x_list, rope_list):
        outputs = []
        for x, rope in zip(x_list, rope_list, strict=True):
            x = x + self.ls1(self.attn(self.norm1(x), rope))
            outputs.append(x + self.ls2(self.mlp(self.norm2(x))))
        return outputs


class Rope(nn.Module):
    """Angles in [-1, 1] times periods, in a dtype of its own."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.shift_coords = dtype, None
        quarter = DIM // HEADS // 4
        self.register_buffer("periods", 100 ** (torch.arange(quarter) / quarter))

    def forward(self, *, H, W):
        axes = [2 * torch.arange(0.5, n, dtype=self.dtype) / n - 1 for n in (H, W)]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        angles = (2 * math.pi * points[:, :, None] / self.periods.to(self.dtype)).flatten(1).tile(2)
        return angles.sin(), angles.cos()


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, DIM, PATCH, PATCH), nn.Identity()

    def forward(self, images):
        return self.norm(self.proj(images).movedim(1, -1))


class HubDinov3(nn.Module):
    """The layout of DINOv3's hub: storage tokens, rotary positions, lists of tokens through every block."""

    def __init__(self, dtype=torch.float32, storage=2):
        super().__init__()
        self.patch_embed = Patches()
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        if storage:
            self.storage_tokens = nn.Parameter(torch.randn(1, storage, DIM))
        self.rope_embed = Rope(dtype)
        self.blocks, self.norm = nn.ModuleList(RotaryBlock() for _ in range(DEPTH)), nn.LayerNorm(DIM, eps=1e-5)
        self.cls_norm = None

    def forward_features(self, images):
        x = self.patch_embed(images)
        height, width = x.shape[1:3]
        first = [
            t.expand(len(x), -1, -1) for t in (self.cls_token, getattr(self, "storage_tokens", None)) if t is not None
        ]
        x = torch.cat([*first, x.flatten(1, 2)], 1)
        for block in self.blocks:
            (x,) = block([x], [self.rope_embed(H=height, W=width)])
        x = self.norm(x)
        count = sum(t.shape[1] for t in first)
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, count:], "x_norm": x}

    def forward(self, images):
        return self.forward_features(images)["x_norm_clstoken"]


# CLIP as OpenAI released it.


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
    """Tokens come first, sequences second."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = nn.MultiheadAttention(DIM, HEADS)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), QuickGelu(), nn.Linear(4 * DIM, DIM))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.Sequential(*(ClipBlock() for _ in range(DEPTH)))

    def forward(self, x):
        return self.resblocks(x)


class OpenAIClip(nn.Module):
    """The image tower of OpenAI's package, which takes images of its own size only."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, DIM, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(DIM))
        self.positional_embedding = nn.Parameter(torch.randn(SIDE * SIDE + 1, DIM))
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(DIM), ClipTransformer(), nn.LayerNorm(DIM)
        self.proj = nn.Parameter(torch.randn(DIM, 16))

    def forward(self, images):
        x = self.conv1(images).flatten(2).mT
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj
