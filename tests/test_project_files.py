"""What a repository says of itself: licence, citation, changes, and that SECURITY.md is true of the code."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path

import pytest

import murf_fast

ROOT = Path(__file__).resolve().parents[1]
# Of https://www.apache.org/licenses/LICENSE-2.0.txt without the blank line at its beginning.
APACHE = "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_licence_is_apaches():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE
    assert 'license = "Apache-2.0"' in text("pyproject.toml")


def test_the_notice_names_all_that_is_bundled():
    bundled = [p.name for p in (ROOT / "murf_fast" / "assets").iterdir() if p.suffix != ".md"]
    assert len(bundled) > 2
    for name in bundled:
        assert name in text("NOTICE")


def test_one_version_everywhere():
    version = murf_fast.__version__
    assert f'\nversion = "{version}"' in text("pyproject.toml")
    assert f"\nversion: {version}\n" in text("CITATION.cff")
    assert f"\n## {version}" in text("CHANGELOG.md")


def test_the_citation_is_whole():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "license"} <= cited.keys()
    titles = [reference["title"] for reference in cited["references"]]
    assert len(titles) == len(set(titles)) == 5
    for reference in (cited, *cited["references"]):
        assert reference["type"] in ("software", "article", "unpublished")
        for author in reference["authors"]:
            assert author.keys() in ({"name"}, {"given-names", "family-names"})


def calls():
    """Every call in the package: its file, its dotted name and its keywords."""
    for folder in ("murf_fast", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    keywords = {k.arg: k.value for k in node.keywords}
                    yield str(path.relative_to(ROOT)), ast.unparse(node.func), keywords


def test_nothing_is_unpickled_or_evaluated():
    found = list(calls())
    loads = [(where, keywords) for where, name, keywords in found if name == "torch.load"]
    assert loads
    for where, keywords in loads:
        assert ast.unparse(keywords.get("weights_only", ast.Constant(None))) == "True", where
    arrays = [(where, keywords) for where, name, keywords in found if name in ("np.load", "numpy.load")]
    assert arrays
    for where, keywords in arrays:
        assert ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) == "False", where
    for where, name, keywords in found:
        assert not re.fullmatch(r"(pickle|dill|joblib|marshal|shelve|yaml)\..*|eval|exec|os\.system", name), where
        assert "trust_remote_code" not in keywords, where
    hubs = {where for where, name, _ in found if name == "torch.hub.load"}
    assert hubs == {"murf_fast/cli/anomaly/weights.py"}  # SECURITY.md says so
    processes = {where for where, name, _ in found if name.startswith("subprocess.")}
    assert processes == {"murf_fast/cli/bench/suites.py", "murf_fast/data/_reading.py"}


def test_the_largest_image_is_the_one_that_is_told():
    from murf_fast._pillow import LARGEST_PIXELS

    assert f"{LARGEST_PIXELS:,} pixels" in text("SECURITY.md")
