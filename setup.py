"""Builds murf_fast: pure Python, Triton kernels (JIT, nothing to build) and one C++ extension.

Every kernel source is compiled once per instruction-set level into its own objects; csrc/dispatch.cpp picks a level at
run time. There is no torch header under csrc/, so the build needs only setuptools, pybind11 and a C++20 compiler. When
it fails the package is installed without the extension, and `murf-fast info` says what is missing.

MURF_FAST_SANITIZE=address,undefined builds the extension with those sanitizers (see .ci/run).
MURF_FAST_REQUIRE_NATIVE=1 turns a failed build of the extension into an error.
MURF_FAST_PURE=1 leaves the extension out: the wheel is one for every Python (see .ci/wheel).
MURF_FAST_OBJECTS=FOLDER keeps the objects of a build there, each by all that it is made of; the next build compiles
only what has changed, wherever its sources lie. Only csrc/bind knows of Python: builds for several Pythons share the
other objects. What no build has asked for in two weeks is thrown away.
MURF_FAST_PROGRESS=FILE adds the lines that tell what has been compiled to a file.
MURF_FAST_OPENMP=0 builds kernels that run in one thread, as where a compiler has no OpenMP runtime (docs/wheels.md).
SOURCE_DATE_EPOCH=SECONDS makes the same bytes of the same sources: of a wheel, of a source distribution.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

# Kernels of csrc/level are compiled once per level, the rest of csrc once.
KERNEL_SOURCES = sorted(str(p) for p in Path("csrc", "level").glob("*.cpp"))
COMMON_SOURCES = sorted(str(p) for p in Path("csrc").glob("*.cpp"))
# Python's headers and pybind11's are included here alone; native.cpp includes the other sources of its folder.
BIND_SOURCES = sorted(str(p) for p in Path("csrc", "bind").glob("*.cpp"))
BIND = str(Path("csrc", "bind", "native.cpp"))

# The machine that is built for, which a cross build names (docs/wheels.md); this one's otherwise.
X86 = sysconfig.get_platform().endswith(("-x86_64", "-amd64"))
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC would stay at 256 bits for its default tuning.
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
LEVELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512} if X86 else {"baseline": []}
# A level of a few kernels, those that multiply in bfloat16; its others are those of AVX-512 (csrc/dispatch.cpp).
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
AMX_SOURCES = [f"csrc/level/{name}.cpp" for name in ("dense_attention", "gemm", "pixel_conv_direct", "pixel_linear")]

# Contraction gives fused multiply-adds; no trapping math lets comparisons vectorize. Nothing here reorders sums.
# Vectors cross no boundary between translation units, so the ABI that -Wpsabi warns of does not matter.
FLAGS = [
    "-O3",
    "-DNDEBUG",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-Wno-psabi",
]
# Programs that tell what a compiler has.
OPENMP = {
    "-fopenmp": "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n",
    "-fopenmp-simd": "int main() {}\n",
}
TILES = """
#include <immintrin.h>
int main() {
  _tile_dpbf16ps(0, 1, 2);
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && _mm512_cvtneps_pbh(__m512{})[0];
}
"""
KEPT = os.environ.get("MURF_FAST_OBJECTS", "")
PROGRESS = os.environ.get("MURF_FAST_PROGRESS", "")
KEPT_SECONDS = 14 * 24 * 3600
SANITIZE = os.environ.get("MURF_FAST_SANITIZE", "")
PURE = os.environ.get("MURF_FAST_PURE") == "1"
ONE_THREAD = os.environ.get("MURF_FAST_OPENMP") == "0"
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=undefined", "-g", "-O1"]


def compile_command(compiler) -> list[str]:
    return list(getattr(compiler, "compiler_so_cxx", compiler.compiler_so))


def sources_of(source: Path, seen: dict[Path, bytes] | None = None) -> dict[Path, bytes]:
    """A source and all of csrc that it includes, with their contents; what is missing is empty."""
    seen = {} if seen is None else seen
    seen[source] = source.read_bytes() if source.exists() else b""
    for name in re.findall(rb'^#include "(.+)"', seen[source], re.MULTILINE):
        beside = Path(source.parent, name.decode())
        header = beside if beside.exists() else Path("csrc", name.decode())
        if header not in seen:
            sources_of(header, seen)
    return seen


def object_key(compiler, described: tuple) -> str:
    """The name of an object: a digest of the compiler, of how it is called, and of all of csrc that goes into it."""
    command = compile_command(compiler)
    program = itertools.takewhile(lambda word: not word.startswith("-"), command)
    version = subprocess.run([*program, "--version"], check=True, capture_output=True).stdout
    source, *_ = described
    files = [part for path, text in sources_of(Path(source)).items() for part in (repr(str(path)).encode(), text)]
    return hashlib.sha256(b"\0".join([version, repr((command, described)).encode(), *files])).hexdigest()


class Progress:
    """Says what has been compiled: a line for every object, and the time of all of them.

    pip shows the lines with -v. MURF_FAST_PROGRESS=FILE adds them to a file, too.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = self.kept = 0
        self.lock = threading.Lock()
        self.begin = self.processor = 0.0

    def __enter__(self) -> Progress:
        self.begin, self.processor = time.perf_counter(), processor_seconds()
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        if error is not None:
            return
        seconds, processor = time.perf_counter() - self.begin, processor_seconds() - self.processor
        compiled = self.total - self.kept
        spent = f", {processor:.0f} s of processor time" if os.name == "posix" else ""  # unknown elsewhere
        self._say(f"{compiled} of {self.total} objects compiled in {seconds:.0f} s{spent}")

    @contextlib.contextmanager
    def step(self, level: str, source: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        with self.lock:
            self.done += 1
            seconds = time.perf_counter() - begin
            self._say(f"[{self.done:3d}/{self.total}] {level:8} {Path(source).name:40} {seconds:5.1f} s")

    def skip(self) -> None:
        with self.lock:
            self.done += 1
            self.kept += 1

    def _say(self, line: str) -> None:
        print(line, flush=True)
        if PROGRESS:
            with open(PROGRESS, "a") as file:
                print(line, file=file)


def processor_seconds() -> float:
    """What programs that this process ran have taken so far."""
    times = os.times()
    return times.children_user + times.children_system


class BuildFresh(build_py):
    def run(self) -> None:
        # What an earlier build left here would be packed again: modules since deleted, an extension of other sources.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "murf_fast"), ignore_errors=True)
        super().run()


class BuildLevels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            # An extension of other sources is worse than none.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            if os.environ.get("MURF_FAST_REQUIRE_NATIVE") == "1" or SANITIZE:
                raise
            print(f"murf_fast: the C++ extension was NOT built: {error}", file=sys.stderr)
            print("murf_fast: the reference and Triton backends remain; `murf-fast info` has details", file=sys.stderr)

    def _build(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise RuntimeError("the kernels are made of GCC's vectors, which MSVC does not have")
        import pybind11

        openmp = self._openmp()
        jobs = [(BIND, [], None)]  # the longest comes first
        jobs += [(source, flags, level) for level, flags in LEVELS.items() for source in KERNEL_SOURCES]
        amx = X86 and sys.platform == "linux" and self._accepts(TILES, *AMX)
        jobs += [(source, AMX, "amx") for source in AMX_SOURCES if amx]
        jobs += [(source, [], None) for source in COMMON_SOURCES]
        python, plain = self._compilers([*ext.include_dirs, pybind11.get_include()])

        def compile_one(job):
            source, flags, level = job
            has = [(name, "1") for name, found in (("MURF_X86", X86), ("MURF_AMX", amx)) if found]
            macros = [("MURF_LEVEL", level)] if level else has
            options = [*FLAGS, *openmp, *flags]
            of_python = source == BIND
            compiler = python if of_python else plain

            def compile_to(folder: Path) -> Path:
                with progress.step(level or "common", source):
                    (made,) = compiler.compile(
                        [source], output_dir=str(folder), macros=macros, include_dirs=["csrc"], extra_postargs=options
                    )
                return Path(made)

            if not KEPT:
                return compile_to(Path(self.build_temp, level or "common"))
            described = (source, macros, options, (pybind11.__version__, sys.version) if of_python else None)
            kept = Path(KEPT, f"{object_key(compiler, described)}.o")
            if kept.exists():
                kept.touch()
                progress.skip()
            else:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                    compile_to(Path(folder)).replace(kept)  # in whole or not at all
            return kept

        with Progress(len(jobs)) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(o) for o in pool.map(compile_one, jobs)]
        if KEPT:
            for path in Path(KEPT).glob("*.o"):
                if path.stat().st_mtime < time.time() - KEPT_SECONDS:
                    path.unlink(missing_ok=True)
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        link_flags = [*openmp, *([f"-fsanitize={SANITIZE}"] if SANITIZE else ["-s"])]
        self.compiler.link_shared_object(objects, target, extra_postargs=link_flags, target_lang="c++")

    def _compilers(self, include: list[str]) -> tuple:
        """The compiler for sources that include Python's headers, and that for all others.

        On Linux neither gets the flags that Python itself was compiled with: debugging information costs a build much
        of its time, and no two Pythons would share an object. Elsewhere they hold what a platform needs.
        """
        python = copy.copy(self.compiler)
        if sys.platform == "linux":
            command = itertools.takewhile(lambda word: not word.startswith("-"), compile_command(self.compiler))
            given = shlex.split(" ".join(os.environ.get(name, "") for name in ("CXXFLAGS", "CPPFLAGS")))
            python.compiler_so = python.compiler_so_cxx = [*command, *given, "-fPIC"]
        plain = copy.copy(python)
        python.include_dirs = [*self.compiler.include_dirs, *include]
        plain.include_dirs = []
        return python, plain

    def _openmp(self) -> list[str]:
        """Without a runtime (Apple's compiler has none) kernels run in one thread; they sum in vectors all the same."""
        flags = [flag for flag in OPENMP if not (ONE_THREAD and flag == "-fopenmp")]
        return next(([flag] for flag in flags if self._accepts(OPENMP[flag], flag)), [])

    def _accepts(self, code: str, *flags: str) -> bool:
        """Whether the compiler makes a program of it."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[*flags])
                self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=[*flags])
            except Exception:
                return False
        return True

    def get_outputs(self) -> list[str]:
        return [o for o in super().get_outputs() if Path(o).exists()]


class SameBytes(sdist):
    """With SOURCE_DATE_EPOCH, an archive that does not tell when, where and by whom it was packed.

    setuptools heeds that variable in wheels only.
    """

    def make_archive(self, base_name: str, format: str, *arguments: object, **options: object) -> str:
        made = super().make_archive(base_name, format, *arguments, **options)
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch and format == "gztar":
            normalize(Path(made), int(epoch))
        return made


def normalize(archive: Path, time: int) -> None:
    """Packs it again: by name, one time, no owner, and of the permissions only whether a file is executed."""
    again = archive.with_name(f"{archive.name}.again")
    with (
        tarfile.open(archive) as given,
        again.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=time) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as packed,
    ):
        for member in sorted(given, key=lambda member: member.name):
            content = given.extractfile(member) if member.isfile() or member.islnk() else None
            if member.islnk():  # one file with two names, of which the other may come later now
                size = given.getmember(member.linkname).size
                member.type, member.linkname, member.size = tarfile.REGTYPE, "", size
            member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}  # fractions of seconds
            packed.addfile(member, content)
    again.replace(archive)


setup(
    packages=[*find_packages(include=["murf_fast", "murf_fast.*"]), "murf_fast.kernels"],
    package_dir={"murf_fast": "murf_fast", "murf_fast.kernels": "kernels"},
    ext_modules=[]
    if PURE
    else [Extension("murf_fast._native", sources=[*COMMON_SOURCES, *BIND_SOURCES, *KERNEL_SOURCES])],
    cmdclass={"build_py": BuildFresh, "build_ext": BuildLevels, "sdist": SameBytes},
)
