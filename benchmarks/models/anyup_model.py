"""AnyUp from end to end: features of a small ViT and an image to features at the image's size.

Weights are random: they do not change the cost. The dense reference is the model as its code is written: a mask of all
queries and keys, the weights of every head; at 1024^2 it would need 64 GB, and the plain encoders stand in for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import CL, randn
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import maps
from torch import Tensor

import murf_fast
from murf_fast.nn import AnyUp
from murf_fast.nn.guided._anyup_forward import _projected, _queries_and_keys, window_rule
from murf_fast.reference.anyup import anyup, encoder, mixed_with_positions, residual_blocks

CHANNELS = 384
GIGABYTE = 1e9


def _model(device: str, dtype: torch.dtype) -> AnyUp:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AnyUp().eval().requires_grad_(False).to(device, dtype)


def _inputs(device: str, dtype: torch.dtype, coarse: int, fine: int) -> tuple[Tensor, Tensor]:
    features = randn(device, dtype, 1, classes(CHANNELS), side(coarse), side(coarse), memory_format=CL)
    return randn(device, dtype, 1, 3, side(fine), side(fine)), features


def end_to_end(device, dtype, coarse: int, fine: int, contenders: set[str]) -> Contenders:
    model = _model(device, dtype)
    image, features = _inputs(device, dtype, coarse, fine)
    size, grid = tuple(image.shape[2:]), tuple(features.shape[2:])
    rule = window_rule("dense", model.window_ratio, size, grid)
    weights = dict(model.named_parameters())

    def plain():
        with murf_fast.use_backend("reference"):
            q, k = _queries_and_keys(weights, image, features, size)
        return murf_fast.window_attention(q, k, features, windows=rule, num_heads=model.num_heads)

    def smaller():
        image, features = _inputs(device, dtype, 32, 448)

        def five_times():
            for _ in range(4):
                model(image, features)
            return model(image, features)

        return five_times

    def oracle():
        """A few rows. The 3x3 convolution of all in float64 would unfold its input, ten gigabytes."""
        exact = {name: w.double() for name, w in weights.items()}
        v = features.double()
        encoded = mixed_with_positions(encoder(exact, "image_encoder", image.double()), exact["rope.freqs"])
        k = F.adaptive_avg_pool2d(encoder(exact, "key_encoder", encoded), grid)
        unified = murf_fast.reference.feature_unify(F.normalize(v, dim=1), exact["key_features_encoder.0.basis"])
        k = torch.cat([k, residual_blocks(exact, "key_features_encoder", unified)], 1)
        q = encoder(exact, "query_encoder", encoded)
        del encoded
        block = "cross_decode.cross_attn"
        k, of_q = encoder(exact, "aggregation", k), exact[f"{block}.norm_q.weight"]
        weight, bias = (exact[f"{block}.attention.in_proj_{n}"].chunk(3) for n in ("weight", "bias"))
        k = _projected(k, weight[1] * exact[f"{block}.norm_k.weight"], bias[1])
        rows, columns = rule.tables()
        for y in range(0, size[0], max(1, size[0] // 7)):
            band = q[:, :, max(y - 1, 0) : y + 2]
            band = F.pad(band, (0, 0, int(y == 0), int(y == size[0] - 1)))
            band = F.conv2d(band, exact["cross_decode.conv2d.weight"], padding=(0, 1))
            one = murf_fast.windows.ranges(
                tuple(torch.from_numpy(n[y : y + 1]) for n in _spans(rows)),
                tuple(torch.from_numpy(n) for n in _spans(columns)),
                grid,
            )
            band = _projected(band, weight[0] * of_q, bias[0])
            part = murf_fast.reference.window_attention(band, k, v, one, model.num_heads)
            yield (slice(None), slice(None), slice(y, y + 1)), part

    others = {
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


def _spans(axis) -> tuple:
    """Starts and ends of an axis's windows."""
    return axis.index[:, 0], axis.index[:, 0] + axis.count


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


@case("anyup_model", "384 channels, 32^2 -> 448^2, float16", devices=("cuda",), dtype=torch.float16)
def anyup_448_half(device, dtype):
    return end_to_end(device, dtype, 32, 448, {"plain encoders"})


@case("anyup_model", "384 channels, 128^2 -> 2048^2", devices=("cuda",))
def anyup_2048(device, dtype):
    return end_to_end(device, dtype, 128, 2048, {"plain encoders"})


@smallest("anyup_model")
def tiny_anyup(device: str):
    return AnyUp(qk_dim=32).to(device).requires_grad_(False)(torch.randn(1, 3, 9, 8, device=device), maps(device)[0])


@configurations("anyup_model")
def layers(device: str, dtype: torch.dtype) -> None:
    """Every layer of the encoders: keys of pooled pixels, and of more than there are."""
    model = AnyUp(allow_bfloat16=True).to(device, dtype).requires_grad_(False)
    for height, width in ((12, 20), (4, 5)):
        features = torch.zeros(1, 384, height, width, device=device, dtype=dtype)
        model(torch.zeros(1, 3, 10, 30, device=device, dtype=dtype), features)
