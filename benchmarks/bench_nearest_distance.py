from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("nearest_distance"), ids=lambda c: c.name)
def test_nearest_distance(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
