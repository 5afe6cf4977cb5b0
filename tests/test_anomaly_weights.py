"""The models that the anomaly commands take: every family, by folder, name, timm and torch.hub."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import stand_in_torchvision
import torch
from families import DIM, HEADS, SIDE, SMALL
from test_cli import invoke

from murf_fast.anomaly import MultiResolutionDetector
from murf_fast.cli.anomaly import weights as named
from murf_fast.cli.demo import backbone

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pil = pytest.importorskip("PIL.Image")

HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406)
OPENAI = (0.48145466, 0.4578275, 0.40821073)
VISION = {
    "dinov2": ("Dinov2Model", "Dinov2Config", IMAGENET),
    "dinov2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", IMAGENET),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", IMAGENET),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", HALF),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", HALF),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", OPENAI),
}


def saved(family, folder):
    kind, config, mean = VISION[family]
    options = {**SMALL, "num_patches": SIDE**2} if family == "siglip2" else SMALL
    getattr(transformers, kind)(getattr(transformers, config)(**options)).save_pretrained(folder)
    return mean


@pytest.mark.parametrize("family", VISION)
def test_families_by_their_folder(family, tmp_path):
    mean = saved(family, tmp_path / "model")
    found = named.load(tmp_path / "model")
    assert found.description == f"{VISION[family][0]} from --weights, model (3 blocks, 24 channels, patch 4)"
    assert tuple(found.encoder([0], [1.0]).resize["mean"]) == mean
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    detector = MultiResolutionDetector(found.encoder([0, 2], [0.5, 1.0]), pixels=None).fit([image])
    assert len(detector.banks_) == 4
    # A model by itself is normalized as its family is.
    assert tuple(MultiResolutionDetector(found.model, [0], pixels=None).encoder.resize["mean"]) == mean


def test_both_towers_and_heads(tmp_path):
    text = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": DIM}
    config = transformers.SiglipConfig(text_config={**text, "vocab_size": 20}, vision_config=SMALL)
    transformers.SiglipModel(config).save_pretrained(tmp_path / "both")
    encoder = named.load(tmp_path / "both").encoder([0], [1.0])
    assert type(encoder.model).__name__.startswith("SiglipVision")
    assert tuple(encoder.resize["mean"]) == HALF
    head = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL))
    head.save_pretrained(tmp_path / "head")
    found = named.load(tmp_path / "head")
    expected, loaded = head.dinov2.state_dict(), found.model.state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        (
            "processor_config.json",
            {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}},
        ),
    ],
)
def test_mean_and_deviation_of_the_folder_s_processor(file, settings, tmp_path):
    saved("siglip", tmp_path)
    (tmp_path / file).write_text(json.dumps(settings))
    resize = named.load(tmp_path).encoder([0], [1.0]).resize
    assert (resize["mean"], resize["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_a_processor_that_normalizes_nothing(tmp_path):
    saved("siglip", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, "image_mean": [0, 0, 0]}')
    assert named.load(tmp_path).encoder([0], [1.0]).resize["mean"] is None


def test_weights_that_are_not_there_are_not_made_up(tmp_path):
    """transformers would fill them with random numbers, and say so in a warning."""
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL))
    state = {name: x for name, x in model.state_dict().items() if "layer.1" not in name and "mask_token" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"it lacks encoder\.layer\.1\.\S+ and \d+ other weights of a Dinov2Model"):
        named.load(tmp_path)


def test_models_of_no_family(tmp_path):
    config = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": DIM}
    transformers.BertModel(transformers.BertConfig(**config, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no vision transformer that loads: .*of a known family, got BertModel"):
        named.load(tmp_path)


def test_a_name_is_looked_for_in_the_cache_first(weights, monkeypatch):
    asked = []

    def pretrained(name, dtype, local_files_only):
        asked.append((name, local_files_only))
        if local_files_only:
            raise OSError("not cached")
        return transformers.Dinov2Model.from_pretrained(weights), None

    monkeypatch.setattr(named, "_pretrained", pretrained)
    monkeypatch.setattr(backbone, "hub_reachable", lambda: True)
    assert named.load("someone/dinov2").description.startswith("Dinov2Model from --weights, dinov2 (2 blocks")
    assert asked == [("someone/dinov2", True), ("someone/dinov2", False)]
    monkeypatch.setattr(backbone, "hub_reachable", lambda: False)
    with pytest.raises(FileNotFoundError, match="not in the local Hugging Face cache, and the hub cannot be reached"):
        named.load("someone/dinov2")


def test_the_environment_s_weights(weights, monkeypatch):
    monkeypatch.setenv("MURF_FAST_WEIGHTS", str(weights))
    assert named.load(None).description.startswith("Dinov2Model from $MURF_FAST_WEIGHTS, tiny (2 blocks")


def test_timm_by_name_and_checkpoint(tmp_path, monkeypatch):
    made = []

    def create_model(name, **options):
        made.append((name, options))
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL))
        model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        return model

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    (tmp_path / "w.pth").write_bytes(b"")
    found = named.load(f"timm:vit_small:{tmp_path / 'w.pth'}")
    assert found.normalization == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    named.load("timm:hf-hub:timm/vit_small")
    common = {"dynamic_img_size": True}
    assert made == [
        ("vit_small", {**common, "checkpoint_path": str(tmp_path / "w.pth")}),
        ("hf-hub:timm/vit_small", {**common, "pretrained": True}),
    ]


def test_timm_itself(tmp_path):
    timm = stand_in_torchvision.imported("timm")
    name = "vit_tiny_patch16_224"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pth")
    found = named.load(f"timm:{name}:{tmp_path / 'w.pth'}")
    assert (
        found.description
        == f"VisionTransformer from --weights, timm:{name}:{tmp_path / 'w.pth'} (12 blocks, 192 channels, patch 16)"
    )
    assert found.normalization == {"mean": HALF, "std": HALF}
    detector = MultiResolutionDetector(found.encoder([1], [0.5, 1.0]), pixels=None)
    detector.fit([torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)])
    assert [bank.shape for bank in detector.banks_] == [(2 * 2, 192), (4 * 5, 192)]
    with pytest.raises(ValueError, match="holds no vision transformer that loads: Unknown model"):
        named.load("timm:nothing")


def test_a_clone_of_a_hub(tmp_path):
    """Its code is its own; here a model of the DINO hub's shape."""
    (tmp_path / "hubconf.py").write_text(
        "dependencies = ['torch']\n"
        "def small(pretrained=True):\n"
        "    import transformers\n"
        f"    return transformers.Dinov2Model(transformers.Dinov2Config(**{SMALL!r}))\n"
    )
    found = named.load(f"hub:{tmp_path}:small")
    assert type(found.model).__name__ == "Dinov2Model"
    with pytest.raises(ValueError, match="holds no vision transformer that loads: Cannot find callable large"):
        named.load(f"hub:{tmp_path}:large")


