"""Run with an installed wheel first on the path: whether it is complete and works. Argument: the folder it lies in."""

import sys
import zipfile
from pathlib import Path

import torch

import murf_fast
from murf_fast import kernels, native

installed = Path(sys.argv[1]).resolve()
source = Path(__file__).resolve().parents[1]
(wheel,) = installed.parent.glob("*.whl")
names = set(zipfile.ZipFile(wheel).namelist())

expected = {str(p.relative_to(source)) for p in (source / "murf_fast").rglob("*.py")}
expected |= {f"murf_fast/{p.relative_to(source)}" for p in (source / "kernels").rglob("*.py")}
expected |= {str(p.relative_to(source)) for p in (source / "murf_fast" / "assets").iterdir()}
missing = sorted(expected - names)
assert not missing, f"not in the wheel: {missing}"

for module in (murf_fast, kernels, native.module()):
    assert Path(module.__file__).resolve().is_relative_to(installed), f"{module.__name__} is {module.__file__}"

features = [torch.rand(1, 3, n, n) for n in (2, 3)]
native_result = murf_fast.upsample_concat(features, (5, 7), backend="native")
torch.testing.assert_close(native_result, murf_fast.upsample_concat(features, (5, 7), backend="reference"))
print(f"{wheel.name}: {len(names)} files, complete; the native backend works from {native.module().__file__}")
