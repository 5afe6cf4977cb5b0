from __future__ import annotations

from murf_fast.reference._resize import resize_map as resize

__all__ = ["resize"]
