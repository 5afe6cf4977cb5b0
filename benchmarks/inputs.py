"""Data that the cases are made of, the same on every device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from registry import Function, classes, side
from torch import Tensor

CL = torch.channels_last
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def randn(device: str, dtype: torch.dtype, *shape: int, memory_format=torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator).to(device, dtype)
    return values.contiguous(memory_format=memory_format)


def up(x: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    return F.interpolate(x, size, mode=mode, align_corners=False)


def compiled(function: Callable, *arguments) -> Function:
    graph = torch.compile(function, fullgraph=True)
    return lambda: graph(*arguments)


def openvino(module: torch.nn.Module, example: Tensor) -> Function:
    """``module`` in OpenVINO's CPU runtime, in the precision of ``example``; traced and compiled in the first call.

    A module of float32, which the runtime computes in bfloat16 if asked, as deployments do.
    """
    from openvino import Core, convert_model

    images = example.float()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if example.dtype == torch.bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }

    @functools.cache
    def graph():
        with torch.no_grad():
            model = convert_model(module, example_input=images)
        model.reshape(list(images.shape))
        return Core().compile_model(model, "CPU", options)

    return lambda: torch.from_numpy(graph()([images.numpy()])[0])


def feature_maps(device, dtype, channels: int, memory_format=CL) -> list[Tensor]:
    channels = classes(channels)
    return [randn(device, dtype, 1, channels, side(s), side(s), memory_format=memory_format) for s in (18, 37, 55)]


# Clusters around a large common mean, as the features of a ViT are.
def features(device: str, dtype: torch.dtype, rows: int, width: int) -> Tensor:
    centers = randn(device, dtype, 200, width)
    which = torch.randint(200, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    return centers[which] + 0.3 * randn(device, dtype, rows, width) + 5 * randn(device, dtype, 1, width)


def guidance_of(device, dtype, size: tuple[int, int]) -> Tensor:
    """Smooth like a photo: neighbours are alike, and so are the logits of a window."""
    return up(randn(device, torch.float32, 1, 3, 9, 7), size, "bicubic").to(dtype)


def coordinates(n: int, device) -> tuple[Tensor, Tensor]:
    at = torch.arange(n * n, device=device)
    return at // n, at % n
