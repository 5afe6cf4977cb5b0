from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("window_attention"), ids=lambda c: c.name)
def test_window_attention(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
