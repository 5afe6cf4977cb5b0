from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("neighborhood_attention"), ids=lambda c: c.name)
def test_neighborhood_attention(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
