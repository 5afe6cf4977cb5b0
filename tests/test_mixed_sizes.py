"""Images of mixed sizes in shared passes against one call per image, and the forms in which users have them."""

from __future__ import annotations

import copy

import pytest
import torch
from test_multi_resolution_encoder import MEAN, PATCH, STD, clip, dinov2, dinov3, hub_registers, model_of, siglip2
from test_murf import CLASSES, WIDTH, randomized
from util import assert_gradient_within_budget, assert_within_budget

import murf_fast
from murf_fast.nn import DepthHead, MultiResolutionEncoder, SegmentationHead
from murf_fast.nn.vit import _attention, _blocks, _mixed

transformers = pytest.importorskip("transformers", reason="needs transformers, the original models")

# Two sizes twice, two turned (one length, other rotary positions), not sorted.
SIZES = [(24, 36), (12, 16), (36, 24), (40, 17), (12, 16), (16, 12)]
NORMALIZED = {"mean": MEAN, "std": STD}


def images_of(sizes=SIZES, seed=0):
    """uint8 and float, channels first and last."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for i, size in enumerate(sizes):
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        image = image.permute(1, 2, 0).contiguous() if i % 2 else image
        images.append(image if i % 3 else image / 255)
    return images


def one_by_one(call, images):
    return [call(image[None]) for image in images]


def assert_all_near(found, oracles, same):
    """Every value by the error of its kind in all images together: in one of them it may be small by chance."""
    assert len(found) == len(oracles) == len(same)
    for mine, its in zip(found, oracles, strict=True):
        assert [m.shape for m in values_of(mine)] == [m.shape for m in values_of(its)]
        assert [t.blocks for t in mine.tokens] == [t.blocks for t in its.tokens]
    kinds = (
        [torch.cat([v.flatten() for v in k]) for k in zip(*map(values_of, all_), strict=True)]
        for all_ in (found, oracles, same)
    )
    for j, (mine, oracle, alike) in enumerate(zip(*kinds, strict=True)):
        assert_within_budget(mine, oracle, alike, f"value {j}")


def values_of(features):
    tokens = [t.tokens for t in features.tokens]
    return [*features.maps, *(c for c in features.cls if c is not None), *tokens, *(features.attentions or [])]


@pytest.mark.parametrize("build", [dinov2, dinov3, siglip2, hub_registers, clip], ids=lambda f: f.__name__)
def test_a_list_equals_one_call_per_image(build):
    model, images = model_of(build), images_of()
    options = {"scales": [1.0, 0.5, 1.5], "layers": [0, -1], **NORMALIZED, "attentions": build is not siglip2}
    encoder = MultiResolutionEncoder(model, **options)
    double = MultiResolutionEncoder(copy.deepcopy(model).double(), **options)
    assert_all_near(encoder(images), one_by_one(double, images), one_by_one(encoder, images))


def test_sequences_of_one_length_attend_together(monkeypatch):
    tables, rotary = (
        MultiResolutionEncoder(model_of(build), scales=[1.0], layers=[0], **NORMALIZED) for build in (dinov2, dinov3)
    )
    calls, attend = [], _attention.attend
    monkeypatch.setattr(_attention, "attend", lambda *args: calls.append(args[3]) or attend(*args))
    tables(images_of())
    assert [(r.sequences, r.length) for r in calls] == [(3, 1 + 12), (1, 1 + 40), (2, 1 + 54)]
    calls.clear()
    rotary(images_of())
    assert [(r.sequences, r.length) for r in calls] == [(2, 3 + 12), (1, 3 + 12), (1, 3 + 40), (1, 3 + 54), (1, 3 + 54)]


@pytest.mark.parametrize("patches", [1, 70, 100, None])
def test_passes_are_bounded(patches, monkeypatch):
    encoder = MultiResolutionEncoder(model_of(dinov2), scales=[1.0], tokens_per_pass=patches, **NORMALIZED)
    images, sizes = images_of(), []
    run = _blocks.run
    monkeypatch.setattr(_blocks, "run", lambda packed, *a, **k: sizes.append(packed) or run(packed, *a, **k))
    found = encoder(images)
    counts = [[b.sequences for b in packed.blocks] for packed in sizes]
    expected = {
        1: [[1]] * 6,
        70: [[2, 1], [1], [1], [1]],
        100: [[2, 1, 1], [1], [1]],
        None: [[2, 1, 1, 1, 1]],
    }
    assert counts == expected[patches]
    for mine, alone in zip(found, one_by_one(encoder, images), strict=True):
        torch.testing.assert_close(mine.maps, alone.maps)


def test_a_pass_takes_neighbours_in_size():
    grids = [[(1, 9)], [(2, 2)], [(9, 1)], [(1, 9)], [(2, 2)], [(30, 30)]]
    assert list(_mixed.passes(grids, 20)) == [[1, 4, 0], [3, 2], [5]]
    assert list(_mixed.passes(grids, 10**6)) == [[1, 4, 0, 3, 2, 5]]


def test_features_of_an_image_hold_no_other_image():
    for features in MultiResolutionEncoder(model_of(dinov2), scales=[1.0, 0.5], **NORMALIZED)(images_of()):
        (packed,) = features.tokens
        storage = packed.tokens.untyped_storage()
        assert storage.nbytes() == packed.tokens.numel() * packed.tokens.element_size()
        assert features.maps[0].untyped_storage().data_ptr() == storage.data_ptr()
        assert packed.cu_seqlens[-1] == len(packed.tokens)


PARTS = ("block", "embeddings", "container", "norm")


@pytest.mark.parametrize(
    ("build", "part"),
    [(b, p) for b in (dinov2, dinov3) for p in PARTS] + [(dinov3, "rope")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_parts_that_are_called(build, part):
    model, images = model_of(build), images_of()
    encoder = MultiResolutionEncoder(model, scales=[1.0], **NORMALIZED)
    family = encoder.family
    modules = {"block": family.blocks[1], "embeddings": family.embedders[0], "container": family.container}
    module = {**modules, "norm": family.final_norm, "rope": family.rope}[part]

    def doubled(module, arguments, output):
        if part == "rope":
            return output[1], output[0]
        return 2 * output if isinstance(output, torch.Tensor) else output

    module.register_forward_hook(doubled)
    plain = MultiResolutionEncoder(model_of(build), scales=[1.0], **NORMALIZED)(images)
    differs = False
    for mine, alone, before in zip(encoder(images), one_by_one(encoder, images), plain, strict=True):
        torch.testing.assert_close(mine.maps, alone.maps)
        differs |= not torch.equal(mine.maps[0], before.maps[0])
    assert differs == (part != "container")


def test_gradients():
    images = images_of(SIZES[:4])

    def gradients(dtype, call):
        model = model_of(dinov3).to(dtype).requires_grad_(True)
        encoder = MultiResolutionEncoder(model, scales=[1.0, 0.5], tokens_per_pass=80, **NORMALIZED)
        sum(f.maps[0].square().sum() + f.cls[1].sum() for f in call(encoder, images)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    oracle, same = gradients(torch.float64, one_by_one), gradients(torch.float32, one_by_one)
    found = gradients(torch.float32, lambda encoder, images: encoder(images))
    assert found.keys() == oracle.keys()
    for name, gradient in found.items():
        assert_gradient_within_budget(gradient, oracle[name], same[name], name)


def test_compiles_in_one_graph():
    encoder = MultiResolutionEncoder(model_of(dinov3), scales=[1.0], **NORMALIZED)
    images = images_of([(24, 16), (12, 16)])
    compiled = torch.compile(lambda x: [f.maps for f in encoder(x)], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), [f.maps for f in encoder(images)])


# Forms of mixed sizes.


def padded(images, fill):
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.full((len(images), 3, height, width), fill, dtype=images[0].dtype)
    for into, image in zip(batch, images, strict=True):
        into[:, : image.shape[1], : image.shape[2]] = image
    return batch


def channels_first(sizes=SIZES[:4]):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def test_a_padded_batch():
    images = channels_first()
    encoder = MultiResolutionEncoder(model_of(dinov2), scales=[1.0, 0.5], **NORMALIZED)
    expected = [f.maps for f in encoder(images)]
    batch, sizes = padded(images, 255), [tuple(image.shape[1:]) for image in images]
    mask = padded([torch.ones_like(image) for image in images], 0)[:, 0]
    for given, options in (
        (batch, {"image_sizes": sizes}),
        (batch, {"image_sizes": torch.tensor(sizes)}),
        (batch.permute(0, 2, 3, 1), {"image_sizes": torch.tensor(sizes).numpy()}),
        (transformers.BatchFeature({"pixel_values": batch, "pixel_mask": mask.long()}), {}),
        ({"pixel_values": batch}, {"image_sizes": sizes}),
        ({"pixel_values": images}, {}),
        (tuple(images), {}),
    ):
        found = [f.maps for f in encoder(given, **options)]
        for mine, its in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
    alone = encoder(transformers.BatchFeature({"pixel_values": batch}))
    assert all(torch.equal(a, b) for a, b in zip(alone.maps, encoder(batch).maps, strict=True))
    by_pass = {i: f for done in encoder.passes(batch, image_sizes=sizes) for i, f in done.items()}
    assert all(torch.equal(by_pass[i].maps[0], its[0]) for i, its in enumerate(expected))


def naflex(grids, most=14, seed=0):
    """What the processor of SigLIP 2 returns; what lies behind an image's patches must not matter."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(len(grids), most, 3 * PATCH * PATCH, generator=generator) * 2 - 1
    shapes = torch.tensor(grids)
    mask = (torch.arange(most) < shapes.prod(1)[:, None]).int()
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def test_naflex_equals_the_model_with_its_mask():
    model, given = model_of(siglip2), naflex([(2, 5), (4, 3), (6, 1), (5, 2), (3, 4), (2, 7)])
    encoder = MultiResolutionEncoder(model, scales=[1.0])

    def theirs(model):
        dtype = next(model.parameters()).dtype
        shapes, mask = given["spatial_shapes"], given["pixel_attention_mask"]
        return model(given["pixel_values"].to(dtype), mask, shapes).last_hidden_state

    oracle, same = theirs(copy.deepcopy(model).double()), theirs(model)
    masked = given["pixel_attention_mask"]
    for features in (encoder(given), encoder({k: v for k, v in given.items() if k != "pixel_attention_mask"})):
        for i, ((rows, columns), mine) in enumerate(zip(given["spatial_shapes"].tolist(), features, strict=True)):
            count = rows * columns
            assert int(masked[i].sum()) == count
            assert_within_budget(mine.tokens[0].tokens, oracle[i, :count], same[i, :count], f"image {i}")
            assert mine.maps[0].shape == (1, WIDTH, rows, columns)


