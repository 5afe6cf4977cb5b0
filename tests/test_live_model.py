"""Whatever was put into a model, before or after the encoder was made, acts as in the model's own forward."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multi_resolution_encoder import (
    FAMILIES,
    MEAN,
    OWN,
    PATCH,
    SMALL,
    STD,
    DinoVisionTransformer,
    HubBlock,
    VisionTransformer,
    clip,
    dinov2,
    dinov2_registers,
    dinov3,
    hub,
    model_of,
    original,
    siglip,
    timm_layout,
    transformers,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit import _blocks
from murf_fast.nn.vit.families._transformers import Transformers
from murf_fast.nn.vit.families.hub import Hub

SIZES = [(12, 20), (24, 24)]
CALLED = [dinov2, dinov2_registers, dinov3, siglip, *OWN]  # siglip2's own forward takes patches


def images_of():
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def encoder_of(model, sizes=SIZES, **options):
    return MultiResolutionEncoder(model, sizes, mean=MEAN, std=STD, norm=True, **options)


def own(build, model, size, layer=2, norm=True):
    """Tokens of the model itself. ``original`` takes pixels of 0 to 255."""
    return original(build, model, 255 * images_of(), size, layer, norm)


def assert_as_in_the_model(build, model, encoder, layers=(2,)):
    features = encoder(images_of())
    for s, size in enumerate(encoder.sizes):
        for i, layer in enumerate(layers):
            expected = own(build, model, size, layer)
            torch.testing.assert_close(features.tokens[i].block(s), expected, rtol=1e-4, atol=1e-4)


def changed(output):
    """A module's output, made another one."""
    if isinstance(output, torch.Tensor):
        return 0.8 * output + 0.1
    if isinstance(output, tuple):
        return (changed(output[0]), *output[1:])
    output["last_hidden_state"] = changed(output["last_hidden_state"])
    return output


def hook_after(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: changed(output))


def hook_before(model, name):
    def hook(module, inputs, options):
        if inputs:
            return (0.9 * inputs[0], *inputs[1:]), options
        key = next(k for k, value in options.items() if isinstance(value, torch.Tensor))
        return inputs, {**options, key: 0.9 * options[key]}

    model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)


def own_forward(model, name):
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *inputs, **options: changed(forward(*inputs, **options))


def wrapped(model, name):
    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def __getattr__(self, key):
            return super().__getattr__(key) if key in ("base", "forward") else getattr(super().__getattr__("base"), key)

        def forward(self, *inputs, **options):
            return changed(self.base(*inputs, **options))

    model.set_submodule(name, Wrapper(model.get_submodule(name)))


def class_of_its_own(model, name):
    module = model.get_submodule(name)

    class Other(type(module)):
        def forward(self, *inputs, **options):
            return changed(super().forward(*inputs, **options))

    module.__class__ = Other


def parametrized(model, name):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = model.get_submodule(name)
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        nn.utils.parametrize.register_parametrization(module, "weight", Twice())


CHANGES = [hook_after, hook_before, own_forward, wrapped, class_of_its_own, parametrized]


