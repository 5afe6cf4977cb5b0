from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("k_center_greedy"), ids=lambda c: c.name)
def test_k_center_greedy(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
