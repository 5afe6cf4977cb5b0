from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("upsample_cross_entropy"), ids=lambda c: c.name)
def test_upsample_cross_entropy(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