def called_modules(build, model):
    """Names of the modules that the model calls before and in its final norm."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if name and not name.startswith(("head", "vision_model.head")):
            handles.append(module.register_forward_hook(lambda module, inputs, output, name=name: seen.append(name)))
    own(build, model, SIZES[0])
    for handle in handles:
        handle.remove()
    return sorted(set(seen))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_change_of_every_module_acts(data):
    build = data.draw(st.sampled_from([*CALLED, clip]))
    model = model_of(build)
    names = called_modules(build, model)
    change, name = data.draw(st.sampled_from(CHANGES)), data.draw(st.sampled_from(names))
    when = data.draw(st.sampled_from(["before", "after"]))
    with torch.no_grad():
        encoder = None if when == "before" else encoder_of(model)
        change(model, name)
        encoder = encoder or encoder_of(model)
        assert_as_in_the_model(build, model, encoder)


@pytest.mark.parametrize("build", CALLED, ids=lambda f: f.__name__)
def test_hooks_see_what_the_model_would_give_them(build):
    model = model_of(build)
    encoder, seen = encoder_of(model), []

    def hook(module, inputs, output, name):
        shapes = tuple(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))
        output = output if isinstance(output, torch.Tensor) else output[0]
        seen.append((name, shapes, output.detach().double().abs().sum().item()))

    for name, module in model.named_modules():
        if name and not name.startswith(("head", "vision_model.head")):
            module.register_forward_hook(lambda m, i, o, name=name: hook(m, i, o, name))
    with torch.no_grad():
        for size in SIZES:
            own(build, model, size, norm=build in OWN)  # the others call their norm by themselves
        expected = sorted(seen)
        seen.clear()
        encoder(images_of())
    assert [(name, shapes) for name, shapes, _ in sorted(seen)] == [(n, s) for n, s, _ in expected]
    for (_, _, a), (_, _, b) in zip(sorted(seen), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("build", [dinov2, dinov3, hub, timm_layout], ids=lambda f: f.__name__)
def test_hooks_on_all_modules(build):
    model = model_of(build)
    encoder, blocks = encoder_of(model), list(encoder_of(model).family.blocks)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: changed(output) if module in (blocks[1], encoder.family.final_norm) else None
    )
    try:
        with torch.no_grad():
            assert_as_in_the_model(build, model, encoder)
    finally:
        handle.remove()


@pytest.mark.parametrize("build", FAMILIES, ids=lambda f: f.__name__)
def test_a_plain_model_runs_packed(build, monkeypatch):
    model = model_of(build)
    encoder = encoder_of(model, layers=[0, 2])

    def called(*arguments):
        raise AssertionError("a module was called as a whole")

    for kind in (Transformers, Hub):
        monkeypatch.setattr(kind, "call_block", called)
        monkeypatch.setattr(kind, "call_container", called)
        monkeypatch.setattr(kind, "call_embeddings", called)
        monkeypatch.setattr(kind, "call_rope", called)
    with torch.no_grad():
        encoder(images_of())


def test_hidden_states_asked_for_once_do_not_end_packing(monkeypatch):
    model = model_of(dinov2)
    encoder = encoder_of(model)
    model(torch.rand(1, 3, 24, 24), output_hidden_states=True)
    monkeypatch.setattr(Transformers, "call_block", None)
    encoder(images_of())


def test_layers_of_a_hooked_encoder():
    model = model_of(dinov2)
    encoder = encoder_of(model, layers=[0, 2])
    model.encoder.register_forward_hook(lambda module, inputs, output: changed(output))
    with torch.no_grad():
        features = encoder(images_of())
        torch.testing.assert_close(features.tokens[0].block(1), own(dinov2, model, SIZES[1], 0), rtol=1e-4, atol=1e-4)
    timm = VisionTransformer().eval()
    timm.blocks = nn.Sequential(*timm.blocks)
    encoder = MultiResolutionEncoder(timm, SIZES, layers=[0, 2])
    timm.blocks.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(ValueError, match="`layers` must be the last block"):
        encoder(images_of())


@pytest.mark.parametrize("build", [dinov2, hub], ids=lambda f: f.__name__)
def test_a_class_patched_later(build, monkeypatch):
    model = model_of(build)
    encoder = encoder_of(model)
    kind = type(encoder.family.blocks[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *inputs, **options: changed(forward(self, *inputs, **options)))
    with torch.no_grad():
        assert_as_in_the_model(build, model, encoder)
        assert_as_in_the_model(build, model, encoder_of(model))


def replica_of(module):
    """What ``torch.nn.parallel.replicate`` makes on each device: the parameters are attributes, and no leaves."""
    copies = {}
    for part in module.modules():
        replica = copies[part] = part._replicate_for_data_parallel()
        replica._former_parameters = OrderedDict()
    for part, replica in copies.items():
        for name, child in part._modules.items():
            replica._modules[name] = None if child is None else copies[child]
        for name, parameter in part._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, 1.1 * parameter)
                replica._former_parameters[name] = getattr(replica, name)
    return copies[module]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("build", [dinov2, dinov3, siglip, hub, timm_layout], ids=lambda f: f.__name__)
def test_replicas_run_on_their_own_parameters(build, trains):
    model = model_of(build)
    names = [n for n, _ in model.named_parameters() if ".1." in n]
    for name in names:
        model.get_parameter(name).requires_grad_(trains)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.1)
    features = replica_of(encoder_of(model))(images_of())
    expected = encoder_of(scaled)(images_of())
    for a, b in zip(features.maps, expected.maps, strict=True):
        torch.testing.assert_close(a, b)
    if trains:
        features.maps[0].sum().backward()
        assert all(model.get_parameter(n).grad is not None for n in names)


class Adapter(nn.Module):
    """What peft puts in the place of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("build", [dinov2, dinov3, siglip, clip, hub], ids=lambda f: f.__name__)
