from __future__ import annotations

import pytest
from cases import CASES
from measure import run


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "gaussian_blur"], ids=lambda c: c.name)
def test_gaussian_blur(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
