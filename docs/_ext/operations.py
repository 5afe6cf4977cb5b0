"""The generated half of an operation's page, the table of all operations, and pages of other public names."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import results

from murf_fast import ops

ROOT = Path(__file__).resolve().parents[2]
# What belongs on another operation's page.
COMPANIONS = {
    "nearest_distance": ("NearestIndex", "IVFIndex"),
    "patch_embed": ("PackedTokens",),
    "bilateral_kernels": ("BilateralParams",),
}


def names() -> set[str]:
    return {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}


def page(name: str) -> str:
    """Call, meaning, measured times and the state on a GPU, of one operation."""
    parts = ["## Call", _documented("function", f"murf_fast.{name}")]
    parts += [_documented("class", f"murf_fast.{companion}") for companion in COMPANIONS.get(name, ())]
    meaning = ROOT / "murf_fast" / "reference" / f"{name}.py"
    if meaning.is_file():
        parts += [
            "## What it means",
            f"`murf_fast.reference.{name}`, plain PyTorch that runs in float64; every kernel is compared with it.",
            f"```{{literalinclude}} ../../murf_fast/reference/{name}.py\n:language: python\n```",
        ]
    parts += ["## Exactness", _exactness(name), "## Measured", results.of(name)]
    return "\n\n".join(parts) + "\n"


def _exactness(name: str) -> str:
    tests = sorted(p.name for p in (ROOT / "tests").glob(f"test_{name}.py"))
    where = f"`tests/{tests[0]}`" if tests else "`tests/test_bilateral.py`" if "bilateral" in name else "its tests"
    if name in ("adaptive_conv",):
        where = "`tests/test_bilateral.py`"
    if name == "resample_patch_embed":
        where = "`tests/test_resample_pos_embed.py`"
    return (
        f"The oracle of {where} is the reference in float64. The budget is twice the error of the reference in the "
        "same dtype on the same input, plus one rounding of the result ([how exact](../guides/numerics.md))."
    )


def table() -> str:
    """Every operation with the first line of its docstring."""
    lines = ["| operation | what it does |", "|---|---|"]
    for name in sorted(names()):
        first = inspect.getdoc(getattr(ops, name)).partition("\n")[0].replace("``", "`")
        lines.append(f"| [`{name}`]({name}.md) | {first} |")
    return "\n".join(lines)


def api(module: str) -> str:
    """Every public name of a module: of its ``__all__``, or else what it defines, in the order of its source."""
    found = importlib.import_module(module)
    own = [n for n, t in vars(found).items() if not n.startswith("_") and getattr(t, "__module__", None) == module]
    return documented(*(f"{module}.{name}" for name in getattr(found, "__all__", None) or own))


def documented(*names: str) -> str:
    """Public names by their full ones: classes with their members."""
    parts = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"
        if kind == "data":  # a dict's docstring is that of all dicts
            parts.append(f"```{{py:data}} {name}\nOne of {', '.join(f'`{key!r}`' for key in thing)}.\n```")
        else:
            parts.append(_documented(kind, name, members=True))
    return "\n\n".join(parts)


def _documented(kind: str, name: str, members: bool = False) -> str:
    module = name.rpartition(".")[0]
    # Of methods those of the library itself: not torch's, not a tuple's.
    options = (
        "   :members:\n   :inherited-members: Module, tuple, object, RuntimeError\n   :exclude-members: extra_repr\n"
        if members and kind == "class"
        else ""
    )
    return f"```{{eval-rst}}\n.. py:currentmodule:: {module}\n\n.. auto{kind}:: {name}\n{options}```"