def test_naflex_at_several_scales_is_its_image_at_several_scales():
    given = naflex([(2, 5), (4, 3)])
    encoder = MultiResolutionEncoder(model_of(siglip2), scales=[0.5, 2.0])
    images = []
    for patches, (rows, columns) in zip(given["pixel_values"], given["spatial_shapes"].tolist(), strict=True):
        cut = patches[: rows * columns].unflatten(1, (PATCH, PATCH, 3)).unflatten(0, (rows, columns))
        images.append(cut.permute(4, 0, 2, 1, 3).reshape(3, rows * PATCH, columns * PATCH))
    for mine, its in zip(encoder(given), encoder(images), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.maps, its.maps, strict=True))


IMAGE, BATCH = torch.rand(3, 12, 16), torch.rand(2, 3, 12, 16)
MASK = torch.ones(2, 12, 16)


def holed(mask, *at):
    mask = mask.clone()
    mask[at] = 0
    return mask


@pytest.mark.parametrize("size", [(3, 14), (14, 3)])
def test_three_pixels_of_channels_last_images_are_no_channels(size):
    encoder = MultiResolutionEncoder(model_of(dinov2), [(8, 12)], **NORMALIZED)
    batch = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(4))
    (cropped,) = encoder(batch, image_sizes=[size])
    alone = encoder(batch[:, : size[0], : size[1]].permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(cropped.maps, alone.maps)


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        ([], {}, ValueError, "`images` must hold at least one image, got an empty list"),
        ([IMAGE, BATCH], {}, ValueError, r"`images\[1\]` must be \(3, H, W\) or .* got \(2, 3, 12, 16\)"),
        ([IMAGE, IMAGE[:2]], {}, ValueError, r"`images\[1\]` must be \(3, H, W\) or .* got \(2, 12, 16\)"),
        ([IMAGE, IMAGE.long()], {}, TypeError, r"`images\[1\]` must be uint8 .* got torch.int64"),
        ([IMAGE, "x"], {}, TypeError, r"`images\[1\]` must be a tensor, got str"),
        ([IMAGE, 255 * IMAGE], {}, ValueError, r"`images\[1\]` must be in 0..1"),
        ([IMAGE, IMAGE[:, :1]], {}, ValueError, r"an image of 1 x 16 pixels at scale 1 .* it is `images\[1\]`"),
        ([IMAGE], {"image_sizes": [(12, 16)]}, ValueError, "`image_sizes` are for a padded batch"),
        (IMAGE, {"image_sizes": [(12, 16)]}, ValueError, r"`images` must be \(B, 3, H, W\)"),
        (BATCH, {"image_sizes": [(12, 16)]}, ValueError, "`image_sizes` must hold one entry for each of 2 images"),
        (BATCH, {"image_sizes": [(12, 16), (13, 8)]}, ValueError, r"`image_sizes\[1\]` must lie within .* 12 x 16"),
        (BATCH, {"image_sizes": [(12, 0), (8, 8)]}, ValueError, r"`image_sizes\[0\]` must be positive"),
        (BATCH, {"image_sizes": [(12, 17), (8, 8)]}, ValueError, r"`image_sizes\[0\]` must lie within .* 12 x 16"),
        (BATCH, {"image_sizes": 3}, TypeError, "`image_sizes` must be a list"),
        (BATCH[:0], {"image_sizes": []}, ValueError, "`images` must hold at least one image"),
        (None, {}, TypeError, "`images` must be a tensor, got NoneType"),
        (3, {}, TypeError, "`images` must be a tensor, got int"),
        ([IMAGE, IMAGE.clone().requires_grad_()], {}, ValueError, r"`images\[1\]` must want no gradient"),
        ({}, {}, ValueError, "no `pixel_values`"),
        ({"pixel_values": BATCH, "input_ids": 0}, {}, ValueError, r"\['input_ids'\]"),
        ({"pixel_values": IMAGE}, {}, ValueError, r"`pixel_values` must be images \(B, 3, H, W\)"),
        (
            {"pixel_values": BATCH, "pixel_mask": MASK[:1]},
            {},
            ValueError,
            r"`pixel_mask` must have shape \(2, 12, 16\)",
        ),
        ({"pixel_values": BATCH, "pixel_mask": 1}, {}, TypeError, "`pixel_mask` must be a tensor"),
        (
            {"pixel_values": BATCH, "pixel_mask": holed(MASK, 1, 0, 0)},
            {},
            ValueError,
            r"`pixel_mask\[1\]` must be ones",
        ),
        (
            {"pixel_values": BATCH, "pixel_mask": holed(MASK, 1, slice(1, 12), slice(1, 16))},
            {},
            ValueError,
            r"`pixel_mask\[1\]` must be ones",
        ),
        ({"pixel_values": BATCH, "pixel_mask": MASK}, {"image_sizes": [(4, 4)] * 2}, ValueError, "give either"),
        (naflex([(2, 5)]), {}, ValueError, "`model` is Dinov2Model"),
    ],
)
def test_bad_images(images, options, error, words):
    with pytest.raises(error, match=words):
        MultiResolutionEncoder(model_of(dinov2), scales=[1.0], **NORMALIZED)(images, **options)


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        (
            {"pixel_attention_mask": torch.tensor([[1] * 9 + [0] + [1] + [0] * 3])},
            {},
            ValueError,
            "must be ones for the 10",
        ),
        ({"pixel_attention_mask": torch.tensor([[1] * 11 + [0] * 3])}, {}, ValueError, r"`pixel_attention_mask\[0\]`"),
        ({"pixel_attention_mask": torch.ones(1, 3)}, {}, ValueError, r"must have shape \(1, 14\)"),
        ({"spatial_shapes": torch.tensor([[3, 5]])}, {}, ValueError, r"`spatial_shapes\[0\]` must be of at most 14"),
        ({"spatial_shapes": torch.tensor([[3, 3]] * 2)}, {}, ValueError, "one entry for each of 1 images, got 2"),
        ({"spatial_shapes": None}, {}, ValueError, "need `spatial_shapes`"),
        ({"pixel_values": torch.rand(1, 14, 5)}, {}, ValueError, r"must be patches \(B, N, 48\), got \(1, 14, 5\)"),
        ({"pixel_values": torch.ones(1, 14, 48).long()}, {}, TypeError, "floating-point tensor of patches"),
        ({"pixel_values": [1]}, {}, TypeError, "floating-point tensor of patches, got list"),
        ({}, {"image_sizes": [(8, 8)]}, ValueError, "`spatial_shapes` alone"),
    ],
)
def test_bad_patches(change, options, error, words):
    with pytest.raises(error, match=words):
        MultiResolutionEncoder(model_of(siglip2), scales=[1.0])(naflex([(2, 5)]) | change, **options)


