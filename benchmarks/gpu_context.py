"""Whether the CUDA context of this process is still alive: an illegal access fails every later call of the process.

In dry runs, MURF_FAST_GPU_FAULT names the operation that is said to have killed it.
"""

from __future__ import annotations

import os

import torch

_killed = False


class PlantedFault(RuntimeError):
    pass


def plant(op: str) -> None:
    global _killed
    if os.environ.get("MURF_FAST_GPU_FAULT") == op:
        _killed = True
        raise PlantedFault(f"{op} is said to have killed the context")


def is_dead() -> bool:
    if _killed:
        return True
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False
