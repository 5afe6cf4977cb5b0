"""What a call costs where there is next to nothing to compute: warm, 8 channels of 4 x 4 to 8 x 8, on one thread.

A timing is of :data:`CALLS` calls. Every operation is timed beside its reference and beside one ``F.interpolate`` of
such a map, whatever it does with its own; two of them have a goal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bilateral import jbu_params
from inputs import randn, up
from registry import Contenders, Function, Target, case, side
from torch import Tensor

import murf_fast
from murf_fast import windows

CALLS, SIZE = 200, (8, 8)
OPTIONS = {"patch_size": 4, "flavor": "timm"}


@dataclass(frozen=True)
class Inputs:
    """Small tensors for every operation."""

    x: Tensor
    maps: list[Tensor]
    one: list[Tensor]
    bias: Tensor
    weight: Tensor
    guidance: Tensor
    kernels: Tensor
    params: murf_fast.BilateralParams
    basis: Tensor
    images: Tensor
    projection: Tensor
    positions: Tensor
    tokens: Tensor
    rows: Tensor
    target: Tensor

    @classmethod
    def made(cls, device: str, dtype: torch.dtype) -> Inputs:
        def r(*shape: int) -> Tensor:
            return randn(device, dtype, *shape)

        x, generator = r(1, 8, 4, 4), torch.Generator().manual_seed(0)
        return cls(
            x=x,
            maps=[x, r(1, 8, 4, 4), r(1, 8, 4, 4)],
            one=[x],
            bias=r(8),
            weight=r(8, 24),
            guidance=r(1, 3, *SIZE),
            kernels=r(1, 9, *SIZE),
            params=jbu_params(device, dtype),
            basis=r(4, 1, 3, 3),
            images=r(1, 3, 16, 16),
            projection=r(8, 48),
            positions=r(16, 8),
            tokens=r(1, 4, 4, 2, 4),
            rows=r(64, 8),
            target=torch.randint(8, (1, *SIZE), generator=generator).to(device),
        )

    def double(self) -> Inputs:
        def wide(value):
            if isinstance(value, Tensor):
                return value.double() if value.is_floating_point() else value
            made = [wide(entry) for entry in value]
            return made if isinstance(value, list) else type(value)(*made)

        return Inputs(*(wide(getattr(self, f.name)) for f in dataclasses.fields(self)))


def attended(i: Inputs, operation: Callable[..., Tensor] = murf_fast.window_attention, **options) -> Tensor:
    rule = windows.ratio(SIZE, (4, 4))
    q = torch.cat([i.kernels, i.kernels[:, :7]], 1)
    return operation(q, i.maps[1].repeat(1, 2, 1, 1), i.x, windows=rule, num_heads=2, **options)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "adaptive_conv": lambda i, **o: murf_fast.adaptive_conv(i.x, i.kernels, **o),
    "bilateral_kernels": lambda i, **o: murf_fast.bilateral_kernels(i.guidance, i.params, **o),
    "feature_unify": lambda i, **o: murf_fast.feature_unify(i.x, i.basis, **o),
    "gaussian_bilateral_upsample": lambda i, **o: murf_fast.gaussian_bilateral_upsample(
        i.x, i.guidance, *[i.x[:, :1]] * 4, **o
    ),
    "gaussian_blur": lambda i, **o: murf_fast.gaussian_blur(i.x, 1.0, **o),
    "image_to_patches": lambda i, **o: murf_fast.image_to_patches(i.images, [SIZE], 4, **o)[0],
    "joint_bilateral_upsample": lambda i, **o: murf_fast.joint_bilateral_upsample(i.x, i.guidance, i.params, **o),
    "k_center_greedy": lambda i, **o: murf_fast.k_center_greedy(i.rows, count=4, **o),
    "linear_head": lambda i, **o: murf_fast.linear_head(i.maps, i.weight, i.bias, size=SIZE, **o),
    "nearest_distance": lambda i, **o: murf_fast.nearest_distance(i.rows[:16], i.rows[16:], k=2, **o)[0],
    "neighborhood_attention": lambda i, **o: murf_fast.neighborhood_attention(*[i.tokens] * 3, kernel_size=3, **o),
    "patch_embed": lambda i, **o: (
        murf_fast.patch_embed(i.images, [16], i.projection, i.bias, i.positions, **OPTIONS, **o).tokens
    ),
    "resample_pos_embed": lambda i, **o: murf_fast.resample_pos_embed(i.positions, SIZE, flavor="timm", **o),
    "resize": lambda i, **o: murf_fast.resize(i.x, SIZE, **o),
    "upsample_argmax": lambda i, **o: murf_fast.upsample_argmax(i.one, SIZE, **o),
    "upsample_confusion": lambda i, **o: murf_fast.upsample_confusion(i.one, i.target, **o),
    "upsample_concat": lambda i, **o: murf_fast.upsample_concat(i.maps, SIZE, **o),
    "upsample_cross_entropy": lambda i, **o: murf_fast.upsample_cross_entropy(i.one, i.target, reduction="none", **o),
    "upsample_expectation": lambda i, **o: murf_fast.upsample_expectation(i.one, SIZE, i.bias, **o),
    "upsample_mean": lambda i, **o: murf_fast.upsample_mean(i.maps, SIZE, **o),
    "upsample_sum": lambda i, **o: murf_fast.upsample_sum(i.maps, SIZE, **o),
    "window_attention": attended,
    "window_attention_argmax": lambda i, **o: attended(i, murf_fast.window_attention_argmax, **o),
}
# Times as fast as what they replace, at least.
GOALS = {
    "resize": Target("F.interpolate", 1 / 3),
    "upsample_concat": Target("F.interpolate and torch.cat", 1 / 1.5),
}


def repeated(call: Function) -> Function:
    def run() -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                for _ in range(side(CALLS)):
                    result = call()
        finally:
            torch.set_num_threads(threads)
        return result

    return run


def build(name: str, device: str, dtype: torch.dtype) -> Contenders:
    call, inputs = OPERATIONS[name], Inputs.made(device, dtype)
    others = {
        "reference": lambda: call(inputs, backend="reference"),
        "F.interpolate": lambda: up(inputs.x, SIZE),
    }
    if name == "upsample_concat":
        others["F.interpolate and torch.cat"] = lambda: torch.cat([up(m, SIZE) for m in inputs.maps], 1)

    def oracle():
        yield (), call(inputs.double(), backend="reference")

    ours = repeated(lambda: call(inputs))
    result = call(inputs)
    others = {other: repeated(function) for other, function in others.items()}
    return Contenders(ours, others, oracle, result.numel() * result.element_size())


for operation in OPERATIONS:
    case(
        "overhead",
        f"{operation}, warm call, 8 x 4 x 4 -> 8 x 8, one thread",
        devices=("cpu",),
        targets=(GOALS[operation],) if operation in GOALS else (),
    )(lambda device, dtype, operation=operation: build(operation, device, dtype))
