"""What is measured: every case once, for the CPU suites and the GPU suite alike.

A case builds its data on a device and names its contenders: ours, and what people run today at its best (both memory
layouts where the layout is free, ``torch.compile`` of the plain graph). ``oracle`` yields slices of the float64 result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

import murf_fast
from murf_fast.nn import JBUStack

Function = Callable[[], Tensor]
CL = torch.channels_last
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Target:
    """A goal: at least ``ratio`` times as fast as the fastest contender whose name starts with ``against``."""

    against: str
    ratio: float


@dataclass
class Contenders:
    ours: Function
    others: dict[str, Function]
    oracle: Callable[[], Iterator[tuple[tuple, Tensor]]]
    result_bytes: int
    operations: int = 0  # floating-point operations of the matrix products, where there are any
    labels: bool = False  # the result is classes: compare the logits that they choose


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    build: Callable[[str, torch.dtype], Contenders]
    dtype: torch.dtype = torch.float32
    targets: tuple[Target, ...] = ()
    write_target: float | None = None  # fraction of the streaming-write rate
    memory_target: tuple[float, str] | None = None  # times these bytes, what they are
    less_memory: tuple[str, float] | None = None  # of that contender's peak at most so much
    beside: tuple[str, str, float] | None = None  # (part, against, ratio): the ratio once both are rid of that part
    devices: tuple[str, ...] = ("cpu", "cuda")
    facts: dict = field(default_factory=dict)  # columns of the table of whole models

    @property
    def id(self) -> str:
        return f"{self.op}: {self.name}"


CASES: list[Case] = []


def case(op: str, name: str, **options):
    def register(build):
        CASES.append(Case(op, name, build, **options))
        return build

    return register


def cpu_cases(op: str) -> list[Case]:
    return [c for c in CASES if c.op == op and "cpu" in c.devices]


_scale = 1.0


def scale_down(factor: float) -> None:
    """Shrinks every case (dry runs and tests); a result of it is never reported."""
    global _scale
    _scale = factor


def side(n: int) -> int:
    return max(2, round(n * _scale))


def classes(n: int) -> int:
    return max(2, round(n * _scale))


def randn(device: str, dtype: torch.dtype, *shape: int, memory_format=torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator).to(device, dtype)
    return values.contiguous(memory_format=memory_format)


def up(x: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    return F.interpolate(x, size, mode=mode, align_corners=False)


def compiled(function: Callable, *arguments) -> Function:
    graph = torch.compile(function, fullgraph=True)
    return lambda: graph(*arguments)


def feature_maps(device, dtype, channels: int, memory_format=CL) -> list[Tensor]:
    channels = classes(channels)
    return [randn(device, dtype, 1, channels, side(s), side(s), memory_format=memory_format) for s in (18, 37, 55)]


def concat(device, dtype, memory_format) -> Contenders:
    maps = feature_maps(device, dtype, 768)
    planar = [m.contiguous() for m in maps]
    size = (side(518), side(518))
    total = sum(m.shape[1] for m in maps)
    out = torch.empty(1, total, *size, dtype=dtype, device=device).to(memory_format=memory_format)
    theirs = torch.empty_like(out, memory_format=CL)
    contiguous = torch.empty_like(out, memory_format=torch.contiguous_format)

    def plain(*maps):
        return torch.cat([up(m, size) for m in maps], dim=1)

    def oracle():
        begin = 0
        for m in maps:
            yield (slice(None), slice(begin, begin + m.shape[1])), up(m.double(), size)
            begin += m.shape[1]

    return Contenders(
        lambda: murf_fast.upsample_concat(maps if memory_format == CL else planar, size, out=out),
        {
            "eager channels_last": lambda: torch.cat([up(m, size) for m in maps], dim=1, out=theirs),
            "eager contiguous": lambda: torch.cat([up(m, size) for m in planar], dim=1, out=contiguous),
            "compile": compiled(plain, *maps),
        },
        oracle,
        out.numel() * out.element_size(),
    )


@case(
    "upsample_concat",
    "3 x 768 channels (18, 37, 55) -> 518, channels_last, out=",
    targets=(Target("eager", 8.0),),
    write_target=0.6,
)
def concat_channels_last(device, dtype):
    return concat(device, dtype, CL)


@case("upsample_concat", "the same, planar")
def concat_planar(device, dtype):
    return concat(device, dtype, torch.contiguous_format)


@case("upsample_concat", "the same, channels_last, bfloat16", dtype=torch.bfloat16)
def concat_bfloat16(device, dtype):
    return concat(device, dtype, CL)


@case("upsample_sum", "3 maps of 150 classes (18, 37, 55) -> 512, channels_last")
def sum_logits(device, dtype):
    maps = feature_maps(device, dtype, 150)
    planar = [m.contiguous() for m in maps]
    size = (side(512), side(512))

    def plain(*maps):
        return reduce(torch.add, [up(m, size) for m in maps])

    def oracle():
        yield (), plain(*[m.double() for m in maps])

    return Contenders(
        lambda: murf_fast.upsample_sum(maps, size),
        {
            "eager channels_last": lambda: plain(*maps),
            "eager contiguous": lambda: plain(*planar),
            "compile": compiled(plain, *maps),
        },
        oracle,
        maps[0].shape[1] * size[0] * size[1] * maps[0].element_size(),
    )


@case(
    "linear_head",
    "3 x 768 channels, 150 classes -> 512",
    targets=(Target("MuRF", 2.5),),
    memory_target=(1.1, "logits"),
)
def head_of_murf(device, dtype):
    return linear_head(device, dtype, {"MuRF channels_last", "MuRF contiguous", "MuRF compile"})


# By itself: it takes gigabytes and gives them back, and whoever runs next to it pays for fresh pages.
@case("linear_head", "the same", targets=(Target("full resolution", 50.0),))
def head_at_full_resolution(device, dtype):
    return linear_head(device, dtype, {"full resolution channels_last", "full resolution contiguous"})


def linear_head(device, dtype, contenders: set[str]) -> Contenders:
    maps = feature_maps(device, dtype, 768)
    planar = [m.contiguous() for m in maps]
    k, columns = classes(150), sum(m.shape[1] for m in maps)
    weight, bias = randn(device, dtype, k, columns) / columns**0.5, randn(device, dtype, k)
    size, largest = (side(512), side(512)), tuple(maps[-1].shape[2:])
    kernel = weight[:, :, None, None]

    def at(grid, *maps):
        return F.conv2d(torch.cat([up(m, grid) for m in maps], dim=1), kernel, bias)

    def murf(*maps):
        return up(at(largest, *maps), size)

    def oracle():
        double = [m.double() for m in maps]
        cat = torch.cat([up(m, largest) for m in double], dim=1)
        yield (), up(F.conv2d(cat, kernel.double(), bias.double()), size)

    others = {
        "MuRF channels_last": lambda: murf(*maps),
        "MuRF contiguous": lambda: murf(*planar),
        "MuRF compile": compiled(murf, *planar),
        "full resolution channels_last": lambda: at(size, *maps),
        "full resolution contiguous": lambda: at(size, *planar),
    }
    return Contenders(
        lambda: murf_fast.linear_head(maps, weight, bias, size=size, via=largest),
        {name: function for name, function in others.items() if name in contenders},
        oracle,
        k * size[0] * size[1] * maps[0].element_size(),
        operations=2 * k * sum(m.numel() for m in maps),
    )


@case(
    "upsample_argmax",
    "150 classes, 56 -> 1024",
    targets=(Target("eager", 8.0),),
    memory_target=(0.05, "logits"),
)
def argmax(device, dtype):
    logits = randn(device, dtype, 1, classes(150), side(56), side(56), memory_format=CL)
    planar, size = logits.contiguous(), (side(1024), side(1024))

    def plain(x):
        return up(x, size).argmax(1)

    def oracle():
        yield (), up(logits.double(), size)

    return Contenders(
        lambda: murf_fast.upsample_argmax([logits], size),
        {
            "eager channels_last": lambda: plain(logits),
            "eager contiguous": lambda: plain(planar),
            "compile": compiled(plain, planar),
        },
        oracle,
        logits.shape[1] * size[0] * size[1] * logits.element_size(),
        labels=True,
    )


@case("upsample_expectation", "256 bins, 44 x 58 -> 176 x 232")
def expectation(device, dtype):
    logits = randn(device, dtype, 1, classes(256), side(44), side(58), memory_format=CL)
    planar, size = logits.contiguous(), (side(176), side(232))
    values = torch.linspace(0.001, 10, logits.shape[1], device=device, dtype=dtype)

    def plain(x):
        return (up(x, size).softmax(1) * values.view(1, -1, 1, 1)).sum(1)

    def oracle():
        yield (), (up(logits.double(), size).softmax(1) * values.double().view(1, -1, 1, 1)).sum(1)

    return Contenders(
        lambda: murf_fast.upsample_expectation([logits], size, values),
        {
            "eager channels_last": lambda: plain(logits),
            "eager contiguous": lambda: plain(planar),
            "compile": compiled(plain, planar),
        },
        oracle,
        logits.shape[1] * size[0] * size[1] * logits.element_size(),
    )


@case(
    "upsample_cross_entropy",
    "150 classes, 56 -> 512, forward and backward",
    targets=(Target("eager", 4.0),),
    memory_target=(0.15, "logits"),
)
def cross_entropy(device, dtype):
    logits = randn(device, dtype, 1, classes(150), side(56), side(56), memory_format=CL).requires_grad_()
    planar, size = logits.detach().contiguous().requires_grad_(), (side(512), side(512))
    target = torch.randint(0, logits.shape[1], (1, *size), generator=torch.Generator().manual_seed(0)).to(device)

    def gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.autograd.grad(loss(x), x)[0]

    def plain(x):
        return F.cross_entropy(up(x, size), target)

    def oracle():
        yield (), gradient(plain, logits.detach().double().requires_grad_())

    graph = torch.compile(plain, fullgraph=True)
    return Contenders(
        lambda: gradient(lambda x: murf_fast.upsample_cross_entropy([x], target), logits),
        {
            "eager channels_last": lambda: gradient(plain, logits),
            "eager contiguous": lambda: gradient(plain, planar),
            "compile": lambda: gradient(graph, planar),
        },
        oracle,
        logits.shape[1] * size[0] * size[1] * logits.element_size(),
    )


@case("upsample_mean", "15 score maps of 5 grids -> 1536 x 3348", targets=(Target("eager", 8.0),))
def mean(device, dtype):
    grids = ((33, 72), (44, 96), (55, 120), (66, 143), (77, 167))
    maps = [randn(device, dtype, 1, 1, side(h), side(w)) + i for h, w in grids for i in range(3)]
    size = (side(1536), side(3348))

    def plain(*maps):
        return reduce(torch.add, [up(m, size) for m in maps]) / len(maps)

    def stacked():
        return torch.stack([up(m, size) for m in maps]).mean(0)

    def oracle():
        yield (), plain(*[m.double() for m in maps])

    return Contenders(
        lambda: murf_fast.upsample_mean(maps, size),
        {"eager running sum": lambda: plain(*maps), "eager stack": stacked, "compile": compiled(plain, *maps)},
        oracle,
        size[0] * size[1] * maps[0].element_size(),
    )


@case("gaussian_blur", "score map 1536 x 3348, sigma 4")
def blur(device, dtype):
    x = randn(device, dtype, 1, 1, side(1536), side(3348))
    taps = torch.exp(-0.5 * (torch.arange(-16, 17, device=device, dtype=torch.float64) / 4) ** 2)
    taps = taps / taps.sum()

    def dense(x):
        kernel = torch.outer(taps, taps).to(x.dtype)[None, None]
        return F.conv2d(F.pad(x, (16,) * 4, mode="reflect"), kernel)

    def separable(x):
        line = taps.to(x.dtype)[None, None]
        return F.conv2d(F.conv2d(F.pad(x, (16,) * 4, mode="reflect"), line[:, :, :, None]), line[:, :, None, :])

    def oracle():
        yield (), separable(x.double())

    return Contenders(
        lambda: murf_fast.gaussian_blur(x, 4.0, border="reflect"),
        {"eager separable": lambda: separable(x), "dense 33 x 33": lambda: dense(x)},
        oracle,
        x.numel() * x.element_size(),
    )


@case("resize", "position embedding, 768 channels, 37 -> 56, bicubic")
def position_embedding(device, dtype):
    table = randn(device, dtype, 1, classes(768), side(37), side(37), memory_format=CL)
    planar, size = table.contiguous(), (side(56), side(56))

    def oracle():
        yield (), up(table.double(), size, "bicubic")

    return Contenders(
        lambda: murf_fast.resize(table, size, mode="bicubic"),
        {
            "eager channels_last": lambda: up(table, size, "bicubic"),
            "eager contiguous": lambda: up(planar, size, "bicubic"),
        },
        oracle,
        table.shape[1] * size[0] * size[1] * table.element_size(),
    )


def pos_embed(flavor: str, antialias: bool, keep: bool):
    def build(device, dtype):
        m, grids = side(37), [(side(n), side(n)) for n in (16, 28, 55)]
        table = randn(device, dtype, 1, 1 + m * m, classes(768))

        def plain(table):
            map_ = table[:, 1:].unflatten(1, (m, m)).permute(0, 3, 1, 2)
            results = []
            for grid in grids:
                resized = F.interpolate(map_, grid, mode="bicubic", antialias=antialias, align_corners=False)
                results.append(torch.cat([table[:, :1], resized.flatten(2).mT], dim=1))
            return Rows(results)

        def oracle():
            yield (), plain(table.double()).joined()

        def ours():
            options = {"flavor": flavor, "num_prefix_tokens": 1, "keep": keep}
            return Rows(murf_fast.resample_pos_embed(table, grids, **options))

        return Contenders(
            ours,
            {"eager": lambda: plain(table), "compile": compiled(plain, table)},
            oracle,
            sum(1 + h * w for h, w in grids) * table.shape[2] * table.element_size(),
        )

    return build


for _flavor, _antialias, _mode in (("dinov2-hf", False, "bicubic"), ("dinov2-reg", True, "antialiased bicubic")):
    _name = f"DINOv2 table, 768 channels, 37 -> 16, 28, 55, {_mode}"
    case("resample_pos_embed", _name, targets=(Target("eager", 5),))(pos_embed(_flavor, _antialias, False))
    case("resample_pos_embed", f"{_name}, kept", targets=(Target("eager", 100),))(pos_embed(_flavor, _antialias, True))


@case("image_to_patches", "8 images 640 x 480, uint8 -> 266, 518, 784, patch 14")
def patches(device, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, side(480), side(640), 3), generator=generator, dtype=torch.uint8).to(device)
    sizes, patch = [14 * side(n) for n in (19, 37, 56)], 14
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))

    def cut(x: Tensor, size: int) -> Tensor:
        n = size // patch
        rows = up(x, (size, size)).view(8, 3, n, patch, n, patch).permute(0, 2, 4, 1, 3, 5)
        return rows.reshape(8, n * n, 3 * patch * patch)

    def plain(images):
        x = ((images.permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std).contiguous()
        return torch.cat([cut(x, size) for size in sizes], dim=1)

    def resize_only():
        x = ((images.permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std).contiguous()
        return [up(x, (size, size)) for size in sizes][-1]

    def oracle():
        x = (images.permute(0, 3, 1, 2).double() / 255 - mean) / std
        yield (), torch.cat([cut(x, size) for size in sizes], dim=1)

    def ours():
        return Rows(murf_fast.image_to_patches(images, sizes, patch, mean=MEAN, std=STD))

    return Contenders(
        ours,
        {"eager rows": lambda: plain(images), "eager images only": resize_only, "compile": compiled(plain, images)},
        oracle,
        8 * 3 * sum(n * n for n in sizes) * 4,
    )


@case(
    "patch_embed",
    "8 images 640 x 480, uint8 -> 266, 518, 784, ViT-B/14 with positions",
    targets=(Target("eager", 1.3),),
    beside=("GEMM alone", "eager", 2.0),
)
def patch_embed(device, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, side(480), side(640), 3), generator=generator, dtype=torch.uint8).to(device)
    sizes, patch, width, m = [14 * side(n) for n in (19, 37, 56)], 14, classes(768), side(37)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    weight = randn(device, dtype, width, 3, patch, patch) / (3 * patch * patch) ** 0.5
    bias, cls, table = (
        randn(device, dtype, width),
        randn(device, dtype, 1, width),
        randn(device, dtype, 1, 1 + m * m, width),
    )

    def embeddings(x: Tensor, weight, bias, cls, table) -> Tensor:
        tokens = F.conv2d(x, weight, bias, stride=patch)
        grid = tokens.shape[2:]
        positions = up(table[:, 1:].unflatten(1, (m, m)).permute(0, 3, 1, 2), grid, "bicubic")
        head = (cls + table[:, 0]).expand(len(x), 1, -1)
        return torch.cat([head, tokens.flatten(2).mT + positions.flatten(2).mT], dim=1).flatten(0, 1)

    def plain(images, weight, bias, cls, table):
        x = ((images.permute(0, 3, 1, 2).to(weight.dtype) / 255 - mean) / std).contiguous()
        return torch.cat([embeddings(up(x, (size, size)), weight, bias, cls, table) for size in sizes])

    arguments = (images, weight, bias, cls, table)

    def oracle():
        yield (), plain(images, *(t.double() for t in arguments[1:]))

    def ours():
        options = {"flavor": "dinov2-hf", "num_prefix_tokens": 1, "prefix": cls, "mean": MEAN, "std": STD}
        return murf_fast.patch_embed(images, sizes, weight, bias, table, patch_size=patch, **options).tokens

    tokens = sum(8 * (1 + (size // patch) ** 2) for size in sizes)
    rows = torch.cat(murf_fast.image_to_patches(images, sizes, patch, mean=MEAN, std=STD, dtype=dtype), 1).flatten(0, 1)
    product = rows.new_empty(len(rows), width)
    others = {"eager": lambda: plain(*arguments), "compile": compiled(plain, *arguments)}
    # A part of both sides, not a contender: what nobody here can make faster.
    others["GEMM alone"] = lambda: torch.mm(rows, weight.flatten(1).T, out=product)
    return Contenders(
        ours,
        others,
        oracle,
        tokens * width * weight.element_size(),
        operations=2 * tokens * width * 3 * patch * patch,
    )


def jbu_params(device, dtype, radius: int = 3) -> murf_fast.BilateralParams:
    """One level with weights of the size that trained ones have."""
    keys, taps = 32, (2 * radius + 1) ** 2
    shapes = [(keys, 3), (keys,), (keys, keys), (keys,), (taps, taps + 3), (taps,), (taps, taps), (taps,)]
    weights = [randn(device, dtype, *shape) / shape[-1] ** 0.5 for shape in shapes]
    return murf_fast.BilateralParams(*(torch.tensor(v, device=device, dtype=dtype) for v in (-0.5, 0.9)), *weights)


def guidance_of(device, dtype, size: tuple[int, int]) -> Tensor:
    """Smooth like a photo: neighbours are alike, and so are the logits of a window."""
    return up(randn(device, torch.float32, 1, 3, 9, 7), size, "bicubic").to(dtype)


def shifted(source: Tensor, kernels: Tensor) -> Tensor:
    """An adaptive convolution as people write it where memory is short: one multiply-add per tap."""
    size, diameter = kernels.shape[2:], round(kernels.shape[1] ** 0.5)
    padded = F.pad(up(source, size, "bicubic"), [diameter // 2] * 4, mode="reflect")
    out = torch.zeros_like(padded[:, :, : size[0], : size[1]])
    for t in range(diameter**2):
        y, x = divmod(t, diameter)
        out.addcmul_(padded[:, :, y : y + size[0], x : x + size[1]], kernels[:, t : t + 1])
    return out


def channel_blocks(x: Tensor, size: int = 64) -> Iterator[tuple[tuple, Tensor]]:
    for begin in range(0, x.shape[1], size):
        where = (slice(None), slice(begin, min(begin + size, x.shape[1])))
        yield where, x[where].double()


@case("bilateral_kernels", "7 x 7 kernels of a guidance of 448 x 448")
def jbu_kernels(device, dtype):
    guidance, params = guidance_of(device, dtype, (side(448), side(448))), jbu_params(device, dtype)

    def plain(guidance, *params):
        return murf_fast.reference.bilateral_kernels(guidance, params)

    def oracle():
        yield (), plain(guidance.double(), *(p.double() for p in params))

    others = {"eager": lambda: plain(guidance, *params)}
    if device == "cuda":
        others["compile"] = compiled(plain, guidance, *params)
    pixels = guidance.shape[2] * guidance.shape[3]
    return Contenders(
        lambda: murf_fast.bilateral_kernels(guidance, params),
        others,
        oracle,
        49 * pixels * guidance.element_size(),
        operations=2 * pixels * (32 * (3 + 32) + 49 * 32 + 49 * (52 + 49)),
    )


@case("adaptive_conv", "768 channels, 224 -> 448, 7 x 7 kernels, bicubic", targets=(Target("eager shifted", 10.0),))
def jbu_conv(device, dtype):
    n = side(224)
    source = randn(device, dtype, 1, classes(768), n, n, memory_format=CL)
    planar = source.contiguous()
    kernels = murf_fast.bilateral_kernels(guidance_of(device, dtype, (2 * n, 2 * n)), jbu_params(device, dtype))
    taps_first = kernels.contiguous()

    def oracle():
        exact = kernels.double()
        for where, block in channel_blocks(source):
            yield where, shifted(block, exact)

    return Contenders(
        lambda: murf_fast.adaptive_conv(source, kernels),
        {
            "eager shifted channels_last": lambda: shifted(source, kernels),
            "eager shifted contiguous": lambda: shifted(planar, taps_first),
            "compile shifted": compiled(shifted, planar, taps_first),
        },
        oracle,
        source.shape[1] * 4 * n * n * source.element_size(),
        operations=2 * 49 * source.shape[1] * 4 * n * n,
    )


def jbu_stack(device, dtype, n: int, unfold: bool = True) -> Contenders:
    """FeatUp's whole upsampler against its order of operations without its extension: unfold and einsum, or one
    multiply-add per tap where the unfolded map has no room.
    """
    source = randn(device, dtype, 1, classes(384), n, n, memory_format=CL)
    channels, size = source.shape[1], (16 * n, 16 * n)
    guidance = guidance_of(device, dtype, size)
    params = jbu_params(device, dtype)
    stack = JBUStack(channels).to(device).eval().requires_grad_(False)
    for level in stack.levels:
        for p, value in zip(level_parameters(level), params, strict=True):
            p.copy_(value.view(p.shape))
    weight, bias = stack.fixup_proj[1].weight, stack.fixup_proj[1].bias
    planar = source.contiguous()

    def plain(source, guidance, weight, bias, *params):
        for level in range(4):
            grid = (2 ** (level + 1) * n,) * 2
            pooled = F.adaptive_avg_pool2d(guidance, grid)
            kernels = murf_fast.reference.bilateral_kernels(pooled, params)
            source = murf_fast.reference.adaptive_conv(source, kernels, grid) if unfold else shifted(source, kernels)
        return source + 0.1 * F.conv2d(source, weight, bias)

    def oracle():
        # The same in an order that fits into memory, a block of channels at a time.
        kernels = [
            murf_fast.reference.bilateral_kernels(
                F.adaptive_avg_pool2d(guidance.double(), (2 ** (level + 1) * n,) * 2), [p.double() for p in params]
            )
            for level in range(4)
        ]
        mixed = source.double() + 0.1 * F.conv2d(source.double(), weight.double())
        for where, block in channel_blocks(mixed):
            for k in kernels:
                block = shifted(block, k)
            yield where, block + 0.1 * bias.double()[where[1]].view(1, -1, 1, 1)

    arguments = (planar, guidance, weight.to(dtype), bias.to(dtype), *params)
    others = {f"eager {'unfold' if unfold else 'shifted'}": lambda: plain(*arguments)}
    if device == "cuda":
        others["compile"] = compiled(plain, *arguments)
    return Contenders(
        lambda: stack(source, guidance),
        others,
        oracle,
        channels * size[0] * size[1] * source.element_size(),
        operations=2 * 49 * channels * size[0] * size[1] * 4 // 3,
    )


def level_parameters(level: murf_fast.nn.JBULevel) -> list[Tensor]:
    layers = [level.range_proj[0], level.range_proj[-1], level.fixup_proj[0], level.fixup_proj[-1]]
    return [level.range_temp, level.sigma_spatial, *(p for layer in layers for p in (layer.weight, layer.bias))]


@case(
    "joint_bilateral_upsample",
    "JBUStack, 384 channels, 16 -> 256",
    targets=(Target("eager", 100.0),),
    memory_target=(2.0, "result"),  # the result and a hundred megabytes
)
def jbu_stack_256(device, dtype):
    return jbu_stack(device, dtype, side(16))


@case("joint_bilateral_upsample", "JBUStack, 384 channels, 28 -> 448", devices=("cuda",))
def jbu_stack_448(device, dtype):
    return jbu_stack(device, dtype, side(28))


@case("joint_bilateral_upsample", "the same in float16", devices=("cuda",), dtype=torch.float16)
def jbu_stack_448_half(device, dtype):
    return jbu_stack(device, dtype, side(28))


@case("joint_bilateral_upsample", "JBUStack, 384 channels, 64 -> 1024", devices=("cuda",))
def jbu_stack_1024(device, dtype):
    return jbu_stack(device, dtype, side(64), unfold=False)


@case(
    "joint_bilateral_upsample",
    "one level, 384 channels, 128 -> 256, forward and backward",
    targets=(Target("eager", 30.0),),
)
def jbu_gradients(device, dtype):
    n, channels = side(128), classes(384)
    size = (2 * n, 2 * n)
    source = randn(device, dtype, 1, channels, n, n, memory_format=CL).requires_grad_()
    planar = source.detach().contiguous().requires_grad_()
    guidance = guidance_of(device, dtype, size).requires_grad_()
    params = jbu_params(device, dtype)
    leaves = [p.requires_grad_() for p in params]
    direction = randn(device, dtype, 1, channels, *size, memory_format=CL)
    planar_direction = direction.contiguous()

    def gradients(result: Tensor, source: Tensor, direction: Tensor) -> Tensor:
        """Those of the parameters are computed, too; the first two show whether all are right."""
        to_source, to_guidance, *_ = torch.autograd.grad(result, [source, guidance, *leaves], direction)
        return torch.cat([to_source.flatten(), to_guidance.flatten()])

    def oracle():
        exact = guidance.detach().double().requires_grad_()
        kernels = murf_fast.reference.bilateral_kernels(exact, [p.detach().double() for p in params])
        to_kernels, begin = torch.zeros_like(kernels), 0
        for where, block in channel_blocks(source.detach()):
            to_block = shifted_gradients(block, kernels.detach(), direction[where].double(), to_kernels)
            yield (slice(begin, begin + block.numel()),), to_block.flatten()
            begin += block.numel()
        yield (slice(begin, None),), torch.autograd.grad(kernels, exact, to_kernels)[0].flatten()

    def ours():
        return gradients(murf_fast.joint_bilateral_upsample(source, guidance, params), source, direction)

    def plain():
        result = murf_fast.reference.joint_bilateral_upsample(planar, guidance, params)
        return gradients(result, planar, planar_direction)

    return Contenders(
        ours,
        {"eager unfold": plain},
        oracle,
        direction.numel() * direction.element_size(),
        operations=3 * 2 * 49 * direction.numel(),
    )


def shifted_gradients(source: Tensor, kernels: Tensor, direction: Tensor, to_kernels: Tensor) -> Tensor:
    """The gradient of :func:`shifted` to the source; that to the kernels is added to ``to_kernels``."""
    size, diameter = kernels.shape[2:], round(kernels.shape[1] ** 0.5)
    leaf = source.detach().requires_grad_()
    padded = F.pad(up(leaf, size, "bicubic"), [diameter // 2] * 4, mode="reflect")
    windows, to_padded = padded.detach(), torch.zeros_like(padded)
    for t in range(diameter**2):
        y, x = divmod(t, diameter)
        where = (..., slice(y, y + size[0]), slice(x, x + size[1]))
        to_kernels[:, t] += torch.einsum("bcyx,bcyx->byx", direction, windows[where])
        to_padded[where].addcmul_(direction, kernels[:, t : t + 1])
    return torch.autograd.grad(padded, leaf, to_padded)[0]


# Clusters around a large common mean, as the features of a ViT are.
def features(device: str, dtype: torch.dtype, rows: int, width: int) -> Tensor:
    centers = randn(device, dtype, 200, width)
    which = torch.randint(200, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    return centers[which] + 0.3 * randn(device, dtype, rows, width) + 5 * randn(device, dtype, 1, width)


def nearest(device, dtype, precision: str) -> Contenders:
    queries, width = side(2048), classes(768)
    x = features(device, dtype, queries + side(100_000), width)
    query, bank = x[:queries].clone(), x[queries:].clone()
    index = murf_fast.NearestIndex(bank, precision=precision)

    def chunked():
        return torch.cat([torch.cdist(part, bank).amin(1).square() for part in query.split(256)])

    def oracle():
        double = bank.double()
        for begin in range(0, queries, 64):
            part = slice(begin, begin + 64)
            rows = query[part].double()
            _, nearest = (double.square().sum(1) - 2 * rows @ double.T).min(1)
            yield part, (rows - double[nearest]).square().sum(1)

    others = {"eager cdist in chunks": chunked}
    if device == "cpu" and importlib.util.find_spec("faiss"):
        import faiss

        flat = faiss.IndexFlatL2(width)
        flat.add(bank.numpy())
        faiss.omp_set_num_threads(torch.get_num_threads())
        others["faiss IndexFlatL2"] = lambda: torch.from_numpy(flat.search(query.numpy(), 1)[0][:, 0])
    return Contenders(
        lambda: murf_fast.nearest_distance(query, index, metric="l2sq")[0][:, 0],
        others,
        oracle,
        64 << 20,
        operations=2 * queries * len(bank) * width,
    )


@case(
    "nearest_distance",
    "2048 queries, bank 100k x 768 prepared",
    targets=(Target("faiss", 2.0),),
    memory_target=(1.0, "64 MB beside the index"),
)
def nearest_auto(device, dtype):
    return nearest(device, dtype, "auto")


@case(
    "nearest_distance",
    'the same, precision="float32"',
    targets=(Target("faiss", 1.0),),
    memory_target=(1.0, "64 MB beside the index"),
)
def nearest_float32(device, dtype):
    return nearest(device, dtype, "float32")


@case("k_center_greedy", "1 % of 100k x 384", targets=(Target("eager", 3.0),))
def k_center(device, dtype):
    rows = features(device, dtype, side(100_000), classes(384))
    count = max(2, len(rows) // 100)

    def greedy(x: Tensor) -> Tensor:
        chosen, nearest = [0], torch.full((len(x),), torch.inf, device=device, dtype=x.dtype)
        for _ in range(count - 1):
            nearest = torch.minimum(nearest, torch.linalg.norm(x - x[chosen[-1]], dim=1))
            chosen.append(int(nearest.argmax()))
        return torch.tensor(chosen, device=device).float()  # exact, as all indices below 2^24

    def oracle():
        yield (), greedy(rows.double())

    return Contenders(
        lambda: murf_fast.k_center_greedy(rows, count=count).float(),
        {"eager": lambda: greedy(rows)},
        oracle,
        rows.numel() * rows.element_size(),
    )


def windowed(device, dtype, contenders: set[str]) -> Contenders:
    """Queries of an image, keys and values of patches, AnyUp's windows; heads averaged over raw values."""
    fine, coarse, heads, depth, channels = side(448), side(32), 4, 128, 8 * classes(48)
    q = randn(device, dtype, 1, depth, fine, fine, memory_format=CL)
    k, v = (randn(device, dtype, 1, c, coarse, coarse, memory_format=CL) for c in (depth, channels))
    rule = murf_fast.windows.ratio(fine, coarse, 0.1)
    rows, columns = (torch.from_numpy(axis.multiplicity() > 0).to(device) for axis in rule.tables())
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(1, 1, fine**2, coarse**2)
    tokens = [x.flatten(2).mT.unflatten(2, (heads, -1)).transpose(1, 2).contiguous() for x in (q, k)]
    values = v.flatten(2).mT[:, None].expand(-1, heads, -1, -1).contiguous()

    def image(out: Tensor) -> Tensor:
        return out.mean(1).mT.unflatten(2, (fine, fine))

    def dense():
        return image(F.scaled_dot_product_attention(*tokens, values, attn_mask=mask))

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # Static shapes: the C++ that Inductor generates for dynamic ones does not compile (torch 2.13).
        (y_of, x_of), (key_y_of, key_x_of) = _coordinates(fine, device), _coordinates(coarse, device)

        def attends(b, h, q_index, k_index):
            in_rows = rows[y_of[q_index], key_y_of[k_index]]
            return in_rows & columns[x_of[q_index], key_x_of[k_index]]

        block_mask = create_block_mask(attends, None, None, fine**2, coarse**2, device=device)
        graph = torch.compile(flex_attention, dynamic=False)
        return lambda: image(graph(*tokens, values, block_mask=block_mask))

    def upsampled():
        """NATTEN's way: keys and values on the grid of the queries, gathered tap after tap."""
        n = max(axis.taps for axis in rule.tables())
        by_row, by_column = (torch.from_numpy(axis.index).long().to(device) for axis in rule.tables())
        big_k, big_v = (F.interpolate(x, (fine, fine), mode="nearest-exact") for x in (k, v))
        nearest = torch.arange(coarse, device=device) * fine // coarse + fine // coarse // 2
        split_q = q.unflatten(1, (heads, -1))
        inside = [torch.arange(n, device=device) < r.sum(1, keepdim=True) for r in (rows, columns)]
        scores = []
        for i in range(by_row.shape[1]):
            for j in range(by_column.shape[1]):
                tap = big_k[:, :, nearest[by_row[:, i]]][..., nearest[by_column[:, j]]]
                valid = inside[0][:, i, None] & inside[1][:, j]
                score = (split_q * tap.unflatten(1, (heads, -1))).sum(2) * (depth // heads) ** -0.5
                scores.append(score.masked_fill(~valid, -torch.inf))
        weights = torch.stack(scores).softmax(0).mean(2)
        total = torch.zeros_like(big_v)
        for t, weight in enumerate(weights):
            i, j = divmod(t, by_column.shape[1])
            total += weight[:, None] * big_v[:, :, nearest[by_row[:, i]]][..., nearest[by_column[:, j]]]
        return total

    def oracle():
        for y in range(0, fine, max(1, fine // 7)):
            one = murf_fast.windows.ranges(
                tuple(torch.tensor([n], dtype=torch.int32) for n in _span(rows[y])),
                tuple(torch.tensor([_span(c)[i] for c in columns], dtype=torch.int32) for i in (0, 1)),
                coarse,
            )
            exact = murf_fast.reference.window_attention(
                q[:, :, y : y + 1].double(), k.double(), v.double(), one, heads
            )
            yield (slice(None), slice(None), slice(y, y + 1)), exact

    others = {
        "dense SDPA": lambda: dense,
        "FlexAttention compile": flex,
        "upsampled keys and values": lambda: upsampled,
    }
    return Contenders(
        lambda: murf_fast.window_attention(q, k, v, windows=rule, num_heads=heads),
        {name: build() for name, build in others.items() if name in contenders},
        oracle,
        channels * fine * fine * q.element_size(),
        operations=2 * int(rows.sum() * columns.sum()) * (depth + channels),
    )


def _coordinates(n: int, device) -> tuple[Tensor, Tensor]:
    at = torch.arange(n * n, device=device)
    return at // n, at % n


def _span(reads: Tensor) -> tuple[int, int]:
    keys = reads.nonzero()
    return int(keys.min()), int(keys.max()) + 1


@case(
    "window_attention",
    "448^2 queries, 32^2 keys, 4 heads of 32, 384 channels, AnyUp's windows",
    targets=(Target("dense", 15.0), Target("upsampled", 5.0)),
)
def window_attention(device, dtype):
    return windowed(device, dtype, {"dense SDPA", "upsampled keys and values"})


@case("window_attention", "the same against FlexAttention", targets=(Target("FlexAttention compile", 3.0),))
def window_attention_flex(device, dtype):
    return windowed(device, dtype, {"FlexAttention compile"})


@case(
    "neighborhood_attention",
    "64^2 tokens, 16 heads of 64, window 7",
    # What NATTEN's CPU path would be if it compiled there: it is FlexAttention with a mask of its own.
    targets=(Target("FlexAttention compile", 2.0),),
)
def neighborhood(device, dtype):
    n, heads, dim, kernel = max(side(64), 8), 16, 64, 7
    q, k, v = (randn(device, dtype, 1, n, n, heads, dim) * s for s in (1.0, 0.9, 1.1))
    rule = murf_fast.windows.neighborhood(n, n, kernel)
    rows, columns = (torch.from_numpy(axis.multiplicity() > 0).to(device) for axis in rule.tables())
    tokens = [x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v)]
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(1, 1, n * n, n * n)

    def grid(out: Tensor) -> Tensor:
        return out.transpose(1, 2).unflatten(1, (n, n))

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    y_of, x_of = _coordinates(n, device)

    def attends(b, h, q_index, k_index):
        return rows[y_of[q_index], y_of[k_index]] & columns[x_of[q_index], x_of[k_index]]

    block_mask = create_block_mask(attends, None, None, n * n, n * n, device=device)
    graph = torch.compile(flex_attention, dynamic=False)
    others = {
        "FlexAttention compile": lambda: grid(graph(*tokens, block_mask=block_mask)),
        "dense SDPA": lambda: grid(F.scaled_dot_product_attention(*tokens, attn_mask=mask)),
    }
    if importlib.util.find_spec("natten") is not None:
        from natten import na2d

        others["NATTEN"] = lambda: na2d(q, k, v, kernel_size=kernel)

    def oracle():
        doubles = [x.double() for x in (q, k, v)]
        yield (), murf_fast.reference.neighborhood_attention(*doubles, (kernel, kernel))

    return Contenders(
        lambda: murf_fast.neighborhood_attention(q, k, v, kernel_size=kernel),
        others,
        oracle,
        q.numel() * q.element_size(),
        operations=4 * q.numel() * kernel**2,
    )


@case(
    "feature_unify",
    "1024 channels of 64^2, 128 filters of 5 x 5",
    targets=(Target("grouped", 3.0),),
    memory_target=(0.05, "responses"),
)
def unify(device, dtype):
    channels, n, filters = classes(1024), max(side(64), 3), 128
    features = randn(device, dtype, 1, channels, n, n)
    basis = randn(device, dtype, filters, 1, 5, 5)

    def plain(features, basis):
        c = features.shape[1]
        inside = F.conv2d(torch.ones_like(features[:, :1]), torch.ones_like(basis[:1]), padding=2)
        responses = F.conv2d(features, basis.repeat(c, 1, 1, 1), padding=2, groups=c) / inside
        return responses.view(1, filters, c, n, n).softmax(1).mean(2)

    def oracle():
        yield (), plain(features.double(), basis.double())

    return Contenders(
        lambda: murf_fast.feature_unify(features, basis),
        {"grouped convolution": lambda: plain(features, basis), "compile": compiled(plain, features, basis)},
        oracle,
        channels * filters * n * n * features.element_size(),
        operations=2 * channels * filters * 25 * n * n,
    )


class Rows(list):
    """Patch rows of several sizes, compared as one tensor but not joined while the clock runs."""

    def joined(self) -> Tensor:
        return torch.cat(self, dim=1)


import anyup_cases  # noqa: E402, F401  (registers AnyUp from end to end)
import murf_cases  # noqa: E402, F401  (registers the whole models)
