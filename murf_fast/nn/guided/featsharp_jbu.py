"""FeatSharp's joint bilateral upsampler."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.annotations import Size
from murf_fast.nn._checkpoint_files import open_checkpoint
from murf_fast.nn._checkpoints import few, load_into
from murf_fast.nn.guided._jbu_levels import run_levels
from murf_fast.nn.guided.jbu_level import JBULevel
from murf_fast.ops import _checks

_FIRST = "ups.0.range_proj.0.weight"


class FeatSharpJBU(nn.Module):
    """Upsamples by any integer factors: one level per prime factor, smallest first, ``ups.0``, ``ups.1``, ...

    A level is a :class:`JBULevel` that interpolates bilinearly, without a fix-up network and without dropout.
    ``range_alpha`` and ``spatial_alpha`` are the original's; they scale kernels that are normalized afterwards and do
    nothing, and are kept so that its state dicts load and save.

    Args:
        factor: Factor of both sides, at least 1, or those of (height, width). Where the sides have unlike factors, the
            first level takes the first prime of both, and so on.
        guides: Channels of the guidance.

    Raises:
        TypeError, ValueError: ``factor`` is no integer, or pair of them, of at least 1.

    Source: FeatSharp (arXiv 2502.16025), its ``JBUStack`` and ``JBULevel``.
    """

    def __init__(self, factor: Size, *, guides: int = 3) -> None:
        super().__init__()
        self.factors: list[int] | list[tuple[int, int]]
        if _arguments.is_sequence(factor):
            self.factors = prime_steps(_arguments.pair("FeatSharpJBU", "factor", factor))
        else:
            factor = _checks.integer("FeatSharpJBU", "factor", factor, 1)
            self.factors = [step for step, _ in prime_steps((factor, factor))]
        self.ups = nn.ModuleList(
            JBULevel(guides=guides, mode="bilinear", fixup=False, dropout=None) for _ in self.factors
        )
        for level in self.ups:
            for name in ("range_alpha", "spatial_alpha"):
                level.register_buffer(name, torch.tensor(0.0))

    @classmethod
    def from_checkpoint(cls, checkpoint: str | PathLike[str] | Mapping[str, Any], factor: Size) -> FeatSharpJBU:
        """An upsampler with trained weights, in eval mode.

        Entries ``state_dict``, ``model``, ``teacher`` are opened, and prefixes ``module.``, ``_orig_mod.``, ``model.``
        and ``teacher.`` taken off if all names have them.

        Args:
            checkpoint: A file of a state dict, a ``.safetensors`` file, or a state dict; names are this class's
                (``ups.0.range_temp``, ...).
            factor: Of the upsampler, at least 2; levels do not tell theirs.

        Raises:
            TypeError: ``checkpoint`` is neither a path nor a state dict.
            ValueError: Keys are missing or unexpected, or a shape is wrong (all of them are listed); or the file is
                missing, empty, damaged, no checkpoint, or a pickle of more than tensors and plain values, which is not
                loaded (``weights_only=True``).
        """
        opened = open_checkpoint("FeatSharpJBU", checkpoint)
        first = opened.weights.get(_FIRST)
        if first is None or first.ndim < 2:
            raise ValueError(
                f"murf_fast.FeatSharpJBU: {opened.origin} must hold {_FIRST}; got the keys {few(opened.weights)}"
            )
        model = cls(factor, guides=first.shape[1])
        load_into(model, opened)
        return model.eval()

    def forward(self, source: Tensor, guidance: Tensor) -> Tensor:
        """Upsamples ``source`` by ``factor``.

        Args:
            source: (B, C, h, w), floating point; the first level's output must have at least 4 rows and columns.
            guidance: (B, guides, H, W) of any size; every level averages it over the pixels of its output. FeatSharp
                resizes it to the output's size first, bilinearly. In the dtype of the source, or float32 beside a half
                type.

        Returns:
            (B, C, factor * h, factor * w), each side by its own factor, in dtype and layout of the source; the source
            itself at a factor of 1. Differentiable. Autocast changes nothing.

        Raises:
            TypeError, ValueError: An argument is wrong, or a level or one of its parts has hooks or was replaced, whose
                weights alone are read; the message names it.

        Memory: as :meth:`JBUStack.forward`.
        """
        source = _checks.map_("FeatSharpJBU", "source", source)
        named = [(f"ups.{i}", level) for i, level in enumerate(self.ups)]
        return run_levels("FeatSharpJBU", named, self.factors, [source], guidance, mode="bilinear")[0]

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"factors={self.factors}"


def prime_steps(factor: tuple[int, int]) -> list[tuple[int, int]]:
    """Pairs whose product is ``factor``, of one prime or 1 per side, smallest first."""
    sides = [_primes(n) for n in factor]
    steps = max(map(len, sides))
    return list(zip(*(side + [1] * (steps - len(side)) for side in sides), strict=True))


def _primes(n: int) -> list[int]:
    primes, divisor = [], 2
    while n > 1:
        while n % divisor == 0:
            primes.append(divisor)
            n //= divisor
        divisor += 1
    return primes
