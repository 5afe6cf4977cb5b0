"""S2 and SigLIP-HD: tiles of several scales against the originals' results and rules."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_multi_resolution_encoder import dinov2, dinov2_registers, model_of, siglip
from util import assert_gradient_within_budget, assert_within_budget, nudged, worst

import murf_fast
from murf_fast.nn import S2, MultiResolutionEncoder, fine_to_coarse_loss, multi_scale_target
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


def test_an_empty_batch():
    assert S2(model_of(dinov2_registers), [1, 2])(torch.rand(0, 3, 24, 24)).shape == (0, 3 + 36, 48)


def test_tiles_that_are_not_put_together():
    """Views of the tokens, from which the merged maps are copied."""
    encoder = MultiResolutionEncoder(model_of(dinov2), [24, 48], tiles=[1, 2])
    images = torch.rand(2, 3, 24, 24)
    merged, apart = encoder(images), encoder(images, merge=False)
    base, tiles = apart.maps
    assert torch.equal(base, merged.maps[0])
    assert tiles.shape == (8, 24, 6, 6)
    assert tiles.untyped_storage().data_ptr() == apart.tokens[0].tokens.untyped_storage().data_ptr()
    assert torch.equal(tiles[2 * 1 + 1], merged.maps[1][1, :, :6, 6:])  # tile (0, 1) of image 1
    with pytest.raises(TypeError, match="`merge` must be True or False"):
        encoder(images, merge=1)


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


def plain_map(images, factor, base, tiling, forward):
    """The map of one scale: every tile by itself, and what several tiles say of a cell averaged."""
    x = F.interpolate(
        images, (factor * base[0], factor * base[1]), mode="bilinear", align_corners=False, antialias=True
    )
    if tiling == "whole":
        return forward(x)
    step = 2 if tiling == "half_overlap" else 1
    n, (rows, columns) = step * (factor - 1) + 1, (base[0] // 4, base[1] // 4)
    corners = [(i * base[0] // step, j * base[1] // step) for i in range(n) for j in range(n)]
    tiles = forward(torch.cat([x[:, :, i : i + base[0], j : j + base[1]] for i, j in corners])).split(len(x))
    total = x.new_zeros(len(x), tiles[0].shape[1], factor * rows, factor * columns)
    count = torch.zeros_like(total)
    for (i, j), tile in zip(corners, tiles, strict=True):
        for sums, new in ((total, tile), (count, 1)):
            sums[:, :, i // 4 : i // 4 + rows, j // 4 : j // 4 + columns] += new
    return total / count


def plain_target(images, factors, base, forward, weights=None, tiling="disjoint", fusion="average", grid=None):
    maps = [plain_map(images, factor, base, tiling, forward) for factor in factors]
    grid = grid or (base[0] // 4, base[1] // 4)
    if fusion == "unshuffle":
        return torch.cat([F.pixel_unshuffle(m, m.shape[2] // grid[0]) for m in maps], 1)
    maps = [F.interpolate(m, grid, mode="bilinear", align_corners=False) for m in maps]
    if fusion == "concat":
        return torch.cat(maps, 1)
    weights = weights or [1] * len(maps)
    return sum(w * m for w, m in zip(weights, maps, strict=True)) / sum(weights)


def siglip_forward(model):
    def forward(tile):
        tokens = model(tile, interpolate_pos_encoding=True).last_hidden_state
        return tokens.mT.unflatten(2, (tile.shape[2] // 4, tile.shape[3] // 4))

    return forward


def check_target(images, factors, base, *, build=siglip, forward=siglip_forward, size=(), **options):
    model = model_of(build)
    result = multi_scale_target(model, images, factors, size=base if size == () else size, **options)
    oracle = plain_target(images.double(), factors, base, forward(copy.deepcopy(model).double()), **options)
    assert_within_budget(result, oracle, plain_target(images, factors, base, forward(model), **options))
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert not result.requires_grad
    return result


@pytest.mark.parametrize(
    ("factors", "size"), [((1, 2), None), ((1, 2), (24, 20)), ((1, 2, 3), None), ((1, 2, 3, 4), None), ((2,), None)]
)
def test_multi_scale_target(factors, size):
    base = size or (12, 8)
    check_target(torch.rand(2, 3, base[0] * max(factors), base[1] * max(factors)), factors, base, size=size)


@pytest.mark.parametrize(
    ("factors", "base", "options"),
    [
        ((1, 2), (24, 20), {"weights": (1, 2)}),
        ((1, 2, 3), (12, 8), {"weights": (2, 0.5, 0)}),
        ((1, 2), (24, 16), {"tiling": "half_overlap"}),
        ((1, 2, 3), (8, 16), {"tiling": "half_overlap", "weights": (1, 2, 3)}),
        ((3, 1), (24, 16), {"tiling": "half_overlap", "fusion": "concat"}),
        ((1, 2), (24, 20), {"tiling": "whole"}),
        ((1, 2, 3), (12, 8), {"fusion": "concat"}),
        ((1, 2, 3), (12, 20), {"fusion": "unshuffle"}),
        ((1, 3), (16, 8), {"fusion": "unshuffle", "grid": (2, 1)}),
        ((1, 2, 3), (12, 12), {"grid": (5, 5)}),
        ((1, 2), (24, 24), {"grid": (9, 7), "tiling": "half_overlap"}),
        ((1, 2), (24, 24), {"grid": (9, 7), "fusion": "concat", "tiling": "whole"}),
    ],
    ids=str,
)
def test_variants(factors, base, options):
    """Of SigLIP-HD's tables 3, 4, 10 and 11; the images are resized to the base scale, too."""
    images = torch.rand(2, 3, max(factors) * base[0] + 3, max(factors) * base[1])
    check_target(images, factors, base, **options)


