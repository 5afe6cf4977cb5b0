from __future__ import annotations

import pytest
from cases import CASES
from measure import run


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "upsample_mean"], ids=lambda c: c.name)
def test_upsample_mean(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
