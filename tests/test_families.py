"""Every family of backbones: the packed pass against the model's own forward, wrappers, and what is refused."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path

import families as models
import pytest
import stand_in_torchvision
import torch
import torch.nn.functional as F
from families import DEPTH, DIM, HEADS, PATCH, SIDE, SMALL, randomized
from torch import nn
from util import assert_within_budget, nudged, worst

from murf_fast.nn import S2, MultiResolutionEncoder
from murf_fast.nn._signatures import signature
from murf_fast.nn.vit.families import LAYOUTS

transformers = pytest.importorskip("transformers", reason="needs transformers, the original models")

OWN_SIZE = (SIDE * PATCH, SIDE * PATCH)
SIZES = [(12, 20), OWN_SIZE, (32, 28)]
ANY_SIZE = {"interpolate_pos_encoding": True}


def renamed(model: nn.Module, name: str) -> nn.Module:
    """Classes are recognised by name."""
    model.__class__ = type(name, (type(model),), {})
    return model


def timm_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**TIMM, **options})


def timm_eva(**options):
    from timm.models.eva import Eva

    return Eva(**{**TIMM, "embed_dim": 2 * DIM, "use_rot_pos_emb": True, **options})


def open_clip(**options):
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(SIDE * PATCH, PATCH, DIM, DEPTH, HEADS, 2, output_dim=16, **options)


def open_clip_quick():
    from open_clip.transformer import QuickGELU

    return open_clip(act_layer=QuickGELU, ls_init_value=0.3, patch_dropout=0.5)


TIMM = {
    "img_size": SIDE * PATCH,
    "patch_size": PATCH,
    "embed_dim": DIM,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": 0,
    "dynamic_img_size": True,
}
TIMM_DINOV3 = {"rope_type": "dinov3", "use_abs_pos_emb": False, "num_reg_tokens": 2, "rope_rotate_half": True}


def clip(**options):
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, **options))


@dataclass
class Case:
    family: str  # how its layout's name begins
    build: object
    last: object = None  # the last tokens by the model's own forward; None: of a model of transformers, at any size
    blocks: str = "blocks"
    sizes: tuple = tuple(SIZES)
    needs: str = ""
    packs_embeddings: bool = True


def features(model, pixels):
    return model.forward_features(pixels)


def any_size(model, pixels):
    return model(pixels, **ANY_SIZE).last_hidden_state


def plain(model, pixels):
    return model(pixels).last_hidden_state


def of_open_clip(model, pixels):
    return model.transformer(model._embeds(pixels))


def of_openai(model, pixels):
    seen = []
    handle = model.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(pixels)
    handle.remove()
    return seen[0].transpose(0, 1)


def of_hub(model, pixels):
    return model.forward_features(pixels)["x_norm"]


def small(kind, config, **options):
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**{**SMALL, **options}))


RADIO = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "patch_size": PATCH}
CASES = {
    "clip": Case("CLIP of t", clip, any_size, "encoder.layers"),
    "clip_gelu": Case("CLIP of t", lambda: clip(hidden_act="gelu"), any_size, "encoder.layers"),
    "vit": Case("ViT and", small("ViTModel", "ViTConfig"), any_size, "layers"),
    "deit": Case("DeiT", small("DeiTModel", "DeiTConfig"), any_size, "layers"),
    "ijepa": Case("I-JEPA", small("IJepaModel", "IJepaConfig"), any_size, "layers"),
    "radio": Case(
        "C-RADIO",
        lambda: transformers.RadioModel(transformers.RadioConfig(**RADIO, max_img_size=32, num_registers=2)),
        plain,
        "encoder.layer",
        packs_embeddings=False,
    ),
    "openai": Case(
        "CLIP of O",
        lambda: renamed(models.OpenAIClip(), "VisionTransformer"),
        of_openai,
        "transformer.resblocks",
        sizes=(OWN_SIZE,),
    ),
    "open_clip": Case(
        "CLIP of O", open_clip, of_open_clip, "transformer.resblocks", sizes=(OWN_SIZE,), needs="open_clip"
    ),
    "open_clip_quick": Case(
        "CLIP of O", open_clip_quick, of_open_clip, "transformer.resblocks", sizes=(OWN_SIZE,), needs="open_clip"
    ),
    "open_clip_norms": Case(
        "CLIP of O",
        lambda: open_clip(qk_norm=True, scale_attn_inner=True),
        of_open_clip,
        "transformer.resblocks",
        sizes=(OWN_SIZE,),
        needs="open_clip",
    ),
    "hub_dinov3": Case("DINOv3 of torch", lambda: renamed(models.HubDinov3(), "DinoVisionTransformer"), of_hub),
    "hub_dinov3_bf16": Case(
        "DINOv3 of torch", lambda: renamed(models.HubDinov3(torch.bfloat16, 0), "DinoVisionTransformer"), of_hub
    ),
    "timm": Case(
        "ViT of timm",
        lambda: timm_vit(reg_tokens=2, no_embed_class=True, init_values=0.5),
        features,
        needs="timm",
    ),
    "timm_query_norm": Case("ViT of timm", lambda: timm_vit(qk_norm=True, reg_tokens=2), features, needs="timm"),
    "timm_class_free": Case(
        "ViT of timm",
        lambda: timm_vit(class_token=False, global_pool="avg", init_values=0.3),
        features,
        needs="timm",
    ),
    "timm_pre_norm": Case(
        "ViT of timm",
        lambda: timm_vit(pre_norm=True, scale_attn_norm=True, patch_drop_rate=0.5),
        features,
        needs="timm",
    ),
    "timm_no_positions": Case("ViT of timm", lambda: timm_vit(pos_embed=""), features, needs="timm"),
    "eva": Case("EVA", lambda: timm_eva(swiglu_mlp=True, patch_drop_rate=0.5), features, needs="timm"),
    "eva_unfused": Case(
        "EVA",
        lambda: timm_eva(qkv_fused=False, scale_attn_inner=True, init_values=0.4, ref_feat_shape=(4, 4)),
        features,
        needs="timm",
    ),
    "eva_attention": Case("EVA", lambda: timm_eva(attn_type="rope", qk_norm=True), features, needs="timm"),
    "timm_dinov3": Case(
        "EVA", lambda: timm_eva(**TIMM_DINOV3, qkv_bias=False, init_values=0.3), features, needs="timm"
    ),
}
# In bfloat16 as well: a position rule, a dtype of rotation or a norm of its own each.
HALF = ("clip", "radio", "openai", "hub_dinov3", "timm_query_norm", "eva_unfused", "timm_dinov3")
# Those of test_multi_resolution_encoder.py.
OTHERS = (
    "DINOv2 of transformers", "DINOv2 with registers", "DINOv3 of transformers", "SigLIP of", "SigLIP 2 of",
    "DINO and DINOv2 of torch.hub",
)  # fmt: skip


def model_of(name: str) -> nn.Module:
    case = CASES[name]
    if case.needs:
        stand_in_torchvision.imported(case.needs)
    torch.manual_seed(0)
    return randomized(case.build())


def resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def test_every_layout_is_tested():
    for layout in LAYOUTS:
        assert layout.name.startswith((*OTHERS, *(case.family for case in CASES.values()))), layout.name


def test_the_guide_has_every_layout():
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "resolutions.md").read_text()
    for layout in LAYOUTS:
        assert f"| {layout.name} |" in guide
        assert all(holder in guide for holder, _ in layout.holders), layout.holders


def both(model, case: Case, images: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first block's output and the last tokens, by the model's own forward."""
    first = []
    handle = model.get_submodule(case.blocks)[0].register_forward_hook(lambda m, i, output: first.append(output))
    last = case.last(model, resized(images, size))
    handle.remove()
    first = first[0] if isinstance(first[0], torch.Tensor) else first[0][0]
    return (first.transpose(0, 1) if case.last is of_openai else first), last


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CASES), *((name, torch.bfloat16) for name in HALF)]
)
def test_equals_the_model_once_per_resolution(name, dtype):
    case = CASES[name]
    model = model_of(name).to(dtype)
    double = copy.deepcopy(model).double()
    images = torch.randn(2, 3, 30, 26, generator=torch.Generator().manual_seed(0)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = MultiResolutionEncoder(model, case.sizes, layers=[0, -1], norm=False)
        last = MultiResolutionEncoder(model, case.sizes, verify=False)
        family = encoder.family
        assert family.kind.name.startswith(case.family)
        assert all(signature(block) in encoder._packable for block in family.blocks)
        assert all(signature(m) in encoder._packable for m in family.embedders) == case.packs_embeddings
        with torch.no_grad():
            unnormed, normed = encoder(images), last(images)
            for s, size in enumerate(case.sizes):
                oracles = both(double, case, images.double(), size)
                same = both(model, case, images, size)
                found = (unnormed.tokens[0].block(s), normed.tokens[0].block(s))
                for part, a, oracle, b in zip(("first block", "last tokens"), found, oracles, same, strict=True):
                    assert_within_budget(a, oracle, b, f"{name}: {part} at {size}")
                    assert float(oracle.std()) > 0.1
                grid = (size[0] // PATCH, size[1] // PATCH)
                prefix = unnormed.tokens[0].prefix
                torch.testing.assert_close(normed.maps[s], found[1][:, prefix:].mT.unflatten(2, grid), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["clip", "hub_dinov3", "openai", "timm_query_norm", "eva", "eva_unfused"])
@pytest.mark.parametrize("where", ["block", "embeddings", "container"])
def test_what_is_called_gives_the_same(name, where):
    """Hooks that see and change nothing make the encoder call modules as the model does."""
    model = model_of(name)
    encoder = MultiResolutionEncoder(model, CASES[name].sizes)
    images, calls, family = torch.randn(1, 3, 24, 24), [], encoder.family
    expected = encoder(images).tokens[0].tokens
    module = {"block": family.blocks[1], "embeddings": family.embedders[-1], "container": family.container}[where]
    if module is None:
        return
    module.register_forward_hook(lambda m, i, o: calls.append(type(m)))
    torch.testing.assert_close(encoder(images).tokens[0].tokens, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == len(CASES[name].sizes)


def test_an_encoder_that_does_more_is_called():
    """No norm follows CLIP's encoder, and none takes back what a changed one does."""
    model = model_of("clip")
    kind = type(model.encoder)

    def forward(self, inputs_embeds, **options):
        output = kind.forward(self, inputs_embeds, **options)
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    model.encoder.__class__ = type("Changed", (kind,), {"forward": forward})
    images = torch.randn(1, 3, 24, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = MultiResolutionEncoder(model, [OWN_SIZE])(images).tokens[0].block(0)
    torch.testing.assert_close(result, model(images).last_hidden_state)


@pytest.mark.parametrize("name", ["clip", "hub_dinov3", "openai", "timm_query_norm", "eva_unfused"])
def test_gradients(name):
    case, model = CASES[name], model_of(name).requires_grad_(True)
    sizes = case.sizes[:1]
    images = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def gradients(model, tokens):
        model.zero_grad()
        sum(t.square().mean() for t in tokens).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def own(model, images):
        return gradients(model, [case.last(model, resized(images, size)) for size in sizes])

    encoder = MultiResolutionEncoder(model, sizes)
    actual = gradients(model, [encoder(images).tokens[0].block(s) for s in range(len(sizes))])
    actual = {n: g.clone() for n, g in actual.items()}
    # A sum of few terms may be right by chance.
    runs = [{n: g.clone() for n, g in own(model, nudged(images, seed)).items()} for seed in range(3)]
    oracle = own(copy.deepcopy(model).double(), images.double())
    assert actual.keys() <= oracle.keys()
    assert {n for n in oracle if float(oracle[n].abs().max())} <= actual.keys()
    for parameter in actual:
        same = worst([run[parameter] for run in runs], oracle[parameter])
        assert_within_budget(actual[parameter], oracle[parameter], same, parameter)


@pytest.mark.parametrize("name", ["openai", "eva"])
def test_compiles_in_one_graph(name):
    encoder = MultiResolutionEncoder(model_of(name), CASES[name].sizes[:1])
    images = torch.randn(1, 3, 24, 24)
    compiled = torch.compile(lambda x: encoder(x).maps[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), encoder(images).maps[0], rtol=1e-4, atol=1e-4)


def test_the_norm_of_clip_is_that_of_the_pooled_token():
    model = model_of("clip")
    images = torch.randn(1, 3, 24, 24)
    plain_, asked = (MultiResolutionEncoder(model, [(24, 24)], norm=norm)(images).tokens[0] for norm in (None, True))
    output = model(images)
    torch.testing.assert_close(plain_.block(0), output.last_hidden_state)
    torch.testing.assert_close(asked.block(0)[:, 0], output.pooler_output)
    with pytest.raises(ValueError, match="`norm` must be False or None, `model` has no final norm"):
        MultiResolutionEncoder(model_of("radio"), [(24, 24)], norm=True)


def test_attentions_are_those_of_clip():
    model = model_of("clip")
    images = torch.randn(1, 3, 24, 24)
    (ours,) = MultiResolutionEncoder(model, [OWN_SIZE], layers=[0], attentions=True)(images).attentions
    model.set_attn_implementation("eager")
    theirs = model(images, output_attentions=True).attentions[0]
    torch.testing.assert_close(ours.flatten(2), theirs[:, :, 0, 1:], rtol=1e-4, atol=1e-6)


def test_radio_normalizes_by_itself():
    model = model_of("radio")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = MultiResolutionEncoder(model, [(24, 24)])(torch.full((1, 3, 24, 24), 128, dtype=torch.uint8))
    expected = model(torch.full((1, 3, 24, 24), 128 / 255)).last_hidden_state
    torch.testing.assert_close(result.tokens[0].block(0), expected)


@pytest.mark.parametrize("name", ["timm_pre_norm", "eva", "open_clip_quick"])
def test_dropout_of_patches_in_training_is_refused(name):
    encoder = MultiResolutionEncoder(model_of(name).train(), [OWN_SIZE])
    with pytest.raises(ValueError, match="training mode"):
        encoder(torch.rand(1, 3, 24, 24))


def test_rotary_positions_of_a_fixed_grid():
    stand_in_torchvision.imported("timm")
    model = timm_eva(dynamic_img_size=False).eval()
    MultiResolutionEncoder(model, [OWN_SIZE])(torch.randn(1, 3, 24, 24))
    with pytest.raises(ValueError, match=r"dynamic_img_size=True for other grids than \(6, 6\)"):
        MultiResolutionEncoder(model, [(16, 36)])(torch.randn(1, 3, 24, 24))


# Wrappers.

NO_MLP = {name: value for name, value in SMALL.items() if name != "intermediate_size"}


def with_text(kind: str, **options) -> nn.Module:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config={**SMALL, **options})
    return getattr(transformers, f"{kind}Model")(config)


HOLDERS = {
    "CLIPModel": (lambda: with_text("CLIP", projection_dim=16), "vision_model"),
    "CLIPVisionModelWithProjection": (small("CLIPVisionModelWithProjection", "CLIPVisionConfig"), "vision_model"),
    "SiglipModel": (lambda: with_text("Siglip"), "vision_model"),
    "Siglip2Model": (lambda: with_text("Siglip2", num_patches=36), "vision_model"),
    "Dinov2ForImageClassification": (
        lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**NO_MLP)), "dinov2",
    ),
    "Dinov2WithRegistersForImageClassification": (
        lambda: transformers.Dinov2WithRegistersForImageClassification(
            transformers.Dinov2WithRegistersConfig(**NO_MLP)
        ),
        "dinov2_with_registers",
    ),
    "ViTForImageClassification": (small("ViTForImageClassification", "ViTConfig"), "vit"),
    "DeiTForImageClassification": (small("DeiTForImageClassification", "DeiTConfig"), "deit"),
    "IJepaForImageClassification": (small("IJepaForImageClassification", "IJepaConfig"), "ijepa"),
    "DataParallel": (lambda: nn.DataParallel(clip()), "module"),
    "compiled": (lambda: torch.compile(clip(), backend="eager"), "_orig_mod"),
    "both": (
        lambda: torch.compile(nn.DataParallel(with_text("CLIP")), backend="eager"), "_orig_mod.module.vision_model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDERS)
def test_wrappers_are_taken_off(name):
    build, attribute = HOLDERS[name]
    model = randomized(build())
    encoder = MultiResolutionEncoder(model, SIZES)
    assert encoder.model is model.get_submodule(attribute)
    images = torch.randn(1, 3, 24, 24)
    expected = MultiResolutionEncoder(encoder.model, SIZES)(images).tokens[0].tokens
    assert torch.equal(encoder(images).tokens[0].tokens, expected)


def test_holders_hold_what_the_layouts_say():
    for holder, attribute in (pair for layout in LAYOUTS for pair in layout.holders):
        kind = getattr(transformers, holder, None)
        if kind is not None:
            assert f"self.{attribute} = " in inspect.getsource(kind.__init__), holder


@pytest.mark.parametrize("holder", ["CLIP", "CustomTextCLIP", "CoCa", "TimmModel"])
def test_holders_of_open_clip(holder):
    package = stand_in_torchvision.imported("open_clip")
    attribute = next(a for layout in LAYOUTS for name, a in layout.holders if name == holder)
    kind = getattr(package, holder, None) or package.timm_model.TimmModel
    assert f"self.{attribute} = " in inspect.getsource(kind.__init__)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Dinov2Backbone", "Dinov2Config"),
        ("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig"),
        ("DINOv3ViTBackbone", "DINOv3ViTConfig"),
    ],
)
def test_backbones_are_their_models(kind, config):
    options = {**(SMALL if kind == "DINOv3ViTBackbone" else NO_MLP), "reshape_hidden_states": True}
    model = randomized(getattr(transformers, kind)(getattr(transformers, config)(**options)))
    pixels = torch.randn(1, 3, 24, 32)
    (map_,) = MultiResolutionEncoder(model, [(24, 32)])(pixels).maps
    torch.testing.assert_close(map_, model(pixels).feature_maps[-1], rtol=1e-4, atol=1e-4)


def test_a_model_that_trains_in_ddp_is_not_taken_out_of_it(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = clip()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="must be frozen inside of DistributedDataParallel"):
            MultiResolutionEncoder(wrapped, SIZES)
        model.requires_grad_(False)
        assert MultiResolutionEncoder(wrapped, SIZES).model is model
        # What is not known is a callable to S2, whatever trains in it.
        other = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        assert not S2(other, [1]).is_packed
    finally:
        torch.distributed.destroy_process_group()


def test_s2_takes_what_holds_a_model():
    model = randomized(with_text("CLIP"))
    images = torch.randn(1, 3, 24, 24)
    assert torch.equal(S2(model, [1, 2])(images), S2(model.vision_model, [1, 2])(images))


# What is refused says why.


class OwnForward(nn.Module):
    def forward(self, pixels):
        return pixels


def of_its_own_forward():
    kind = type("Custom", (transformers.ViTModel,), {"forward": OwnForward.forward})
    return kind(transformers.ViTConfig(**SMALL))


def of_another_name():
    return renamed(clip(), "MyClip")


def without_positions():
    model = renamed(models.HubDinov3(), "DinoVisionTransformer")
    del model.rope_embed
    return model


def with_a_norm_for_cls():
    model = renamed(models.HubDinov3(), "DinoVisionTransformer")
    model.cls_norm = nn.LayerNorm(DIM)
    return model


def sam():
    config = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS, "image_size": 32}
    return transformers.SamVisionModel(transformers.SamVisionConfig(**config, patch_size=PATCH, output_channels=8))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.projector, self.tower = nn.Linear(2, 2), with_text("CLIP")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "got Linear: no family has a class of this name, nor a list of blocks"),
        (sam, "got SamVisionModel: its blocks attend in windows, with relative positions"),
        (of_its_own_forward, "got Custom: it is a ViTModel with a `forward` of its own"),
        (without_positions, "to be DINOv3 of torch.hub (DinoVisionTransformer) it has no `rope_embed`; to be DINO "),
        (with_a_norm_for_cls, "norm of their own (`cls_norm`)"),
        (Tower, "got Tower: no family has a class of this name, nor a list of blocks where it has one; it holds one: "
         "pass `model.tower`."),
        (lambda: nn.Sequential(clip(), clip()), "it holds one: pass `model.0` or `model.1`."),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "got Linear in DataParallel: no family"),
    ],
)  # fmt: skip
def test_refusals_name_the_part(build, message):
    with pytest.raises(TypeError) as caught:
        MultiResolutionEncoder(build(), SIZES)
    assert message in str(caught.value)
    assert "Known are: DINOv2 of transformers" in str(caught.value)


def test_a_class_of_another_name_is_told_its_nearest():
    model = of_another_name()
    model.__class__ = type("MyClip", (nn.Module,), {})
    with pytest.raises(TypeError, match=r"the nearest is CLIP of transformers.*whose parts it has: derive its class"):
        MultiResolutionEncoder(model, SIZES)
    del model.embeddings
    with pytest.raises(TypeError, match=r"of which it lacks `embeddings\.patch_embedding`"):
        MultiResolutionEncoder(model, SIZES)


@pytest.mark.parametrize("rope_type", ["mixed"])
def test_rotary_positions_of_every_block_are_refused(rope_type):
    stand_in_torchvision.imported("timm")
    with pytest.raises(TypeError, match="differ from block to block"):
        MultiResolutionEncoder(timm_eva(rope_type=rope_type), SIZES)
