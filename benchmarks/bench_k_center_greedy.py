from __future__ import annotations

import pytest
from cases import CASES
from measure import run


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "k_center_greedy"], ids=lambda c: c.name)
def test_k_center_greedy(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
