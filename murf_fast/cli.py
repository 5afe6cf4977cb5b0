"""The command ``murf-fast``. The package works without it; its libraries come with the extra ``[cli]``."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from murf_fast._commands import app
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "murf_fast":
            raise
        sys.exit(f"murf-fast: the command line needs {error.name}: pip install 'murf-fast[cli]'")
    app(prog_name="murf-fast")
