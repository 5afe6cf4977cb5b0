"""One case: every value that is drawn has a name, so that a failure is one line that can be repeated."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import murf_fast

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIDES = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 23, 31, 32, 33)
# Triton's interpreter takes about half a millisecond per program and has no bfloat16.
INTERPRETED_SIDES = (1, 2, 3, 5)


class Draw:
    """The values of case ``index`` of an operation under a seed, drawn one after the other.

    ``backend`` is handed to every call; "triton" keeps shapes and dtypes to what its interpreter affords. ``change``
    alters every result before it is looked at: how the comparisons themselves are tested.
    """

    def __init__(
        self, op: str, seed: int, index: int, backend: str | None = None, change: Callable | None = None
    ) -> None:
        self.name = f"{op}:{seed}:{index}"
        self.backend, self.change = backend, change
        self.values: dict[str, object] = {}
        self._random = random.Random(self.name)
        self.generator = torch.Generator().manual_seed(self._random.getrandbits(62))

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton"

    def note(self, name: str, value: object) -> None:
        self.values[name] = value

    def choice(self, name: str, options: Sequence, weights: Sequence[float] | None = None):
        value = self._random.choices(list(options), weights)[0]
        self.note(name, value)
        return value

    def integer(self, name: str, least: int, most: int) -> int:
        self.note(name, self._random.randint(least, most))
        return self.values[name]

    def number(self, name: str, least: float, most: float) -> float:
        """With few digits, as people write them."""
        self.note(name, round(self._random.uniform(least, most), self._random.choice((1, 2, 6))))
        return self.values[name]

    def chance(self, name: str, probability: float) -> bool:
        self.note(name, self._random.random() < probability)
        return self.values[name]

    def as_number(self, name: str, value: float):
        """The same number, sometimes of a NumPy type."""
        if not self.chance(f"{name}.NumPy", 0.1):
            return value
        return np.int64(value) if isinstance(value, int) else np.float64(value)

    def side(self, name: str, most: int = 33) -> int:
        sides = INTERPRETED_SIDES if self.interpreted else SIDES
        return self.choice(name, [n for n in sides if n <= most])

    def grid(self, name: str, most: int = 33) -> tuple[int, int]:
        pair = (self.side(name, most), self.side(name, most))
        if self._random.random() < 0.2:
            pair = (pair[0], pair[0])
        self.note(name, pair)
        return pair

    def dtype(self, name: str = "dtype", options: Sequence[torch.dtype] = DTYPES) -> torch.dtype:
        if self.interpreted:
            options = [d for d in options if d in (torch.float32, torch.float16)]
        weights = [{torch.float32: 5, torch.bfloat16: 3, torch.float16: 3, torch.float64: 2}[d] for d in options]
        return self.choice(name, options, weights)

    def batch(self) -> int:
        return self.choice("batch", (0, 1, 2, 3), (1, 6, 6, 3)) if not self.interpreted else 1

    def call(self, op: str, *args, **kwargs):
        """The operation; floating-point, label and index results come back altered if this draw alters them."""
        if self.backend is not None:
            kwargs["backend"] = self.backend
        result = getattr(murf_fast, op)(*args, **kwargs)
        if self.change is None:
            return result
        if isinstance(result, Tensor):
            return self.change(result)
        if isinstance(result, (tuple, list)):
            return type(result)(self.change(r) for r in result)
        return result.with_tokens(self.change(result.tokens))  # PackedTokens

    def statement(self) -> str:
        """One line: what to repeat, and all that was drawn."""
        drawn = ", ".join(f"{name}={_short(value)}" for name, value in self.values.items())
        name = f"{self.name}:{self.backend}" if self.backend else self.name
        return f'--fuzz-case "{name}"  {drawn}'


def _short(value: object) -> str:
    return str(value).replace("torch.", "")
