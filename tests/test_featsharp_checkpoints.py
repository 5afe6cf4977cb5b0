"""FeatSharp's checkpoints: the original's layout, spectral norms folded; and bad input of all its modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from guided import draw
from test_featsharp import seeded, stand_in
from test_multi_resolution_encoder import dinov2, model_of
from torch import nn

from murf_fast.nn import (
    PHIS,
    BiasBuffer,
    ConditionalBias,
    FeatSharp,
    FeatSharpBlock,
    FeatSharpUpsampler,
    MultiResolutionEncoder,
    blend_tiles,
    merge_tiles,
    split_tiles,
)
from murf_fast.nn.featsharp import _checkpoint


def of_a_training(sharp, *, ddp=False):
    """As the original stores it."""
    inner = "module." if ddp else ""
    state = {f"upsampler.{inner}{k}": v for k, v in sharp.upsampler.state_dict().items()}
    state |= {f"normalizer.{k}": v for k, v in sharp.normalizer.state_dict().items()}
    state |= {f"bias_buffer.{inner}{k}": v for k, v in sharp.bias_buffer.state_dict().items()}
    if sharp.conditional_bias is not None:
        state |= {f"cond_bias_transform.{inner}{k}": v for k, v in sharp.conditional_bias.state_dict().items()}
    args = {"type": "featsharp.inputs-jbu-tiles", "factor": 2, "normalizer": "phi-s"}
    return {"model_state": state, "upsample_args": args, "train_config": {"lr": 1e-3}}


def trained(channels=8, factor=2, *, conditional_bias=False, **options):
    normalizer, bias = PHIS.fit([3 + draw(40, channels)]), BiasBuffer(channels, 4, 3)
    torch.nn.init.normal_(bias.buffer)
    weight = draw(channels, 3, 4, 4)
    parts = {"normalizer": normalizer, "bias_buffer": bias}
    if conditional_bias:
        parts["conditional_bias"] = seeded(ConditionalBias(channels, 2))
    sharp = FeatSharp(stand_in(weight), factor, channels=channels, num_heads=2, **parts, **options)
    seeded(sharp.upsampler)
    return sharp.requires_grad_(False)


@pytest.mark.parametrize("ddp", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inputs": ("tiles", "bilinear"), "norm": False},
        {"factor": (2, 3)},
        {"factor": 4, "progressive": True},
        {"conditional_bias": True},
        {"inputs": ("jbu",)},
        {"inputs": ("bilinear",)},
    ],
    ids=str,
)
def test_a_trainings_checkpoint(options, ddp, tmp_path):
    sharp, images = trained(**options), draw(1, 3, 16, 16)
    torch.save(of_a_training(sharp, ddp=ddp), tmp_path / "featsharp.pth")
    inputs = options.get("inputs", ("jbu", "tiles"))
    given = {} if "tiles" in inputs else {"factor": options.get("factor", 2)}
    loaded = FeatSharp.from_checkpoint(tmp_path / "featsharp.pth", sharp.encoder, inputs, num_heads=2, **given)
    assert not loaded.training
    assert torch.equal(loaded(images), sharp(images))
    upsampler = FeatSharpUpsampler.from_checkpoint(tmp_path / "featsharp.pth", inputs, num_heads=2, **given)
    expected = sharp.upsampler.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in upsampler.state_dict().items())


def test_our_own_state_dict():
    """It holds the encoder, which is passed over."""
    model = model_of(dinov2)
    sharp = FeatSharp(model, 2, size=16, num_heads=8, normalizer=PHIS(24), bias_buffer=BiasBuffer(24, 4, 4))
    seeded(sharp.upsampler)
    images = draw(1, 3, 16, 16)
    loaded = FeatSharp.from_checkpoint(sharp.state_dict(), model, num_heads=8, size=16)
    assert torch.equal(loaded(images), sharp(images))
    bare = FeatSharpUpsampler.from_checkpoint(sharp.upsampler.state_dict(), num_heads=8)
    assert torch.equal(bare.ups[0].tile_pos, sharp.upsampler.ups[0].tile_pos)


def spectral(weight, parts, version):
    """A weight's parametrization as the training stores it, and the weight that it stands for."""
    original, chunks, state = draw(*weight.shape), [], {}
    state["original"] = original
    for i, chunk in enumerate(original.chunk(parts)):
        prefix = f"0.parts.{i}." if parts > 1 else "0."
        u, v, scale = F.normalize(draw(len(chunk)), dim=0), F.normalize(draw(chunk.shape[1]), dim=0), draw(1, 1) + 2
        state |= {f"{prefix}sn_scale": scale, f"{prefix}_u": u, f"{prefix}_v": v}
        if version is not None:
            state[f"{prefix}_sn_version"] = torch.tensor(version)
        factor = F.softplus(scale) + 0.05 if version == 2 else scale
        chunks.append(chunk * factor / (u @ chunk @ v + 1e-6))
    return state, torch.cat(chunks)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_spectral_norms_are_folded(version):
    sharp = trained()
    state = dict(sharp.upsampler.state_dict())
    for name, parts in {"attn.qkv": 3, "attn.proj": 1, "mlp.w12": 2, "mlp.w3": 1}.items():
        weight = state.pop(f"ups.0.block.{name}.weight")
        found, folded = spectral(weight, parts, version)
        state |= {f"ups.0.block.{name}.parametrizations.weight.{key}": value for key, value in found.items()}
        sharp.upsampler.get_submodule(f"ups.0.block.{name}").weight.copy_(folded)
    loaded = FeatSharpUpsampler.from_checkpoint(
        {"model_state": {f"upsampler.{k}": v for k, v in state.items()}}, num_heads=2
    )
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, sharp.upsampler.state_dict()[name], rtol=1e-5, atol=1e-6)
    del state["ups.0.block.attn.qkv.parametrizations.weight.0.parts.1._u"]
    with pytest.raises(ValueError, match=r"a spectral norm without ups.0.block.attn.qkv.*parts.1._u"):
        FeatSharpUpsampler.from_checkpoint(state, num_heads=2)