def test_gradients_of_adapters(build, when):
    torch.manual_seed(1)
    model = model_of(build)
    encoder = encoder_of(model) if when == "after" else None
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith("head")]
    for name in linears:
        model.set_submodule(name, Adapter(model.get_submodule(name)))
    adapters = [p for n, p in model.named_parameters() if n.endswith(("a.weight", "b.weight"))]
    encoder = encoder or encoder_of(model)
    sum(m.square().sum() for m in encoder(images_of()).maps).backward()
    actual = [p.grad.clone() for p in adapters if p.grad is not None]
    assert len(actual) == len(adapters) >= 2 * 3 * 4
    model.zero_grad()
    prefix = 0 if encoder.family.prefix() is None else len(encoder.family.prefix())
    sum(own(build, model, size)[:, prefix:].square().sum() for size in SIZES).backward()
    for grad, p in zip(actual, adapters, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()))


def test_what_a_hook_keeps_is_not_overwritten():
    model = model_of(dinov2)
    encoder, kept = encoder_of(model, SIZES[:1]), []
    block = model.encoder.layer[0]
    block.register_forward_hook(lambda module, inputs, output: kept.extend([inputs[0], output]))
    with torch.no_grad():
        encoder(images_of())
    with torch.no_grad():
        torch.testing.assert_close(kept[1], own(dinov2, model, SIZES[0], 0, norm=False), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept[1], block(kept[0]), rtol=1e-4, atol=1e-4)


def test_a_learned_vector_in_a_frozen_model():
    model = model_of(hub)
    encoder, vector = encoder_of(model), nn.Parameter(torch.zeros(24))
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output + vector)
    encoder(images_of()).maps[0].square().sum().backward()
    actual, vector.grad = vector.grad, None
    own(hub, model, SIZES[0])[:, 1:].square().sum().backward()
    torch.testing.assert_close(actual, vector.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("build", [dinov2, dinov3, siglip, timm_layout], ids=lambda f: f.__name__)
def test_checkpoints(build):
    model = model_of(build).train().requires_grad_(True)
    encoder, calls = encoder_of(model), []
    if build is timm_layout:
        model.grad_checkpointing = True
    else:
        model.config.pos_embed_shift = model.config.pos_embed_jitter = model.config.pos_embed_rescale = None
        for module in model.modules():  # as gradient_checkpointing_enable(), whose name depends on the version
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    mlp = encoder.family.layer(encoder.family.blocks[1]).mlp
    mlp.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    loss = sum(m.sum() for m in encoder(images_of()).maps)
    assert len(calls) == len(SIZES)
    loss.backward()
    assert len(calls) == 2 * len(SIZES)


def test_checkpoints_of_packed_blocks(monkeypatch):
    model, calls, functional = model_of(timm_layout).requires_grad_(True), [], _blocks._functional
    model.grad_checkpointing = True
    encoder = encoder_of(model)
    monkeypatch.setattr(_blocks, "_functional", lambda *arguments: (calls.append(1), functional(*arguments))[1])
    loss = sum(m.square().sum() for m in encoder(images_of()).maps)
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 6


@pytest.mark.parametrize("how", ["hook", "forward", "class"])
def test_what_is_put_on_the_model_itself_is_refused(how):
    model = model_of(dinov2)
    encoder = encoder_of(model)
    if how == "hook":
        model.register_forward_hook(lambda module, inputs, output: None)
    elif how == "forward":
        model.forward = lambda pixels: None
    else:
        model.__class__ = type("Other", (type(model),), {"forward": lambda self, pixels: None})
    with pytest.raises(ValueError, match="is never called itself"):
        encoder(images_of())


def test_attention_of_the_user():
    model = model_of(dinov2)
    encoder = encoder_of(model)

    def uniform(module, query, key, value, mask, **options):
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2), None

    transformers.AttentionInterface.register("uniform", uniform)
    model.config._attn_implementation = "uniform"
    with torch.no_grad():
        assert_as_in_the_model(dinov2, model, encoder)


@pytest.mark.parametrize("build", [dinov2, hub], ids=lambda f: f.__name__)
def test_copies_and_files(build):
    encoder = encoder_of(model_of(build))
    expected = encoder(images_of()).maps[1]
    torch.testing.assert_close(copy.deepcopy(encoder)(images_of()).maps[1], expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(encoder))(images_of()).maps[1], expected)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("build", [dinov2, dinov2_registers, dinov3], ids=lambda f: f.__name__)
