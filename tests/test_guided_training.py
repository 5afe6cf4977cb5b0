"""Training the upsamplers on several processes: every parameter that is not frozen gets a gradient."""

from __future__ import annotations

import pytest
from guided import draw, seeded
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from murf_fast.nn import JAFAR, NAF, AnyUp, FeatSharpJBU, JBUStack

BUILD = {
    "AnyUp": lambda: AnyUp(16, num_heads=2),
    "NAF": lambda: NAF(32, num_heads=2, kernel_size=3),
    "JAFAR": lambda: JAFAR(6, qk_dim=16),
    "JBUStack": lambda: JBUStack(6, norm=True, radius=1),
    "FeatSharpJBU": lambda: FeatSharpJBU(4),
}


@pytest.fixture
def alone(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def trained(name, model):
    """Two steps: the second raises if a gradient of the first is missing."""
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        image, features = draw(1, 3, 16, 16), draw(1, 6, 4, 4)
        arguments = (features, image) if "JBU" in name else (image, features)
        wrapped(*arguments).square().mean().backward()


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch comes without gloo"
)
@pytest.mark.parametrize("name", BUILD)
def test_distributed_without_unused_parameters(name, alone):
    model = seeded(BUILD[name]()).train()
    trained(name, model)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert sum(not p.requires_grad for p in model.parameters()) == (2 if name == "AnyUp" else 0)
    if name == "AnyUp":
        model.requires_grad_(True)  # what there is to see if it were not frozen
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            trained(name, model)