def test_torchs_own_spectral_norm_is_not_ours():
    """Another parametrization is refused, not read as a weight."""
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"without 0?.*sn_scale"):
        _checkpoint.folded("test", {f"x.{k}": v for k, v in module.state_dict().items()})


def changed(change):
    state = of_a_training(trained())["model_state"]
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: {"weight": torch.ones(3)}, "must hold ups.0.block.ls1.gamma, .* got the keys weight"),
        (
            lambda: changed(lambda s: s.update({"loss_transform.norm1.weight": torch.ones(8)})),
            "cond_bias_transform",
        ),
        (
            lambda: changed(lambda s: s.pop("upsampler.ups.0.block.attn.qkv.weight")),
            "missing keys: ups.0.block.attn.qkv",
        ),
        (lambda: changed(lambda s: s.update({"upsampler.ups.0.more": torch.ones(8)})), "unexpected keys: ups.0.more"),
        (
            lambda: changed(lambda s: s.pop("upsampler.ups.0.tile_pos")),
            "`inputs` must be those .* it has jbu, and a block",
        ),
        (lambda: changed(lambda s: s.update({"bias_buffer.buffer": torch.ones(8)})), r"buffer \(8,\) \(expected"),
        (
            lambda: changed(lambda s: s.pop("normalizer.alpha")),
            "PHIS: the checkpoint does not fit; missing keys: alpha",
        ),
        (lambda: changed(lambda s: s.update({"upsampler.ups.0.block.ls2.gamma": torch.ones(3, 1)})), "must hold"),
    ],
)
def test_another_layout(state, message):
    with pytest.raises(ValueError, match=message):
        FeatSharp.from_checkpoint(state(), stand_in(draw(8, 3, 4, 4)), num_heads=2)


