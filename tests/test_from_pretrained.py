"""MuRF from a folder of transformers: weights, family and normalization; no network."""

from __future__ import annotations

import json

import pytest
import torch
from families import SMALL

import murf_fast
from murf_fast.nn.vit._pretrained import IMAGENET

transformers = pytest.importorskip("transformers")

CLIP = {**SMALL, "hidden_act": "quick_gelu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    import socket

    def refused(*arguments, **options):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)


def test_features_are_those_of_the_loaded_model(folder):
    images = torch.randint(0, 256, (2, 3, 30, 26), dtype=torch.uint8)
    murf = murf_fast.MuRF.from_pretrained(folder, (24, 32))
    model = transformers.Dinov2Model.from_pretrained(folder).eval().requires_grad_(False)
    assert torch.equal(murf(images), murf_fast.MuRF(model, (24, 32), **IMAGENET)(images))
    assert not murf.training
    assert not any(p.requires_grad for p in murf.parameters())
    assert (
        murf_fast.MuRF.from_pretrained(str(folder), scales=(1.0,), dtype=torch.bfloat16)(images).dtype == torch.bfloat16
    )


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_mean_and_deviation_are_the_processor_s(file, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "patch_size": SMALL["patch_size"]}
    nested = {"image_processor": settings} if file == "processor_config.json" else settings
    (tmp_path / file).write_text(json.dumps(nested))
    resize = murf_fast.MuRF.from_pretrained(tmp_path, (24,)).encoder.resize
    assert (resize["mean"], resize["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    given = murf_fast.MuRF.from_pretrained(tmp_path, (24,), mean=(0.5, 0.5, 0.5)).encoder.resize
    assert (given["mean"], given["std"]) == ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6])
    (tmp_path / file).write_text(json.dumps(settings | {"do_normalize": False}))
    assert murf_fast.MuRF.from_pretrained(tmp_path, (24,)).encoder.resize["mean"] is None
    (tmp_path / file).write_text(json.dumps(settings | {"patch_size": 99}))
    with pytest.raises(ValueError, match=f"`patch_size` of {file} is 99, the model's is {SMALL['patch_size']}"):
        murf_fast.MuRF.from_pretrained(tmp_path, (24,))


def test_a_family_s_own_without_a_processor(tmp_path):
    config = transformers.CLIPVisionConfig(**CLIP)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    murf = murf_fast.MuRF.from_pretrained(tmp_path, (24,))
    assert murf.encoder.family.kind.name.startswith("CLIP")
    assert murf.encoder.resize["mean"][0] == 0.48145466


def test_what_does_not_load_is_one_sentence(folder, tmp_path):
    load = murf_fast.MuRF.from_pretrained
    with pytest.raises(FileNotFoundError, match="not in the local Hugging Face cache; local_files_only=False"):
        load("nobody/no-such-model", (24,))
    with pytest.raises(FileNotFoundError, match="must be a folder"):
        load(tmp_path / "none", (24,))
    with pytest.raises(ValueError, match="does not load"):
        load(tmp_path, (24,))  # empty
    with pytest.raises(TypeError, match="`name_or_folder` must be"):
        load(3, (24,))
    with pytest.raises(TypeError, match="`local_files_only` must be True or False"):
        load(folder, (24,), local_files_only="no")
    with pytest.raises(ValueError, match="either `sizes` or `scales`"):
        load(folder)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL))
    state = {k: v for k, v in model.state_dict().items() if ".layer.1." not in k and "layers.1." not in k}
    model.save_pretrained(tmp_path / "half", state_dict=state)
    with pytest.raises(ValueError, match=r"it lacks .* other weights of a Dinov2Model"):
        load(tmp_path / "half", (24,))
    (tmp_path / "half" / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="half does not load"):
        load(tmp_path / "half", (24,))
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**config, vocab_size=20)).save_pretrained(tmp_path / "text")
    with pytest.raises(TypeError, match="`model` must be a vision transformer of a known family, got BertModel"):
        load(tmp_path / "text", (24,))