def test_attentions_are_those_of_the_model(build, trains):
    model = model_of(build)
    encoder = encoder_of(model, layers=[0, 2], attentions=True)
    model.requires_grad_(trains)
    features = encoder(images_of())
    assert len(features.attentions) == 4
    model.set_attn_implementation("eager")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for s, size in enumerate(SIZES):
        grid = (size[0] // PATCH, size[1] // PATCH)
        pixels = F.interpolate((images_of() - mean) / std, size, mode="bilinear")
        theirs = model(pixels, output_attentions=True).attentions
        for i, layer in enumerate((0, 2)):
            rows = theirs[layer][:, :, 0, -grid[0] * grid[1] :].unflatten(2, grid)
            torch.testing.assert_close(features.attentions[2 * s + i], rows, rtol=1e-3, atol=1e-5)


def test_attentions_need_cls_and_parts():
    with pytest.raises(ValueError, match="CLS"):
        encoder_of(model_of(siglip), attentions=True)
    model = model_of(dinov2)
    encoder = encoder_of(model, attentions=True)
    model.encoder.layer[2].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ValueError, match="`attentions` need the parts of the model's Dinov2Layer 2"):
        encoder(images_of())


# Recognition.


class PostNorm(HubBlock):
    def forward(self, x):
        x = x + self.norm1(self.ls1(self.attn(x)))
        return x + self.norm2(self.ls2(self.mlp(x)))


class Parallel(HubBlock):
    def forward(self, x):
        return x + self.ls1(self.attn(self.norm1(x))) + self.ls2(self.mlp(self.norm2(x)))


class QueryNorm(HubBlock):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.attn.q_norm = nn.LayerNorm(dim // heads)

    def forward(self, x):
        y, attn = self.norm1(x), self.attn
        q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(attn.q_norm(q), k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1(attn.proj(y))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Unlike(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.mix(x) + x.mean(1, keepdim=True)


class Forward:
    """The stand-ins with a forward of their own."""

    def forward(self, images):
        return self.norm(self.outputs(images)[-1])


class CallableTimm(Forward, VisionTransformer):
    pass


class CallableHub(Forward, DinoVisionTransformer):
    pass


def named(kind):
    """Classes are recognised by name."""
    base = "VisionTransformer" if issubclass(kind, VisionTransformer) else "DinoVisionTransformer"
    return type(base, (kind,), {})


@pytest.mark.parametrize("kind", [CallableTimm, CallableHub, DinoVisionTransformer])
@pytest.mark.parametrize(
    ("block", "verify"),
    [(b, True) for b in (HubBlock, PostNorm, Parallel, QueryNorm, Unlike)] + [(b, False) for b in (QueryNorm, Unlike)],
)
def test_other_blocks_are_called(block, verify, kind):
    torch.manual_seed(0)
    model = named(kind)().eval().requires_grad_(False)
    model.blocks[1] = block(24, 3).requires_grad_(False).eval()
    encoder = MultiResolutionEncoder(model, SIZES, verify=verify)
    for s, size in enumerate(SIZES):
        expected = model.norm(model.outputs(F.interpolate(images_of(), size, mode="bilinear"))[-1])
        torch.testing.assert_close(encoder(images_of()).tokens[0].block(s), expected, rtol=1e-4, atol=1e-4)


def norm_of_patches(model):
    outputs, model.patch_embed.norm = model.patch_embed.proj, nn.LayerNorm(24)
    del model.patch_embed.proj

    class Both(nn.Conv2d):
        def forward(self, x):
            return self.norm(super().forward(x).movedim(1, -1)).movedim(-1, 1)

    outputs.__class__ = Both
    outputs.norm = model.patch_embed.norm
    model.patch_embed.proj = outputs


class LargerTokens(CallableHub):
    def first(self, images):
        return 1.5 * super().first(images)


class OtherRule(CallableHub):
    """Antialiased positions under the hub's settings for plain ones."""

    def first(self, images):
        self.interpolate_antialias, self.interpolate_offset = True, 0.0
        tokens = super().first(images)
        self.interpolate_antialias, self.interpolate_offset = False, 0.1
        return tokens


class OtherNorm(CallableHub):
    def forward(self, images):
        return 2 * super().forward(images)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (LargerTokens, "the tokens before its first block"),
        (OtherRule, "the tokens before its first block"),
        (OtherNorm, "what follows its last block"),
    ],
)
def test_what_differs_is_refused(kind, part):
    model = named(kind)().eval()
    with pytest.raises(ValueError, match=part):
        MultiResolutionEncoder(model, SIZES)
    MultiResolutionEncoder(model, SIZES, verify=False)


def test_a_norm_in_the_patch_embedding_is_called():
    model = named(CallableHub)().eval().requires_grad_(False)
    norm_of_patches(model)
    encoder = MultiResolutionEncoder(model, SIZES)
    for s, size in enumerate(SIZES):
        expected = model.norm(model.outputs(F.interpolate(images_of(), size, mode="bilinear"))[-1])
        torch.testing.assert_close(encoder(images_of()).tokens[0].block(s), expected, rtol=1e-4, atol=1e-4)


class DinoPatches(nn.Module):
    def __init__(self, dim, side):
        super().__init__()
        self.img_size, self.patch_size, self.num_patches = side * PATCH, PATCH, side * side
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Dino(DinoVisionTransformer):
    """DINO's hub: positions as DINOv2's, dropout behind them, no layer scales; forward returns CLS."""

    def __init__(self, dim=24, side=6):
        super().__init__(dim, side=side)
        self.patch_embed, self.pos_drop = DinoPatches(dim, side), nn.Dropout(0.0)
        for block in self.blocks:
            block.ls1, block.ls2 = nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.norm(self.outputs(x)[-1])[:, 0]


@pytest.mark.parametrize("change", [None, *CHANGES[:4]], ids=lambda c: getattr(c, "__name__", "plain"))
def test_dino(change):
    model = type("VisionTransformer", (Dino,), {})().eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = MultiResolutionEncoder(model, SIZES)
    if change is not None:
        change(model, "blocks.1")
    for s, size in enumerate(SIZES):
        expected = model.norm(model.outputs(F.interpolate(images_of(), size, mode="bilinear"))[-1])
        torch.testing.assert_close(encoder(images_of()).tokens[0].block(s), expected, rtol=1e-4, atol=1e-4)


class Wide(CallableHub):
    """A hub model of wide images: (4, 9) patches, of which 36 could be taken for (6, 6)."""

    grid = (4, 9)

    def __init__(self, declares=True):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.grid[0] * self.grid[1], 24))
        if declares:
            self.patch_embed.patches_resolution = self.grid

    def first(self, images):
        x = self.patch_embed.proj(images)
        positions = self.pos_embed[:, 1:].mT.unflatten(2, self.grid)
        factors = tuple((n + 0.1) / m for n, m in zip(x.shape[2:], self.grid, strict=True))
        positions = F.interpolate(positions, scale_factor=factors, mode="bicubic")
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls, (x + positions).flatten(2).mT], 1)


