"""The command ``murf-fast``. The package works without it; its libraries come with the extra ``[cli]``."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from murf_fast.cli.commands import app
    except ModuleNotFoundError as error:
        if _package(error) in (None, "murf_fast"):
            raise
        sys.exit(f"murf-fast: the command line needs {_package(error)}: pip install 'murf-fast[cli]'")
    app(prog_name="murf-fast")


def _package(error: ModuleNotFoundError) -> str | None:
    return error.name and error.name.partition(".")[0]
