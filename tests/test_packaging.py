"""The package without its parts, and what goes into a wheel."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[1]
PROJECT_FILES = ("LICENSE", "NOTICE", "CITATION.cff", "CHANGELOG.md", "SECURITY.md")

BLOCK = """
import importlib.abc, importlib.metadata, importlib.util, sys, warnings

class Blocked(importlib.abc.MetaPathFinder):
    names = {names}
    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in Blocked.names else find_spec(name, package)
"""


def run_without(names, code):
    """Runs code where the modules ``names`` cannot be imported."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MURF_FAST_BACKEND", "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, "-c", BLOCK.format(names=set(names)) + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_extension_and_triton_the_reference_answers_with_one_warning():
    out = run_without(
        ["murf_fast._native", "triton"],
        """
import torch
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import murf_fast
    maps = [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 2)]
    for op in (murf_fast.upsample_concat, murf_fast.upsample_sum, murf_fast.upsample_mean, murf_fast.upsample_concat):
        result = op(maps, (7, 6))
        expected = getattr(murf_fast.reference, op.__name__)(maps, (7, 6))
        assert torch.equal(result, expected), op
told = [w for w in told if "murf_fast" in str(w.message)]
assert len(told) == 1, told
assert told[0].category is RuntimeWarning
assert "native" in str(told[0].message) and "C++20 compiler" in str(told[0].message)
""",
    )
    assert out == ""


@pytest.mark.parametrize(
    ("backend", "reasons"),
    [("native", ["not built or does not load"]), ("triton", ["TRITON_INTERPRET=1", "triton is not installed"])],
)
def test_a_backend_asked_for_by_name_raises_with_every_reason(backend, reasons):
    for how in ("argument", "context", "environment"):
        out = run_without(
            ["murf_fast._native", "triton"],
            f"""
import contextlib, os, torch, murf_fast
if {how!r} == "environment":
    os.environ["MURF_FAST_BACKEND"] = {backend!r}
context = murf_fast.use_backend({backend!r}) if {how!r} == "context" else contextlib.nullcontext()
options = dict(backend={backend!r}) if {how!r} == "argument" else dict()
with context:
    try:
        murf_fast.resize(torch.ones(1, 1, 2, 2), 3, **options)
    except murf_fast.BackendUnavailableError as error:
        print(error)
""",
        )
        for reason in reasons:
            assert reason in out, how


def test_info_without_extension_and_triton_says_how_to_get_them():
    out = run_without(
        ["murf_fast._native", "triton"],
        "sys.argv = ['murf-fast', 'info']\nfrom murf_fast.cli import main\ntry: main()\nexcept SystemExit: pass\n",
    )
    assert "C++ extension" in out
    assert "pip install --force-reinstall" in " ".join(out.split())
    assert "triton is not installed" in " ".join(out.split())


def test_importing_needs_no_extra():
    run_without(
        [
            "rich",
            "typer",
            "PIL",
            "matplotlib",
            "transformers",
            "safetensors",
            "timm",
            "psutil",
            "faiss",
            "scipy",
            "zarr",
            "pyarrow",
            "ray",
        ],
        "import murf_fast.cli.info, murf_fast.nn, murf_fast.anomaly, murf_fast.data; murf_fast.cli.info.collect()",
    )


HEAVY = [
    "torch._dynamo",
    "sympy",
    "triton",
    "transformers",
    "matplotlib",
    "scipy",
    "faiss",
    "torchvision",
    "pyarrow",
    "ray",
]


@pytest.mark.parametrize("what", ["murf_fast", "murf_fast.cli.commands"])
def test_importing_costs_no_compiler(what):
    """What takes long to import is imported where it is used: `torch._dynamo` alone takes a second."""
    code = f"import sys, torch\nimport {what}\nprint([m for m in {HEAVY} if m in sys.modules])"
    assert run_without([], code).strip() == "[]"


def test_importing_takes_three_tenths_of_a_second_beside_torch(tmp_path):
    """CPU time with bytecode at hand, as in an installed package; on a slow machine a quarter of what torch takes."""
    code = f"""
import time
start = time.process_time()
import torch
middle = time.process_time()
sys.pycache_prefix, sys.dont_write_bytecode = {str(tmp_path)!r}, False
import murf_fast
print(middle - start, time.process_time() - middle)
"""
    run_without([], code)  # writes the bytecode
    for _ in range(5):
        torchs, ours = map(float, run_without([], code).split())
        allowed = max(0.3, torchs / 4)
        if ours <= allowed:
            return
    pytest.fail(
        f"import murf_fast: {ours:.2f} s beside torch's {torchs:.2f} s, over {allowed:.2f} s five times in a row"
    )


