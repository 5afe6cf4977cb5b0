"""pytest on a sanitized build of the extension. Arguments: the folder it lies in, and pytest's own."""

import sys
from pathlib import Path

import pytest

from murf_fast import _extension

folder, *arguments = sys.argv[1:]
extension = Path(_extension.module().__file__).resolve()
assert extension.is_relative_to(Path(folder).resolve()), f"the sanitized build is not the one imported, but {extension}"
assert b"__asan_" in extension.read_bytes(), f"{extension} was not built with AddressSanitizer"

# The kernels' own tests: compilers, registration, float64, Triton, the command line, files, checks of arguments, models
# and the benchmarks run no C++ of ours, or the same again, and results of gigabytes only run more of it.
SKIPPED = (
    "compile",
    "registration",
    "gradcheck",
    "triton",
    "checked_memory",
    "launchers",
    "gpu",
    "cli",
    "packaging",
    "bench",
    "test_tables",
    "ablations",
    "roofline",
    "test_extract",
    "test_features",
    "onnx",
    "export",
    "flops",
    "pretrained",
    "test_docs",
    "test_examples",
    "overlap",
    "assembler",
    "project_files",
    "reprs",
    "large",
    "detector",
    "grow",
    "live_model",
    "checkpoints",
    "early_checks",
    "guided_modules",
    "misuse",
    "derivatives",
    "every_op",
    "image_files",
    "anomaly",
    "process_defaults",
    "threads",
    "scales",
    "dtypes",
    "kernels_are_tested",
    "training",
    "demo",
    "peak_memory",
    "families",
    "depth_losses",
    "featsharp",
    "phis",
    "regularizers",
    "multi_view",
    "adapted_models",
    "mixed_sizes",
    "graphed",
    "attention_kinds",
    "products_of_a_pass",
    "interrupts",
    "emulated",
)
kernels = " and ".join(f"not {word}" for word in SKIPPED)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--fuzz-cases", "1000", "-k", kernels, *arguments]))
