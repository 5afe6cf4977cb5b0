"""The families of Hugging Face transformers."""

from __future__ import annotations

from dataclasses import replace

from murf_fast.nn.vit.families._layout import BlockLayout, Layout

_PROJECTIONS = (
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),  # transformers 4
)
_DINO = BlockLayout(
    norm1="norm1",
    projections=_PROJECTIONS,
    output="attention.o_proj | attention.output.dense",
    scale1="layer_scale1",
    norm2="norm2",
    mlp="mlp",
    scale2="layer_scale2",
    heads="attention.num_heads | attention.num_attention_heads | attention.attention.num_attention_heads",
    scale="attention.scaling | attention.attention.scaling",
)
_VIT = replace(_DINO, norm1="layernorm_before", norm2="layernorm_after", scale1="", scale2="")
_CLIP = BlockLayout(
    norm1="layer_norm1",
    projections=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
    output="self_attn.out_proj",
    norm2="layer_norm2",
    mlp="mlp",
    heads="self_attn.num_heads",
    scale="self_attn.scale",
)
_ANY_SIZE = (("interpolate_pos_encoding", True),)

_dinov2 = Layout(
    name="DINOv2 of transformers (Dinov2Model, Dinov2Backbone)",
    models=("Dinov2Model", "Dinov2Backbone"),
    holders=(("Dinov2ForImageClassification", "dinov2"),),
    projection="embeddings.patch_embeddings.projection",
    embedders=("embeddings",),
    prefix=("embeddings.cls_token", "embeddings.register_tokens"),
    positions="embeddings.position_embeddings",
    flavor="dinov2-hf",
    container="encoder",
    blocks="encoder.layer",
    block=_DINO,
    norm="layernorm",
)
_vit = Layout(
    name="ViT and DINO of transformers (ViTModel)",
    models=("ViTModel",),
    holders=(("ViTForImageClassification", "vit"), ("ViTForMaskedImageModeling", "vit")),
    projection="embeddings.patch_embeddings.projection",
    embedders=("embeddings",),
    prefix=("embeddings.cls_token",),
    positions="embeddings.position_embeddings",
    flavor="dinov2-hf",
    container="encoder",
    blocks="layers | encoder.layer",
    block=_VIT,
    norm="layernorm",
    options=_ANY_SIZE,
)
_clip = Layout(
    name="CLIP of transformers (CLIPVisionModel)",
    models=("CLIPVisionModel", "CLIPVisionTransformer"),
    holders=(
        ("CLIPModel", "vision_model"),
        ("CLIPVisionModelWithProjection", "vision_model"),
        ("CLIPForImageClassification", "vision_model"),
    ),
    tower="vision_model",  # transformers 4 wraps it
    projection="embeddings.patch_embedding",
    embedders=("embeddings", "pre_layrnorm"),
    pre_norm="pre_layrnorm",
    prefix=("embeddings.class_embedding",),
    positions="embeddings.position_embedding.weight",
    flavor="clip",
    container="encoder",
    keyword="inputs_embeds",
    blocks="encoder.layers",
    block=_CLIP,
    norm="post_layernorm",
    is_normed=False,  # the norm is that of the pooled CLS token
    options=_ANY_SIZE,
)
_siglip = Layout(
    name="SigLIP of transformers (SiglipVisionModel)",
    models=("SiglipVisionModel", "SiglipVisionTransformer"),
    holders=(("SiglipModel", "vision_model"), ("SiglipForImageClassification", "vision_model")),
    tower="vision_model",
    projection="embeddings.patch_embedding",
    embedders=("embeddings",),
    positions="embeddings.position_embedding.weight",
    flavor="siglip",
    container="encoder",
    keyword="inputs_embeds",
    blocks="encoder.layers",
    block=_CLIP,
    norm="post_layernorm",
    options=_ANY_SIZE,
)

LAYOUTS = (
    _dinov2,
    replace(
        _dinov2,
        name="DINOv2 with registers of transformers (Dinov2WithRegistersModel, Dinov2WithRegistersBackbone)",
        models=("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        holders=(("Dinov2WithRegistersForImageClassification", "dinov2_with_registers"),),
        flavor="dinov2-reg",
    ),
    Layout(
        name="DINOv3 of transformers (DINOv3ViTModel, DINOv3ViTBackbone)",
        models=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        projection="embeddings.patch_embeddings",
        embedders=("embeddings",),
        prefix=("embeddings.cls_token", "embeddings.register_tokens"),
        rotary="transformers",
        rope="rope_embeddings",
        container="model",
        blocks="layer | model.layer",  # transformers 4 | 5
        block=_DINO,
        norm="norm",
    ),
    _clip,
    _siglip,
    replace(
        _siglip,
        name="SigLIP 2 of transformers (Siglip2VisionModel)",
        models=("Siglip2VisionModel", "Siglip2VisionTransformer"),
        holders=(("Siglip2Model", "vision_model"), ("Siglip2ForImageClassification", "vision_model")),
        flavor="siglip2",
        patch_layout="yxc",
        patch_size="config.patch_size",
    ),
    _vit,
    replace(
        _vit,
        name="DeiT of transformers (DeiTModel)",
        models=("DeiTModel",),
        holders=(
            ("DeiTForImageClassification", "deit"),
            ("DeiTForImageClassificationWithTeacher", "deit"),
            ("DeiTForMaskedImageModeling", "deit"),
        ),
        prefix=("embeddings.cls_token", "embeddings.distillation_token"),
        positioned=2,
    ),
    replace(
        _vit,
        name="I-JEPA of transformers (IJepaModel)",
        models=("IJepaModel",),
        holders=(("IJepaForImageClassification", "ijepa"),),
        prefix=(),
    ),
    Layout(
        name="C-RADIO of transformers (RadioModel)",
        models=("RadioModel",),
        projection="embeddings.patch_projection",
        patch_size="config.patch_size",
        embedders=("input_conditioner", "embeddings"),
        calls_embeddings=True,  # positions are cut out of a square that is resized
        normalizes=True,
        prefix=("embeddings.cls_register_token",),
        positioned=0,
        container="encoder",
        blocks="encoder.layer",
        block=_DINO,
        norm="",
    ),
)
