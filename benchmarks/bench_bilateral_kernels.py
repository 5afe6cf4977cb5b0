from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("bilateral_kernels"), ids=lambda c: c.name)
def test_bilateral_kernels(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
