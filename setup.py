"""Builds murf_fast: pure Python, Triton kernels (JIT, nothing to build) and one C++ extension.

Every kernel source is compiled once per instruction-set level into its own objects; csrc/dispatch.cpp picks a level at
run time. There is no torch header under csrc/, so the build needs only setuptools, pybind11 and a C++20 compiler. When
it fails the package is installed without the extension, and `murf-fast info` says what is missing.

MURF_FAST_SANITIZE=address,undefined builds the extension with those sanitizers (see .ci/run).
MURF_FAST_REQUIRE_NATIVE=1 turns a failed build of the extension into an error.
MURF_FAST_PURE=1 leaves the extension out: the wheel is one for every Python (see .ci/wheel).
MURF_FAST_OBJECTS=FOLDER keeps the objects of a build there, each by all that it is made of; the next build compiles
only what has changed, wherever its sources lie.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Kernels of csrc/level are compiled once per level, the rest of csrc once.
KERNEL_SOURCES = sorted(str(p) for p in Path("csrc", "level").glob("*.cpp"))
COMMON_SOURCES = sorted(str(p) for folder in ("csrc", "csrc/bind") for p in Path(folder).glob("*.cpp"))
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h"))

# The machine that is built for, which a cross build names (docs/wheels.md); this one's otherwise.
X86 = sysconfig.get_platform().endswith(("-x86_64", "-amd64"))
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC would stay at 256 bits for its default tuning.
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
LEVELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512} if X86 else {"baseline": []}
# A level of a few kernels, those that multiply in bfloat16; its others are those of AVX-512 (csrc/dispatch.cpp).
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
AMX_SOURCES = [f"csrc/level/{name}.cpp" for name in ("dense_attention", "pixel_conv_direct", "pixel_linear")]

# Contraction gives fused multiply-adds; no trapping math lets comparisons vectorize. Nothing here reorders sums.
# Vectors cross no boundary between translation units, so the ABI that -Wpsabi warns of does not matter.
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
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
SANITIZE = os.environ.get("MURF_FAST_SANITIZE", "")
PURE = os.environ.get("MURF_FAST_PURE") == "1"
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=undefined", "-g", "-O1"]


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
        jobs = [(sources, flags, level) for level, flags in LEVELS.items() for sources in KERNEL_SOURCES]
        amx = X86 and sys.platform == "linux" and self._accepts(TILES, *AMX)
        jobs += [(source, AMX, "amx") for source in AMX_SOURCES if amx]
        jobs += [(source, [], None) for source in COMMON_SOURCES]
        include = [*self.compiler.include_dirs, *ext.include_dirs, pybind11.get_include(), "csrc"]
        surroundings = self._surroundings(pybind11.__version__) if KEPT else b""

        def compile_one(job):
            source, flags, level = job
            has = [(name, "1") for name, found in (("MURF_X86", X86), ("MURF_AMX", amx)) if found]
            macros = [("MURF_LEVEL", level)] if level else has
            options = [*FLAGS, *openmp, *flags]

            def compile_to(folder: Path) -> Path:
                (made,) = self.compiler.compile(
                    [source], output_dir=str(folder), macros=macros, include_dirs=include, extra_postargs=options
                )
                return Path(made)

            if not KEPT:
                return compile_to(Path(self.build_temp, level or "common"))
            described = repr((source, macros, options)).encode()
            key = hashlib.sha256(b"\0".join([surroundings, described, Path(source).read_bytes()])).hexdigest()
            kept = Path(KEPT, f"{key}.o")
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                    compile_to(Path(folder)).replace(kept)  # in whole or not at all
            return kept

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(o) for o in pool.map(compile_one, jobs)]
        if KEPT:
            for old in {str(path) for path in Path(KEPT).glob("*.o")} - {*objects}:
                Path(old).unlink()
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        link_flags = [*openmp, *([f"-fsanitize={SANITIZE}"] if SANITIZE else ["-s"])]
        self.compiler.link_shared_object(objects, target, extra_postargs=link_flags, target_lang="c++")

    def _surroundings(self, pybind11: str) -> bytes:
        """What every object is made of: headers, by their names, the compiler, pybind11 and Python."""
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        version = subprocess.run([compiler[0], "--version"], check=True, capture_output=True).stdout
        named = repr((compiler, pybind11, sys.version)).encode()
        return b"\0".join([version, named, *(part for h in HEADERS for part in (h.encode(), Path(h).read_bytes()))])

    def _openmp(self) -> list[str]:
        """Without a runtime (Apple's compiler has none) kernels run in one thread; they sum in vectors all the same."""
        return next(([flag] for flag, program in OPENMP.items() if self._accepts(program, flag)), [])

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


setup(
    packages=[*find_packages(include=["murf_fast", "murf_fast.*"]), "murf_fast.kernels"],
    package_dir={"murf_fast": "murf_fast", "murf_fast.kernels": "kernels"},
    ext_modules=[] if PURE else [Extension("murf_fast._native", sources=[*COMMON_SOURCES, *KERNEL_SOURCES])],
    cmdclass={"build_py": BuildFresh, "build_ext": BuildLevels},
)
