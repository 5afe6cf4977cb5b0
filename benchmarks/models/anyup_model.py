"""AnyUp from end to end: features of a small ViT and an image to features at the image's size.

Weights are random: they do not change the cost. The dense reference is the model as its code is written: a mask of all
queries and keys, the weights of every head; at 1024^2 it would need 64 GB, and the plain encoders stand in for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from inputs import CL, randn
from registry import Contenders, Rows, Target, case, classes, configurations, side, smallest
from tiny import maps
from torch import Tensor

import murf_fast
from murf_fast import _extension, backends
from murf_fast.nn import AnyUp
from murf_fast.nn.guided._anyup_forward import _projected, _projection, keys_of, window_rule
from murf_fast.ops._pixel_linear import pixel_linear
from murf_fast.ops._pixels import arithmetic_of
from murf_fast.reference.anyup import anyup, encoder, mixed_with_positions, residual_blocks

CHANNELS = 384
GIGABYTE = 1e9


def _model(device: str, dtype: torch.dtype) -> AnyUp:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AnyUp().eval().requires_grad_(False).to(device, dtype)


def _multiplies_in_bfloat16() -> bool:
    return _extension.load_error() is None and arithmetic_of("native", torch.bfloat16) == torch.bfloat16


def _inputs(device: str, dtype: torch.dtype, coarse: int, fine: int) -> tuple[Tensor, Tensor]:
    features = randn(device, dtype, 1, classes(CHANNELS), side(coarse), side(coarse), memory_format=CL)
    return randn(device, dtype, 1, 3, side(fine), side(fine)), features


def plainly(
    model: AnyUp, image: Tensor, features: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> Callable[[int, int], Tensor]:
    """Rows (1, C, end - begin, W) of the result as plain PyTorch computes them in ``dtype``, by begin and end.

    The 3x3 convolution of all in float64 would unfold its input, ten gigabytes.
    """
    weights, v = {name: w.to(dtype) for name, w in model.named_parameters()}, features.to(dtype)
    grid = tuple(features.shape[2:])
    rule = window_rule("dense", model.window_ratio, size, grid)
    encoded = mixed_with_positions(encoder(weights, "image_encoder", image.to(dtype)), weights["rope.freqs"])
    k = F.adaptive_avg_pool2d(encoder(weights, "key_encoder", encoded), grid)
    unified = murf_fast.reference.feature_unify(F.normalize(v, dim=1), weights["key_features_encoder.0.basis"])
    k = torch.cat([k, residual_blocks(weights, "key_features_encoder", unified)], 1)
    q = encoder(weights, "query_encoder", encoded)
    del encoded
    block = "cross_decode.cross_attn"
    k, of_q = encoder(weights, "aggregation", k), weights[f"{block}.norm_q.weight"]
    weight, bias = (weights[f"{block}.attention.in_proj_{n}"].chunk(3) for n in ("weight", "bias"))
    k = _projected(k, weight[1] * weights[f"{block}.norm_k.weight"], bias[1])

    def rows(begin: int, end: int) -> Tensor:
        band = q[:, :, max(begin - 1, 0) : end + 1]
        band = F.pad(band, (0, 0, int(begin == 0), int(end == size[0])))
        band = F.conv2d(band, weights["cross_decode.conv2d.weight"], padding=(0, 1))
        band = _projected(band, weight[0] * of_q, bias[0])
        own = rule.crop(begin, 0, end - begin, size[1])
        return murf_fast.reference.window_attention(band, k, v, own, model.num_heads)

    return rows


def end_to_end(device, dtype, coarse: int, fine: int, contenders: set[str]) -> Contenders:
    model = _model(device, dtype)
    image, features = _inputs(device, dtype, coarse, fine)
    size, grid = tuple(image.shape[2:]), tuple(features.shape[2:])
    rule = window_rule("dense", model.window_ratio, size, grid)
    weights = dict(model.named_parameters())

    def plain():
        with murf_fast.use_backend("reference"):
            encoded = model.encode_image(image, grids=[grid])
        return model(encoded, features)

    def smaller():
        image, features = _inputs(device, dtype, 32, 448)

        def five_times():
            for _ in range(4):
                model(image, features)
            return model(image, features)

        return five_times

    def oracle():
        """A few rows."""
        rows = plainly(model, image, features, size, torch.float64)
        for y in range(0, size[0], max(1, size[0] // 7)):
            yield (slice(None), slice(None), slice(y, y + 1)), rows(y, y + 1)

    def in_float32():
        single = AnyUp().eval().requires_grad_(False).to(device)
        single.load_state_dict(model.state_dict())
        inputs = image.float(), features.float()
        return lambda: single(*inputs)

    others = {
        "float32": in_float32,
        "dense reference": lambda: lambda: anyup(weights, image, features, rule, size),
        "plain encoders": lambda: plain,
        "linear in pixels: 448^2 five times": smaller,
    }
    return Contenders(
        lambda: model(image, features),
        {name: build() for name, build in others.items() if name in contenders},
        oracle,
        features.shape[1] * size[0] * size[1] * image.element_size(),
        operations=2 * size[0] * size[1] * 128 * 128 * (14 + 9 + 1),
    )


@case(
    "anyup_model",
    "384 channels, 32^2 -> 448^2",
    targets=(Target("dense", 10.0),),
    memory_target=(1.5 * GIGABYTE / (4 * CHANNELS * 448**2), "result"),
)
def anyup_448(device, dtype):
    return end_to_end(device, dtype, 32, 448, {"dense reference", "plain encoders"})


# The windows are a share of the map: with four times the keys every pixel sees 3.3 times as many, so attention's share
# of the time grows, and exactly linear would be a smaller model.
@case(
    "anyup_model",
    "384 channels, 64^2 -> 1024^2",
    targets=(Target("linear", 0.75),),
    memory_target=((2 * GIGABYTE + 4 * CHANNELS * 1024**2) / (4 * CHANNELS * 1024**2), "result"),
)
def anyup_1024(device, dtype):
    return end_to_end(device, dtype, 64, 1024, {"plain encoders", "linear in pixels: 448^2 five times"})


@case(
    "anyup_model",
    "labels of 21 classes, 32^2 -> 448^2",
    targets=(Target("head on 384 channels", 3.0),),
    less_memory=("head on 384 channels", 0.25),
)
def anyup_labels(device, dtype):
    """The head before the attention instead of after it."""
    model = _model(device, dtype)
    image, features = _inputs(device, dtype, 32, 448)
    size, count = tuple(image.shape[2:]), classes(21)
    weight, bias = randn(device, dtype, count, features.shape[1]), randn(device, dtype, count)

    def after():
        return F.conv2d(model(image, features), weight[:, :, None, None], bias).argmax(1)

    def logits(dtype):
        rows = plainly(model, image, features, size, dtype)
        bands = (rows(y, min(y + 32, size[0])) for y in range(0, size[0], 32))
        found = [torch.einsum("kc,bchw->bkhw", weight.to(dtype), band) for band in bands]
        return torch.cat(found, 2) + bias.to(dtype)[:, None, None]

    def oracle():
        yield (), logits(torch.float64)

    return Contenders(
        lambda: model.predict(image, features, weight, bias, reduce="argmax"),
        {"head on 384 channels": after},
        oracle,
        size[0] * size[1],
        logits=lambda: logits(dtype),
    )


# The encoders' passes of inference, and of the residual blocks' arguments a second time in the backward.
@case(
    "anyup_model",
    "forward and backward, 384 channels, 16^2 -> 224^2",
    targets=(Target("plain encoders", 1.0),),
    less_memory=("plain encoders", 1 / 3),
    capturable=False,
)
def anyup_training(device, dtype):
    """Gradients to every parameter that has one; in plain PyTorch all that is not ours to recompute is ours, too."""
    model = _model(device, dtype).requires_grad_(True)
    image, features = _inputs(device, dtype, 16, 224)
    size, grid = tuple(image.shape[2:]), tuple(features.shape[2:])
    direction = randn(device, dtype, *features.shape[:2], *size, memory_format=CL)
    unused = ("cross_decode.cross_attn.attention.out_proj", "cross_decode.cross_attn.attention.in_proj_bias")
    names = [name for name, _ in model.named_parameters() if not name.startswith(unused)]

    def gradients(result: Tensor, module: AnyUp) -> Tensor:
        found = torch.autograd.grad(result, [module.get_parameter(n) for n in names], direction.to(result.dtype))
        return torch.cat([(g / g.abs().max()).flatten() for g in found])

    def plain(module: AnyUp, dtype: torch.dtype) -> Tensor:
        weights, x, v = dict(module.named_parameters()), image.to(dtype), features.to(dtype)
        encoded = mixed_with_positions(encoder(weights, "image_encoder", x), weights["rope.freqs"])
        k = keys_of(weights, F.adaptive_avg_pool2d(encoder(weights, "key_encoder", encoded), grid), v)
        q = F.conv2d(encoder(weights, "query_encoder", encoded), weights["cross_decode.conv2d.weight"], padding=1)
        q = _projected(q, *_projection(weights, 0))
        rule = window_rule("dense", module.window_ratio, size, grid)
        return murf_fast.window_attention(q, k, v, windows=rule, num_heads=module.num_heads)

    def oracle():
        exact = copy.deepcopy(model).double()
        yield (), gradients(plain(exact, torch.float64), exact)

    return Contenders(
        lambda: gradients(model(image, features), model),
        {"plain encoders": lambda: gradients(plain(model, dtype), model)},
        oracle,
        sum(model.get_parameter(n).numel() for n in names) * image.element_size(),
    )


@case("anyup_model", "three maps of one image, 448^2", targets=(Target("three calls", 2.2),))
def anyup_maps(device, dtype):
    """Two layers and another scale: the queries are made once."""
    model = _model(device, dtype)
    image = randn(device, dtype, 1, 3, side(448), side(448))
    maps = [randn(device, dtype, 1, classes(CHANNELS), side(n), side(n), memory_format=CL) for n in (32, 31, 16)]
    size = tuple(image.shape[2:])

    def oracle():
        channels = 0
        for f in maps:
            rows = plainly(model, image, f, size, torch.float64)
            for y in range(0, size[0], max(1, size[0] // 3)):
                where = (slice(None), slice(channels, channels + f.shape[1]), slice(y, y + 1))
                yield where, rows(y, y + 1)
            channels += f.shape[1]

    return Contenders(
        lambda: Rows(model(image, maps)),
        {"three calls": lambda: Rows(model(image, f) for f in maps)},
        oracle,
        sum(f.shape[1] for f in maps) * size[0] * size[1] * image.element_size(),
    )


def tile(device, dtype, coarse: int, fine: int) -> Contenders:
    """The second tile of the second row of four by four, once the statistics of the image are known."""
    model = _model(device, dtype)
    image, features = _inputs(device, dtype, coarse, fine)
    n = image.shape[2] // 4
    region, inside = (n, n, n, n), (slice(None), slice(None), slice(n, 2 * n), slice(n, 2 * n))
    statistics = model.statistics(image, grids=[features])

    def oracle():
        rows = plainly(model, image, features, tuple(image.shape[2:]), torch.float64)
        for y in range(0, n, max(1, n // 3)):
            yield (slice(None), slice(None), slice(y, y + 1)), rows(n + y, n + y + 1)[:, :, :, n : 2 * n]

    return Contenders(
        lambda: model(model.encode_image(image, region=region, statistics=statistics), features),
        {
            "whole image": lambda: model(image, features)[inside],
            "tile and statistics": lambda: model(image, features, region=region),
            "statistics": lambda: model.statistics(image, grids=[features]).norms,
            "statistics, recomputed": lambda: model.statistics(image, grids=[features], recompute=True).norms,
        },
        oracle,
        features.shape[1] * n * n * image.element_size(),
    )


# A sixteenth of the pixels, for at most 1.3 sixteenths of the time and the memory.
@case(
    "anyup_model",
    "a 256^2 tile of 1024^2",
    targets=(Target("whole image", 16 / 1.3),),
    less_memory=("whole image", 1.3 / 16),
    devices=("cpu",),
)
def anyup_tile(device, dtype):
    return tile(device, dtype, 64, 1024)


@case(
    "anyup_model",
    "a 512^2 tile of 2048^2",
    targets=(Target("whole image", 16 / 1.3),),
    less_memory=("whole image", 1.3 / 16),
    devices=("cuda",),
)
def anyup_large_tile(device, dtype):
    return tile(device, dtype, 128, 2048)


# On a CPU without matrix units for bfloat16 the encoders compute in float32, and there is nothing to reach.
@case(
    "anyup_model",
    "384 channels, 32^2 -> 448^2, bfloat16",
    dtype=torch.bfloat16,
    targets=(Target("float32", 1.5),) if torch.cuda.is_available() or _multiplies_in_bfloat16() else (),
)
def anyup_448_bfloat16(device, dtype):
    return end_to_end(device, dtype, 32, 448, {"plain encoders", "float32"})


@case("anyup_model", "384 channels, 32^2 -> 448^2, float16", devices=("cuda",), dtype=torch.float16)
def anyup_448_half(device, dtype):
    return end_to_end(device, dtype, 32, 448, {"plain encoders"})


@case("anyup_model", "384 channels, 128^2 -> 2048^2", devices=("cuda",))
def anyup_2048(device, dtype):
    return end_to_end(device, dtype, 128, 2048, {"plain encoders"})


@smallest("anyup_model")
def tiny_anyup(device: str):
    model, image = AnyUp(qk_dim=32).to(device).requires_grad_(False), torch.randn(1, 3, 9, 8, device=device)
    features = maps(device)[0]
    for size in (None, (5, 11)):
        model(image, features, size, region=(1, 2, 3, 4))
    return model(image, features)


@configurations("anyup_model")
def layers(device: str, dtype: torch.dtype) -> None:
    """Every layer of the encoders: keys of pooled pixels, and of more than there are."""
    model = AnyUp().to(device, dtype).requires_grad_(False)
    for height, width in ((12, 20), (4, 5)):
        features = torch.zeros(1, 384, height, width, device=device, dtype=dtype)
        image = torch.zeros(1, 3, 10, 30, device=device, dtype=dtype)
        model(image, features)
        model(image, features, (12, 20), region=(1, 2, 5, 7))
    _many_pixels(device, dtype, len(model.image_encoder[0].weight))


def _many_pixels(device: str, dtype: torch.dtype, channels: int) -> None:
    """The layers of a large image, which have a kernel of their own on some GPUs."""
    height, width = 448, 120
    backend = backends.resolve(None, torch.device(device).type, dtype)
    x, out = (torch.zeros(height * width, channels, device=device, dtype=dtype) for _ in range(2))
    weight, vector = torch.zeros(channels, channels, device=device, dtype=dtype), torch.zeros(channels, device=device)
    turns = tuple(torch.zeros(n, 2, channels, device=device) for n in (height, width))
    normalized = {"norm": (vector, vector), "weight": weight, "backend": backend}
    pixel_linear(x, out, weight=weight, statistics=True, backend=backend)
    pixel_linear(x, out, statistics=True, **normalized)
    pixel_linear(x, out, residual=out, statistics=True, **normalized)
    pixel_linear(x, out, residual=out, rotation=turns, **normalized)
    pixel_linear(x, out, bias=vector, statistics=True, **normalized)
    pixel_linear(x, out, unit_eps=1e-3, weight=weight, bias=vector, backend=backend)