def test_passes_take_lists_and_check_them_at_once():
    encoder = MultiResolutionEncoder(model_of(dinov2), scales=[1.0], **NORMALIZED)
    with pytest.raises(TypeError, match="must be a list or a padded batch"):
        encoder.passes(BATCH)
    with pytest.raises(ValueError, match=r"`images\[1\]`"):
        encoder.passes([IMAGE, IMAGE[:2]])
    with pytest.raises(ValueError, match="`tokens_per_pass` must be at least 1, got 0"):
        MultiResolutionEncoder(model_of(dinov2), scales=[1.0], tokens_per_pass=0)


# MuRF of images of mixed sizes.


def near(found, oracles, same):
    assert isinstance(found, list)
    for i, (mine, oracle, alike) in enumerate(zip(found, oracles, same, strict=True)):
        assert_within_budget(mine, oracle[0], alike[0], f"image {i}")


def test_murf_features_and_depth():
    images, head = images_of(), randomized(DepthHead(2 * 2 * WIDTH, 16, depth_range=(1e-3, 10.0)))
    model = model_of(dinov2)
    murf = murf_fast.MuRF(model, head=head, scales=[1.0, 0.5], **NORMALIZED)
    wide = copy.deepcopy(model).double(), copy.deepcopy(head).double()
    double = murf_fast.MuRF(wide[0], head=wide[1], scales=[1.0, 0.5], **NORMALIZED)
    for method in ("features", "tokens", "depth"):
        plain, oracle = getattr(murf, method), getattr(double, method)
        near(plain(images), one_by_one(oracle, images), one_by_one(plain, images))
    own = [image.shape[:2] if i % 2 else image.shape[1:] for i, image in enumerate(images)]
    assert [tuple(d.shape) for d in murf.depth(images)] == [tuple(size) for size in own] == SIZES
    other = [(5 + i, 7) for i in range(len(images))]
    assert [tuple(d.shape) for d in murf.depth(images, other)] == other
    assert {tuple(d.shape) for d in murf.depth(images, 9)} == {(9, 9)}
    assert {tuple(x.shape) for x in murf.features(images, (4, 5))} == {(2 * WIDTH, 4, 5)}
    with pytest.raises(ValueError, match=r"`size` must hold one \(height, width\) for each of 6 images, got 2"):
        murf.depth(images, [(4, 4), (5, 5)])
    with pytest.raises(ValueError, match="`out` must be None for images of mixed sizes"):
        murf.features(images, out=torch.empty(1))


