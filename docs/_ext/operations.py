"""The generated half of an operation's page, the table of all operations, and pages of other public names."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
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
        lines.append(f"| [`{name}`]({name}.md) | {_first_line(getattr(ops, name))} |")
    return "\n".join(lines)


def api(module: str, *rooms: str) -> str:
    """Every public name of a module: of its ``__all__``, or else what it defines, in the order of its source.

    With ``rooms``, packages below the module, those that are defined in the first of them, but for those in the others.
    """
    return documented(*_public(module, *rooms))


def api_table(module: str, *rooms: str) -> str:
    """Names with the first lines of their docstrings; arguments as of ``api``."""
    lines = ["| name | what it is |", "|---|---|"]
    for full in _public(module, *rooms):
        thing = getattr(importlib.import_module(module), full.rpartition(".")[2])
        lines.append(f"| {{py:obj}}`~{full}` | {_first_line(thing) if callable(thing) else ''} |")
    return "\n".join(lines)


def _first_line(thing) -> str:
    """Of a docstring, whose roles of Sphinx become names, as Markdown has none of them."""
    return re.sub(r":\w+:`", "`", inspect.getdoc(thing).partition("\n")[0].replace("``", "`"))


def _public(module: str, *rooms: str) -> list[str]:
    found = importlib.import_module(module)
    own = [n for n, t in vars(found).items() if not n.startswith("_") and getattr(t, "__module__", None) == module]
    names = getattr(found, "__all__", None) or own
    if rooms:
        names = [name for name in names if _lies_in(_home(found, name), *rooms)]
    return [f"{module}.{name}" for name in names]


def _home(module, name: str) -> str:
    """The module that defines a public name."""
    thing = getattr(module, name)
    if hasattr(thing, "__module__"):
        return thing.__module__
    below = (other for other in sys.modules if other.startswith(f"{module.__name__}."))
    return max((other for other in below if getattr(sys.modules[other], name, None) is thing), key=len)


def _lies_in(home: str, room: str, *others: str) -> bool:
    return f"{home}.".startswith(f"{room}.") and not any(f"{home}.".startswith(f"{other}.") for other in others)


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
    options = ""
    if members and kind == "class":
        # Of methods those of the library itself: not torch's, not a tuple's; fields are in the docstring.
        skipped = ", ".join(("extra_repr", "add_note", "with_traceback", *_fields(name)))
        bases = "Module, tuple, object, RuntimeError, BaseException"
        options = f"   :members:\n   :inherited-members: {bases}\n   :exclude-members: {skipped}\n"
    return f"```{{eval-rst}}\n.. py:currentmodule:: {module}\n\n.. auto{kind}:: {name}\n{options}```"


def _fields(name: str) -> tuple[str, ...]:
    module, _, attribute = name.rpartition(".")
    return getattr(getattr(importlib.import_module(module), attribute), "_fields", ())
