"""murf_fast.patch on stand-ins that have the names of the originals' classes, functions and weights."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest
import torch

from murf_fast import patch
from murf_fast.nn import AnyUp
from murf_fast.patch import _attention_colors

EXTENSION = """
    import torch

    class AdaptiveConv(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input, filters):
            raise RuntimeError("FeatUp's extension was called")
"""
UPSAMPLERS = """
    import torch
    import torch.nn.functional as F
    from torch import nn
    from featup.adaptive_conv_cuda.adaptive_conv import AdaptiveConv

    class JBULearnedRange(nn.Module):
        def __init__(self, guidance_dim, feat_dim, key_dim, scale=2, radius=3):
            super().__init__()
            self.radius = radius
            taps = (2 * radius + 1) ** 2
            layers = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(o, o, 1))
            self.range_temp = nn.Parameter(torch.tensor(0.0))
            self.range_proj = layers(guidance_dim, key_dim)
            self.fixup_proj = layers(guidance_dim + taps, taps)
            self.sigma_spatial = nn.Parameter(torch.tensor(1.0))

        def forward(self, source, guidance):
            r, (B, _, H, W) = self.radius, guidance.shape
            p = self.range_proj(guidance)
            windows = F.unfold(F.pad(p, [r] * 4, mode="reflect"), 2 * r + 1).view(B, p.shape[1], -1, H, W)
            logits = torch.einsum("bctyx,bcyx->btyx", windows, p)
            similarity = torch.softmax(self.range_temp.exp().clamp(1e-4, 1e4) * logits, 1)
            d = torch.linspace(-1, 1, 2 * r + 1, dtype=guidance.dtype)
            near = torch.exp(-(d[:, None] ** 2 + d**2) / (2 * self.sigma_spatial**2)).view(1, -1, 1, 1)
            k = similarity * near
            k = k / k.sum(1, keepdim=True).clamp(1e-7)
            k = k + 0.1 * self.fixup_proj(torch.cat([k, guidance], 1))
            k = k.permute(0, 2, 3, 1).reshape(B, H, W, 2 * r + 1, 2 * r + 1)
            up = F.interpolate(source, (H, W), mode="bicubic", align_corners=False)
            return AdaptiveConv.apply(F.pad(up, [r] * 4, mode="reflect"), k)

    class JBUStack(nn.Module):
        def __init__(self, feat_dim):
            super().__init__()
            for name in ("up1", "up2", "up3", "up4"):
                self.add_module(name, JBULearnedRange(3, feat_dim, 32))
            self.fixup_proj = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(feat_dim, feat_dim, 1))

        def forward(self, source, guidance):
            for up in (self.up1, self.up2, self.up3, self.up4):
                h, w = source.shape[2:]
                source = up(source, F.adaptive_avg_pool2d(guidance, (2 * h, 2 * w)))
            return self.fixup_proj(source) * 0.1 + source
