from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("joint_bilateral_upsample"), ids=lambda c: c.name)
def test_joint_bilateral_upsample(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
