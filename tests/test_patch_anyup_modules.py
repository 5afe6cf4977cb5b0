"""murf_fast.patch.anyup on modules of any package: a copy of AnyUp's, and a stand-in with Falcon Perception's names."""

from __future__ import annotations

import sys
import textwrap
import types

import pytest
import test_patch
import torch
from torch.nn.attention.flex_attention import BlockMask

from murf_fast import patch, windows
from murf_fast.nn import AnyUp

FALCON = """
    class FlexCrossAttention(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            self.num_head = heads
            self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)
            self.attention = nn.Module()
            self.attention.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim))
            self.attention.in_proj_bias = nn.Parameter(torch.randn(3 * dim))

    class FalconAnyUp(AnyUp):
        def __init__(self, **options):
            super().__init__(**options)
            self.cross_decode.cross_attn = FlexCrossAttention(self.qk_dim, 2)

        def forward(self, images, features, attn_mask, output_size=None, vis_attn=False, q_chunk_size=None):
            return "Falcon itself"

    AnyUp = FalconAnyUp

    def build_upsampler_block_mask(H, W, h, w, ratio=0.1):
        rows, columns = ([(torch.arange(n) + 0.5) / n for n in (H, W)])
        bounds = [f((p + s * ratio).clamp(0, 1) * n).long() for p, n in ((rows, h), (columns, w))
                  for s, f in ((-1, torch.floor), (1, torch.ceil))]
        r0, r1 = (b[:, None].expand(H, W) for b in bounds[:2])
        c0, c1 = (b.expand(H, W) for b in bounds[2:])
        w_ = w

        def _mask_mod(b, head, q, k):
            y, x = q // W, q % W
            return (k // w_ >= r0[y, x]) & (k // w_ < r1[y, x]) & (k % w_ >= c0[y, x]) & (k % w_ < c1[y, x])

        return create_block_mask(_mask_mod, None, None, H * W, h * w, device="cpu")
"""


def module(name, *sources):
    made = types.ModuleType(name)
    source = "".join(textwrap.dedent(s) for s in sources)
    exec(compile(source, name, "exec"), made.__dict__)
    return made


@pytest.fixture
def copy():
    yield module("somebody.layers.upsampling", test_patch.MODEL)
    patch.unpatch()


@pytest.fixture
def falcon():
    source = "from torch.nn.attention.flex_attention import create_block_mask\n"
    yield module("vlm.anyup", source, test_patch.MODEL, FALCON)
    patch.unpatch()


def test_a_copy(copy):
    torch.manual_seed(0)
    model, (image, features) = copy.AnyUp(), (torch.randn(2, 3, 15, 18), torch.randn(2, 5, 4, 3))
    patch.anyup(copy)
    patch.anyup(copy)  # a second time changes nothing
    ours = AnyUp.from_checkpoint(model.state_dict(), num_heads=2, window_ratio=0.3)
    torch.testing.assert_close(model(image, features), ours(image, features))
    patch.unpatch()
    assert model(image, features) == "AnyUp itself"
    assert "anyup" not in sys.modules


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_falcon_perception(falcon, ratio):
    """Windows are the mask's, whatever the model's own."""
    torch.manual_seed(0)
    model, (image, features) = (
        falcon.AnyUp(window_ratio=0.2),
        (torch.rand(2, 3, 16, 20) * 2 - 1, torch.randn(2, 6, 4, 5)),
    )
    mask = falcon.build_upsampler_block_mask(16, 20, 4, 5, ratio)
    assert model(image, features, mask) == "Falcon itself"
    patch.anyup(falcon)
    options = {"num_heads": 2, "window_ratio": ratio, "values": "split", "image_range": (-1, 1)}
    ours = AnyUp.from_checkpoint(model.state_dict(), **options)
    arguments = {"images": image, "features": features, "attn_mask": mask}
    torch.testing.assert_close(model(**arguments), ours(image, features))
    half = falcon.build_upsampler_block_mask(8, 10, 4, 5, ratio)
    torch.testing.assert_close(model(image, features, half, (8, 10)), ours(image, features, (8, 10)))
    low = model.bfloat16()(image, features.bfloat16(), mask)  # images stay as they are, features are the model's
    assert low.dtype == torch.bfloat16
    assert low.shape == (2, 6, 16, 20)
    with pytest.raises(ValueError, match="`features` must have a multiple of 2 channels, got 5"):
        model(image, features[:, :5].bfloat16(), mask)
    patch.unpatch()
    assert model(image, features, mask) == "Falcon itself"


def test_masks_of_other_rules(falcon):
    """Are left to the original: windows are known from the tables of its own rule alone."""
    model, (image, features) = falcon.AnyUp(), (torch.rand(1, 3, 16, 20), torch.randn(1, 6, 4, 5))
    patch.anyup(falcon)
    other = falcon.create_block_mask(lambda b, h, q, k: q >= k, None, None, 320, 20, device="cpu")
    for mask in (None, other, falcon.build_upsampler_block_mask(8, 10, 4, 5)):
        assert model(image, features, mask) == "Falcon itself"


def test_windows_are_those_of_the_dense_rule(falcon):
    from murf_fast.patch._block_mask import windows_of

    mask = falcon.build_upsampler_block_mask(55, 23, 7, 4)
    assert isinstance(mask, BlockMask)
    found, expected = windows_of(mask, (55, 23), (7, 4)), windows.ratio((55, 23), (7, 4), 0.1)
    for a, b in zip(found.tables(), expected.tables(), strict=True):
        assert (a.multiplicity() == b.multiplicity()).all()


def test_modules_without_the_classes(copy):
    with pytest.raises(TypeError, match="`module` must be a module, got str"):
        patch.anyup("anyup.model")
    del copy.ResBlock
    with pytest.raises(ValueError, match=r"must hold the classes .*; somebody.layers.upsampling lacks ResBlock"):
        patch.anyup(copy)
