from __future__ import annotations

import pytest
from cases import CASES
from measure import run


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "image_to_patches"], ids=lambda c: c.name)
def test_image_to_patches(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
