"""The packed pass against the original models, run once per resolution."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from util import assert_within_budget

from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit import _attention, _blocks, _products

transformers = pytest.importorskip("transformers", reason="needs transformers, the original models")

PATCH = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(12, 20), (24, 24), (32, 28)]
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": PATCH}


class HubAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class HubScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        return x * self.gamma


class HubBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.ls1, self.ls2 = HubAttention(dim, heads), HubScale(dim), HubScale(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoVisionTransformer(nn.Module):
    """A stand-in with the DINOv2 hub's names and its rules for positions."""

    def __init__(self, dim=24, heads=3, depth=3, side=6, registers=0):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + side * side, dim))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, dim)) if registers else None
        self.interpolate_antialias, self.interpolate_offset = bool(registers), 0.0 if registers else 0.1
        self.blocks, self.norm = nn.ModuleList(HubBlock(dim, heads) for _ in range(depth)), nn.LayerNorm(dim, eps=1e-6)
        self.side = side

    def first(self, images):
        x = self.patch_embed.proj(images)
        grid = tuple(x.shape[2:])
        positions = self.pos_embed[:, 1:].mT.unflatten(2, (self.side, self.side))
        if grid != (self.side, self.side):
            if self.interpolate_offset:
                how = {"scale_factor": tuple((n + self.interpolate_offset) / self.side for n in grid)}
            else:
                how = {"size": grid}
            positions = F.interpolate(positions, **how, mode="bicubic", antialias=self.interpolate_antialias)
        x = (x + positions).flatten(2).mT
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        registers = [] if self.register_tokens is None else [self.register_tokens.expand(len(x), -1, -1)]
        return torch.cat([first, *registers, x], dim=1)

    def outputs(self, images):
        outputs = [self.first(images)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs


class VisionTransformer(DinoVisionTransformer):
    """A stand-in with timm's names and rules: antialiased positions; with registers none for CLS and registers."""

    def __init__(self, registers=0, **options):
        super().__init__(registers=registers, **options)
        self.pos_drop, self.norm_pre, self.patch_drop = nn.Identity(), nn.Identity(), nn.Identity()
        self.patch_embed.grid_size = (self.side, self.side)
        if registers:
            self.pos_embed = nn.Parameter(self.pos_embed[:, 1:].detach().clone())
        self.reg_token = self.register_tokens
        del self.register_tokens

    def first(self, images):
        x = self.patch_embed.proj(images)
        grid = tuple(x.shape[2:])
        prefix = self.pos_embed.shape[1] - self.side**2
        positions = self.pos_embed[:, prefix:].mT.unflatten(2, (self.side, self.side))
        if grid != (self.side, self.side):
            positions = F.interpolate(positions, grid, mode="bicubic", antialias=True)
        x = (x + positions).flatten(2).mT
        first = self.cls_token + self.pos_embed[:, :1] if prefix else self.cls_token
        tokens = [t.expand(len(x), -1, -1) for t in (first, self.reg_token) if t is not None]
        return self.norm_pre(self.patch_drop(self.pos_drop(torch.cat([*tokens, x], dim=1))))


def dinov2():
    config = transformers.Dinov2Config(**SMALL, image_size=6 * PATCH, layerscale_value=0.7)
    return transformers.Dinov2Model(config)


def dinov2_swiglu():
    config = transformers.Dinov2Config(**SMALL, image_size=6 * PATCH, use_swiglu_ffn=True)
    return transformers.Dinov2Model(config)


def dinov2_registers():
    config = transformers.Dinov2WithRegistersConfig(**SMALL, image_size=6 * PATCH, num_register_tokens=2)
    return transformers.Dinov2WithRegistersModel(config)


def dinov3():
    config = transformers.DINOv3ViTConfig(**SMALL, image_size=6 * PATCH, intermediate_size=48, num_register_tokens=2)
    config.hidden_size, config.num_attention_heads = 24, 3
    return transformers.DINOv3ViTModel(config)


def siglip():
    config = transformers.SiglipVisionConfig(**SMALL, image_size=6 * PATCH, intermediate_size=48)
    return transformers.SiglipVisionModel(config)


def siglip2():
    config = transformers.Siglip2VisionConfig(**SMALL, num_patches=36, intermediate_size=48)
    return transformers.Siglip2VisionModel(config)


def clip():
    config = transformers.CLIPVisionConfig(**SMALL, image_size=6 * PATCH, intermediate_size=48)
    return transformers.CLIPVisionModel(config)


def hub():
    return DinoVisionTransformer()


def hub_registers():
    return DinoVisionTransformer(registers=2)


def timm_layout():
    return VisionTransformer()


def timm_registers():
    return VisionTransformer(registers=2)


OWN = [
    hub,
    hub_registers,
    timm_layout,
    timm_registers,
]  # stand-ins: their weights are no download, their code no package
FAMILIES = [dinov2, dinov2_swiglu, dinov2_registers, dinov3, siglip, siglip2, *OWN]


def model_of(build):
    torch.manual_seed(3)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero initialisations would hide errors
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def prefix_of(build):
    one, three = (
        (dinov2, dinov2_swiglu, clip, hub, timm_layout),
        (dinov2_registers, dinov3, hub_registers, timm_registers),
    )
    return 1 if build in one else 3 if build in three else 0


def original(build, model, images, size, layer, norm):
    """Tokens (B, P + N, D) of the original model: resize, normalize, run, take a layer."""
    dtype = next(model.parameters()).dtype
    # Pixels in the dtype of the run, as everything behind them: the budget is that of the whole pipeline.
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (MEAN, STD))
    pixels = F.interpolate((images.to(dtype) / 255 - mean) / std, size, mode="bilinear", align_corners=False)
    if build in OWN:
        output = model.outputs(pixels)[layer + 1]
        return model.norm(output) if norm else output
    if build is siglip2:
        model = getattr(model, "vision_model", model)
        h, w = size[0] // PATCH, size[1] // PATCH
        cut = pixels.unflatten(3, (w, PATCH)).unflatten(2, (h, PATCH)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        x = model.embeddings.patch_embedding(cut.flatten(1, 2))
        table = model.embeddings.position_embedding.weight.mT.reshape(1, -1, 6, 6)
        positions = F.interpolate(table, (h, w), mode="bilinear", align_corners=False, antialias=True)
        x = x + positions.flatten(2).mT
        if dtype == torch.float32:
            shapes = torch.tensor([[h, w]] * len(x))
            torch.testing.assert_close(x, model.embeddings(cut.flatten(1, 2), shapes))
        for block in model.encoder.layers[: layer + 1]:
            output = block(x, attention_mask=None)
            x = output[0] if isinstance(output, tuple) else output
        return model.post_layernorm(x) if norm else x
    # A hook, as what `hidden_states` holds of the last block differs among models and versions.
    outputs = []
    hook = blocks_of(model)[layer].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(pixels, **({"interpolate_pos_encoding": True} if build in (siglip, clip) else {}))
    hook.remove()
    hidden = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    if not norm:
        return hidden
    model = getattr(model, "vision_model", model)
    final = getattr(model, "layernorm", None) or getattr(model, "norm", None) or model.post_layernorm
    return final(hidden)


def blocks_of(model):
    """The blocks of a transformers model, under the names of versions 4 and 5."""
    for path in ("encoder.layer", "encoder.layers", "vision_model.encoder.layers", "layer", "model.layer"):
        with contextlib.suppress(AttributeError):
            return model.get_submodule(path)
    raise AssertionError(f"no blocks in {type(model).__name__}")


@pytest.fixture(params=[False, True], ids=["as_they_are", "packed"])
def weights(request, monkeypatch):
    """Weights packed for oneDNN, as in large passes on processors where that pays, or as they are."""
    if request.param:
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this build of torch has no oneDNN")
        monkeypatch.setattr(_products, "LEAST_ROWS", 1)
        monkeypatch.setattr(_products, "_can_pack", lambda x: True)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("build", FAMILIES, ids=lambda f: f.__name__)
def test_equals_the_model_once_per_resolution(build, norm, weights):
    model = model_of(build)
    double = copy.deepcopy(model).double()
    images = torch.randint(0, 256, (2, 3, 30, 26), dtype=torch.uint8)
    layers = [0, -1]
    encoder = MultiResolutionEncoder(model, SIZES, layers=layers, norm=norm, mean=MEAN, std=STD)
    prefix = prefix_of(build)
    with torch.no_grad():
        features = encoder(images)
        assert len(features.maps) == len(SIZES) * len(layers)
        for s, size in enumerate(SIZES):
            grid = (size[0] // PATCH, size[1] // PATCH)
            for i, layer in enumerate((0, 2)):
                oracle = original(build, double, images, size, layer, norm)
                same = original(build, model, images, size, layer, norm)
                name = f"layer {layer} at {size}"
                assert_within_budget(features.tokens[i].block(s), oracle, same, name)
                expected = oracle[:, prefix:].mT.unflatten(2, grid)
                actual = features.maps[2 * s + i]
                assert actual.stride(1) == 1
                assert_within_budget(actual, expected, same[:, prefix:].mT.unflatten(2, grid), name)
                cls = features.cls[2 * s + i]
                if prefix:
                    assert_within_budget(cls, oracle[:, 0], same[:, 0], name)
                else:
                    assert cls is None


@pytest.mark.parametrize("build", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("chunk", "segment"), [(1, 1), (7, 40), (36, 200), (10_000, 10_000)])
def test_chunks_of_rows_change_nothing(build, chunk, segment, monkeypatch):
    encoder = MultiResolutionEncoder(model_of(build), SIZES, layers=[0, 1, -1], norm=False)
    images = torch.rand(2, 3, 30, 26)
    whole = encoder(images)
    monkeypatch.setattr(_blocks, "CHUNK", chunk)
    monkeypatch.setattr(_blocks, "SEGMENT", segment)
    for a, b in zip(encoder(images).tokens, whole.tokens, strict=True):
        torch.testing.assert_close(a.tokens, b.tokens)
    # With gradients wanted, and under a compiler, a pass overwrites nothing.
    encoder.requires_grad_(True)
    for a, b in zip(encoder(images).tokens, whole.tokens, strict=True):
        torch.testing.assert_close(a.tokens, b.tokens)


def test_neighbours_of_one_grid_attend_together():
    model = model_of(dinov3)
    encoder = MultiResolutionEncoder(model, [(24, 24), (48, 48), (24, 24)], tiles=[1, 2, 1])
    packed = encoder.embed(torch.rand(2, 3, 48, 48))
    runs = _attention.runs(packed, encoder._rotations(packed))
    assert [(r.start, r.sequences, r.length) for r in runs] == [(0, 2 + 8 + 2, 36 + 3)]
    assert runs[0].stop == len(packed.tokens)


def test_segments_are_whole_sequences():
    """Of as few as have so many rows: neighbours of other lengths together, long runs in parts."""
    all_runs = [_attention.Run(0, 2, 10, None), _attention.Run(20, 5, 30, None), _attention.Run(170, 1, 200, None)]
    found = list(_attention.segments(all_runs, 70))
    assert [[(r.start, r.sequences, r.length) for r in segment] for segment in found] == [
        [(0, 2, 10), (20, 2, 30)],
        [(80, 3, 30)],
        [(170, 1, 200)],
    ]
    assert list(_attention.segments(all_runs, 10_000)) == [all_runs]


def test_no_segment_is_left_with_few_rows():
    """Products of a few rows take as long as those of many: the last segment takes them, if it has room for half."""
    all_runs = [_attention.Run(0, 13, 10, None), _attention.Run(130, 1, 30, None)]
    found = list(_attention.segments(all_runs, 40))
    assert [[(r.start, r.sequences, r.length) for r in segment] for segment in found] == [
        [(0, 4, 10)],
        [(40, 4, 10)],
        [(80, 4, 10)],
        [(120, 1, 10), (130, 1, 30)],
    ]
    (whole,) = _attention.segments([_attention.Run(0, 5, 10, None)], 40)
    assert [(r.start, r.sequences, r.length) for r in whole] == [(0, 4, 10), (40, 1, 10)]


@pytest.mark.parametrize("rows", [0, 1, 41, 511, 512, 513, 553, 767, 768, 1060, 1370, 3026])
def test_chunks_are_of_equal_size(rows):
    x = torch.empty(rows + 7, 1)
    sizes = [s.stop - s.start for s in _blocks._chunks(x, 7, 7 + rows)]
    assert sum(sizes) == rows
    if rows:
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) < 1.5 * _blocks.CHUNK
        assert len(sizes) == 1 or min(sizes) > 0.6 * _blocks.CHUNK


class Adapter(nn.Linear):
    """A projection that is more than its product."""

    def forward(self, x):
        return super().forward(x) + 1


def test_projections_that_are_more_than_their_product():
    model = model_of(dinov2)
    changed = copy.deepcopy(model)
    name, q = next((n, m) for n, m in changed.named_modules() if n.endswith(("q_proj", "query")) and ".1." in n)
    adapter = Adapter(q.in_features, q.out_features).requires_grad_(False)
    adapter.load_state_dict(q.state_dict())
    changed.set_submodule(name, adapter)
    images = torch.rand(1, 3, 24, 24)
    result = MultiResolutionEncoder(changed, [(24, 24)])(images).tokens[0].block(0)
    torch.testing.assert_close(result, changed(images).last_hidden_state)
    assert not torch.allclose(result, model(images).last_hidden_state)
    hooked = copy.deepcopy(model)
    v = next(m for n, m in hooked.named_modules() if n.endswith(("v_proj", "value")) and ".0." in n)
    v.register_forward_hook(lambda module, inputs, output: 2 * output)
    result = MultiResolutionEncoder(hooked, [(24, 24)])(images).tokens[0].block(0)
    torch.testing.assert_close(result, hooked(images).last_hidden_state)


def test_autocast():
    model = model_of(dinov2)
    images = torch.rand(1, 3, 24, 24)
    with torch.autocast("cpu", torch.bfloat16):
        actual = MultiResolutionEncoder(model, [(24, 24)])(images).tokens[0].block(0)
        same = model(images).last_hidden_state
    oracle = copy.deepcopy(model).double()(images.double()).last_hidden_state
    assert actual.dtype == same.dtype
    assert_within_budget(actual, oracle, same, "autocast")


def test_compiles_in_one_graph():
    model = model_of(dinov2)
    encoder = MultiResolutionEncoder(model, SIZES[:2])
    images = torch.rand(1, 3, 30, 26)
    compiled = torch.compile(lambda x: encoder(x).maps, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(images), encoder(images).maps, strict=True):
        torch.testing.assert_close(a, b)


def per_sequence(q, k, v, cu_q, cu_k, longest_q, longest_k):
    """What ``torch.nn.attention.varlen.varlen_attn`` means, on any device."""
    assert torch.equal(cu_q, cu_k)
    assert cu_q.dtype == torch.int32
    assert longest_q == longest_k == int((cu_q[1:] - cu_q[:-1]).max())
    parts = []
    for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        parts.append(F.scaled_dot_product_attention(*(t[a:b].transpose(0, 1) for t in (q, k, v))).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("build", [dinov2, dinov3, hub], ids=lambda f: f.__name__)
def test_varlen_takes_the_packed_buffer(build, monkeypatch):
    """The launch of all sequences at once, with a stand-in for the CUDA kernel."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen attention")
    monkeypatch.setattr(varlen, "varlen_attn", per_sequence)
    monkeypatch.setattr(_attention, "reasons_against", lambda *_: [])
    model = model_of(build)
    images = torch.rand(2, 3, 30, 26)
    expected = MultiResolutionEncoder(model, SIZES)(images).tokens[0].tokens
    encoder = MultiResolutionEncoder(model, SIZES, attention="varlen")
    torch.testing.assert_close(encoder(images).tokens[0].tokens, expected)
    torch.testing.assert_close(encoder.requires_grad_(True)(images).tokens[0].tokens, expected)


def test_varlen_is_refused_with_every_reason():
    with pytest.raises(ValueError, match=r'"varlen"` cannot be used: .*CUDA device.*float32'):
        MultiResolutionEncoder(model_of(dinov2), SIZES, attention="varlen")(torch.rand(1, 3, 24, 24))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["varlen", "xformers"])
@pytest.mark.parametrize("build", [dinov2, dinov3], ids=lambda f: f.__name__)
def test_one_launch_for_all_sequences_on_a_gpu(build, kind):
    double = model_of(build).double()
    half = copy.deepcopy(double).to("cuda", torch.bfloat16)
    encoder = MultiResolutionEncoder(half, SIZES, attention=kind)
    reasons = _attention.reasons_against(kind, torch.device("cuda"), torch.bfloat16, encoder.family.head_width)
    if reasons:
        pytest.skip("; ".join(reasons))
    images = torch.rand(2, 3, 30, 26)
    oracle = MultiResolutionEncoder(double, SIZES)(images.double()).tokens[0].tokens
    same = MultiResolutionEncoder(half, SIZES, attention="sdpa")(images.cuda()).tokens[0].tokens
    assert_within_budget(encoder(images.cuda()).tokens[0].tokens.cpu(), oracle, same.cpu(), kind)


def test_parameters_are_shared_and_maps_are_views():
    model = model_of(dinov2)
    encoder = MultiResolutionEncoder(model, SIZES)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in model.parameters()}
    features = encoder(torch.zeros(1, 3, 24, 24))
    storage = features.tokens[0].tokens.untyped_storage().data_ptr()
    for map_, cls in zip(features.maps, features.cls, strict=True):
        assert map_.untyped_storage().data_ptr() == storage == cls.untyped_storage().data_ptr()
    assert features.tokens[0].cu_seqlens.tolist() == [0, 16, 53, 110]


def test_a_copy_runs_on_its_own_parameters():
    encoder = MultiResolutionEncoder(model_of(hub), SIZES[:1])
    twin = copy.deepcopy(encoder).double()
    assert twin(torch.rand(1, 3, 24, 24)).maps[0].dtype == torch.float64
    assert encoder(torch.rand(1, 3, 24, 24)).maps[0].dtype == torch.float32


@pytest.mark.parametrize("build", [dinov2, dinov3], ids=lambda f: f.__name__)
def test_gradients_reach_the_parameters(build):
    model = model_of(build).requires_grad_(True)
    images = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8)
    encoder = MultiResolutionEncoder(model, SIZES[:2], mean=MEAN, std=STD)
    sum(m.square().sum() for m in encoder(images).maps).backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    prefix = prefix_of(build)
    sum(original(build, model, images, s, 2, True)[:, prefix:].square().sum() for s in SIZES[:2]).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    double = copy.deepcopy(model).double()
    double.zero_grad()
    sum(original(build, double, images, s, 2, True)[:, prefix:].square().sum() for s in SIZES[:2]).backward()
    for name, p in double.named_parameters():
        if p.grad is not None:
            assert_within_budget(actual[name], p.grad, expected[name], name)


def test_tiles_are_images_of_their_own():
    model = model_of(dinov2)
    images = torch.rand(2, 3, 48, 48)
    tiled = MultiResolutionEncoder(model, [(24, 24), (48, 48)], tiles=[1, 2])(images)
    assert tiled.maps[1].shape[2:] == (12, 12)
    plain = MultiResolutionEncoder(model, [(24, 24)])
    for y in range(2):
        for x in range(2):
            alone = plain(images[:, :, 24 * y : 24 * (y + 1), 24 * x : 24 * (x + 1)]).maps[0]
            torch.testing.assert_close(tiled.maps[1][:, :, 6 * y : 6 * (y + 1), 6 * x : 6 * (x + 1)], alone)


def test_scales_and_their_rounding():
    model = model_of(dinov2)
    by_rule = {rule: MultiResolutionEncoder(model, scales=[0.5, 1.5], rounding=rule) for rule in ("floor", "murf")}
    assert by_rule["floor"].sizes_for(30, 26) == [(12, 12), (44, 36)]
    assert by_rule["murf"].sizes_for(30, 26) == [(15, 13), (45, 39)]
    assert [tuple(m.shape[2:]) for m in by_rule["murf"](torch.rand(1, 3, 30, 26)).maps] == [(3, 3), (11, 9)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "Dinov2Model"),
        ({"layers": [3]}, ValueError, "3 blocks"),
        ({"layers": []}, ValueError, "layers"),
        ({"scales": [1.0]}, ValueError, "either"),
        ({"sizes": None}, ValueError, "either"),
        ({"rounding": "up"}, ValueError, "rounding"),
        ({"attention": "flash"}, ValueError, "attention"),
        ({"sizes": None, "scales": [0.0]}, ValueError, "> 0"),
        ({"layers": [10**30]}, ValueError, "3 blocks"),
        ({"norm": 3}, TypeError, "`norm` must be True or False, got 3"),
        ({"verify": 3}, TypeError, "`verify` must be True or False, got 3"),
        ({"attentions": "x"}, TypeError, "`attentions` must be True or False, got 'x'"),
        ({"keep_positions": 3}, ValueError, "`keep_positions` must be one of"),
        ({"keep_positions": 1.0}, ValueError, "`keep_positions` must be one of"),
        ({"mean": (True, True, True)}, ValueError, "`mean` must be three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "`std` must be three numbers > 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"model": model_of(dinov2), "sizes": [(24, 24)]}
    with pytest.raises(error) as caught:
        MultiResolutionEncoder(**{**good, **arguments})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("images", "sizes", "message"),
    [
        (torch.rand(3, 24, 24), [(24, 24)], "images"),
        (torch.rand(1, 4, 24, 24), [(24, 24)], "images"),
        (torch.rand(1, 3, 24, 24), [(24, 25)], "multiple of 4"),
        (torch.rand(1, 3, 24, 24), [(3, 24)], "hold a patch"),
    ],
)
def test_bad_images(images, sizes, message):
    with pytest.raises(ValueError, match=message):
        MultiResolutionEncoder(model_of(dinov2), sizes)(images)


def test_nan_pixels_stay_in_their_patch_before_attention():
    images = torch.rand(1, 3, 24, 24)
    images[0, 1, 5, 9] = torch.nan
    packed = MultiResolutionEncoder(model_of(dinov2), [(24, 24)]).embed(images)
    bad = packed.map(0).isnan().any(1)[0]
    assert bad.nonzero().tolist() == [[1, 2]]


def test_random_rotations_in_training_are_refused():
    encoder = MultiResolutionEncoder(model_of(dinov3).train(), [(24, 24)])
    with pytest.raises(ValueError, match="training mode"):
        encoder(torch.rand(1, 3, 24, 24))


def test_dropout_in_training_is_refused():
    config = transformers.Dinov2Config(**SMALL, image_size=24, hidden_dropout_prob=0.1)
    encoder = MultiResolutionEncoder(transformers.Dinov2Model(config), [(24, 24)]).train()
    with pytest.raises(ValueError, match="training mode"):
        encoder(torch.rand(1, 3, 24, 24))


@pytest.mark.parametrize("build", [dinov2, dinov3, siglip, *OWN], ids=lambda b: b.__name__)
def test_tangents_and_torch_func(build):
    """Of the images and of every parameter: forward mode is the derivative, reverse mode its transpose, in float32."""
    model = model_of(build)
    encoder = MultiResolutionEncoder(model, [(12, 20), (24, 24)], mean=MEAN, std=STD)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 24, 24, generator=generator)
    parameters = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    directions = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    of_images = torch.randn(images.shape, generator=generator)

    def maps(images, parameters):
        features = torch.func.functional_call(encoder, parameters, (images,))
        return torch.cat([m.flatten() for m in features.maps])

    def moved(step):
        encoder.double()
        there = {name: p.double() + step * directions[name] for name, p in parameters.items()}
        with torch.no_grad():
            return maps(images.double() + step * of_images, there)

    output, tangent = torch.func.jvp(maps, (images, parameters), (of_images, directions))
    assert torch.equal(output, maps(images, parameters)) or torch.allclose(output, maps(images, parameters), atol=1e-4)
    cotangent = torch.randn(output.shape, generator=generator)
    along = torch.func.jvp(lambda p: maps(images, p), (parameters,), (directions,))[1]
    _, pull = torch.func.vjp(lambda p: maps(images, p), parameters)
    (pulled,) = pull(cotangent)
    one_way = float((cotangent.double() * along.double()).sum())
    other_way = sum(float((pulled[name].double() * directions[name]).sum()) for name in pulled)
    scale = float(cotangent.norm() * along.norm())
    assert abs(one_way - other_way) < 1e-5 * scale
    step = 1e-5
    expected = (moved(step) - moved(-step)) / (2 * step)
    assert float((tangent.double() - expected).norm() / expected.norm()) < 1e-4
