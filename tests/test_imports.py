"""Imports point one way. Those within functions count like those at the top: a circle is a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"murf_fast": ROOT / "murf_fast", "murf_fast.kernels": ROOT / "kernels"}
# A file imports from its own layer and from those behind it.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("patch", "__init__"),
    ("nn", "anomaly", "data"),
    ("ops",),
    ("backends",),
    ("native", "kernels", "reference"),
    ("tables", "windows", "scales", "_arguments", "_pillow", "_files", "_image_paths", "_ray_cluster"),
    (
        "_extension",
        "_fork",
        "_discovery",
        "_constant",
        "_torch_versions",
        "_layout",
        "_capture",
        "_ray_address",
        "annotations",
    ),
)


def modules_of(folders: dict[str, Path]) -> dict[str, Path]:
    """Dotted names (packages by their ``__init__``) and files."""
    found = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts) if package else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules among ``known`` that a file imports; ``from package import name`` is its module of that name, if any,
    and the package's own file if not.
    """
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            candidates = (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__")
            yield from [c for c in candidates if c in known][:1]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of two modules and more, and modules that import themselves."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


@pytest.mark.parametrize(
    "folders", [FOLDERS, {"": ROOT / "benchmarks"}, {"": ROOT / "tests"}], ids=["murf_fast", "benchmarks", "tests"]
)
def test_no_circles(folders):
    known = modules_of(folders)
    assert len(known) > 10
    assert circles({name: set(imported(path, known)) for name, path in known.items()}) == []


def test_layers():
    known = modules_of(FOLDERS)
    level = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
    wrong = [
        f"{name} imports {target}"
        for name, path in known.items()
        for target in imported(path, known)
        if level[room_of(target)] < level[room_of(name)]
    ]
    assert wrong == []


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}) == [["a", "b", "c"], ["e"]]