def test_variants_of_a_model_with_prefix_tokens():
    """CLS and registers stay out of the overlapping windows' map."""

    def forward(model):
        return lambda tile: model(tile).last_hidden_state[:, 3:].mT.unflatten(2, [n // 4 for n in tile.shape[2:]])

    check_target(
        torch.rand(1, 3, 48, 32),
        (1, 2),
        (24, 16),
        build=dinov2_registers,
        forward=forward,
        tiling="half_overlap",
        grid=(5, 7),
    )


def test_a_student_on_another_grid():
    """CLIP-HD: a teacher of 24, 48 and 72 pixels, and a student of 36 whose positions are resized."""
    model, images = model_of(siglip), torch.rand(2, 3, 72, 72)
    student = MultiResolutionEncoder(copy.deepcopy(model).requires_grad_(True), [36], antialias=True)
    target = multi_scale_target(model, images, (1, 2, 3), grid=9)
    fine_to_coarse_loss(student(images).maps[0], target).backward()
    grads = {name: p.grad for name, p in student.named_parameters()}
    moved = [name for name, g in grads.items() if g is not None and g.any()]
    assert any("position_embedding" in name for name in moved)
    assert any("patch_embedding" in name for name in moved)


@pytest.mark.parametrize("tiling", ["disjoint", "half_overlap", "whole"])
def test_kinds_of_images(tiling):
    """uint8 and channels that come last are the same images; half ones too, up to their rounding."""
    model = model_of(siglip)
    pixels = torch.randint(0, 256, (2, 3, 48, 40), dtype=torch.uint8)
    how = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "tiling": tiling, "size": (24, 16)}
    expected = multi_scale_target(model, pixels.double() / 255, **how)
    eps = 30 * torch.finfo(torch.float32).eps * expected.abs().max()
    for images in (pixels, pixels.permute(0, 2, 3, 1).contiguous(), pixels.float() / 255):
        assert (multi_scale_target(model, images, **how) - expected).abs().max() <= eps
    half = (pixels.float() / 255).half()
    rounded = multi_scale_target(model, half.float(), **how)
    assert (multi_scale_target(model, half, **how) - rounded).abs().max() <= eps
    with pytest.raises(ValueError, match="`mean` and `std` must be in the unit of pixels divided by 255"):
        multi_scale_target(model, pixels, **how | {"mean": (124, 116, 104), "std": (58, 57, 57)})


def plain_loss(kind, x, t):
    """Position by position, and entry by entry."""
    cosine = 1 - (x * t).sum(1) / (x.norm(dim=1) * t.norm(dim=1))
    far = (x - t).abs()
    smooth = torch.where(far < 1, far**2 / 2, far - 0.5).mean()
    losses = {"l1": far.mean(), "cosine": cosine.mean(), "smooth_l1": smooth}
    return losses.get(kind, 0.9 * losses["cosine"] + 0.1 * smooth)


@pytest.mark.parametrize("kind", ["l1", "cosine", "smooth_l1", "cosine_smooth_l1"])
def test_fine_to_coarse_loss(kind):
    x, t = 2 * torch.randn(2, 7, 4, 5), 2 * torch.randn(2, 7, 4, 5)

    def derived(loss, dtype, seed=None):
        leaf = (x if seed is None else nudged(x, seed)).to(dtype).detach().clone().requires_grad_()
        target = t.to(dtype).clone().requires_grad_()
        value = loss(leaf, target)
        value.backward()
        return value.detach(), leaf.grad, target.grad

    oracle = derived(lambda *a: plain_loss(kind, *a), torch.float64)
    plain = [derived(lambda *a: plain_loss(kind, *a), torch.float32, seed) for seed in range(4)]
    value, gradient, of_target = derived(lambda *a: fine_to_coarse_loss(*a, kind), torch.float32)
    assert of_target is None
    assert_within_budget(value, oracle[0], worst([p[0] for p in plain], oracle[0]))
    assert_gradient_within_budget(gradient, oracle[1], worst([p[1] for p in plain], oracle[1]))
    assert fine_to_coarse_loss(x, t.bfloat16(), kind).dtype == torch.float32
    half = fine_to_coarse_loss(x.bfloat16(), t.bfloat16(), kind)
    assert_within_budget(half, plain_loss(kind, x.bfloat16().double(), t.bfloat16().double()), half.new_tensor(0))


def test_the_default_loss_is_the_papers():
    x, t = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    assert torch.equal(fine_to_coarse_loss(x, t), fine_to_coarse_loss(x, t, "l1"))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: fine_to_coarse_loss(x, x[:1]), ValueError, "`target` must have the shape of `features`"),
        (lambda x: fine_to_coarse_loss(None, x), TypeError, "`features` must be a tensor"),
        (lambda x: fine_to_coarse_loss(x, x.int()), TypeError, "`target` must have one of the dtypes"),
        (lambda x: fine_to_coarse_loss(x, x, "l2"), ValueError, "`kind` must be one of .*, got 'l2'"),
    ],
)
def test_bad_losses(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.rand(2, 3, 4, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": []}, "factors"),
        ({"factors": [1, 0]}, "factors"),
        ({"factors": [1, 5]}, "size"),
        ({"images": torch.rand(3, 24, 24)}, "images"),
        ({"layers": [0, 1]}, "one layer"),
        ({"weights": (1, -1)}, r"`weights` must be at least 0, and one of them above, got \[1"),
        ({"weights": (0, 0)}, "`weights` must be at least 0"),
        ({"weights": (1, 1, 1)}, "`weights` must be 2 numbers"),
        ({"weights": (1, 2), "fusion": "concat"}, "`weights` are for fusion=\"average\", got 'concat'"),
        ({"tiling": "sliding"}, "`tiling` must be one of .*, got 'sliding'"),
        ({"fusion": "sum"}, "`fusion` must be one of .*, got 'sum'"),
        ({"grid": 0}, "`grid` must be positive"),
        ({"grid": 4, "fusion": "unshuffle"}, r"`grid` must divide that of every scale, \(6, 6\) times \[1, 2\], .* 4"),
        ({"size": 20, "tiling": "half_overlap"}, r"`size` must be an even number of patches of 4 .*, got \(20, 20\)"),
        (
            {"images": torch.rand(1, 3, 48, 48, device="meta"), "tiling": "half_overlap"},
            "`images` must be on the device",
        ),
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
    losses = siglip_hd.train(steps=20, every=20, factors=(1, 3), tiling="half_overlap", loss="cosine_smooth_l1")
    assert losses[-1] < 0.92 * losses[0]


def test_the_schedule_is_the_papers():
    """Of 90,000 steps 4,000 warm up, in a line; the rest is half a cosine, down to 0 behind the last step."""
    pytest.importorskip("transformers")
    from murf_fast.cli.demo.siglip_hd import share_of_rate

    share = [share_of_rate(step, 90_000) for step in range(90_001)]
    assert share[:2] == [1 / 4000, 2 / 4000]
    assert share[3999] == share[4000] == max(share) == 1
    assert share[4000 + 21_500] == pytest.approx((1 + 0.5**0.5) / 2)
    assert share[4000 + 43_000] == pytest.approx(0.5)
    assert share[90_000] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(share[4000:]))
    assert [share_of_rate(step, 1) for step in (0, 1)] == [1, 1]
    assert share_of_rate(0, 0) == 1


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


@pytest.mark.parametrize("option", ["--factors=1,5", "--factors=0", "--factors=1,,2", "--tiling=big", "--loss=l2"])
def test_choices_are_checked(option, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from murf_fast.cli.demo import siglip_hd

    monkeypatch.setattr("sys.argv", ["siglip_hd", option])
    with pytest.raises(SystemExit) as stop:
        siglip_hd.main()
    assert stop.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_layer_that_is_no_list():
    with pytest.raises(TypeError, match="`layers` must be a list of indices, got 1"):
        multi_scale_target(model_of(siglip), torch.rand(1, 3, 48, 48), layers=1)
