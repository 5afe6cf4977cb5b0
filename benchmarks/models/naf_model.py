"""NAF from end to end: features of a small ViT and an image to features at the image's size.

Weights are random: they do not change the cost. Plain PyTorch is the model as its code is written, but for NATTEN,
which computes on a CPU for its own tests only: attention to all keys with a mask, in bands of rows. (Keys and values
on the grid of the queries, tap after tap, took seven times as long.) An image that lies channels_last, and one that
does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import CL, randn
from registry import Contenders, Target, case, classes, configurations, side, smallest
from torch import Tensor

import murf_fast
from murf_fast import windows
from murf_fast.nn import NAF
from murf_fast.reference.naf import naf_queries_and_keys

CHANNELS, BAND = 384, 16


def model_of(device: str, dtype: torch.dtype, **options) -> NAF:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NAF(**options).eval().requires_grad_(False).to(device, dtype)


def end_to_end(device, dtype, coarse: int, fine: int) -> Contenders:
    channels = 4 * classes(CHANNELS // 4)
    features = randn(device, dtype, 1, channels, side(coarse), side(coarse), memory_format=CL)
    image = randn(device, dtype, 1, 3, side(fine), side(fine))
    model = model_of(device, dtype, kernel_size=min(9, side(coarse)))
    size, grid, heads = tuple(image.shape[2:]), tuple(features.shape[2:]), model.num_heads
    weights = model.state_dict()
    rule = windows.neighborhood(size, grid, model.kernel_size)
    tables = [torch.from_numpy(axis.multiplicity()).to(device, dtype).log() for axis in rule.tables()]

    def masked(image: Tensor) -> Tensor:
        q, k = naf_queries_and_keys(weights, image, size, grid, heads)
        q, k, v = (x.unflatten(1, (heads, -1)).flatten(3).mT for x in (q, k, features))
        result = features.new_empty(1, heads, channels // heads, size[0] * size[1])
        for y in range(0, size[0], BAND):
            mask = (tables[0][y : y + BAND, None, :, None] + tables[1][:, None]).flatten(0, 1).flatten(1)
            here = slice(y * size[1], y * size[1] + len(mask))
            result[..., here] = F.scaled_dot_product_attention(q[:, :, here], k, v, attn_mask=mask).mT
        return result.flatten(1, 2).unflatten(2, size)

    def oracle():
        """A few rows."""
        exact = {name: w.double() for name, w in weights.items()}
        q, k = naf_queries_and_keys(exact, image.double(), size, grid, heads)
        k, v = (x.double().unflatten(1, (heads, -1)).flatten(3).mT for x in (k, features))
        for y in range(0, size[0], max(1, size[0] // 7)):
            row = q[:, :, y].unflatten(1, (heads, -1)).mT
            mask = (tables[0][y, :, None] + tables[1][:, None]).flatten(1).double()
            weight = (row @ k.mT * row.shape[3] ** -0.5 + mask).softmax(-1)
            yield (slice(None), slice(None), slice(y, y + 1)), (weight @ v).mT.flatten(1, 2)[:, :, None]

    planar, channels_last = image, image.contiguous(memory_format=CL)
    others = {
        "plain, all keys and a mask, channels_last": lambda: masked(channels_last),
        "plain, all keys and a mask, contiguous": lambda: masked(planar),
    }
    keys = model.kernel_size**2
    return Contenders(
        lambda: model(image, features),
        others,
        oracle,
        channels * size[0] * size[1] * image.element_size(),
        operations=2 * size[0] * size[1] * (128 * 128 * (4 + 36) + 128 * 30 + keys * (256 + channels)),
    )


@case("naf_model", "384 channels, 32^2 -> 448^2", targets=(Target("plain", 8.0),))
def naf_448(device, dtype):
    return end_to_end(device, dtype, 32, 448)


@case(
    "naf_model",
    "labels of 21 classes, 32^2 -> 448^2",
    targets=(Target("head on 384 channels", 1.0),),
    less_memory=("head on 384 channels", 0.6),
)
def naf_labels(device, dtype):
    """A partial head for every head's channels, before the attention instead of after it."""
    channels = 4 * classes(CHANNELS // 4)
    features = randn(device, dtype, 1, channels, side(32), side(32), memory_format=CL)
    image = randn(device, dtype, 1, 3, side(448), side(448))
    model = model_of(device, dtype, kernel_size=min(9, side(32)))
    weight, bias = randn(device, dtype, classes(21), channels), randn(device, dtype, classes(21))
    size, grid, heads = tuple(image.shape[2:]), tuple(features.shape[2:]), model.num_heads

    def logits(dtype):
        x, f, w, b = (t.to(dtype) for t in (image, features, weight, bias))
        q, k = naf_queries_and_keys({n: p.to(dtype) for n, p in model.state_dict().items()}, x, size, grid, heads)
        rule = windows.neighborhood(size, grid, model.kernel_size)
        up = murf_fast.reference.window_attention(q, k, f, rule, heads, values="split")
        return F.conv2d(up, w[:, :, None, None], b)

    def oracle():
        yield (), logits(torch.float64)

    return Contenders(
        lambda: model.predict(image, features, weight, bias, reduce="argmax"),
        {"head on 384 channels": lambda: F.conv2d(model(image, features), weight[:, :, None, None], bias).argmax(1)},
        oracle,
        size[0] * size[1],
        logits=lambda: logits(dtype),
    )


@smallest("naf_model")
def tiny_naf(device: str):
    model = NAF(32, num_heads=1, kernel_size=3).to(device).eval().requires_grad_(False)
    features = torch.randn(1, 2, 3, 4, device=device)
    return model(torch.randn(1, 3, 9, 8, device=device), features, (9, 12))


@configurations("naf_model")
def layers(device: str, dtype: torch.dtype) -> None:
    """Every layer of the encoders: queries of the image's size, of more pixels, and of fewer."""
    model = NAF(kernel_size=3).to(device, dtype).eval().requires_grad_(False)
    features = torch.zeros(1, 384, 4, 5, device=device, dtype=dtype)
    for size in ((10, 30), (12, 40), (8, 10)):
        model(torch.zeros(1, 3, 10, 30, device=device, dtype=dtype), features, size)
