"""What a compiler takes as a constant of the graph that it traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_while_compiling(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which marks a function by this attribute, but without importing
    ``torch._dynamo`` first: that takes a second, more than the rest of ``import murf_fast``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
