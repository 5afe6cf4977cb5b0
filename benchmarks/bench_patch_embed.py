from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("patch_embed"), ids=lambda c: c.name)
def test_patch_embed(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
