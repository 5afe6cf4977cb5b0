"""S2 and SigLIP-HD: tiles of several scales against the originals' results and rules."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_multi_resolution_encoder import dinov2, dinov2_registers, model_of, siglip
from util import assert_within_budget

import murf_fast
from murf_fast.nn import S2, fine_to_coarse_loss, multi_scale_target
from murf_fast.nn.vit.s2 import _merge, _split

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "s2__multiscale.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def stand_in(golden):
    """The golden file's backbone: tanh(conv) patches behind a prefix token that knows its tile's mean."""

    def model(tiles):
        patches = torch.tanh(F.conv2d(tiles, golden["patch_weight"], stride=7)).flatten(2).mT
        first = golden["prefix"] + tiles.mean((1, 2, 3))[:, None]
        return torch.cat([first[:, None], patches], 1)

    return model


@pytest.mark.parametrize("index", [0, 1, 2])
def test_golden(golden, index):
    sizes = golden["img_sizes"].tolist()
    s2 = S2(
        stand_in(golden),
        img_sizes=sizes,
        max_split_size=int(golden["max_split_size"]),
        resize_output_to_idx=index,
        num_prefix_tokens=1,
    )
    expected = golden[f"s2.to_idx{index}.f64"]
    result = s2(golden["image"])
    assert_within_budget(result, expected.double(), golden[f"s2.to_idx{index}"])
    side = math.isqrt(result.shape[1] - 1)
    torch.testing.assert_close(s2.maps(golden["image"]).flatten(2).mT, result[:, 1:])
    assert s2.maps(golden["image"]).shape[2:] == (side, side)
    by_scale = S2(stand_in(golden), [1, 2, 3], resize_output_to_idx=index, num_prefix_tokens=1)
    assert torch.equal(by_scale(golden["image"]), result)


@pytest.mark.parametrize("which", [0, 1])
def test_golden_merge_and_average(golden, which):
    """Tiles put together and averaged with the base, as SigLIP-HD (bilinear) and S2 (area) do."""
    tiles, base = golden[f"merge{which}.tiles"], golden[f"merge{which}.base"]
    t = math.isqrt(len(tiles) // len(base))
    merged = _merge(tiles.flatten(2).mT, t, len(base), tiles.shape[2:])
    assert torch.equal(merged, golden[f"merge{which}.merged"])
    grid = base.shape[2:]
    for mode in ("bilinear", "area"):
        result = murf_fast.upsample_mean([base, merged], tuple(grid), mode=mode)
        torch.testing.assert_close(result, golden[f"merge{which}.{mode}_average"], rtol=1e-6, atol=1e-6)


def test_split_is_undone_by_merge():
    images = torch.rand(2, 3, 6, 8)
    tiles = _split(images, 2)
    assert torch.equal(tiles[2 * 1 + 1], images[1, :, :3, 4:])  # tile (0, 1) of image 1
    assert torch.equal(_merge(tiles.flatten(2).mT, 2, 2, (3, 4)), images)


@pytest.mark.parametrize("build", [dinov2, dinov2_registers, siglip], ids=lambda f: f.__name__)
@pytest.mark.parametrize("index", [0, 1])
def test_packed_equals_called(build, index):
    model = model_of(build)
    prefix = {dinov2: 1, dinov2_registers: 3, siglip: 0}[build]
    images = torch.rand(2, 3, 24, 24)
    packed = S2(model, [1, 2], resize_output_to_idx=index)
    options = {"interpolate_pos_encoding": True} if build is siglip else {}

    def called(model):
        wrapper = S2(
            lambda tiles: model(tiles, **options).last_hidden_state,
            [1, 2],
            resize_output_to_idx=index,
            num_prefix_tokens=prefix,
        )
        return lambda images: wrapper(images)

    oracle = called(copy.deepcopy(model).double())(images.double())
    assert_within_budget(packed(images), oracle, called(model)(images))
    assert packed.is_packed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "either"),
        ({"scales": [1, 2], "img_sizes": [24, 48]}, ValueError, "either"),
        ({"scales": [1, 2], "resize_output_to_idx": 2}, ValueError, "`resize_output_to_idx` must be at most 1, got 2"),
        ({"scales": [1, 2], "resize_output_to_idx": -1}, ValueError, "`resize_output_to_idx` must be at least 0"),
        ({"scales": [1, 2], "resize_output_to_idx": True}, TypeError, "`resize_output_to_idx` must be an integer"),
        ({"scales": [1, 2], "resize_output_to_idx": 1.0}, TypeError, "`resize_output_to_idx` must be an integer"),
        ({"scales": [1, 0]}, ValueError, "> 0"),
        ({"scales": [1], "max_split_size": 0}, ValueError, "`max_split_size` must be at least 1"),
        ({"scales": [1], "num_prefix_tokens": 1}, ValueError, "leave it out"),
        ({"scales": [1], "layers": [0, 1]}, ValueError, "one layer"),
        ({"scales": [1], "model": 3}, TypeError, "callable"),
        ({"scales": [1], "model": lambda x: x, "norm": False}, ValueError, "norm are for supported"),
    ],
)
def test_bad_s2(arguments, error, message):
    with pytest.raises(error, match=message):
        S2(**{"model": model_of(dinov2), **arguments})


def test_bad_images_and_tokens(golden):
    s2 = S2(model_of(dinov2), [1, 1.5])
    with pytest.raises(ValueError, match="images"):
        s2(torch.rand(3, 24, 24))
    with pytest.raises(ValueError, match="equal tiles"):
        S2(model_of(dinov2), img_sizes=[24, 50], max_split_size=24)(torch.rand(1, 3, 24, 24))
    with pytest.raises(ValueError, match="num_prefix_tokens"):
        S2(stand_in(golden), [1, 2])(golden["image"])
    with pytest.raises(TypeError, match="uint8"):
        S2(stand_in(golden), [1, 2], num_prefix_tokens=1)(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


def plain_target(model, images, factors, base, forward):
    maps = []
    for factor in factors:
        x = F.interpolate(
            images, (factor * base[0], factor * base[1]), mode="bilinear", align_corners=False, antialias=True
        )
        rows = []
        for y in range(factor):
            row = [
                forward(model, x[:, :, y * base[0] : (y + 1) * base[0], c * base[1] : (c + 1) * base[1]])
                for c in range(factor)
            ]
            rows.append(torch.cat(row, 3))
        whole = torch.cat(rows, 2)
        grid = (base[0] // 4, base[1] // 4)
        maps.append(F.interpolate(whole, grid, mode="bilinear", align_corners=False))
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("factors", [(1, 2), (1, 2, 3), (2,)])
@pytest.mark.parametrize("size", [None, (24, 20)])
def test_multi_scale_target(factors, size):
    model = model_of(siglip)
    images = torch.rand(2, 3, 24 * max(factors), 20 * max(factors))

    def forward(model, tile):
        tokens = model(tile, interpolate_pos_encoding=True).last_hidden_state
        return tokens.mT.unflatten(2, (6, 5))

    result = multi_scale_target(model, images, factors, size=size)
    oracle = plain_target(copy.deepcopy(model).double(), images.double(), factors, (24, 20), forward)
    assert_within_budget(result, oracle, plain_target(model, images, factors, (24, 20), forward))
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert not result.requires_grad


def test_fine_to_coarse_loss():
    student = torch.rand(2, 3, 4, 5, requires_grad=True)
    target = torch.rand(2, 3, 4, 5, requires_grad=True)
    loss = fine_to_coarse_loss(student, target)
    torch.testing.assert_close(loss, (student - target).abs().mean())
    loss.backward()
    torch.testing.assert_close(student.grad, (student - target).sign().detach() / student.numel())
    assert target.grad is None
    assert fine_to_coarse_loss(student, target.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="shape"):
        fine_to_coarse_loss(student, target[:1])
    with pytest.raises(TypeError, match="features"):
        fine_to_coarse_loss(None, target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": []}, "factors"),
        ({"factors": [1, 0]}, "factors"),
        ({"factors": [1, 5]}, "size"),
        ({"images": torch.rand(3, 24, 24)}, "images"),
        ({"layers": [0, 1]}, "one layer"),
    ],
)
def test_bad_targets(arguments, message):
    with pytest.raises(ValueError, match=message):
        multi_scale_target(**{"model": model_of(siglip), "images": torch.rand(1, 3, 48, 48), **arguments})


def test_the_training_example_lowers_the_loss():
    pytest.importorskip("PIL", reason="the example reads photos")
    from murf_fast.cli.demo import siglip_hd

    losses = siglip_hd.train(steps=40, every=20)
    assert len(losses) == 3
    assert losses[-1] < 0.92 * losses[0]


@pytest.mark.parametrize("steps", ["-1", "1000001", "many", "1.5"])
def test_steps_are_checked(steps, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from murf_fast.cli.demo import siglip_hd

    monkeypatch.setattr("sys.argv", ["siglip_hd", "--steps", steps])
    with pytest.raises(SystemExit) as stop:
        siglip_hd.main()
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        siglip_hd.train(1, every=0)
