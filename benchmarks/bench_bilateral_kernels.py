from __future__ import annotations

import pytest
from cases import CASES
from measure import run


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.op == "bilateral_kernels" and "cpu" in c.devices], ids=lambda c: c.name
)
def test_bilateral_kernels(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
