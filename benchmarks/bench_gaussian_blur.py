from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("gaussian_blur"), ids=lambda c: c.name)
def test_gaussian_blur(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
