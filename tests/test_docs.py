"""The documentation's own parts: what is generated, what its pages and the README take for granted, its link check.

That the whole of it builds without a warning, and that its examples run, is `make docs`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import typing
from pathlib import Path

import pytest
import report
import torch

import murf_fast
from murf_fast import annotations

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MOST_PICTURES = 1_000_000  # bytes that a clone pays for


def module(name: str, folder: Path = DOCS / "_ext"):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", folder / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))  # they import each other
    try:
        spec.loader.exec_module(found)
    finally:
        sys.path.remove(str(folder))
    return found


@pytest.fixture(scope="module")
def operations():
    return module("operations")


@pytest.fixture(scope="module")
def results():
    return module("results")


def test_every_operation_has_a_page_and_a_row_of_the_readme(operations):
    pages = {path.stem for path in (DOCS / "operations").glob("*.md")} - {"index"}
    assert pages == operations.names()
    assert len(pages) > 20
    readme = (ROOT / "README.md").read_text()
    for name in pages:
        assert f"\n| `{name}` |" in readme, name
        text = (DOCS / "operations" / f"{name}.md").read_text()
        assert text.startswith(f"# `{name}`\n")
        assert "```{testcode}" in text, name
        assert "## The original, and where this differs\n" in text, name


def test_a_page_ends_in_call_meaning_and_measured_times(operations):
    page = operations.page("upsample_argmax")
    headings = re.findall(r"^## (.*)", page, re.M)
    assert headings == ["Call", "What it means", "Exactness", "Measured"]
    assert "autofunction:: murf_fast.upsample_argmax" in page
    assert "tests/test_upsample_argmax.py" in page
    (reference,) = re.findall(r"literalinclude} (\S+)", page)
    assert (DOCS / "operations" / reference).resolve().is_file()
    for name in operations.names():  # the tests that a page names are there
        for test in re.findall(r"tests/test_\w+\.py", operations.page(name)):
            assert (ROOT / test).is_file(), name


def test_measured_tables_are_the_records(results, tmp_path, monkeypatch):
    known, ops = results.found(), murf_fast.ops.__all__
    assert [bool(r["machine"]["driver"]) for r in known] == sorted(bool(r["machine"]["driver"]) for r in known)
    whole = results.everything()
    for record in known:
        for case in record["cases"]:
            assert len(case["contenders"]) == 1 or f"| {case['case']} |" in whole
            assert case["op"] not in ops or f"| {case['case']} |" in results.of(case["op"])
        assert record["machine"]["device"] in whole
    record = json.loads(json.dumps(known[0]))
    record["cases"] = [case for case in record["cases"] if case["op"] == "upsample_argmax"]
    assert record["cases"]
    for contender in record["cases"][0]["contenders"].values():
        contender["median_s"] = 0.012345 if contender is record["cases"][0]["contenders"]["murf_fast"] else 1.2345
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "results.json").write_text(json.dumps(record))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = results.of("upsample_argmax")
    assert "12.3 ms" in table
    assert "| 100.0 |" in table
    assert "No benchmark" in results.of("resize")


def test_flavours_are_compared():
    flavours = module("flavours")
    shares = flavours.differences()
    assert set(shares) == set(flavours.FLAVOURS)
    assert all(0.001 < share < 1 for row in shares.values() for share in row)
    hub = shares["dinov2-hub"]
    assert hub == sorted(hub, reverse=True)  # the 0.1 matters less, the finer the grid
    assert f"{hub[0]:.1%}" in flavours.table()
    flavours.GRIDS = (flavours.TABLE,)
    assert all(row == [0.0] for row in flavours.differences().values())


def test_every_name_of_types_has_an_entry_with_what_it_accepts():
    aliases = module("aliases")
    assert [alias.name for alias in sorted(aliases.aliases())] == sorted(annotations.__all__)
    page = aliases.page()
    for alias in aliases.aliases():
        value = getattr(annotations, alias.name)
        entry = page.partition(f".. py:type:: {alias.name}\n")[2].partition("```")[0]
        assert alias.text.splitlines()[0] in entry
        if typing.get_origin(value) is typing.Literal:
            for choice in typing.get_args(value):
                assert f'``"{choice}"``' in entry, alias.name
    accepted = {alias.name: alias.accepted for alias in aliases.aliases()}
    assert accepted["Size"] == ["int", "np.integer[Any]", "Integers"]
    assert accepted["Keep"] == ["bool", '"checked"']
    assert "str" in accepted["Image"]
    assert "PIL.Image.Image" in accepted["Image"]
    assert "<!-- generated: annotations -->" in (DOCS / "api" / "annotations.md").read_text()


def test_a_name_of_types_without_a_docstring_is_told(monkeypatch):
    monkeypatch.setattr(annotations, "__all__", [*annotations.__all__, "Sequence"])
    with pytest.raises(ValueError, match="no docstring behind Sequence"):
        module("aliases").aliases()


def test_pictures_are_used_and_small():
    pictures = [path for path in (DOCS / "pictures").iterdir() if path.is_file()]
    text = "".join(path.read_text() for path in [*DOCS.rglob("*.md"), ROOT / "README.md"])
    for path in pictures:
        assert f"pictures/{path.name})" in text, path.name
    assert sum(path.stat().st_size for path in pictures) < MOST_PICTURES
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"!\[[^]]+\]\(([^)]+)\)", path.read_text()):
            found = (path.parent / target).resolve()
            assert found.is_file() or found.parent.name == "drawn", f"{path.name}: {target}"


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert len(targets) > 20
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_readme_runs(tmp_path):
    """Every block of Python in the README, on small tensors and models under the names that it takes for granted."""
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 16, n, n, generator=generator) for n in (5, 9, 14)]
    size = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    vit = transformers.Dinov2Model(transformers.Dinov2Config(**size)).eval().requires_grad_(False)
    image = torch.rand(1, 3, 64, 64, generator=generator)
    images = torch.randint(256, (1, 3, 90, 120), dtype=torch.uint8, generator=generator)
    given = {
        "murf_fast": murf_fast,
        "model": vit,
        "vit": vit,
        "head": murf_fast.nn.SegmentationHead(48, 5).eval(),
        "maps": maps,
        "low": maps,
        "weight": torch.randn(5, 48, generator=generator),
        "bias": torch.zeros(5),
        "target": torch.randint(16, (1, 40, 50), generator=generator),
        "score_maps": [m[:, :1] for m in maps],
        "anyup_weights": murf_fast.nn.AnyUp().state_dict(),
        "featup_weights": murf_fast.nn.JBUStack(16).state_dict(),
        "image": image,
        "features": torch.randn(1, 16, 8, 8, generator=generator),
        "head_weight": torch.randn(5, 16, generator=generator),
        "head_bias": torch.zeros(5),
        "normal_images": [torch.rand(3, 70, 70, generator=generator) for _ in range(3)],
        "query": torch.randn(10, 8, generator=generator),
        "bank": torch.randn(100, 8, generator=generator),
        "score": torch.rand(1, 1, 40, 40, generator=generator),
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 4
    batches = [{"images": images, "image": images[0], "other": images[0, :, :70]}, {}, {}, {"image": images[0]}]
    with torch.no_grad():
        for block, special in zip(blocks, batches, strict=True):
            names = {**given, **special}
            exec(block, names)
            labels = names.get("labels")
            assert (
                labels is None
                or not isinstance(labels, list)
                or [tuple(x.shape) for x in labels]
                == [
                    (90, 120),
                    (70, 120),
                ]
            )
            if "fused" in names and "murf" not in names:
                assert tuple(names["fused"].shape) == (1, 48, 512, 512)


def test_the_link_check_sees_faults(tmp_path):
    check = module("check_links", DOCS)
    assert check.faults(tmp_path) == [f"{tmp_path} holds no page"]
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1><a href="https://example.org/x">elsewhere</a>')
    good = '<a href="b.html#there">b</a><a href="#here">a</a><p id="here"><img src="data:image/png;base64,AA" alt="x">'
    (tmp_path / "a.html").write_text(good)
    assert check.faults(tmp_path) == []
    for bad, fault in (
        ('<a href="c.html">c</a>', "leads to no file"),
        ('<a href="b.html#nowhere">b</a>', "leads to no such place"),
        ('<img src="gone.png" alt="x">', "gone.png is missing"),
        ('<script src="https://example.org/x.js"></script>', "from elsewhere"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "from elsewhere"),
        ('<img src="a.html">', "no text in its place"),
    ):
        (tmp_path / "a.html").write_text(good + bad)
        (found,) = check.faults(tmp_path)
        assert fault in found, found


def test_docstrings_are_read_as_they_are_written():
    pytest.importorskip("sphinx")
    hooks = module("docstrings")
    lines = [
        "One line.",
        "",
        "Returns:",
        "    (B, C): a map.",
        "    Differentiable.",
        "",
        "Raises:",
        "    ValueError: No.",
    ]
    hooks.plain_returns(None, "", "", None, None, lines)
    assert lines[2:4] == [":returns: (B, C): a map.", "    Differentiable."]
    lines = ["Memory: the result,", "and a row.", "", "Source: a paper.", "Memory of old."]
    hooks.fields(None, "", "", None, None, lines)
    assert lines == [":Memory: the result,", "    and a row.", "", ":Source: a paper.", "    Memory of old."]
    assert hooks._exists("murf_fast.ops._pixel_conv")
    assert hooks._exists("MultiResolutionEncoder.forward")
    assert not hooks._exists("MultiResolutionEncoder.backwards")
    assert not hooks._exists("upsample_conact")