class Wider(Wide):
    grid = (4, 8)


def test_rectangular_tables():
    model = named(Wide)().eval().requires_grad_(False)
    encoder = MultiResolutionEncoder(model, SIZES)
    expected = model.norm(model.outputs(F.interpolate(images_of(), SIZES[0], mode="bilinear"))[-1])
    torch.testing.assert_close(encoder(images_of()).tokens[0].block(0), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the tokens before its first block"):
        MultiResolutionEncoder(named(Wide)(declares=False), SIZES)
    with pytest.raises(ValueError, match="32 positions, which is no square"):
        MultiResolutionEncoder(named(Wider)(declares=False), SIZES)


@pytest.mark.parametrize("build", CALLED, ids=lambda f: f.__name__)
def test_the_comparison_leaves_no_trace(build):
    model, calls = model_of(build).train(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: calls.append(module))
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    versions = [p._version for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MultiResolutionEncoder(model, SIZES)
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in model.modules()]
    assert versions == [p._version for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_comparison_takes_every_dtype(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for build in (dinov2, dinov3, siglip):
            MultiResolutionEncoder(model_of(build).to(dtype), SIZES)


def test_models_without_values():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.device("meta"):
            model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=24))
            rotary = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL, image_size=24))
        for each in (model, rotary):
            encoder = MultiResolutionEncoder(each, SIZES)
            assert len(encoder.family.blocks) == 3
        encoder = encoder_of(model)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        assert encoder(images_of()).maps[0].isfinite().all()


def test_blocks_taken_out_later():
    model = model_of(dinov2)
    encoder = encoder_of(model, layers=[2])
    model.encoder.layer = model.encoder.layer[:2]
    with pytest.raises(ValueError, match=r"`layers` \[2\] must be indices of `model`'s blocks, of which 2 are left"):
        encoder(images_of())