def test_constants_of_a_trace_are_marked_as_torch_marks_them():
    from murf_fast._constant import constant_while_compiling

    def ours():
        return 1

    def theirs():
        return 1

    constant_while_compiling(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


@pytest.fixture
def setup_script(monkeypatch):
    """Runs setup.py but for its build: its names, and what it would give to setuptools."""

    def run():
        given = {}
        monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
        monkeypatch.chdir(ROOT)
        names = {"__name__": "setup", "__file__": "setup.py"}
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), names)
        return names, given

    return run


@pytest.mark.parametrize(
    ("platform", "levels"),
    [
        ("linux-x86_64", ["baseline", "avx2", "avx512"]),
        ("linux-aarch64", ["baseline"]),
        ("macosx-11.0-arm64", ["baseline"]),
        ("macosx-10.13-universal2", ["baseline"]),
    ],
)
def test_levels_are_those_of_the_machine_that_is_built_for(setup_script, monkeypatch, platform, levels):
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", platform)
    names, _ = setup_script()
    assert list(names["LEVELS"]) == levels


@pytest.mark.parametrize("accepted", [["-fopenmp", "-fopenmp-simd"], ["-fopenmp-simd"], []])
def test_without_a_runtime_of_openmp_sums_are_of_vectors(setup_script, monkeypatch, accepted):
    names, _ = setup_script()
    build = names["BuildLevels"](setuptools.Distribution())
    monkeypatch.setattr(build, "_accepts", lambda program, flag: flag in accepted)
    assert build._openmp() == accepted[:1]


def test_a_build_for_one_thread_asks_for_no_runtime(setup_script, monkeypatch):
    monkeypatch.setenv("MURF_FAST_OPENMP", "0")
    names, _ = setup_script()
    build = names["BuildLevels"](setuptools.Distribution())
    monkeypatch.setattr(build, "_accepts", lambda program, flag: True)
    assert build._openmp() == ["-fopenmp-simd"]


def test_archives_of_the_same_files_become_the_same_bytes(setup_script, tmp_path):
    """Whatever order, times, owners and permissions they were packed with, and whether two names were one file."""
    names, _ = setup_script()
    contents = {"p-1/a.py": b"a = 1\n", "p-1/run": b"#!/bin/sh\n", "p-1/A.py": b"a = 1\n"}
    made = []
    for i in range(2):
        archive = tmp_path / str(i) / "p-1.tar.gz"
        archive.parent.mkdir()
        with tarfile.open(archive, "w:gz") as packed:
            for name in sorted(contents) if i else contents:
                member = tarfile.TarInfo(name)
                member.size, member.mtime, member.uid, member.uname = len(contents[name]), 10.5 + i, i, f"user {i}"
                member.mode = (0o755, 0o700)[i] if name == "p-1/run" else (0o664, 0o600)[i]
                if name == "p-1/A.py" and not i:
                    member.type, member.size, member.linkname = tarfile.LNKTYPE, 0, "p-1/a.py"
                packed.addfile(member, io.BytesIO(contents[name]))
        names["normalize"](archive, 1_700_000_000)
        made.append(archive.read_bytes())
        with tarfile.open(archive) as packed:
            assert {m.name: packed.extractfile(m).read() for m in packed} == contents
            assert [m.mode for m in packed] == [0o644, 0o644, 0o755]
            assert {(m.mtime, m.uid, m.uname) for m in packed} == {(1_700_000_000, 0, "")}
        assert list(archive.parent.iterdir()) == [archive]
    assert made[0] == made[1]


def test_msvc_is_refused_by_name(setup_script):
    names, given = setup_script()
    build = names["BuildLevels"](setuptools.Distribution())
    build.compiler = types.SimpleNamespace(compiler_type="msvc")
    with pytest.raises(RuntimeError, match="MSVC"):
        build._build(given["ext_modules"][0])


def test_the_extension_can_be_left_out(setup_script, monkeypatch):
    monkeypatch.setenv("MURF_FAST_PURE", "1")
    _, given = setup_script()
    assert given["ext_modules"] == []


def test_every_subpackage_is_packaged(setup_script):
    _, given = setup_script()
    folders = {given["package_dir"].get(name, name.replace(".", "/")) for name in given["packages"]}
    found = {str(p.parent.relative_to(ROOT)) for top in ("murf_fast", "kernels") for p in (ROOT / top).rglob("*.py")}
    assert found == folders
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), folder
    # Sources with bodies per instruction-set level and the others: every one of them is built.
    (extension,) = given["ext_modules"]
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")} == set(extension.sources)


