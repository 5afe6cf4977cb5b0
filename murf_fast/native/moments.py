"""Statistics of channels between two layers: few numbers, which PyTorch joins."""

from __future__ import annotations

from murf_fast.tables.moments import group_norm

__all__ = ["group_norm"]
