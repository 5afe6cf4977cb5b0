"""What the tables have in common: a copy in the extension and copies on devices, each made once."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from murf_fast import _extension


class Table:
    """A frozen dataclass of sizes and arrays. The extension has a class of its name, with the fields as keywords."""

    @cached_property
    def native(self):
        """The table as the C++ extension holds it."""
        of_extension = getattr(_extension.module(), type(self).__name__)
        return of_extension(**{field.name: getattr(self, field.name) for field in fields(self)})

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The arrays that Triton kernels take (:meth:`device_arrays`) as tensors on ``device``, copied there once."""
        copies = self._device_copies
        if device not in copies:
            copies[device] = tuple(torch.from_numpy(array).to(device) for array in self.device_arrays())
        return copies[device]

    def device_arrays(self) -> tuple[np.ndarray, ...]:
        raise NotImplementedError

    @cached_property
    def _device_copies(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}
