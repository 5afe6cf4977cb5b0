"""What the modules that upsample along an image share: other values, linear heads, many maps, regions, attention maps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from guided import LargestTensor, draw, seeded
from util import assert_within_budget

import murf_fast
from murf_fast import backends
from murf_fast.nn import JAFAR, NAF, AnyUp
from murf_fast.nn.guided import _attend

BUILD = {
    "AnyUp": lambda: AnyUp(16, num_heads=2),
    "AnyUp, natten": lambda: AnyUp(16, num_heads=2, windows="natten"),
    "NAF": lambda: NAF(32, num_heads=2, kernel_size=3),
    "JAFAR": lambda: JAFAR(6, qk_dim=16),
}
SIZES = {"the image's": None, "larger": (25, 31), "smaller": (13, 9)}
REGIONS = {"corner": (0, 0, 5, 4), "inside": (3, 2, 6, 5), "border": (7, 0, 6, 9), "pixel": (12, 8, 1, 1)}
every_module = pytest.mark.parametrize("name", BUILD)
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def built(name):
    return seeded(BUILD[name]()).requires_grad_(False)


def inputs(batch=2):
    return draw(batch, 3, 20, 17), draw(batch, 6, 5, 4)


def precise(model):
    return copy.deepcopy(model).double()


def doubled(*tensors):
    return [None if t is None else t.double() for t in tensors]


def attention_of(model, image, features, size):
    """(B, N, pixels, keys): the model's own answer to one unit value a key, in float64, head by head."""
    batch, (h, w) = features.shape[0], features.shape[2:]
    units = torch.eye(h * w, dtype=torch.float64).view(1, h * w, h, w).expand(batch, -1, -1, -1)
    model, heads = precise(model), model.num_heads
    if isinstance(model, NAF):
        whole = model(image.double(), features.double(), size, values=units.repeat(1, heads, 1, 1))
        return whole.unflatten(1, (heads, h * w)).flatten(3).mT
    return model(image.double(), features.double(), size, values=units).flatten(2).mT[:, None]


@every_module
@every_size
def test_values_are_weighed_with_the_features_attention(name, size):
    model, (image, features) = built(name), inputs()
    values = draw(2, 8, 5, 4, seed=3)
    p = attention_of(model, image, features, size)
    result, again = model(image, features, size, values=values), model(image, features, size, values=features)
    torch.testing.assert_close(p.sum(3), torch.ones_like(p[..., 0]))
    for actual, v in ((result, values), (again, features)):
        v = v.double().flatten(2).unflatten(1, (p.shape[1], -1))
        oracle = torch.einsum("bnpk,bnck->bncp", p, v).flatten(1, 2).view(actual.shape)
        assert_within_budget(actual, oracle, model(image, features, size, values=actual.new_ones(2, 8, 5, 4))[:, :1] * 0 + oracle.float())
    assert torch.equal(again, model(image, features, size))
