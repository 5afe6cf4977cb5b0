from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("adaptive_conv"), ids=lambda c: c.name)
def test_adaptive_conv(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