def test_fit_and_score_by_another_family(tmp_path):
    """A bank is scored with the normalization that it was made with."""
    saved("siglip", tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [1, 1, 1]}'
    )
    (tmp_path / "good").mkdir()
    pil.new("RGB", (24, 24), (90, 120, 150)).save(tmp_path / "good" / "a.png")
    given = ("--weights", tmp_path / "model")
    options = ("--layers", "1", "--scales", "1", "--pixels", "0")
    result = invoke("anomaly", "fit", tmp_path / "good", "--out", tmp_path / "bank", *given, *options)
    assert result.exit_code == 0, result.output
    arguments = (tmp_path / "bank", tmp_path / "good" / "a.png", "--out", tmp_path / "map.png")
    result = invoke("anomaly", "score", *arguments, *given)
    assert result.exit_code == 0, result.output
    assert "image score 0" in result.output


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    arguments = (tmp_path, "--out", tmp_path / "o", "--weights", "timm:vit", "--layers", "1")
    pil.new("RGB", (24, 24)).save(tmp_path / "a.png")
    result = invoke("anomaly", "fit", *arguments)
    assert result.exit_code == 1
    assert "this needs timm" in result.output


def test_a_half_copy_of_a_folder_is_told_from_another_encoder(tmp_path):
    saved("dinov2", tmp_path / "whole")
    model = transformers.Dinov2Model.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    model.half().save_pretrained(tmp_path / "half")
    pil.new("RGB", (24, 24), (90, 100, 110)).save(tmp_path / "x.png")
    bank, out = tmp_path / "bank", tmp_path / "map.png"
    options = ("--scales", 1, "--layers", 0, "--pixels", 0)
    fitted = invoke("anomaly", "fit", tmp_path / "x.png", "--out", bank, "--weights", tmp_path / "whole", *options)
    assert fitted.exit_code == 0, fitted.output
    score = ("anomaly", "score", bank, tmp_path / "x.png", "--out", out, "--weights", tmp_path / "half")
    refused = invoke(*score)
    assert refused.exit_code == 2
    assert "made with the same weights in float32" in " ".join(refused.output.split())
    taken = invoke(*score, "--any-precision")
    assert taken.exit_code == 0, taken.output


def test_damage_is_not_taken_for_another_type(tmp_path):
    """Weights that are stored in halves are tried as they are where the encoder is another, and there alone."""
    saved("dinov2", tmp_path / "half")
    transformers.Dinov2Model.from_pretrained(tmp_path / "half", dtype=torch.float16).save_pretrained(tmp_path / "half")
    pil.new("RGB", (24, 24), (90, 100, 110)).save(tmp_path / "x.png")
    bank, given = tmp_path / "bank", ("--weights", tmp_path / "half")
    fitted = invoke("anomaly", "fit", tmp_path / "x.png", "--out", bank, *given, "--scales", 1, "--layers", 0)
    assert fitted.exit_code == 0, fitted.output
    (rows,) = bank.glob("*.safetensors")
    content = bytearray(rows.read_bytes())
    content[-1] ^= 1
    rows.write_bytes(content)
    refused = invoke("anomaly", "score", bank, tmp_path / "x.png", "--out", tmp_path / "map.png", *given)
    assert refused.exit_code == 2
    assert f"{rows.name} is damaged or missing: its checksum is not" in " ".join(refused.output.split())


def test_a_processor_whose_mean_is_one_number(tmp_path):
    saved("dinov2", tmp_path)
    settings = {"image_mean": 0.5, "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"`image_mean` of preprocessor_config\.json must be three numbers, got 0\.5"):
        named.load(tmp_path)
