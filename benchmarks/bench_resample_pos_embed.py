from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("resample_pos_embed"), ids=lambda c: c.name)
def test_resample_pos_embed(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
