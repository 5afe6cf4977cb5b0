"""FeatSharp's tiles, block, levels and whole: against plain formulas, and what the original made."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from guided import LargestTensor, assert_close, draw
from originals import golden
from test_guided_modules import Sum, replica_of
from test_multi_resolution_encoder import MEAN, STD, dinov2_registers, model_of, siglip
from util import assert_gradient_within_budget, assert_within_budget, layouts, nudged, worst

import murf_fast
from murf_fast import backends
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
from murf_fast.nn.featsharp import local_attention
from murf_fast.nn.featsharp.tiles import levels_of
from murf_fast.nn.guided.featsharp_jbu import prime_steps
from murf_fast.reference import featsharp as plain

CONFIGURATIONS = [c for n in (1, 2, 3) for c in itertools.permutations(("bilinear", "jbu", "tiles"), n)]


def seeded(module):
    """Weights for which every part of the module matters."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        offset = 0.9 if name.endswith(("norm1.weight", "norm2.weight", "sigma_spatial")) else 0.0
        scale = 0.5 if "gamma" in name or "tile_pos" in name else 0.2 if p.ndim < 2 else fan_in**-0.5
        p.data.copy_(offset + scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def arrays(name):
    return {key: torch.from_numpy(value) for key, value in golden(name).items()}


def results_of(call, module, dtype, tensors):
    """The result, and gradients to all tensors and parameters, in ``dtype``."""
    module = copy.deepcopy(module).to(dtype)
    leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    result = call(module, **leaves)
    wanted = {**leaves, **dict(module.named_parameters())}
    grads = torch.autograd.grad(result, list(wanted.values()), draw(*result.shape).to(dtype), allow_unused=True)
    used = {name: g for name, g in zip(wanted, grads, strict=True) if g is not None}
    return {"result": result.detach(), **used}


# Of rounding errors. The gradient of a single number has one in every draw, and few of them may all be small.
DRAWS = 12


def assert_parity(ours, formula, module, tensors):
    """Result and every gradient within the budget of the plain formula in float32, whose worst draw counts. Returns
    the oracle of the result and that draw of it.
    """
    oracle = results_of(formula, module, torch.float64, tensors)
    theirs = [results_of(formula, module, torch.float32, tensors)]
    for seed in range(DRAWS):
        other = copy.deepcopy(module)
        for p in other.parameters():
            p.data.copy_(nudged(p.data, seed))
        theirs.append(results_of(formula, other, torch.float32, {n: nudged(t, seed) for n, t in tensors.items()}))
    actual = results_of(ours, module, torch.float32, tensors)
    assert actual.keys() == oracle.keys()
    for name, value in actual.items():
        check = assert_within_budget if name == "result" else assert_gradient_within_budget
        check(value, oracle[name], worst([t[name] for t in theirs], oracle[name]), name)
    return oracle["result"], worst([t["result"] for t in theirs], oracle["result"])


# ---- tiles


@pytest.mark.parametrize(("factor", "progressive"), [(2, False), ((2, 3), False), (6, True), ((1, 4), True), (1, True)])
@pytest.mark.parametrize("size", [5, (4, 7)])
def test_tiles(factor, progressive, size):
    images = draw(2, 3, 19, 23)
    pair = factor if isinstance(factor, tuple) else (factor, factor)
    levels = levels_of("test", pair, progressive)
    views = split_tiles(images, factor, size, progressive=progressive)
    height, width = size if isinstance(size, tuple) else (size, size)
    oracle, same = (plain.views(x, levels, (height, width)) for x in (images.double(), images))
    assert_within_budget(views, oracle, same)
    maps = draw(len(views), 4, 3, 2)
    merged = merge_tiles(maps, factor, progressive=progressive)
    parts = maps.split([2 * rows * columns for rows, columns in levels])
    assert len(merged) == len(levels)
    for got, part, level in zip(merged, parts, levels, strict=True):
        assert torch.equal(got, plain.mosaic(part, *level))
        assert got.shape[0] == 1 or got.is_contiguous(memory_format=torch.channels_last) or level == (1, 1)


def test_levels():
    assert levels_of("test", (6, 6), True) == [(1, 1), (2, 2), (6, 6)]
    assert levels_of("test", (4, 6), True) == [(1, 1), (2, 2), (4, 6)]
    assert levels_of("test", (2, 12), True) == [(1, 1), (2, 2), (2, 4), (2, 12)]
    assert levels_of("test", (6, 6), False) == [(1, 1), (6, 6)]
    assert levels_of("test", (1, 1), True) == levels_of("test", (1, 1), False) == [(1, 1)]


def test_tiles_of_uint8_and_of_channels_last_images():
    images = torch.randint(256, (2, 3, 12, 10), dtype=torch.uint8)
    expected = split_tiles(images.float() / 255, 2, 4)
    assert torch.equal(split_tiles(images, 2, 4), expected)
    assert torch.equal(split_tiles(images.permute(0, 2, 3, 1).contiguous(), 2, 4), expected)


def test_golden_tiles():
    data = arrays("featsharp__tiles_phis_bias")
    views = split_tiles(data["tiles.image"], 6, 12, progressive=True)
    # The original has the tiles of an image one behind the other.
    batch, expected, begin = len(data["tiles.image"]), [], 0
    for n in (1, 2, 6):
        level = data["tiles.batch"][begin : begin + batch * n * n]
        expected.append(level.unflatten(0, (batch, n * n)).transpose(0, 1).flatten(0, 1))
        begin += batch * n * n
    assert_close(views, torch.cat(expected), 5e-5)
    maps = torch.tanh(F.conv2d(views, data["tiles.patch_weight"], stride=4)) + views.mean((1, 2, 3), keepdim=True)
    for i, merged in enumerate(merge_tiles(maps, 6, progressive=True)):
        assert_close(merged, data[f"tiles.map{i}"], 5e-5)


# ---- the block


@pytest.mark.parametrize(
    ("inputs", "channels", "heads", "window", "norm", "size"),
    [
        (48, 24, 16, 7, True, (9, 11)),  # heads of 3 channels, in 4
        (32, 32, 4, 3, True, (1, 5)),
        (20, 7, 2, 5, False, (5, 1)),
        (24, 8, 8, 1, True, (2, 3)),
        (16, 16, 16, 7, True, (8, 3)),
    ],
)
def test_block(inputs, channels, heads, window, norm, size):
    module = seeded(FeatSharpBlock(inputs, channels, num_heads=heads, window=window, norm=norm))

    def formula(module, x):
        return plain.featsharp_block(dict(module.named_parameters()), x, heads, window)

    assert_parity(lambda module, x: module(x), formula, module, {"x": draw(2, inputs, *size)})


@pytest.mark.parametrize("pieces", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_block_without_gradients(dtype, pieces, monkeypatch):
    """In chunks of tokens and some heads at a time, in every layout and dtype."""
    module, x = seeded(FeatSharpBlock(48, 24)).to(dtype), draw(2, 48, 6, 5).to(dtype)
    monkeypatch.setitem(local_attention._CHUNK, "cpu", 7)
    heads = 16 // pieces
    monkeypatch.setitem(local_attention._BYTES, "cpu", heads * 3 * 4 * x.numel() // 48 * x.element_size())
    weights = {name: p.detach() for name, p in module.named_parameters()}
    oracle = plain.featsharp_block({name: p.double() for name, p in weights.items()}, x.double())
    same = plain.featsharp_block(weights, x)
    calls = []
    own = module.attn._attended
    monkeypatch.setattr(module.attn, "_attended", lambda *a: calls.append(a[1:3]) or own(*a))
    with torch.no_grad():
        for name, given in layouts(x).items():
            result = module(given)
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert result.dtype == dtype
            assert_within_budget(result, oracle, same, name)
        assert calls == [(i, i + heads) for i in range(0, 16, heads)] * len(layouts(x))
        assert module(x[:0]).shape == (0, 24, 6, 5)


def test_replicas_of_data_parallel():
    """Their parameters are plain attributes, which want gradients like those they are of."""
    module, x = seeded(FeatSharpUpsampler(8, 2, num_heads=2)), draw(1, 8, 4, 3)
    images, tiles = draw(1, 3, 8, 6), draw(1, 8, 8, 6)
    result = replica_of(module)(x, images, tiles)
    assert torch.equal(result, module(x, images, tiles))
    grads = [torch.autograd.grad(r.sum(), list(module.parameters())) for r in (result, module(x, images, tiles))]
    assert all(map(torch.equal, *grads))
    with torch.no_grad():
        assert torch.equal(replica_of(module)(x, images, tiles), module(x, images, tiles))


@pytest.mark.parametrize("gradients", [False, True])
def test_parts_may_be_wrapped_and_hooked(gradients):
    """Each is called, with all tokens at once where somebody listens; but for what is read by weight alone."""
    x, parts = draw(1, 16, 5, 4), ("norm1", "attn.proj", "ls1", "norm2", "mlp", "mlp.w12", "mlp.w3", "ls2")
    for path in parts:
        module = seeded(FeatSharpBlock(16, 8)).requires_grad_(gradients)
        plain_result, shapes = module(x), []
        hook = module.get_submodule(path).register_forward_hook(lambda _, args, out, s=shapes: s.append(out.shape))
        assert torch.equal(module(x), plain_result)
        assert [tuple(shape[:3]) for shape in shapes] == [(1, 5, 4)], path
        hook.remove()
        parent, _, leaf = path.rpartition(".")
        adapter = Sum(module.get_submodule(path))
        setattr(module.get_submodule(parent), leaf, adapter)
        assert not torch.allclose(module(x), plain_result), path
        assert adapter.seen


def test_the_hidden_layer_belongs_to_who_holds_it():
    block, seen = seeded(FeatSharpBlock(16, 8)).requires_grad_(False), []
    block.mlp.w12.register_forward_hook(lambda _, args, out: seen.append((out, out.clone())))
    block(draw(1, 16, 3, 4))
    assert len(seen) == 1
    assert all(torch.equal(held, at_the_time) for held, at_the_time in seen)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_parametrized_projection_is_made_once(gradients):
    """As spectral norms are in training, which take a step every time."""
    module, x, calls = seeded(FeatSharpBlock(16, 8)).requires_grad_(gradients), draw(1, 16, 3, 4), []

    class Doubled(torch.nn.Module):
        def forward(self, weight):
            calls.append(weight)
            return 2 * weight

    expected = copy.deepcopy(module)
    expected.attn.qkv.weight.data.mul_(2)
    torch.nn.utils.parametrize.register_parametrization(module.attn.qkv, "weight", Doubled())
    calls.clear()
    assert torch.equal(module(x), expected(x))
    assert len(calls) == 1


def test_forward_mode_is_refused_by_name():
    """The attention has no tangents; none may be lost on the way to it."""
    module, x = seeded(FeatSharpBlock(16, 8)).requires_grad_(False), draw(1, 16, 3, 3)
    with pytest.raises(NotImplementedError, match="window_attention"):
        torch.func.jvp(module, (x,), (x,))


def test_block_keeps_no_large_tensor(monkeypatch):
    """Without gradients nothing is larger than the block's input: not what is projected, nor what is hidden."""
    module, x = seeded(FeatSharpBlock(48, 24)), draw(1, 48, 40, 40)
    monkeypatch.setitem(local_attention._BYTES, "cpu", 1 << 18)
    monkeypatch.setitem(local_attention._CHUNK, "cpu", 128)
    with torch.no_grad(), LargestTensor() as seen:
        module(x)
    assert seen.elements == x.numel()


def test_a_new_block_returns_the_first_channels():
    x = draw(1, 48, 4, 4)
    torch.testing.assert_close(FeatSharpBlock(48, 24)(x), x[:, :24], rtol=0, atol=1e-4)


def test_golden_block_and_attention():
    data = arrays("featsharp__local_attention")
    module = FeatSharpBlock(48, 24)
    module.load_state_dict({k.removeprefix("block.param."): v for k, v in data.items() if k.startswith("block.param.")})
    side = int(data["block.width"])
    x = data["block.x"].mT.unflatten(2, (side, side))
    for result in (module(x), module.requires_grad_(False)(x)):
        assert_close(result.flatten(2).mT, data["block.output"], 2e-6)
    attention = module.attn
    attention.load_state_dict(
        {k.removeprefix("attn.param."): v for k, v in data.items() if k.startswith("attn.param.")}
    )
    side = int(data["attn.width"])
    x = data["attn.x"].unflatten(1, (side, side))
    assert_close(attention.attend(x).flatten(1, 2), data["attn.heads_concat"], 4e-5)
    assert_close(attention(x).flatten(1, 2), data["attn.output"], 1.2e-5)


# ---- levels and upsamplers


def formula_of(factor, inputs, heads=2, window=3, progressive=False):
    """An upsampler's plain statement, from its parameters."""
    pair = factor if isinstance(factor, tuple) else (factor, factor)
    grids = levels_of("test", pair, progressive)
    steps = list(zip(grids, grids[1:] or grids, strict=False))

    def formula(module, low, images, tiles=None, more=None):
        parameters = dict(module.named_parameters())
        for i, (before, after) in enumerate(steps):
            weights = {k.removeprefix(f"ups.{i}."): v for k, v in parameters.items() if k.startswith(f"ups.{i}.")}
            step = tuple(n // m for n, m in zip(after, before, strict=True))
            given = tiles if i + 1 == len(steps) else more
            low = plain.featsharp_level(weights, low, images, given, inputs, prime_steps(step), heads, window)
        return low

    return formula


@pytest.mark.parametrize("inputs", CONFIGURATIONS, ids="-".join)
def test_inputs(inputs):
    """All of Table 8, in any order."""
    module = seeded(FeatSharpUpsampler(4, 2, inputs, num_heads=2, window=3))
    tensors = {"low": draw(2, 4, 3, 2), "images": draw(2, 3, 13, 9), "tiles": draw(2, 4, 6, 4)}

    def ours(module, low, images, tiles):
        return module(low, images, tiles)

    assert_parity(ours, formula_of(2, inputs), module, tensors)


@pytest.mark.parametrize("factor", [1, 3, (2, 3), (1, 4)])
def test_factors(factor):
    inputs = ("jbu", "tiles")
    rows, columns = factor if isinstance(factor, tuple) else (factor, factor)
    module = seeded(FeatSharpUpsampler(4, factor, inputs, num_heads=2, window=3))
    tensors = {"low": draw(1, 4, 4, 3), "images": draw(1, 3, 13, 17), "tiles": draw(1, 4, 4 * rows, 3 * columns)}
    assert_parity(lambda m, low, images, tiles: m(low, images, tiles), formula_of(factor, inputs), module, tensors)


def test_progressive():
    inputs = ("bilinear", "tiles")
    module = seeded(FeatSharpUpsampler(4, (4, 2), inputs, progressive=True, num_heads=2, window=3))
    assert len(module.ups) == 2
    tensors = {
        "low": draw(1, 4, 3, 2),
        "images": draw(1, 3, 5, 5),
        "tiles": draw(1, 4, 12, 4),
        "more": draw(1, 4, 6, 4),
    }
    formula = formula_of((4, 2), inputs, progressive=True)
    assert_parity(lambda m, low, images, tiles, more: m(low, images, [more, tiles]), formula, module, tensors)


@pytest.mark.parametrize("name", ["featsharp_level_c24_x2", "featsharp_level_c32_x3"])
def test_golden_level(name):
    data = arrays(name)
    weights = {f"ups.0.{k.removeprefix('param.')}": v for k, v in data.items() if k.startswith("param.")}
    module = FeatSharpUpsampler.from_checkpoint(weights)
    assert module.factor == (int(data["factor"]),) * 2
    with torch.no_grad():
        result = module(data["lr"], data["guidance"], data["tiles"])
    assert_close(result, data["output"], 2e-5)


def test_gradcheck():
    module = seeded(FeatSharpUpsampler(2, 2, ("tiles", "bilinear"), num_heads=2, window=3)).double()
    low, tiles = (draw(1, 2, n, n).double().requires_grad_() for n in (2, 4))
    parameters = dict(module.named_parameters())

    def call(low, tiles, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (low, None, tiles))

    assert torch.autograd.gradcheck(call, (low, tiles, *parameters.values()), fast_mode=True)


def test_compiled_without_breaks():
    """With gradients; the whole, below, without."""
    module = seeded(FeatSharpUpsampler(4, 2, ("jbu", "bilinear", "tiles"), num_heads=4))
    low, images, tiles = draw(1, 4, 4, 3), draw(1, 3, 16, 12), draw(1, 4, 8, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(low, images, tiles), module(low, images, tiles))


def test_half_types():
    module = seeded(FeatSharpUpsampler(8, 2)).requires_grad_(False)
    low, images, tiles = draw(1, 8, 4, 3), draw(1, 3, 16, 12), draw(1, 8, 8, 6)
    weights = {n.removeprefix("ups.0."): p.double() for n, p in module.named_parameters()}
    arguments = (("jbu", "tiles"), [(2, 2)])
    oracle = plain.featsharp_level(weights, low.double(), images.double(), tiles.double(), *arguments)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(module).to(dtype)
        given = [x.to(dtype) for x in (low, images, tiles)]
        same = plain.featsharp_level({n: p.to(dtype) for n, p in weights.items()}, *given, *arguments)
        assert_within_budget(half(*given), oracle, same, str(dtype))
        # Parameters and features in float32, products in the half type.
        with torch.autocast("cpu", dtype=dtype):
            mixed = module(low, images, tiles)
        assert_within_budget(mixed.to(dtype), oracle, same, f"autocast {dtype}")


# ---- end to end


def stand_in(weight):
    """An encoder that is any callable: tanh of a convolution."""
    return lambda views: torch.tanh(F.conv2d(views, weight, stride=4))


def whole(module, images, encode, size, levels, inputs):
    """FeatSharp from its definition; ``encode`` makes a map of a view."""
    dtype = images.dtype
    maps = encode(plain.views(images, levels, size))
    if module.normalizer is not None:
        matrix = (module.normalizer.alpha.double() * module.normalizer.rotation.double()).to(dtype)
        centred = maps - module.normalizer.mean.to(dtype)[:, None, None]
        maps = torch.einsum("kc,bchw->bkhw", matrix, centred)
    if module.bias_buffer is not None:
        maps = maps + F.interpolate(module.bias_buffer.buffer.to(dtype), maps.shape[2:], mode="bilinear")
    if module.conditional_bias is not None:
        maps = plain.conditional_bias({n: p.to(dtype) for n, p in module.conditional_bias.named_parameters()}, maps, 4)
    batch = len(images)
    parts = maps.split([batch * rows * columns for rows, columns in levels])
    low, tiles = parts[0], plain.mosaic(parts[-1], *levels[-1])
    weights = {n.removeprefix("upsampler.ups.0."): p.to(dtype) for n, p in module.named_parameters()}
    return plain.featsharp_level(weights, low, images, tiles, inputs, prime_steps(levels[-1]), 8, 7)


@pytest.mark.parametrize("factor", [2, (1, 2)])  # the encoder's own tiles, and views that are cut for it
@pytest.mark.parametrize("build", [dinov2_registers, siglip], ids=lambda f: f.__name__)
def test_end_to_end(build, factor):
    model, inputs, size = model_of(build), ("jbu", "tiles"), (16, 24)
    normalizer = PHIS.fit([3 + 2 * draw(50, 24)])
    bias = BiasBuffer(24, 3, 3)
    torch.nn.init.normal_(bias.buffer)
    parts = {"normalizer": normalizer, "bias_buffer": bias, "conditional_bias": seeded(ConditionalBias(24, 4))}
    sharp = FeatSharp(model, factor, size=size, num_heads=8, **parts)
    seeded(sharp.upsampler)
    sharp.requires_grad_(False)
    images = draw(2, 3, 30, 50)
    rows, columns = factor if isinstance(factor, tuple) else (factor, factor)
    prefix = {dinov2_registers: 3, siglip: 0}[build]
    options = {"interpolate_pos_encoding": True} if build is siglip else {}

    def encoder_of(dtype):
        own = copy.deepcopy(model).to(dtype)
        return lambda x: own(x, **options).last_hidden_state[:, prefix:].mT.unflatten(2, (4, 6))

    levels = [(1, 1), (rows, columns)]
    oracle, same = (
        whole(sharp, images.to(t), encoder_of(t), size, levels, inputs) for t in (torch.float64, torch.float32)
    )
    result = sharp(images)
    assert_within_budget(result, oracle, same)
    assert result.shape == (2, 24, 4 * rows, 6 * columns)
    raw = torch.einsum("kc,bchw->bkhw", (normalizer.inv_rotation / normalizer.alpha).double(), oracle)
    raw = raw + normalizer.mean[:, None, None]
    torch.testing.assert_close(sharp(images, raw=True).double(), raw, rtol=1e-4, atol=1e-4)


def test_encoders_sizes_and_images():
    """An encoder with a size of its own, one that normalizes, images as they come; and a callable is the same."""
    model, images = model_of(dinov2_registers), torch.rand(2, 3, 20, 28)
    unit = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    normalized = (images - unit[0]) / unit[1]
    sharp = FeatSharp(model, 2, num_heads=8)
    upsampler = seeded(sharp.upsampler)
    with pytest.raises(ValueError, match=r"`images` must be a multiple of the encoder's patch of 4 .* got \(20, 27\)"):
        sharp(normalized[..., :27])
    expected = sharp(normalized)
    assert expected.shape == (2, 24, 10, 14)
    encoder = MultiResolutionEncoder(model, [(20, 28)], mean=MEAN, std=STD)
    given = {"num_heads": 8}
    others = [
        (FeatSharp(encoder, 2, **given), images),
        (FeatSharp(model, 2, size=(20, 28), mean=MEAN, std=STD, **given), images),
        (FeatSharp(model, 2, size=(20, 28), mean=MEAN, std=STD, **given), images.permute(0, 2, 3, 1)),
        (
            FeatSharp(lambda x: model(x).last_hidden_state[:, 3:].mT.unflatten(2, (5, 7)), 2, channels=24, **given),
            normalized,
        ),
    ]
    for other, pixels in others:
        other.upsampler = upsampler
        torch.testing.assert_close(other(pixels), expected, rtol=1e-4, atol=1e-4)
    low, tiles = sharp.encode(normalized)
    assert low.untyped_storage().nbytes() == low.numel() * low.element_size()  # not those of all views
    assert torch.equal(upsampler(low, sharp.guidance(normalized, low), tiles), expected)
    byte = (255 * images).to(torch.uint8)
    exact = FeatSharp(encoder, 2, **given)
    exact.upsampler = upsampler
    assert torch.equal(exact(byte), exact(byte.permute(0, 2, 3, 1)))
    torch.testing.assert_close(exact(byte), exact(byte.float() / 255), rtol=1e-4, atol=1e-4)


def test_ways_to_resize_and_to_train():
    """Square factors by the encoder's own tiles, others by views that are cut for it: the same resize."""
    model, images = model_of(dinov2_registers), draw(1, 3, 30, 22)
    options = {"size": 16, "num_heads": 8, "mode": "bicubic", "antialias": True, "inputs": ("tiles",)}
    sharp, other = FeatSharp(model, 2, **options), FeatSharp(model, (2, 1), **options)
    torch.testing.assert_close(sharp.encode(images)[0], other.encode(images)[0])
    views = split_tiles(images, 2, 16, mode="bicubic", antialias=True)
    maps = model(views).last_hidden_state[:, 3:].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(sharp.encode(images)[1][0], merge_tiles(maps, 2)[1], rtol=1e-4, atol=1e-4)
    sharp.train()
    assert sharp.upsampler.training
    assert not sharp.encoder.training
    assert not model.training


def test_images_of_any_dtype():
    sharp = FeatSharp(model_of(dinov2_registers), 2, size=16, num_heads=8)
    seeded(sharp.upsampler)
    images = draw(1, 3, 16, 16).half()
    expected = sharp(images)
    assert torch.equal(sharp(images.float()), expected)
    torch.testing.assert_close(sharp(images.double()), expected)


def test_without_tiles_the_encoder_sees_one_view():
    seen = []
    encode = stand_in(draw(8, 3, 4, 4))
    sharp = FeatSharp(
        lambda x: seen.append(tuple(x.shape)) or encode(x), 3, channels=8, inputs=("bilinear",), num_heads=2
    )
    assert sharp(draw(2, 3, 16, 12)).shape == (2, 8, 12, 9)
    assert sharp.encode(draw(2, 3, 16, 12))[1] == []
    assert seen == [(2, 3, 16, 12)] * 2
    tiled = FeatSharp(lambda x: seen.append(tuple(x.shape)) or encode(x), 1, channels=8, num_heads=2)
    low, (tile,) = tiled.encode(draw(2, 3, 16, 16))
    assert low is tile
    assert seen[-1] == (2, 3, 16, 16)


@pytest.mark.parametrize("gradients", [False, True])
def test_an_empty_batch(gradients):
    model = model_of(dinov2_registers)
    parts = {"normalizer": PHIS(24), "bias_buffer": BiasBuffer(24, 4, 4)}
    for factor in (2, (1, 2)):
        sharp = FeatSharp(model, factor, size=16, num_heads=8, **parts).requires_grad_(gradients)
        rows, columns = sharp.factor
        assert sharp(draw(0, 3, 16, 16)).shape == (0, 24, 4 * rows, 4 * columns)


def test_progressive_end_to_end():
    encode = stand_in(draw(8, 3, 4, 4))
    sharp = FeatSharp(encode, 4, channels=8, inputs=("jbu", "tiles"), progressive=True, num_heads=2)
    seeded(sharp.upsampler)
    images = draw(1, 3, 16, 12)
    views = plain.views(images, [(1, 1), (2, 2), (4, 4)], (16, 12))
    low, two, four = encode(views).split([1, 4, 16])
    expected = sharp.upsampler(low, images, [plain.mosaic(two, 2, 2), plain.mosaic(four, 4, 4)])
    torch.testing.assert_close(sharp(images), expected)


def test_gradients_reach_every_part():
    encode = stand_in(draw(8, 3, 4, 4))
    bias = BiasBuffer(8, 4, 3)
    parts = {"normalizer": PHIS(8), "bias_buffer": bias, "conditional_bias": seeded(ConditionalBias(8, 2))}
    sharp = FeatSharp(encode, 2, channels=8, num_heads=2, **parts)
    seeded(sharp.upsampler).train()
    sharp(draw(1, 3, 16, 12)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in sharp.parameters())


def test_whole_is_compiled_without_breaks():
    model = model_of(dinov2_registers)
    sharp = FeatSharp(model, 2, size=16, num_heads=8, normalizer=PHIS(24), bias_buffer=BiasBuffer(24, 4, 4))
    seeded(sharp.upsampler)
    images = draw(1, 3, 16, 16)
    compiled = torch.compile(sharp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), sharp(images))


# ---- bias, baselines


@pytest.mark.parametrize("size", [(5, 7), (8, 4), (13, 14)])
def test_bias_buffer(size):
    module = BiasBuffer(6, 5, 7)
    torch.nn.init.normal_(module.buffer)

    def formula(module, features):
        return features + F.interpolate(module.buffer, features.shape[2:], mode="bilinear", align_corners=False)

    assert_parity(lambda m, features: m(features), formula, module, {"features": draw(3, 6, *size)})
    half = draw(1, 6, *size).bfloat16()
    assert module(half).dtype == torch.bfloat16
    last = draw(2, 6, *size).contiguous(memory_format=torch.channels_last)
    assert module(last).is_contiguous(memory_format=torch.channels_last)


def test_conditional_bias():
    module = seeded(ConditionalBias(12, 4))

    def formula(module, features):
        return plain.conditional_bias(dict(module.named_parameters()), features, 4)

    assert_parity(lambda m, features: m(features), formula, module, {"features": draw(2, 12, 3, 4)})
    x = draw(1, 12, 3, 4)
    torch.testing.assert_close(ConditionalBias(12, 4)(x), x, rtol=0, atol=1e-6)


def test_golden_bias():
    data = arrays("featsharp__tiles_phis_bias")
    module = BiasBuffer(6, 9, 9)
    module.load_state_dict({"buffer": data["bias.buffer"]})
    for i in range(3):
        assert_close(module(data[f"bias.x{i}"]), data[f"bias.y{i}"], 5e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_blended(weight):
    low, tiles = draw(2, 5, 3, 4), draw(2, 5, 6, 12)

    def formula(low, tiles):
        return weight * F.interpolate(low, (6, 12), mode="bilinear", align_corners=False) + (1 - weight) * tiles

    result = blend_tiles(low, tiles, weight)
    assert_within_budget(result, formula(low.double(), tiles.double()), formula(low, tiles))
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(
    bool(backends.reasons_against("triton", "cpu")), reason="; ".join(backends.reasons_against("triton", "cpu"))
)
def test_triton():
    """A level on Triton's kernels, in the interpreter; with gradients, and some heads at a time without."""
    module = seeded(FeatSharpUpsampler(2, 2, num_heads=2, window=3))
    tensors = {"low": draw(1, 2, 2, 3), "images": draw(1, 3, 8, 9), "tiles": draw(1, 2, 4, 6)}

    def ours(module, low, images, tiles):
        with murf_fast.use_backend("triton"):
            return module(low, images, tiles)

    formula = formula_of(2, ("jbu", "tiles"))
    oracle, same = assert_parity(ours, formula, module, tensors)
    with torch.no_grad():
        assert_within_budget(ours(module, **tensors), oracle, same)