def test_murf_labels_have_the_size_of_their_image():
    images, head = channels_first(), randomized(SegmentationHead(2 * WIDTH, CLASSES))
    murf = murf_fast.MuRF(model_of(dinov2), head=head, scales=[1.0, 0.5], tokens_per_pass=60, **NORMALIZED)
    batch, sizes = padded(images, 0), [tuple(image.shape[1:]) for image in images]
    for labels in (murf.segment(images), murf.segment(batch, image_sizes=sizes)):
        assert [tuple(x.shape) for x in labels] == sizes
        for mine, image in zip(labels, images, strict=True):
            # Of a random head classes may be as good as each other within a rounding.
            assert (mine == murf.segment(image[None])[0]).double().mean() > 0.99
    assert [f.maps[0].shape[0] for f in murf.encode(batch, image_sizes=sizes)] == [1] * 4


def test_murf_components_are_those_of_all_images():
    images = channels_first([(24, 36), (24, 36), (24, 36)])
    murf = murf_fast.MuRF(model_of(dinov2), scales=[1.0, 0.5], **NORMALIZED)
    together = murf.pca(torch.stack(images), components=2)
    for mine, its in zip(murf.pca(images, components=2), together, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3 * float(its.abs().max()))
    mixed = murf.pca(images_of(), 8, components=2)
    assert [tuple(x.shape) for x in mixed] == [(2, 8, 8)] * 6


