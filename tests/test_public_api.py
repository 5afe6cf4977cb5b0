from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from public_api import public_api

EXPECTED = Path(__file__).parent / "golden" / "public_api.txt"


def test_names_and_signatures():
    assert list(public_api()) == EXPECTED.read_text().splitlines()


def test_packages_come_when_they_are_named():
    """``import murf_fast`` is enough for ``murf_fast.anomaly.au_pro``; what the packages need comes no earlier."""
    script = """
import sys, murf_fast
late = ("faiss", "scipy", "sklearn", "transformers", "timm", "matplotlib", "rich", "typer", "PIL", "murf_fast.anomaly")
early = [name for name in late if name in sys.modules]
assert not early, early
assert callable(murf_fast.anomaly.au_pro) and callable(murf_fast.patch.anyup) and callable(murf_fast.nn.AnyUp)
assert {"anomaly", "nn", "patch", "resize", "windows"} <= set(dir(murf_fast))
early = [name for name in ("faiss", "transformers", "timm", "matplotlib", "rich", "typer") if name in sys.modules]
assert not early, early
try:
    murf_fast.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)
