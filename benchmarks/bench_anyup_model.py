from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("anyup_model"), ids=lambda c: c.name)
def test_anyup_model(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