# Rectangular tilings.


@pytest.mark.parametrize("build", [dinov2, dinov3], ids=lambda f: f.__name__)
def test_tiles_of_rows_and_columns(build):
    model, images = model_of(build), torch.rand(2, 3, 24, 60)
    tiled = MultiResolutionEncoder(model, [(24, 20), (24, 60)], tiles=[1, (2, 3)], **NORMALIZED)
    assert tiled.tiles == [(1, 1), (2, 3)]
    features = tiled(images)
    alone = MultiResolutionEncoder(model, [(12, 20)], **NORMALIZED)
    cls = []
    for y in range(2):
        for x in range(3):
            tile = alone(images[:, :, 12 * y : 12 * (y + 1), 20 * x : 20 * (x + 1)])
            torch.testing.assert_close(features.maps[1][:, :, 3 * y : 3 * (y + 1), 5 * x : 5 * (x + 1)], tile.maps[0])
            cls.append(tile.cls[0])
    torch.testing.assert_close(features.cls[1], torch.stack(cls).mean(0))
    for mine, whole in zip(tiled(list(images)), features.maps[1], strict=True):
        torch.testing.assert_close(mine.maps[1][0], whole)


def test_tiles_at_scales_and_bad_ones():
    model = model_of(dinov2)
    encoder = MultiResolutionEncoder(model, scales=[1.0], tiles=[(1, 3)], **NORMALIZED)
    assert encoder.sizes_for(30, 26) == [(28, 24)]
    with pytest.raises(ValueError, match="must hold a patch of 4 x 12 pixels"):
        encoder.sizes_for(30, 11)
    for tiles, words in (
        ([(1, 2, 3)], "`tiles` must be one or two integers"),
        ([(1, 0)], "`tiles` must be at least 1"),
        ([(2, 3)], r"multiple of \(8, 12\) pixels"),
        ([(7, 1)], r"must hold a patch of \(28, 4\) pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            MultiResolutionEncoder(model, [(24, 28)], tiles=tiles)
