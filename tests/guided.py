"""What the modules that upsample features along an image (NAF, JAFAR) are tested with."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from util import assert_within_budget

# Many, because the error of a gradient along a single direction may be any small number by chance.
DIRECTIONS = 16
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def seeded(model: nn.Module) -> nn.Module:
    """Weights for which every part of the model matters."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        offset = float(p.ndim == 1 and name.endswith("weight"))
        if not name.endswith("freqs"):
            p.data.copy_(
                offset + (1.5 if fan_in > 1 else 0.3) * fan_in**-0.5 * torch.randn(p.shape, generator=generator)
            )
    return model.eval()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def plain_encoder(p: dict[str, Tensor], name: str, x: Tensor, *, residual: bool) -> Tensor:
    """As the originals write it, from a state dict."""

    def conv(layer: str, x: Tensor) -> Tensor:
        weight = p[f"{name}.{layer}.weight"]
        pad = weight.shape[-1] // 2
        x = F.pad(x, [pad] * 4, mode="reflect") if pad else x
        return F.conv2d(x, weight, p.get(f"{name}.{layer}.bias"))

    def norm(layer: str, x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 8, p[f"{name}.{layer}.weight"], p[f"{name}.{layer}.bias"]))

    x = conv("0", x)
    block = 1
    while f"{name}.{block}.conv1.weight" in p:
        y = conv(f"{block}.conv2", norm(f"{block}.norm2", conv(f"{block}.conv1", norm(f"{block}.norm1", x))))
        x, block = (x + y if residual else y), block + 1
    return x


def results_of(call, model: nn.Module, dtype: torch.dtype, image: Tensor, features: Tensor, step: int = 1) -> dict:
    """Result and gradients to image, features and every parameter, in ``dtype``; with a step of -1 the images of the
    batch, which know nothing of each other, are taken in reverse.
    """
    model = model.to(dtype)
    order = torch.arange(len(image))
    order = order if step > 0 else order.flip(0)
    leaves = {"image": image, "features": features}
    leaves = {name: t.detach().to(dtype)[order].requires_grad_() for name, t in leaves.items()}
    result = call(model, leaves["image"], leaves["features"])
    leaves |= dict(model.named_parameters())
    gradients = []
    for seed in range(DIRECTIONS):
        direction = draw(*result.shape, seed=seed).to(dtype)[order]
        gradients.append(torch.autograd.grad(result, list(leaves.values()), direction, retain_graph=True))
    model.to(torch.float32)
    gradients = {name: torch.stack(g) for name, g in zip(leaves, zip(*gradients, strict=True), strict=True)}
    for name in ("image", "features"):
        gradients[name] = gradients[name][:, order]
    return {"result": result.detach()[order], **gradients}


def assert_parity(ours, plain, model: nn.Module, image: Tensor, features: Tensor) -> None:
    """Within the budget of the plain formula in float32, result and every gradient.

    Sums over all pixels cancel: what a single run of the formula makes of them in float32 is partly chance. The memory
    layout, the convolution's kernel and the order of the batch mean nothing and draw from that error: the worst counts.
    """
    oracle = results_of(plain, model, torch.float64, image, features)
    theirs = []
    for onednn, layout, step in itertools.product((True, False), LAYOUTS, (1, -1)):
        with torch.backends.mkldnn.flags(enabled=onednn):
            inputs = (x.contiguous(memory_format=layout) for x in (image, features))
            theirs.append(results_of(plain, model, torch.float32, *inputs, step))
    actual = results_of(ours, model, torch.float32, image, features)
    assert actual.keys() == oracle.keys()
    for name, value in actual.items():
        errors = [t[name].double() - oracle[name] for t in theirs]
        assert_within_budget(value, oracle[name], oracle[name] + max(errors, key=lambda e: float(e.abs().max())), name)
        own, scale = (value.double() - oracle[name]).norm(), oracle[name].norm()
        assert own <= 2 * max(e.norm() for e in errors) + torch.finfo(value.dtype).eps * scale, (name, own, scale)


def assert_close(actual: Tensor, expected: Tensor, allowed: float) -> None:
    assert actual.shape == expected.shape
    assert float((actual.detach().double() - expected.double()).abs().max()) <= allowed


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation in its scope returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


class NoWaiting(TorchDispatchMode):
    """Fails where a value would have to be known on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert not any(s in name for s in ("_local_scalar_dense", "nonzero", "aten::equal", "unique", "masked_select"))
        return function(*args, **(kwargs or {}))
