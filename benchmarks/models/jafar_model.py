"""JAFAR from end to end: features of a small ViT and an image to features at the image's size.

Weights are random: they do not change the cost. Plain PyTorch is the model as its code is written, without what never
reaches the result, its attention whole or in bands of rows; an image that lies channels_last, and one that does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import CL, randn
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import maps
from torch import Tensor

from murf_fast.nn import JAFAR
from murf_fast.reference.jafar import attend, jafar, jafar_queries_and_keys

CHANNELS, BAND = 384, 16


def model_of(device: str, dtype: torch.dtype, **options) -> JAFAR:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return JAFAR(**options).eval().requires_grad_(False).to(device, dtype)


def end_to_end(device, dtype, coarse: int, fine: int) -> Contenders:
    features = randn(device, dtype, 1, classes(CHANNELS), side(coarse), side(coarse), memory_format=CL)
    image = randn(device, dtype, 1, 3, side(fine), side(fine))
    model = model_of(device, dtype, v_dim=features.shape[1])
    size, weights = tuple(image.shape[2:]), dict(model.named_parameters())

    def in_bands(image: Tensor) -> Tensor:
        q, k = jafar_queries_and_keys(weights, image, features, size)
        result = features.new_empty(1, features.shape[1], size[0] * size[1])
        for band in torch.arange(size[0] * size[1]).split(BAND * size[1]):
            here = slice(int(band[0]), int(band[-1]) + 1)
            result[:, :, here] = attend(q[:, here], k, features, model.num_heads)
        return result.unflatten(2, size)

    def oracle():
        """Some of the queries."""
        exact = {name: w.double() for name, w in weights.items()}
        q, k = jafar_queries_and_keys(exact, image.double(), features.double(), size)
        for y in range(0, size[0], max(1, size[0] // 7)):
            row = attend(q[:, y * size[1] : (y + 1) * size[1]], k, features.double(), model.num_heads)
            yield (slice(None), slice(None), slice(y, y + 1)), row.unflatten(2, (1, size[1]))

    planar, channels_last = image, image.contiguous(memory_format=CL)
    others = {
        "plain, attention in bands, channels_last": lambda: in_bands(channels_last),
        "plain, attention in bands, contiguous": lambda: in_bands(planar),
        "plain, whole attention": lambda: jafar(weights, channels_last, features, size, model.num_heads),
    }
    keys = features.shape[2] * features.shape[3]
    return Contenders(
        lambda: model(image, features),
        others,
        oracle,
        features.numel() // keys * size[0] * size[1] * image.element_size(),
        operations=2 * size[0] * size[1] * (128 * 128 * (14 + 9 + 1) + keys * (128 + features.shape[1])),
    )


@case("jafar_model", "384 channels, 32^2 -> 448^2", targets=(Target("plain", 8.0),))
def jafar_448(device, dtype):
    return end_to_end(device, dtype, 32, 448)


@case(
    "jafar_model",
    "labels of 21 classes, 32^2 -> 448^2",
    targets=(Target("head on 384 channels", 1.0),),
    less_memory=("head on 384 channels", 0.6),
)
def jafar_labels(device, dtype):
    """The head before the attention instead of after it."""
    features = randn(device, dtype, 1, classes(CHANNELS), side(32), side(32), memory_format=CL)
    image = randn(device, dtype, 1, 3, side(448), side(448))
    model = model_of(device, dtype, v_dim=features.shape[1])
    size, count = tuple(image.shape[2:]), classes(21)
    weight, bias = randn(device, dtype, count, features.shape[1]), randn(device, dtype, count)

    def logits(dtype):
        x, f, w, b = (t.to(dtype) for t in (image, features, weight, bias))
        q, k = jafar_queries_and_keys({n: p.to(dtype) for n, p in model.named_parameters()}, x, f, size)
        low = F.conv2d(f, w[:, :, None, None], b)
        bands = [attend(part, k, low, model.num_heads) for part in q.split(BAND * size[1], 1)]
        return torch.cat(bands, 2).unflatten(2, size)

    def oracle():
        yield (), logits(torch.float64)

    return Contenders(
        lambda: model.predict(image, features, weight, bias, reduce="argmax"),
        {"head on 384 channels": lambda: F.conv2d(model(image, features), weight[:, :, None, None], bias).argmax(1)},
        oracle,
        size[0] * size[1],
        logits=lambda: logits(dtype),
    )


# A sixteenth of the pixels.
@case(
    "jafar_model",
    "a 128^2 tile of 512^2",
    targets=(Target("region", 8.0),),
    less_memory=("region", 0.2),
)
def jafar_tile(device, dtype):
    """The second tile of the second row of four by four, once the statistics of the image are known."""
    features = randn(device, dtype, 1, classes(CHANNELS), side(32), side(32), memory_format=CL)
    n = side(128)
    image, region = randn(device, dtype, 1, 3, 4 * n, 4 * n), (n, n, n, n)
    model = model_of(device, dtype, v_dim=features.shape[1])
    statistics = model.statistics(image, grids=[features])

    def oracle():
        """Some of the queries."""
        exact = {name: w.double() for name, w in model.named_parameters()}
        q, k = jafar_queries_and_keys(exact, image.double(), features.double(), tuple(image.shape[2:]))
        for y in range(0, n, max(1, n // 3)):
            begin = (n + y) * 4 * n + n
            row = attend(q[:, begin : begin + n], k, features.double(), model.num_heads)
            yield (slice(None), slice(None), slice(y, y + 1)), row.unflatten(2, (1, n))

    return Contenders(
        lambda: model(model.encode_image(image, region=region, statistics=statistics), features),
        {
            "region": lambda: model(image, features, region=region),
            "statistics": lambda: model.statistics(image, grids=[features]).norms,
        },
        oracle,
        features.shape[1] * n * n * image.element_size(),
    )


@smallest("jafar_model")
def tiny_jafar(device: str):
    features = maps(device)[0]
    model = JAFAR(features.shape[1], qk_dim=32).to(device).requires_grad_(False)
    return model(torch.randn(1, 3, 9, 8, device=device), features)


@configurations("jafar_model")
def layers(device: str, dtype: torch.dtype) -> None:
    """Every layer of the encoders: keys of pooled pixels, and of more than there are; both first convolutions."""
    for kernel_size in (1, 3):
        model = JAFAR(384, kernel_size=kernel_size).to(device, dtype).requires_grad_(False)
        for height, width in ((12, 20), (4, 5)):
            features = torch.zeros(1, 384, height, width, device=device, dtype=dtype)
            model(torch.zeros(1, 3, 10, 30, device=device, dtype=dtype), features)
