"""The names of types that users write their own annotations with, from the source of ``murf_fast.annotations``.

A type alias is no object with a docstring: what it stands for and the string behind it are read from the file.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple

from murf_fast import annotations

MODULE = annotations.__name__


class Alias(NamedTuple):
    name: str
    text: str
    accepted: list[str]


def page() -> str:
    """Every public name, in the order of its source: what it is, and what it accepts."""
    return "\n\n".join(map(_entry, aliases()))


def aliases() -> list[Alias]:
    """What is public.

    Raises:
        ValueError: A public name has no docstring behind it.
    """
    body, found = ast.parse(inspect.getsource(annotations)).body, []
    for assigned, behind in itertools.pairwise(body):
        if isinstance(assigned, ast.Assign) and isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant):
            (target,) = assigned.targets
            found.append(Alias(target.id, inspect.cleandoc(behind.value.value), list(_accepted(assigned.value))))
    if missing := sorted(set(annotations.__all__) - {alias.name for alias in found}):
        raise ValueError(f"{MODULE}: no docstring behind {', '.join(missing)}")
    return [alias for alias in found if alias.name in annotations.__all__]


def _accepted(node: ast.expr) -> Iterator[str]:
    """The choices of a Literal, the members of a union, as one writes them."""
    if isinstance(node, ast.BinOp):
        yield from _accepted(node.left)
        yield from _accepted(node.right)
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Literal", "Union"):
        is_literal = ast.unparse(node.value) == "Literal"
        for part in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            yield json.dumps(ast.literal_eval(part)) if is_literal else next(_accepted(part))
    else:
        yield node.value if isinstance(node, ast.Constant) else ast.unparse(node)


def _entry(alias: Alias) -> str:
    accepted = ", ".join(f"``{part}``" for part in alias.accepted)
    lines = ["", *alias.text.splitlines(), "", f"Accepts: {accepted}."]
    indented = "\n".join(f"   {line}".rstrip() for line in lines)
    return f"```{{eval-rst}}\n.. py:currentmodule:: {MODULE}\n\n.. py:type:: {alias.name}\n{indented}\n```"
