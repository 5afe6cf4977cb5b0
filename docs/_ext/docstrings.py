"""How Sphinx reads the docstrings of murf_fast.

Their paragraphs "Memory: ..." and "Source: ..." become fields beside the arguments, and a bare name between backticks
(``:func:`resize```) is looked for in every public module, as a reader would.
"""

from __future__ import annotations

import pydoc
import re

import torch
from docutils import nodes
from sphinx.application import Sphinx

FIELDS = ("Memory", "Source")
MODULES = (
    "murf_fast",
    "murf_fast.nn",
    "murf_fast.windows",
    "murf_fast.anomaly",
    "murf_fast.data",
    "murf_fast.patch",
    "murf_fast.annotations",
)
# Names of types in "Raises:" and "Attributes:", of libraries that have their own documentation.
FOREIGN = re.compile(
    r"(TypeError|ValueError|RuntimeError|KeyError|IndexError|OSError|FileNotFoundError|FileExistsError|MemoryError"
    r"|ModuleNotFoundError|ImportError|NotImplementedError|OverflowError|AttributeError|StopIteration|KeyboardInterrupt"
    r"|Exception|object|str|int|float|bool|dict|list|tuple|None|NamedTuple|torch\..*|numpy\..*|np\..*|nn\..*|Tensor|Module"
    r"|pathlib\..*|Path|collections\..*|typing\..*|transformers\..*)"
)


def fields(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turns paragraphs that begin with one of FIELDS into fields of that name; runs after napoleon."""
    inside = False
    for i, line in enumerate(lines):
        begun = next((field for field in FIELDS if line.startswith(f"{field}: ")), None)
        if begun:
            lines[i], inside = f":{begun}: {line.removeprefix(begun + ': ')}", True
        elif not line.strip():
            inside = False
        elif inside:
            lines[i] = "    " + line


def plain_returns(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Makes a field of "Returns:" as it is; napoleon would take what is before its first colon for a type."""
    if "Returns:" not in lines:
        return
    at = lines.index("Returns:")
    lines[at : at + 2] = [f":returns: {lines[at + 1].strip()}"]


def resolve(app: Sphinx, env, node: nodes.Element, contnode: nodes.Element):
    """A Python name that the page's own module does not have: found elsewhere, foreign, internal, or an error."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].lstrip(".")
    names = [part.strip() for part in target.split(",")]
    if all(FOREIGN.fullmatch(name) for name in names):
        return contnode
    if len(names) > 1:
        return contnode if all(_exists(name) or FOREIGN.fullmatch(name) for name in names) else None
    domain = env.get_domain("py")
    tail = target.removeprefix("murf_fast.")
    for module in MODULES:
        for candidate in (f"{module}.{tail}", f"{module}.{tail.rpartition('.')[2]}"):
            if candidate in domain.objects:
                return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], candidate, node, contnode)
    return contnode if _exists(target) or hasattr(torch.nn.Module, tail) else None


def _exists(target: str) -> bool:
    """Whether there is such a module, object or method, with no page of its own."""
    return any(pydoc.locate(name) is not None for name in (target, *(f"{module}.{target}" for module in MODULES)))


def setup(app: Sphinx) -> dict:
    app.connect("autodoc-process-docstring", plain_returns, priority=100)
    app.connect("autodoc-process-docstring", fields, priority=900)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