"""


@pytest.fixture(params=["built", "not built"])
def featup(request, tmp_path, monkeypatch):
    """A package `featup` on the path, with its extension or without."""
    folder = tmp_path / "featup" / "adaptive_conv_cuda"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    missing = "from featup.adaptive_conv_cuda import cuda_impl\n" if request.param == "not built" else ""
    (folder / "adaptive_conv.py").write_text(missing + textwrap.dedent(EXTENSION))
    (folder.parent / "upsamplers.py").write_text(textwrap.dedent(UPSAMPLERS))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield request.param
    patch.unpatch()
    for name in [n for n in sys.modules if n.split(".")[0] == "featup"]:
        del sys.modules[name]


def unfolded(input, filters):
    batch, height, width, diameter, _ = filters.shape
    windows = torch.nn.functional.unfold(input, diameter).view(batch, input.shape[1], -1, height, width)
    return torch.einsum("bctyx,byxt->bcyx", windows, filters.flatten(3))


def gradients(function, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    result = function(*leaves)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, direction)]


def test_featup(featup):
    patch.featup()
    patch.featup()  # a second time changes nothing
    from featup.upsamplers import AdaptiveConv, JBUStack

    torch.manual_seed(0)
    input, filters = torch.randn(2, 5, 10, 13), torch.randn(2, 4, 7, 7, 7)
    actual = gradients(AdaptiveConv.apply, input, filters)
    expected = gradients(unfolded, input.double(), filters.double())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    assert (actual[2].flatten(3).abs().amax((0, 1, 2)) > 0).all()  # all of the 49 taps

    stack = JBUStack(6)
    source, guidance = torch.randn(2, 6, 2, 3), torch.randn(2, 3, 40, 40)
    for training in (False, True):
        stack.train(training)
        torch.manual_seed(1)
        fast = gradients(stack, source, guidance)
        forward = JBUStack.forward
        patch.unpatch()
        assert JBUStack.forward is not forward
        AdaptiveConv.apply = staticmethod(unfolded)
        torch.manual_seed(1)
        slow = gradients(stack.double(), source.double(), guidance.double())
        del AdaptiveConv.apply
        stack.float()
        patch.featup()
        torch.testing.assert_close(AdaptiveConv.apply(input, filters), actual[0])
        for a, e in zip(fast, slow, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_unpatch_puts_everything_back(featup):
    names = {n for n in sys.modules if n.startswith("featup")}
    patch.featup()
    from featup.upsamplers import AdaptiveConv, JBUStack

    patch.unpatch()
    patch.unpatch()
    source, guidance = torch.randn(1, 6, 2, 3), torch.randn(1, 3, 40, 40)
    if featup == "built":
        with pytest.raises(RuntimeError, match="FeatUp's extension was called"):
            JBUStack(6)(source, guidance)
    else:
        assert "featup.adaptive_conv_cuda.adaptive_conv" not in sys.modules
        with pytest.raises(AttributeError):
            AdaptiveConv.apply(source, guidance)
    assert names <= set(sys.modules)


def test_without_featup(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ModuleNotFoundError, match="the package featup is not installed"):
        patch.featup()


MODEL = """
    import torch
    from torch import nn

    class ResBlock(nn.Module):
        def __init__(self, inputs, dim):
            super().__init__()
            half = lambda n: [nn.GroupNorm(8, n), nn.SiLU(), nn.Conv2d(n, dim, 1, bias=False)]
            self.block = nn.Sequential(*half(inputs), *half(dim))
            self.shortcut = nn.Identity() if inputs == dim else nn.Conv2d(inputs, dim, 1, bias=False)

    class LearnedFeatureUnification(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.basis = nn.Parameter(torch.randn(dim, 1, 5, 5))

    def encoder(first, dim, inputs=None):
        return nn.Sequential(first, ResBlock(inputs or dim, dim), ResBlock(dim, dim))

    class CrossAttentionBlock(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
            self.cross_attn = nn.Module()
            self.cross_attn.norm_q, self.cross_attn.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)
            self.cross_attn.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    class NATTENCrossAttentionBlock(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
            self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)
            self.cross_attn = nn.Module()
            self.cross_attn.num_heads = heads
            self.cross_attn.q_proj, self.cross_attn.k_proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)

    class AnyUp(nn.Module):
        def __init__(self, qk_dim=16, num_heads=2, window_ratio=0.3, use_natten=False, lfu_dim=None):
            super().__init__()
            self.qk_dim, self.lfu_dim, self.window_ratio = qk_dim, lfu_dim or qk_dim, window_ratio
            conv = lambda i, k: nn.Conv2d(i, qk_dim, k, padding=k // 2, padding_mode="reflect", bias=False)
            for name, first in (("image", conv(3, 1)), ("key", conv(qk_dim, 1)), ("query", conv(qk_dim, 1))):
                self.add_module(f"{name}_encoder", encoder(first, qk_dim))
            self.key_features_encoder = encoder(LearnedFeatureUnification(self.lfu_dim), qk_dim, self.lfu_dim)
            self.cross_decode = (NATTENCrossAttentionBlock if use_natten else CrossAttentionBlock)(qk_dim, num_heads)
            self.aggregation = encoder(conv(2 * qk_dim, 3), qk_dim)
            self.rope = nn.Module()
            self.rope.freqs = nn.Parameter(torch.randn(2, qk_dim))

        def forward(self, image, features, output_size=None, vis_attn=False, q_chunk_size=None):
            return "AnyUp itself"
"""


@pytest.fixture
def anyup(tmp_path, monkeypatch):
    """A package `anyup` on the path; its model."""
    (tmp_path / "anyup").mkdir()
    (tmp_path / "anyup" / "__init__.py").write_text("")
    (tmp_path / "anyup" / "model.py").write_text(textwrap.dedent(MODEL))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module("anyup.model").AnyUp
    patch.unpatch()
    for name in [n for n in sys.modules if n.split(".")[0] == "anyup"]:
        del sys.modules[name]


@pytest.mark.parametrize(("use_natten", "lfu_dim"), [(False, None), (True, None), (False, 32)])
def test_anyup(anyup, use_natten, lfu_dim):
    torch.manual_seed(0)
    model = anyup(use_natten=use_natten, lfu_dim=lfu_dim)
    image, features = torch.randn(2, 3, 15, 18), torch.randn(2, 5, 4, 3)
    assert model(image, features) == "AnyUp itself"
    patch.anyup()
    patch.anyup()  # a second time changes nothing
    ours = AnyUp.from_checkpoint(
        model.state_dict(), num_heads=2, window_ratio=0.3, windows="natten" if use_natten else "dense"
    )
    for size in (None, (9, 12), torch.Size((20, 21))):
        expected = gradients(lambda i, f, size=size: ours(i, f, size and tuple(size)), image, features)
        actual = gradients(lambda i, f, size=size: model(i, f, size, q_chunk_size=4), image, features)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
    with pytest.raises(ValueError, match="`image` must have 3 channels, got 5"):
        model(features, features)
    patch.unpatch()
    assert model(image, features) == "AnyUp itself"


def test_attention_in_colors(anyup, monkeypatch):
    """``vis_attn=True`` shows the mean color of what a pixel attends to, and changes nothing."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    torch.manual_seed(0)
    model, (image, features) = anyup(), (torch.randn(2, 3, 15, 18), torch.randn(2, 5, 4, 3))
    patch.anyup()
    with torch.no_grad():
        assert torch.equal(model(image, features, (9, 8), vis_attn=True), model(image, features, (9, 8)))
        (figure,) = shown
        reference, output = (torch.from_numpy(axis.get_images()[0].get_array().data.copy()) for axis in figure.axes)
        assert reference.shape == (4, 3, 3)
        # The middle of the plane is grey: the cube of OKLab's lightness, in all three channels.
        middle = _attention_colors.oklab_plane((2, 2))[:, 1, 1]
        torch.testing.assert_close(middle, torch.full((3,), 0.7**3), atol=1e-3, rtol=0)
        ours = AnyUp.from_checkpoint(model.state_dict(), num_heads=2, window_ratio=0.3)
        colors = _attention_colors.oklab_plane((4, 3))[None]
        expected = _attention_colors.encoded(ours(image[:1], features[:1], (9, 8), values=colors)[0])
        torch.testing.assert_close(output, expected.permute(1, 2, 0))
        pyplot.close(figure)
        with pytest.warns(UserWarning, match="shows nothing for NATTEN's windows"):
            anyup(use_natten=True)(image, features, vis_attn=True)


def test_anyup_as_it_was(anyup):
    """What this library does not have is left to the original."""
    patch.anyup()
    image, features = torch.randn(1, 3, 15, 18), torch.randn(1, 5, 4, 3)
    changed = anyup()
    changed.key_encoder[1].register_forward_hook(lambda *_: None)
    assert changed(image, features) == "AnyUp itself"
    assert anyup().bfloat16()(image.bfloat16(), features.bfloat16()).dtype == torch.bfloat16


def test_without_anyup(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ModuleNotFoundError, match="the package anyup is not installed"):
        patch.anyup()
