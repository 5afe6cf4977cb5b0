"""What torch has in some of its versions only, and what stands for it in the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

# torch 2.6 has no such question: there a graph holds the backend of the process that captured it.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def _any_requires_grad(*arguments: Any) -> bool:
    values = [x for a in arguments for x in (a if isinstance(a, (list, tuple)) else (a,))]
    return any(isinstance(x, Tensor) and x.requires_grad for x in values)


# Of an op's arguments, lists among them; torch 2.6 has it not.
any_requires_grad = getattr(torch._C, "_any_requires_grad", _any_requires_grad)


def _has_any_global_hook() -> bool:
    names = ("backward_pre_hooks", "backward_hooks", "forward_pre_hooks", "forward_hooks")
    return any(getattr(torch_module, f"_global_{name}") for name in names)


# Whether a call of any module runs somebody's hook; torch 2.6 keeps the hooks, but has not the question.
has_any_global_hook = getattr(torch_module, "_has_any_global_hook", _has_any_global_hook)

_dynamo_knows_known_true = torch.__version__ >= "2.8"


def known_equal(sizes: Sequence[int], others: Sequence[int]) -> bool:
    """Whether sizes are equal, with no for an answer where a graph holds one open, which the question leaves open.

    Under Dynamo ``isinstance(n, torch.SymInt)`` tells open sizes from others in the latest versions of torch only, in
    2.11 not yet. Where it does not, and there is nothing else to ask either, an open size is compared and the graph is
    that of the answer.
    """
    pairs = list(zip(sizes, others, strict=True))
    if torch.compiler.is_compiling() and _dynamo_knows_known_true:
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(n == m) for n, m in pairs)
    return not any(isinstance(n, torch.SymInt) for pair in pairs for n in pair) and all(n == m for n, m in pairs)
