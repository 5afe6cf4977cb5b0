"""FeatSharp's block, and the whole from images to features twice and four times as fine.

Weights are random: they do not change the cost. The block's contender is the same formulas on FlexAttention, compiled,
as FeatSharp's code attends. The whole is also compared with what it is there to replace, which gives other features:
the encoder run once at the resolution of the tiles.
"""

from __future__ import annotations

import copy

import torch
from inputs import CL, randn
from registry import Contenders, Target, case, classes, side
from torch import Tensor, nn

import murf_fast
from murf_fast.nn import BiasBuffer, FeatSharp, FeatSharpBlock, MultiResolutionEncoder, merge_tiles, split_tiles

PATCH, HEADS, RADIUS = 14, 16, 3


def _scaled(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """With layer scales that let every part be seen in the result."""
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return module.eval().requires_grad_(False).to(device, dtype)


@case(
    "featsharp_model",
    "block, 64^2 tokens of 384 channels",
    targets=(Target("FlexAttention compile", 3.0),),
    less_memory=("FlexAttention compile", 1 / 3),
)
def block(device, dtype):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    channels, n = HEADS * classes(384 // HEADS), side(64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _scaled(FeatSharpBlock(2 * channels, channels), device, dtype)
    x = randn(device, dtype, 1, 2 * channels, n, n, memory_format=CL)
    slopes = torch.tensor([2.0 ** -(1 + head // 2) for head in range(HEADS)], device=device)

    def near(b, h, query, key):
        return ((query // n - key // n).abs() <= RADIUS) & ((query % n - key % n).abs() <= RADIUS)

    def biased(score, b, h, query, key):
        rows, columns = (query // n - key // n).abs(), (query % n - key % n).abs()
        return score - slopes[h] * torch.where(h % 2 == 0, rows, columns)

    mask = create_block_mask(near, None, None, n * n, n * n, device=device)

    def plain(x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        width = tokens.shape[2] // HEADS
        qkv = module.attn.qkv(module.norm1(tokens)).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        heads = flex_attention(q, k, v, score_mod=biased, block_mask=mask, scale=width**-0.5)[..., :width]
        tokens = tokens + module.ls1.gamma * module.attn.proj(heads.transpose(1, 2).flatten(2))
        result = tokens[..., :channels] + module.ls2.gamma * module.mlp(module.norm2(tokens))
        return result.mT.unflatten(2, (n, n))

    graph = torch.compile(plain, dynamic=False)

    def oracle():
        yield (), copy.deepcopy(module).double()(x.double())

    hidden = module.mlp.w3.in_features
    a_token = 3 * 2 * channels * 2 * channels + 2 * channels * (2 * channels + 2 * hidden) + hidden * channels
    return Contenders(
        lambda: module(x),
        {"FlexAttention compile": torch.no_grad()(lambda: graph(x))},
        oracle,
        channels * n * n * x.element_size(),
        operations=2 * n * n * a_token,
    )


def whole(factor: int):
    """A case's builder: normalized images of 448^2 pixels, ViT-S/14, random weights."""

    def build(device: str, dtype: torch.dtype) -> Contenders:
        from transformers import Dinov2Config, Dinov2Model

        channels, grid = 64 * classes(6), side(32)
        config = Dinov2Config(
            hidden_size=channels,
            num_attention_heads=classes(6),
            num_hidden_layers=classes(12),
            image_size=PATCH * grid,
            patch_size=PATCH,
            attn_implementation="sdpa",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Dinov2Model(config).eval().requires_grad_(False).to(device, dtype)
            size = PATCH * grid
            sharp = FeatSharp(model, factor, size=size, bias_buffer=BiasBuffer(channels, grid, grid))
            sharp = _scaled(sharp, device, dtype)
        images = randn(device, dtype, 1, 3, factor * size, factor * size)
        large = MultiResolutionEncoder(model, [factor * size])

        @torch.no_grad()
        def plain():
            """The model's own forward of every view, one call; the rest in plain PyTorch."""
            with murf_fast.use_backend("reference"):
                views = split_tiles(images, factor, size)
                maps = model(pixel_values=views).last_hidden_state[:, 1:].mT.unflatten(2, (grid, grid))
                low, tiles = merge_tiles(sharp.features(maps), factor)
                return sharp.upsampler(low, images, tiles)

        @torch.no_grad()
        def oracle():
            yield (), copy.deepcopy(sharp).double()(images.double())

        return Contenders(
            torch.no_grad()(lambda: sharp(images)),
            {"plain": plain, "encoder at the full resolution": torch.no_grad()(lambda: large(images).maps[0])},
            oracle,
            channels * (factor * grid) ** 2 * images.element_size(),
        )

    return build


case("featsharp_model", "ViT-S/14, 448^2, twice as fine")(whole(2))
case("featsharp_model", "ViT-S/14, 448^2, four times as fine")(whole(4))
