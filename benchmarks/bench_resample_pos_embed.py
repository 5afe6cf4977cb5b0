from __future__ import annotations

import pytest
from cases import CASES
from measure import run


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "resample_pos_embed"], ids=lambda c: c.name)
def test_resample_pos_embed(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
