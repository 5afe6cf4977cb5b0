"""Parts of pages that nobody types: ``<!-- generated: NAME ARGUMENTS -->`` is replaced by what NAME makes.

A page of ``operations/`` is the text written for it, and behind that the call from its docstring, its meaning from
``murf_fast/reference``, what was measured from ``benchmarks/results``, and what is known of its GPU kernel.
"""

from __future__ import annotations

import re
from pathlib import Path

import aliases
import drawn
import flavours
import operations
import results
import tested_versions
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

MARK = re.compile(r"<!-- generated: ([a-z-]+)(?: (.*?))? -->")
PARTS = {
    "operations": operations.table,
    "annotations": aliases.page,
    "api": operations.api,
    "api-table": operations.api_table,
    "documented": operations.documented,
    "measured": results.everything,
    "measured-of": results.of,
    "gpu-status": results.gpu_status,
    "pos-embed-differences": flavours.table,
    "tested-versions": tested_versions.table,
}


def replace(app: Sphinx, page: str, source: list[str]) -> None:
    def made(match: re.Match) -> str:
        name, arguments = match.groups()
        if name not in PARTS:
            raise ExtensionError(f"{page}: no part is called {name!r}, only {', '.join(PARTS)}")
        return PARTS[name](*(arguments or "").split())

    text = source[0]
    folder, _, name = page.rpartition("/")
    if folder == "operations" and name != "index":
        text = f"{text.rstrip()}\n\n{operations.page(name)}"
    source[0] = MARK.sub(made, text)


def check(app: Sphinx) -> None:
    """Every public operation has a page, and every page an operation."""
    pages = {path.stem for path in (Path(app.srcdir) / "operations").glob("*.md")} - {"index"}
    missing, unknown = operations.names() - pages, pages - operations.names()
    if missing or unknown:
        raise ExtensionError(f"docs/operations: pages missing: {sorted(missing)}; of no operation: {sorted(unknown)}")


def setup(app: Sphinx) -> dict:
    app.connect("builder-inited", check)
    app.connect("builder-inited", drawn.draw)
    app.connect("source-read", replace)
    return {"parallel_read_safe": True}
