"""Published methods by name: all that each says, what stands in for it, and what a saved detector keeps of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_anomaly_detector import images, model
from test_cli import invoke

from murf_fast import k_center_greedy
from murf_fast.anomaly import METHODS, PRESETS, MultiResolutionDetector, ScoringRules
from murf_fast.anomaly.methods import configured
from murf_fast.nn import MultiResolutionEncoder

pil = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

# Of the papers and the original implementations, for 12 and 24 blocks.
LAYERS = {
    "mrf-ad": ([7, 9, 11], [15, 19, 23]),
    "patchcore": ([5, 8], [11, 17]),
    "anomaly-dino": ([11], [23]),
    "superad": ([2, 5, 8, 11], [5, 11, 17, 23]),
}


@pytest.fixture(scope="module")
def vit():
    return model()


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_shares_of_the_depth(method):
    assert [configured(method, blocks)["layers"] for blocks in (12, 24)] == list(LAYERS[method])
    assert configured(method, 1)["layers"] == [0]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_all_that_it_says(vit, method, tmp_path):
    detector = MultiResolutionDetector.by_name(method, vit)
    said = METHODS[method]
    assert detector.method == method
    assert detector.rules == PRESETS[method]
    assert detector.encoder.layers == said.layers(3)
    assert detector.encoder.norm == said.norm
    assert tuple(detector.encoder.scales) == said.scales
    for name in ("pixels", "shorter_side", "index", "coreset", "projection", "references"):
        assert getattr(detector, name) == getattr(said, name)
    small = {"shorter_side": 32} if said.shorter_side else {"scales": (0.5, 1.0)}
    detector = MultiResolutionDetector.by_name(method, vit, **small).fit(images(4), folder=tmp_path)
    loaded = MultiResolutionDetector.load(tmp_path, vit)
    assert loaded.settings == detector.settings
    found, expected = (each.score(images(1, seed=5)[0]) for each in (loaded, detector))
    assert torch.equal(found.map, expected.map)
    assert found.score == expected.score
    with pytest.raises(ValueError, match="made with another encoder"):
        MultiResolutionDetector.load(tmp_path, MultiResolutionEncoder(vit, scales=(1.0,), norm=not said.norm))


def test_options_stand_in_for_what_a_method_says(vit):
    detector = MultiResolutionDetector.by_name(
        "superad", vit, layers=(1,), norm=False, references=None, rules=ScoringRules(k=2), index="coreset", pixels=900.0
    )
    assert (detector.encoder.layers, detector.encoder.norm, detector.references) == ([1], False, None)
    assert (detector.rules.k, detector.index, detector.pixels, detector.shorter_side) == (2, "coreset", 900, None)
    detector = MultiResolutionDetector.by_name("mrf-ad", vit, shorter_side=28)
    assert (detector.pixels, detector.shorter_side) == (None, 28)
    for options, words in (
        ({"method": "padim"}, "`method` must be one of"),
        ({"pixels": 9.0, "shorter_side": 9}, "either `pixels` or `shorter_side`"),
        ({"enlarge": True}, "`enlarge` needs `pixels`"),
        ({"references": 0}, r"`references` must be in \(0, 1\]"),
        ({"shorter_side": 0}, "`shorter_side` must be at least 1"),
        ({"shorter_side": 1}, "`shorter_side` must be at least the 4 pixels of a patch, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            MultiResolutionDetector.by_name(**{"method": "superad", "encoder": vit, **options})
    with pytest.raises(TypeError, match="`encoder` must be a model"):
        MultiResolutionDetector.by_name("superad", MultiResolutionEncoder(vit, scales=(1.0,)))
    with pytest.raises(TypeError, match="`norm` must be True or False"):
        MultiResolutionDetector(vit, layers=(1,), norm=1)


def test_references_are_a_coreset_of_cls_tokens(vit):
    several = images(6)
    detector = MultiResolutionDetector.by_name("superad", vit, shorter_side=32, references=0.5)
    done = []
    detector.fit(several, references_progress=lambda *pair: done.append(pair))
    assert done == [(i, 6) for i in range(1, 7)]
    mean, std = (torch.tensor(detector.encoder.resize[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        hidden = vit((torch.stack(several) / 255 - mean) / std).last_hidden_state
    chosen = sorted(k_center_greedy(hidden[:, 0], count=3).tolist())
    assert chosen != [0, 1, 2]  # or nothing would be seen
    assert detector.images_ == 3
    every = MultiResolutionDetector.by_name("superad", vit, shorter_side=32, references=None)
    for bank, expected in zip(detector.banks_, every.fit([several[i] for i in chosen]).banks_, strict=True):
        torch.testing.assert_close(bank, expected)
    assert detector.add(several[:2]).images_ == 5
    with pytest.raises(TypeError, match="`images` must be a list where `references` are chosen"):
        detector.fit(iter(several))
    siglip = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=4
        )
    ).eval()
    with pytest.raises(ValueError, match="CLS tokens, which `encoder` has none of"):
        MultiResolutionDetector.by_name("superad", siglip)


def test_references_leave_out_images_without_foreground(vit):
    several = images(4)
    options = {"shorter_side": 32, "references": 1.0, "foreground": lambda image: torch.full(image.shape[1:], bool(
        not torch.equal(image, several[1])))}  # fmt: skip
    assert MultiResolutionDetector.by_name("superad", vit, **options).fit(several).images_ == 3
    options["foreground"] = lambda image: torch.zeros(image.shape[1:])
    with pytest.raises(ValueError, match="covers no patch of any image"):
        MultiResolutionDetector.by_name("superad", vit, **options).fit(several)


def test_banks_of_earlier_versions_have_no_method(vit, tmp_path):
    from murf_fast._files import sha256_of_json

    fitted = MultiResolutionDetector(vit, layers=(0, 2), scales=(1.0,), index="coreset").fit(images(3), folder=tmp_path)
    index = json.loads((tmp_path / "detector.json").read_text())
    later = ("sha256", "method", "model", "norm", "shorter_side", "projection", "references")
    index = {**{name: value for name, value in index.items() if name not in later}, "version": 3}
    (tmp_path / "detector.json").write_text(json.dumps({**index, "sha256": sha256_of_json(index)}))
    loaded = MultiResolutionDetector.load(tmp_path, vit)
    assert loaded.settings == fitted.settings
    loaded.add(images(1), in_place=True)
    assert json.loads((tmp_path / "detector.json").read_text())["version"] == 4


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "normal").mkdir()
    for i, image in enumerate(images(4, size=(42, 56))):
        pil.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "normal" / f"{i}.png")
    return tmp_path / "normal"


def run(*arguments):
    result = invoke("anomaly", *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_commands_by_name(photos, weights, tmp_path):
    """Fitted, looked at, enlarged and scored; what was chosen is printed and stored."""
    at, bank = ("--weights", weights), tmp_path / "bank"
    options = ("--shorter-side", 42, "--references", 0.5, "--k", 2, "--neighbors", "kth", "--fusion", "max")
    printed = run("fit", photos, "--out", bank, "--method", "superad", *options, *at)
    chosen = (
        "method: superad features: layers 0, 1 with the final norm; scales 1 of images with a shorter side of 42 "
        "pixels banks: all rows, searched exactly, of 50 % of the images, chosen by their CLS tokens scores: cosine "
        "distance to the 2 nearest rows, the largest; maximum of all maps; image score: mean of the highest hundredth "
        "of the patches not part of it: masks of the object"
    )
    assert chosen in printed
    assert "the 2 references of them have up to 48 rows in 2 banks" in printed  # 3 x 4 patches, two layers
    assert "2 images, 2 banks, 48 rows" in printed
    shown = run("show", bank)
    assert chosen in shown
    assert "Dinov2Model, 2 blocks, 24 channels, patch 14, float32" in shown
    told = json.loads(run("show", bank, "--json"))
    assert (told["method"], told["norm"], told["references"], told["images"]) == ("superad", True, 0.5, 2)
    rules = dataclasses.replace(PRESETS["superad"], k=2, neighbors="kth", fusion="max")
    assert told["rules"] == json.loads(json.dumps(dataclasses.asdict(rules)))
    added = run("add", bank, photos, *at)
    assert chosen in added
    assert "4 images added: 6 images, 144 rows (before: 48)" in added
    assert "image score" in run("score", bank, photos / "0.png", "--out", tmp_path / "map.png", *at)


def test_every_option_stands_in(photos, weights, tmp_path):
    options = {
        "--layers": 1, "--scales": 0.5, "--pixels": 0, "--index": "coreset", "--coreset": 0.25, "--projection": "none",
        "--references": 1, "--rules": "mrf-ad", "--metric": "l2sq", "--sigma": 2, "--image-score": "top1%",
        "--scale-weights": 1, "--layer-weights": 2,
    }  # fmt: skip
    given = [text for pair in options.items() for text in pair]
    run("fit", photos, "--out", tmp_path / "b", "--method", "patchcore", *given, "--norm", "--weights", weights)
    told = json.loads(run("show", tmp_path / "b", "--json"))
    names = ("method", "layers", "norm", "scales", "pixels", "shorter_side", "index", "coreset", "projection")
    assert [told[name] for name in names] == ["patchcore", [1], True, [0.5], None, None, "coreset", 0.25, None]
    assert told["references"] is None
    assert told["rules"] == json.loads(json.dumps(dataclasses.asdict(
        ScoringRules(metric="l2sq", sigma=2, image_score="top1%", scale_weights=(1,), layer_weights=(2,))
    )))  # fmt: skip


def test_adding_says_what_is_wrong(photos, weights, tmp_path):
    def refused(words, *arguments):
        result = invoke("anomaly", *arguments)
        assert result.exit_code == 2, result.output
        assert words in " ".join(result.output.split())

    refused("holds no bank; `murf-fast anomaly fit` makes one", "add", tmp_path, photos, "--weights", weights)
    refused("holds no detector", "show", tmp_path)
    bank = tmp_path / "bank"
    run("fit", photos, "--out", bank, "--scales", 1, "--layers", 1, "--pixels", 0, "--weights", weights)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=2, image_size=56, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "other")
    words = "made with another encoder (Dinov2Model, 2 blocks, 24 channels, patch 14)"
    refused(words, "add", bank, photos, "--weights", tmp_path / "other")
    refused("no addition that did not finish", "add", bank, photos, "--weights", weights, "--resume")
    (bank / "unfinished.json").write_text("{}")
    refused("an addition that did not finish; --resume goes on", "add", bank, photos, "--weights", weights)
    refused("is damaged", "add", bank, photos, "--weights", weights, "--resume")
    run("add", bank, photos / "0.png", "--weights", weights, "--force")
    assert json.loads(run("show", bank, "--json"))["images"] == 5
    index = json.loads((bank / "detector.json").read_text())
    (bank / "detector.json").write_text(json.dumps({**index, "images": 9}))
    refused("is damaged, its checksum is another", "show", bank)