def test_only_the_bindings_are_compiled_for_one_python(setup_script):
    setup_file, _ = setup_script()
    python = re.compile(rb"#include [<\"](pybind11|Python\.h)")
    plain = [*setup_file["KERNEL_SOURCES"], *setup_file["COMMON_SOURCES"]]
    for source in plain:
        for path, text in setup_file["sources_of"](Path(source)).items():
            assert path.is_file(), f"{source} includes {path}"
            assert not python.search(text), f"{source} includes {path}"
    # The one source that is compiled of csrc/bind includes all others.
    included = setup_file["sources_of"](Path(setup_file["BIND"]))
    assert {Path(source) for source in setup_file["BIND_SOURCES"]} <= set(included)
    assert any(python.search(text) for text in included.values())


def test_kept_objects_are_known_by_all_that_they_are_made_of(setup_script, source_tree, monkeypatch):
    setup_file, _ = setup_script()
    monkeypatch.chdir(source_tree)
    compiler = types.SimpleNamespace(compiler_so=[sys.executable, "-fPIC"])
    source = str(Path("csrc", "level", "upsample_sum.cpp"))

    def key(*options, program=compiler):
        return setup_file["object_key"](program, (source, [], options, None))

    before = key("-O3")
    assert key("-O3") == before
    assert key("-O2") != before
    assert key("-O3", program=types.SimpleNamespace(compiler_so=[sys.executable, "-fPIC", "-g"])) != before
    with Path("csrc", "level", "window_weights.h").open("a") as header:  # included by others
        header.write("// changed")
    assert key("-O3") == before
    with Path("csrc", "level", "simd.h").open("a") as header:  # included by a header
        header.write("// changed")
    assert key("-O3") != before


def test_a_build_says_what_it_has_compiled(setup_script, tmp_path, capsys):
    setup_file, _ = setup_script()
    setup_file["PROGRESS"] = str(tmp_path / "progress.log")
    with setup_file["Progress"](2) as progress:
        progress.skip()
        with progress.step("avx2", "csrc/level/gemm.cpp"):
            pass
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[  2/2\] avx2     gemm\.cpp +\d+\.\d s", first)
    assert re.fullmatch(r"1 of 2 objects compiled in \d+ s, \d+ s of processor time", last)
    assert (tmp_path / "progress.log").read_text().splitlines() == [first, last]


@pytest.fixture
def source_tree(tmp_path):
    """What a build reads, in a folder of its own."""
    for name in ("murf_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", *PROJECT_FILES):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_source_distribution_holds_all_that_a_build_reads(source_tree):
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", code], cwd=source_tree, check=True, capture_output=True, timeout=120)
    (archive,) = (source_tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder, suffixes in (("csrc", (".cpp", ".h")), ("murf_fast", (".py",)), ("kernels", (".py",))):
        wanted = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes}
        assert wanted
        assert wanted <= names
    assert {*PROJECT_FILES, "murf_fast/py.typed"} <= names


def test_a_failed_build_packs_nothing_of_an_earlier_one(source_tree):
    library = source_tree / "build" / "lib"
    stale = [library / "murf_fast" / name for name in ("deleted.py", "_native.of_an_earlier_build.so")]
    stale[0].parent.mkdir(parents=True)
    for file in stale:
        file.touch()
    result = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", str(library)],
        cwd=source_tree,
        env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false", "MURF_FAST_REQUIRE_NATIVE": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "was NOT built" in result.stderr
    assert (library / "murf_fast" / "native" / "upsample_sum.py").is_file()
    assert not [p.name for p in library.rglob("*") if p.suffix == ".so" or p in stale]


def test_bundled_files_have_their_licences():
    assets = ROOT / "murf_fast" / "assets"
    licences = (assets / "LICENSES.md").read_text()
    bundled = [p for p in assets.iterdir() if p.suffix in (".jpg", ".png", ".npz")]
    assert bundled
    for file in bundled:
        assert file.name in licences
        assert file.stat().st_size < 300_000


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_what_git_tracks_stays_small():
    """12 MB, whoever clones it: large originals belong into the folder of `originals.py`."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, timeout=60).stdout
    sizes = {n: (ROOT / n).stat().st_size for n in names.decode().rstrip("\0").split("\0") if (ROOT / n).is_file()}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:5]
    assert 1_000_000 < sum(sizes.values()) <= 12_000_000, [(n, sizes[n]) for n in largest]
