"""`.ci/versions`: what becomes of results, and of what is not here. The runs themselves are its own business."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def versions():
    before = list(sys.path)
    yield loaded(ROOT / ".ci" / "versions.py")
    sys.path[:] = before


@pytest.fixture
def recorded(versions):
    return versions.tested_versions


CELL = {
    "python": "3.10.13", "torch": "2.6.0+cu124", "triton": "3.2.0", "numpy": "2.2.6", "transformers": "4.57.1",
    "passed": 90, "skipped": 2, "failed": 0, "skips": {"no Triton": 2}, "failures": [], "missing": [], "against": {},
    "commit": "abc", "date": "2026-11-27",
}  # fmt: skip


def test_a_cell_takes_the_place_of_its_predecessor(recorded, tmp_path):
    record = tmp_path / "versions.json"
    newer = {**CELL, "python": "3.9.1"}
    again = {**CELL, "python": "3.10.9", "torch": "2.6.0", "passed": 91}
    for cell in (CELL, newer, {**CELL, "torch": "2.13.0"}, again):
        recorded.put(record, cell)
    assert [(c["python"], c["torch"], c["passed"]) for c in recorded.read(record)] == [
        ("3.9.1", "2.6.0+cu124", 90),
        ("3.10.9", "2.6.0", 91),
        ("3.10.13", "2.13.0", 90),
    ]


def test_the_table_hides_nothing(recorded, tmp_path):
    record = tmp_path / "versions.json"
    assert recorded.table(record) == "No run is recorded yet."
    bad = {"failed": 1, "failures": ["tests.test_a::test_b"], "triton": None, "missing": ["extra anomaly: no faiss"]}
    recorded.put(record, {**CELL, **bad, "against": {"triton on cpu": ["it is too old", "it sleeps"]}})
    table = recorded.table(record)
    assert "| 3.10.13 | 2.6.0+cu124 | none | 2.2.6 | 4.57.1 | 90 | 2 | 1 | `abc`, 2026-11-27 |" in table
    for words in ("`tests.test_a::test_b`", "no faiss", "it is too old; it sleeps", "2 skipped: no Triton"):
        assert words in table


def test_results_are_counted_with_their_reasons(versions, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_skipped(n): pytest.skip('not here')\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=out.xml", "test_some.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    found = versions.counted(tmp_path / "out.xml")
    assert (found["passed"], found["skipped"], found["failed"]) == (1, 2, 2)
    assert found["skips"] == {"not here": 2}
    assert found["failures"] == ["test_some::test_bad", "test_some::test_error"]


def test_what_is_named_and_not_here_is_an_error(versions, tmp_path, monkeypatch, capsys):
    common = ["versions", "--work", str(tmp_path), "--record", str(tmp_path / "versions.json")]
    monkeypatch.setattr(sys, "argv", [*common, "--python", "3.999", "--torch", "2.6.0"])
    assert versions.main() == 1
    assert "not to be had: no Python 3.999 is here" in capsys.readouterr().out
    monkeypatch.setattr(versions, "CELLS", (("3.999", "2.6.0"),))
    monkeypatch.setattr(sys, "argv", common)
    assert versions.main() == 0
    assert not (tmp_path / "versions.json").exists()
    monkeypatch.setattr(sys, "argv", [*common, "--python", "3.10"])
    with pytest.raises(SystemExit, match="name --python and --torch, both"):
        versions.main()


def test_a_cell_that_fails_does_not_stop_the_others(versions, tmp_path, monkeypatch, capsys):
    def run(cell):
        if cell.torch == "1":
            raise subprocess.CalledProcessError(1, ["pip"])
        return {**CELL, "torch": cell.torch, "failed": int(cell.torch == "2"), "failures": ["x"] * (cell.torch == "2")}

    monkeypatch.setattr(versions.Cell, "run", run)
    record = tmp_path / "versions.json"
    for cells, status in ((("1", "3"), 1), (("2", "3"), 1), (("3",), 0)):
        monkeypatch.setattr(versions, "CELLS", tuple(("3.10", torch) for torch in cells))
        monkeypatch.setattr(sys, "argv", ["versions", "--work", str(tmp_path), "--record", str(record)])
        assert versions.main() == status
        assert json.loads(record.read_text())[-1]["torch"] == "3"
        assert "90 passed, 2 skipped" in capsys.readouterr().out


def test_the_interpreter_is_the_version_that_was_asked_for(versions, tmp_path, monkeypatch):
    here = ".".join(map(str, sys.version_info[:2]))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(versions.NotToBeHadError):
        versions.python_of(here)
    (tmp_path / f"python{here}").symlink_to(sys.executable)
    assert versions.python_of(here) == str(tmp_path / f"python{here}")
    (tmp_path / "python3.1").symlink_to(sys.executable)  # 3.11 is no 3.1
    with pytest.raises(versions.NotToBeHadError):
        versions.python_of("3.1")
    assert versions.python_of(sys.executable) == sys.executable


def test_the_quick_tests_are_there(versions):
    for name in versions.QUICK:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert not function or function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_the_oldest_versions_are_those_that_are_promised(versions):
    project = (ROOT / "pyproject.toml").read_text()
    python, torch = versions.CELLS[0]
    assert f'\nrequires-python = ">={python}"\n' in project
    assert f'"torch>={torch.removesuffix(".0")}"' in project


def test_the_pythons_that_are_named_are_those_of_the_record(recorded):
    project = (ROOT / "pyproject.toml").read_text()
    pythons = {".".join(cell["python"].split(".")[:2]) for cell in recorded.read()}
    assert set(re.findall(r"Programming Language :: Python :: (3\.\d+)", project)) == pythons
    (wheels,) = re.findall(r'^build = "(cp.+)"$', project, re.MULTILINE)
    assert set(wheels.split()) == {f"cp{python.replace('.', '')}-*" for python in pythons}
