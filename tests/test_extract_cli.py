"""`murf-fast extract`: its statuses, and one line for what is wrong before any work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from extracting import make_images, make_tar
from typer.testing import CliRunner

from murf_fast.cli.commands import app
from murf_fast.data import Features
from murf_fast.nn import SegmentationHead


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, 3)
    (folder / "notes.txt").write_text("no image")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, ["extract", *map(str, arguments)])


def test_statuses_and_what_is_said(images, weights, tmp_path):
    out, options = tmp_path / "out", ("--weights", weights, "--sizes", "28,42x28", "--batch", 2, "--shard", 2)
    first = invoke(images, "--out", out, *options)
    assert first.exit_code == 0, first.output
    for words in ("1 other files are left alone", "features 48x3x2 float32", "3 images in 2 shards of safetensors"):
        assert words in first.output
    assert len(Features(out)) == 3
    again = invoke(images, "--out", out, *options)
    assert again.exit_code == 0
    assert "3 of 3 images are there from before" in again.output
    refused("another configuration: --dtype", images, "--out", out, *options, "--dtype", "float16")
    broken = tmp_path / "broken"
    make_images(broken, 2)
    (broken / "000.png").write_text("no image")
    found = invoke(broken, "--out", tmp_path / "some", *options)
    assert found.exit_code == 1, found.output
    assert "1 image broken" in found.output
    assert "000.png is not an image" in found.output
    strict = invoke(broken, "--out", tmp_path / "strict", *options, "--strict")
    assert strict.exit_code == 1
    assert "--strict: 000.png is not an image" in strict.output


def refused(words, *arguments, code=2):
    result = invoke(*arguments)
    told = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == code, told
    assert words in told, told
    assert "Traceback" not in told
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_one_line_before_any_work(images, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "full" / ".lock").touch()
    (tmp_path / "list.txt").write_text(f"{images}/000.png\n{images}/nine.png\n")
    (tmp_path / "twice.txt").write_text(f"{images}/000.png\n{images}/000.png\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "cut.tar").write_bytes(b"no archive" * 100)
    make_tar(tmp_path / "part-00.tar", [images / "notes.txt"])
    torch.save(SegmentationHead(47, 5).state_dict(), tmp_path / "head.pth")
    for words, source, *options in (
        ("is not there", tmp_path / "none"),
        ("is not there", tmp_path / "*.tif"),
        ("part-01.tar is not there", tmp_path / "part-{00..01}.tar"),
        ("holds no image", tmp_path / "empty"),
        ("holds no image", tmp_path / "empty.txt"),
        ("holds no image", tmp_path / "part-00.tar"),
        ("no whole, uncompressed tar file", tmp_path / "cut.tar"),
        ("line 2", tmp_path / "list.txt"),
        ("two images of the name", tmp_path / "twice.txt"),
        ("must be a folder, a list", images / "000.png"),
        ("--column names a column of .parquet", images, "--column", "jpg"),
        ("--format must be one of safetensors, zarr", images, "--format", "hdf5"),
        ("--fuse must be one of concat, none", images, "--fuse", "sum"),
        ("--dtype must be one of float32", images, "--dtype", "int8"),
        ("--sizes must be pixels", images, "--sizes", "x"),
        ("--sizes must be pixels", images, "--sizes", ","),
        ("multiples of 14 pixels, a patch of these weights, got 30x30; 28x28 or 42x42", images, "--sizes", "28,30"),
        ("got 7x28; 14x42 would do", images, "--sizes", "7x28"),
        ("must be indices of 2 blocks", images, "--layers", "5"),
        ("--layers must be numbers", images, "--layers", "a"),
        ("--grid must be pixels", images, "--grid", "3x4x5"),
        ("--grid is for --fuse concat", images, "--grid", "3x4", "--fuse", "none"),
        ("--fuse none needs sizes", images, "--sizes", "28,28", "--fuse", "none"),
        ("`head` must have 48 columns", images, "--sizes", "28,42", "--head", tmp_path / "head.pth"),
        ("--head must be a file", images, "--head", tmp_path / "none.pth"),
        ("--head-kind must be one of", images, "--head-kind", "boxes"),
        ("--depth-range must be two numbers", images, "--head-kind", "depth", "--depth-range", "1"),
        ("--out must be a folder", images, "--out", images / "000.png"),
        ("holds other files", images, "--out", tmp_path / "full"),
        ("--device must be cpu", images, "--device", "tpu"),
        ("--workers is about Ray's workers", images, "--workers", "2"),
        ("--weights must be a folder", images, "--weights", tmp_path / "none"),
    ):
        out = () if "--out" in options else ("--out", tmp_path / "out")
        of_model = () if "--weights" in options else ("--weights", weights)
        refused(words, source, *out, *of_model, *options)
        assert not (tmp_path / "out").exists(), words
    assert {p.name for p in (tmp_path / "full").iterdir()} == {"thesis.tex", ".lock"}


def test_half_precision_that_a_format_lacks(images, weights, tmp_path):
    pytest.importorskip("pyarrow")
    out = ("--out", tmp_path / "out", "--weights", weights, "--sizes", "28")
    refused("has no bfloat16", images, *out, "--format", "parquet", "--dtype", "bfloat16")
    assert not (tmp_path / "out").exists()


def test_columns_of_a_table(images, weights, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    data = [b"x", b"y"]
    pq.write_table(pa.table({"a": data, "b": data, "c": [1, 2]}), tmp_path / "t.parquet")
    (tmp_path / "no.parquet").write_bytes(b"no table")
    out = ("--out", tmp_path / "out", "--weights", weights, "--sizes", "28")
    refused("2 columns of bytes (a, b): name one by --column", tmp_path / "t.parquet", *out)
    refused("has no column 'c' of bytes; there are: a, b", tmp_path / "t.parquet", *out, "--column", "c")
    refused("is no Parquet table", tmp_path / "no.parquet", *out)


@pytest.mark.parametrize(
    ("library", "extra", "options"),
    [
        ("ray", "ray", ["--ray"]),
        ("zarr", "data", ["--format", "zarr"]),
        ("pyarrow", "data", ["--format", "arrow"]),
        ("pyarrow", "data", ["--format", "parquet"]),
    ],
)
def test_a_missing_library_is_one_line(library, extra, options, images, weights, tmp_path, monkeypatch):
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {library!r}", name=library)

    # What other tests imported.
    for name in [n for n in sys.modules if n.partition(".")[0] == library or n.startswith("murf_fast.data.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    given = (images, "--out", tmp_path / "out", "--weights", weights, "--sizes", "28", *options)
    refused(f"this needs {library}: pip install 'murf-fast[{extra}]'", *given, code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder in which nobody may write")
def test_no_permission(images, weights):
    if os.access("/sys/kernel", os.W_OK) and os.geteuid() != 0:
        pytest.skip("this user may write everywhere")
    refused("/sys/kernel/features", images, "--out", "/sys/kernel/features", "--weights", weights, "--sizes", "28")
