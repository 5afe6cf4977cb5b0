from __future__ import annotations

import pytest
from cases import CASES
from measure import run


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "linear_head"], ids=lambda c: c.name)
def test_linear_head(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
