"""FeatUp's whole upsampler, and one level with its gradients."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from bilateral import channel_blocks, jbu_params, shifted, tiny_params
from inputs import CL, compiled, guidance_of, randn, up
from registry import Contenders, Target, case, classes, side, smallest
from tiny import maps
from torch import Tensor

import murf_fast
from murf_fast.nn import JBUStack


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
    capturable=False,
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


@case(
    "joint_bilateral_upsample",
    "JBUStack, labels of 150 classes, 28 -> 448",
    targets=(Target("argmax of logits", 1.0),),
    less_memory=("argmax of logits", 0.5),  # a quarter of the logits goes into the last level
)
def labels(device, dtype):
    """A head in front of the levels, and of the last level's logits a few rows at a time."""
    n, count = side(28), classes(150)
    source = randn(device, dtype, 1, classes(384), n, n, memory_format=CL)
    guidance = guidance_of(device, dtype, (16 * n, 16 * n))
    stack = JBUStack(source.shape[1]).to(device).eval().requires_grad_(False)
    weight, bias = randn(device, dtype, count, source.shape[1]), randn(device, dtype, count)

    def logits(dtype):
        exact = copy.deepcopy(stack).to(dtype)
        with murf_fast.use_backend("reference"):
            return exact.predict(*(x.to(dtype) for x in (source, guidance, weight, bias)))

    def oracle():
        yield (), logits(torch.float64)

    return Contenders(
        lambda: stack.predict(source, guidance, weight, bias, reduce="argmax"),
        {"argmax of logits": lambda: stack.predict(source, guidance, weight, bias).argmax(1)},
        oracle,
        count * (16 * n) ** 2 * source.element_size(),
        logits=lambda: logits(dtype),
    )


@smallest("joint_bilateral_upsample")
def tiny(device: str) -> None:
    params = murf_fast.BilateralParams(*tiny_params(device))
    murf_fast.joint_bilateral_upsample(maps(device)[0], torch.randn(1, 3, 6, 5, device=device), params, radius=1)