def test_a_factor_of_1_has_nothing_to_upsample_with():
    """And so no weights of a joint bilateral upsampler."""
    module = seeded(FeatSharpUpsampler(8, 1, num_heads=2))
    again = FeatSharpUpsampler.from_checkpoint(module.state_dict(), num_heads=2)
    assert again.factor == (1, 1)
    with torch.no_grad():
        assert torch.equal(again(MAP, IMAGE, MAP), module.eval()(MAP, IMAGE, MAP))
    jbu = seeded(FeatSharpUpsampler(8, 1, ("jbu",), num_heads=2))
    FeatSharpUpsampler.from_checkpoint(jbu.state_dict(), ("jbu",), factor=1, num_heads=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_callables_see_the_dtype_of_the_images(dtype):
    seen = []

    def encoder(views):
        seen.append(views.dtype)
        return views.mean(1, keepdim=True)[:, :, ::4, ::4].expand(-1, 8, -1, -1).to(dtype)

    sharp = FeatSharp(encoder, 2, channels=8, size=16, num_heads=2).to(dtype)
    assert sharp(torch.rand(1, 3, 32, 32, dtype=dtype)).dtype == dtype
    assert seen == [dtype]


def test_under_vmap():
    module = seeded(FeatSharpUpsampler(8, 2, num_heads=2)).requires_grad_(False)
    tensors = [torch.stack([draw(*t.shape), draw(*t.shape)]) for t in (MAP, IMAGE, MOSAIC)]
    torch.testing.assert_close(
        torch.func.vmap(module)(*tensors), torch.stack([module(*(t[i] for t in tensors)) for i in (0, 1)])
    )


def test_inputs_are_those_of_the_weights():
    state = trained().upsampler.state_dict()
    with pytest.raises(ValueError, match=r"it has jbu and tiles, and a block of 16 channels for features of 8; got"):
        FeatSharpUpsampler.from_checkpoint(state, ("bilinear", "jbu", "tiles"))
    with pytest.raises(ValueError, match=r"`factor` must be that of the tiles, \(2, 2\), or None, got \(4, 4\)"):
        FeatSharpUpsampler.from_checkpoint(state, factor=4, num_heads=2)
    with pytest.raises(ValueError, match="`factor` is needed"):
        FeatSharpUpsampler.from_checkpoint(trained(inputs=("jbu",)).upsampler.state_dict(), ("jbu",))


MAP, MOSAIC, IMAGE = torch.ones(1, 8, 4, 3), torch.ones(1, 8, 8, 6), torch.ones(1, 3, 16, 12)


def upsampler(**options):
    return FeatSharpUpsampler(8, 2, num_heads=2, **options)


def whole(*args, **options):
    return FeatSharp(*args, num_heads=2, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: split_tiles(IMAGE, 0, 4), ValueError, "`factor` must be at least 1, got 0"),
        (lambda: split_tiles(IMAGE, 2.0, 4), TypeError, "`factor` must be an integer"),
        (lambda: split_tiles(IMAGE, 2, 0), ValueError, "`size` must be positive"),
        (lambda: split_tiles(IMAGE[0], 2, 4), ValueError, r"`images` must be \(B, 3, H, W\)"),
        (lambda: split_tiles(IMAGE, 2, 4, progressive=1), TypeError, "`progressive` must be True or False"),
        (lambda: merge_tiles(MAP, 2), ValueError, "`maps` must have a multiple of 5 views for a factor of 2, got 1"),
        (lambda: merge_tiles(3, 2), TypeError, "`maps` must be a tensor"),
        (lambda: BiasBuffer(8, 0, 3), ValueError, "`height` must be at least 1"),
        (lambda: BiasBuffer(8, 4, 3)(MAP[:, :4]), ValueError, "`features` must have 8 channels, got 4"),
        (lambda: FeatSharpBlock(17, 8), ValueError, "`inputs`, .* must be a multiple of 16 heads, got 17"),
        (lambda: FeatSharpBlock(16, 17), ValueError, "`channels` must be at most 16, got 17"),
        (lambda: FeatSharpBlock(16, 8, window=4), ValueError, "`window` must be odd, got 4"),
        (lambda: FeatSharpBlock(16, 8)(MAP), ValueError, "`x` must have 16 channels, got 8"),
        (lambda: FeatSharpBlock(16, 8)(torch.ones(1, 16, 2, 2).double()), TypeError, "`x` must have the dtype"),
        (lambda: upsampler(inputs=()), ValueError, "`inputs` must be one to three different ones"),
        (lambda: upsampler(inputs="jbu"), ValueError, "`inputs` must be one to three different ones"),
        (lambda: upsampler(inputs=("jbu", "jbu")), ValueError, "`inputs` must be one to three different ones"),
        (lambda: upsampler(inputs=[["jbu"]]), ValueError, "`inputs` must be one to three different ones"),
        (lambda: upsampler()(MAP[:, :7], IMAGE, MOSAIC[:, :7]), ValueError, "`low` must have 8 channels, got"),
        (lambda: whole(lambda x: x, 2, channels=8)(IMAGE), ValueError, "`encoder` must give maps of `channels`, 8"),
        (lambda: upsampler(inputs=("resfu",)), ValueError, r"`inputs` must be one of .* got 'resfu'"),
        (lambda: FeatSharpUpsampler(8, 0), ValueError, "`factor` must be at least 1, got 0"),
        (
            lambda: upsampler()(MAP, IMAGE, None),
            ValueError,
            "`tiles` must be one map for each of 1 levels, got NoneType",
        ),
        (lambda: upsampler()(MAP, IMAGE, MAP), ValueError, r"`tiles` must be .* \(1, 8, 8, 6\), got \(1, 8, 4, 3\)"),
        (lambda: upsampler()(MAP, IMAGE, MOSAIC.double()), TypeError, "`tiles` must have the dtype of `low`"),
        (
            lambda: upsampler()(MAP.half(), IMAGE, MOSAIC.half()),
            TypeError,
            "`low` must have the dtype of `its parameters`",
        ),
        (lambda: upsampler()(MAP, None, MOSAIC), TypeError, "`images` must be a tensor, got NoneType"),
        (lambda: upsampler()(MAP, IMAGE[:, :2], MOSAIC), ValueError, "`guidance` must have 3 channels, got 2"),
        (lambda: blend_tiles(MAP, MOSAIC, 2), ValueError, "`weight` must be within 0 and 1, got 2"),
        (lambda: blend_tiles(MAP, MOSAIC[:, :4]), ValueError, "`tiles` must have batch and channels of `low`"),
        (lambda: whole(3, 2, channels=8), TypeError, "`encoder` must be a module or a callable, got int"),
        (lambda: whole(lambda x: x, 2), ValueError, "`channels` is needed for a callable"),
        (lambda: whole(lambda x: x, 2, channels=8, mean=0), ValueError, "mean are for vision transformers"),
        (lambda: whole(lambda x: 3, 2, channels=8)(IMAGE), TypeError, r"`encoder\(views\)` must be a tensor, got int"),
        (
            lambda: whole(lambda x: x, 2, channels=8, normalizer=PHIS(12)),
            ValueError,
            "`normalizer` must have 8 channels",
        ),
        (
            lambda: whole(lambda x: x, 2, channels=8, bias_buffer=3),
            TypeError,
            "`bias_buffer` must be a BiasBuffer or None",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_input_of_vision_transformers():
    model = model_of(dinov2)
    for options, message in (
        ({"channels": 24}, "`channels` is known"),
        ({"size": 18}, r"`size` must be a multiple of the encoder's patch of 4 pixels .* got \(18, 18\)"),
        ({"layers": [0, 1]}, "must have one layer"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatSharp(model, 2, num_heads=8, **options)
    encoder = MultiResolutionEncoder(model, [16])
    with pytest.raises(ValueError, match="`encoder` has options of its own; leave out layers"):
        FeatSharp(encoder, 2, num_heads=8, layers=[0])
    with pytest.raises(ValueError, match="`size` is needed"):
        FeatSharp(MultiResolutionEncoder(model, scales=[1.0]), 2, num_heads=8)
    with pytest.raises(ValueError, match=r"`inputs`, .* must be a multiple of 16 heads, got 24"):
        FeatSharp(model, 2, inputs=("jbu",))


def test_what_is_read_by_weight_alone_is_refused_with_hooks():
    block, x = FeatSharpBlock(16, 8), torch.ones(1, 16, 3, 3)
    block.attn.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="`qkv` has hooks or a forward of its own, which would do nothing"):
        block(x)
    block.attn.qkv = nn.Sequential(nn.Linear(16, 48))
    with pytest.raises(ValueError, match="`qkv` is a Sequential, which would do nothing"):
        block(x)
