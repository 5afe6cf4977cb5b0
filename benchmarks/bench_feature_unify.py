from __future__ import annotations

import pytest
from cases import cpu_cases
from measure import run


@pytest.mark.parametrize("case", cpu_cases("feature_unify"), ids=lambda c: c.name)
def test_feature_unify(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
