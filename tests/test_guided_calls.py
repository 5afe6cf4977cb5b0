"""What the modules that upsample along an image share: values, linear heads, many maps, regions, attention maps."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from guided import LargestTensor, draw, seeded
from util import assert_gradient_within_budget, assert_labels_within_budget, assert_within_budget, nudged, worst

import murf_fast
from murf_fast import _extension, backends
from murf_fast.nn import JAFAR, NAF, AnyUp
from murf_fast.nn.guided import _attend
from murf_fast.ops import _image_encoders, _image_regions, _naf_regions

BUILD = {
    "AnyUp": lambda: AnyUp(16, num_heads=2),
    "AnyUp, natten": lambda: AnyUp(16, num_heads=2, windows="natten"),
    "AnyUp, large kernel": lambda: AnyUp(16, num_heads=2, kernel_size=3),
    "NAF": lambda: NAF(32, num_heads=2, kernel_size=3),
    "JAFAR": lambda: JAFAR(6, qk_dim=16, kernel_size=3),
}
MORE = {
    "JAFAR, 1x1": lambda: JAFAR(6, qk_dim=16),
    "NAF, one block": lambda: NAF(32, num_heads=2, kernel_size=3, blocks=1),
}
SIZES = {"the image's size": None, "larger": (25, 31), "smaller": (13, 9), "of both kinds": (9, 31)}
REGIONS = {"corner": (0, 0, 5, 4), "inside": (3, 2, 5, 6), "border": (7, 0, 2, 9), "pixel": (8, 8, 1, 1)}
every_module = pytest.mark.parametrize("name", BUILD)
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def built(name):
    return seeded({**BUILD, **MORE}[name]()).requires_grad_(False)


def inputs(batch=2):
    return draw(batch, 3, 20, 17), draw(batch, 6, 5, 4)


def whole(model, image, features, size=None):
    """The result as it was before there was anything else, in float64, and as plain PyTorch has it in float32: worst
    of several draws of its rounding.
    """
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(image.double(), features.double(), size)
        with murf_fast.use_backend("reference"):
            draws = [(image, features), *((nudged(image, i), nudged(features, i)) for i in range(6))]
            return oracle, worst([model(*one, size) for one in draws], oracle)


def mixing(model, rows):
    """(heads * rows, 6): what may be done to channels before the attention, as each head has its own."""
    heads = model.num_heads if isinstance(model, NAF) else 1
    return torch.block_diag(*(draw(rows, 6 // heads, seed=i) for i in range(heads)))


def mixed(matrix, x):
    return torch.einsum("kc,bchw->bkhw", matrix.to(x.dtype), x)


def cropped(x, region):
    top, left, height, width = region
    return x[..., top : top + height, left : left + width]


def expected_crop(oracle, same, region):
    """The oracle's rectangle, and one with the error of the whole: of a pixel or two it is a matter of luck."""
    exact = cropped(oracle, region)
    return exact, exact + (same.double() - oracle).abs().max()


@every_module
@every_size
def test_values_are_weighed_with_the_features_attention(name, size):
    model, (image, features) = built(name), inputs()
    matrix = mixing(model, 4)
    values = mixed(matrix, features)
    result = model(image, features, size, values=values)
    assert_within_budget(result, *(mixed(matrix, x) for x in whole(model, image, features, size)))
    assert torch.equal(model(image, features, size, values=features), model(image, features, size))


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_results_have_the_dtype_of_the_values(name, dtype):
    model, (image, features) = built(name), inputs()
    assert model(image, features, values=features.to(dtype)).dtype == dtype
    assert model(image, features.to(dtype), values=features).dtype == torch.float32


HEADS = {"few classes": 3, "many classes": 40}


@every_module
@every_size
@pytest.mark.parametrize("classes", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("bands", [False, True])
def test_predict(name, size, classes, bands, monkeypatch):
    model, (image, features) = built(name), inputs()
    weight, bias = draw(classes, 6), draw(classes)
    if bands:
        monkeypatch.setitem(_attend._BAND_BYTES, "cpu", 4 * 2 * 40 * 31 * 4)
    oracle, same = (mixed(weight, x) + bias[:, None, None] for x in whole(model, image, features, size))
    logits = model.predict(image, features, weight[:, :, None, None], bias, size)
    assert_within_budget(logits, oracle, same)
    shares = model.predict(image, features, weight, bias, size, reduce="softmax")
    assert_within_budget(shares, oracle.softmax(1), same.softmax(1))
    labels = model.predict(image, features, weight, bias, size, reduce="argmax")
    assert labels.dtype == torch.uint8
    assert_labels_within_budget(labels, oracle, same)
    without = model.predict(image, features, weight, output_size=size)
    assert_within_budget(without, oracle - bias[:, None, None], same - bias[:, None, None])


def test_predict_in_half_types():
    """Logits are made in the wider dtype of features and parameters, and rounded once."""
    model, (image, features) = built("AnyUp"), inputs()
    weight, bias = draw(5, 6), draw(5)
    half = [x.bfloat16() for x in (features, weight)]
    result = model.predict(image, *half, bias)
    exact = model.predict(image, *(x.float() for x in half), bias.bfloat16().float())
    assert result.dtype == torch.bfloat16
    assert_within_budget(result, exact, exact)
    assert model.predict(image, features, draw(300, 6), reduce="argmax").dtype == torch.int16


@pytest.mark.parametrize("name", ["AnyUp", "NAF", "JAFAR"])
def test_labels_without_logits(name, monkeypatch):
    model = built(name)
    image, features, weight = draw(1, 3, 64, 64), draw(1, 6, 8, 8), draw(40, 6)
    monkeypatch.setitem(_attend._BAND_BYTES, "cpu", 4 * 80 * 64 * 8)
    with LargestTensor() as largest:
        model.predict(image, features, weight, reduce="argmax")
    assert largest.elements < 40 * 64 * 64
    assert largest.elements >= 64 * 64


@every_module
@every_size
def test_one_image_for_many_maps(name, size):
    model, (image, features) = built(name), inputs()
    others = [features, draw(2, 6, 4, 5), draw(2, 6, 5, 4, seed=2).bfloat16()]
    values = [draw(2, 2, *f.shape[2:], seed=3) for f in others]
    for encoded in (image, model.encode_image(image, size, grids=others), model.encode_image(image, size)):
        results = model(encoded, others, size)
        assert isinstance(results, list)
        for result, f in zip(results, others, strict=True):
            assert result.dtype == f.dtype
            if f.dtype == torch.float32:
                assert_within_budget(result, *whole(model, image, f, size))
        for result, f, v in zip(model(encoded, others, size, values=values), others, values, strict=True):
            assert result.shape[:2] == (2, 2)
            assert torch.equal(result, model(encoded, f, size, values=v))


@every_module
@every_size
@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_a_region_is_a_crop(name, size, region, monkeypatch):
    monkeypatch.setitem(_image_encoders._BAND_BYTES, "cpu", 1)  # bands of eight rows
    model, (image, features) = built(name), inputs()
    oracle, same = whole(model, image, features, size)
    expected = expected_crop(oracle, same, region)
    assert_within_budget(model(image, features, size, region=region), *expected)
    for encoded in (model.encode_image(image, size), model.encode_image(image, size, grids=[features], region=region)):
        assert_within_budget(model(encoded, features, region=region), *expected)
    weight = draw(3, 6)
    result = model.predict(image, features, weight, output_size=size, region=region)
    assert_within_budget(result, *expected_crop(mixed(weight, oracle), mixed(weight, same), region))


@pytest.mark.skipif(_extension.load_error() is not None, reason=str(_extension.load_error()))
@pytest.mark.parametrize("name", ["AnyUp", "NAF", "JAFAR"])
@every_size
@pytest.mark.parametrize("region", [*REGIONS.values(), (4, 4, 5, 4), (1, 3, 8, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_of_a_region_are_those_of_the_whole(name, size, region, dtype, monkeypatch):
    """Bit for bit: tiles of the convolution are cut at the same places."""
    monkeypatch.setitem(_image_encoders._BAND_BYTES, "cpu", 1)
    model, image = copy.deepcopy(built(name)).to(dtype), inputs()[0].to(dtype)
    expected = cropped(model.encode_image(image, size).queries, region)
    assert torch.equal(model.encode_image(image, size, region=region).queries, expected)


TILED = ["AnyUp", "AnyUp, natten", "AnyUp, large kernel", "JAFAR", "JAFAR, 1x1", "NAF", "NAF, one block"]


@pytest.mark.parametrize("name", TILED)
@every_size
@pytest.mark.parametrize("recompute", [False, True])
def test_tiles_of_one_image(name, size, recompute, monkeypatch):
    monkeypatch.setitem(_image_encoders._BAND_BYTES, "cpu", 1)
    model, (image, features) = built(name), inputs()
    expected = whole(model, image, features, size)
    for grids in (None, [features, (4, 5)]):
        statistics = model.statistics(image, size, grids=grids, recompute=recompute)
        for region in REGIONS.values():
            tile = model.encode_image(image, size, region=region, statistics=statistics)
            assert_within_budget(model(tile, features), *expected_crop(*expected, region))


@pytest.mark.skipif(_extension.load_error() is not None, reason=str(_extension.load_error()))
@pytest.mark.parametrize("name", ["AnyUp", "JAFAR", "JAFAR, 1x1", "NAF", "NAF, one block"])
@every_size
def test_tiles_are_crops_bit_for_bit(name, size, monkeypatch):
    """With statistics of whole maps; and only the tile is encoded."""
    monkeypatch.setitem(_image_encoders._BAND_BYTES, "cpu", 1)
    model, image = built(name), inputs()[0]
    expected = model.encode_image(image, size)
    statistics = model.statistics(image, size)
    assert torch.equal(statistics.keys.whole, expected.keys.whole)
    monkeypatch.setattr(_image_encoders, "_image_queries", None)
    for region in [*REGIONS.values(), (4, 4, 5, 4), (1, 3, 8, 6)]:
        tile = model.encode_image(image, size, region=region, statistics=statistics)
        assert torch.equal(tile.queries, cropped(expected.queries, region))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_regions_in_half_types(dtype):
    model = seeded(AnyUp(16, num_heads=2)).requires_grad_(False)
    image, features = inputs()
    exact = copy.deepcopy(model).to(dtype).double()(image.to(dtype).double(), features.to(dtype).double())
    half = copy.deepcopy(model).to(dtype)
    with murf_fast.use_backend("reference"):
        same = half(image.to(dtype), features.to(dtype))
    region = REGIONS["inside"]
    result = half(image.to(dtype), features.to(dtype), region=region)
    assert_within_budget(result, *expected_crop(exact, same, region))


@pytest.mark.skipif(
    bool(backends.reasons_against("triton", "cpu")), reason="; ".join(backends.reasons_against("triton", "cpu"))
)
@pytest.mark.parametrize(
    ("name", "size", "recompute"),
    [
        ("AnyUp", None, False),
        ("AnyUp", None, True),
        ("AnyUp", (6, 11), False),
        ("AnyUp", (6, 11), True),
        ("JAFAR", (6, 11), True),
        ("NAF", (9, 8), True),
    ],
)
def test_regions_by_triton(name, size, recompute, monkeypatch):
    monkeypatch.setitem(_image_encoders._BAND_BYTES, "cpu", 1)
    model = built(name)
    image, features, region = draw(1, 3, 11, 8), draw(1, 6, 3, 3), (1, 2, 5, 4)
    oracle, same = whole(model, image, features, size)
    with murf_fast.use_backend("triton"):
        statistics = model.statistics(image, size, grids=[features], recompute=recompute)
        tile = model.encode_image(image, size, region=region, statistics=statistics)
        result = model(tile, features)
    assert_within_budget(result, *expected_crop(oracle, same, region))


@every_module
def test_gradients_of_a_region_and_of_values(name):
    """Where gradients are wanted, those of the crop of the whole result."""
    model, (image, features) = seeded(BUILD[name]()), inputs()
    region, values = REGIONS["inside"], draw(2, 4, 5, 4)

    def gradients(dtype, crop_first):
        own = copy.deepcopy(model).to(dtype)
        leaves = [x.to(dtype).requires_grad_() for x in (image, features, values)]
        if crop_first:
            result = own(*leaves[:2], values=leaves[2], region=region)
        else:
            result = cropped(own(*leaves[:2], values=leaves[2]), region)
        direction = draw(*result.shape).to(dtype)
        # Features that give the attention alone do nothing in NAF.
        parameters = {n: p for n, p in own.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(result, [*leaves, *parameters.values()], direction, allow_unused=True)
        named = zip(("image", "features", "values", *parameters), found, strict=True)
        return {n: g for n, g in named if g is not None and not n.endswith("in_proj_bias")}

    oracle, same, actual = gradients(torch.float64, False), gradients(torch.float32, False), gradients(None, True)
    assert actual.keys() == oracle.keys()
    assert {"image", "values"} <= actual.keys()
    for n, gradient in actual.items():
        # Sums that cancel: one run of the same formula is one draw of its error.
        twice = oracle[n] + 2 * (same[n].double() - oracle[n]).abs().max()
        assert_gradient_within_budget(gradient, oracle[n], twice, n)


def test_gradients_of_probabilities(monkeypatch):
    """Bands are for results without gradients."""
    monkeypatch.setitem(_attend._BAND_BYTES, "cpu", 1)
    model, (image, features) = built("NAF"), inputs()
    weight, bias = draw(3, 6).requires_grad_(), draw(3).requires_grad_()
    found = torch.autograd.grad(
        model.predict(image, features, weight, bias, reduce="softmax").square().sum(), [weight, bias]
    )
    up = model(image, features)
    shares = (mixed(weight, up) + bias[:, None, None]).softmax(1)
    expected = torch.autograd.grad(shares.square().sum(), [weight, bias])
    for actual, e in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, e)
    labels = model.predict(image, features, weight, bias, reduce="argmax")
    assert not labels.requires_grad
    assert torch.equal(labels, shares.argmax(1).to(torch.uint8))


@every_module
@every_size
def test_attention_maps(name, size):
    model, (image, features) = built(name), inputs()
    row, column = 8, 5
    weights = model.attention_map(image, features, (row, column), size)
    assert weights.shape == (2, model.num_heads, 5, 4)
    shared = features[:, None] if not isinstance(model, NAF) else features.unflatten(1, (model.num_heads, -1))
    by_head = weights[:, :, None] if isinstance(model, NAF) else weights.mean(1, keepdim=True)[:, :, None]
    pixel = (by_head * shared).sum((3, 4)).flatten(1)
    oracle, same = whole(model, image, features, size)
    allowed = (same.double() - oracle).abs().max()  # of one pixel chance makes less
    assert_within_budget(pixel, oracle[..., row, column], oracle[..., row, column] + allowed)
    encoded = model.encode_image(image, size)
    torch.testing.assert_close(model.attention_map(encoded, features, (row, column)), weights)
    if name == "AnyUp":  # a window is a part of the map
        assert bool((weights == 0).any())


def test_autocast_leaves_the_head_alone():
    model, (image, features) = built("AnyUp"), inputs()
    expected = model.predict(image, features, draw(3, 6), draw(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.predict(image, features, draw(3, 6), draw(3)), expected)


def test_compile():
    model, (image, features) = built("NAF"), inputs()
    call = torch.compile(
        lambda: model(image, [features, features], region=REGIONS["inside"]), fullgraph=True, backend="eager"
    )
    torch.compiler.reset()
    for result in call():
        assert torch.equal(result, model(image, features, region=REGIONS["inside"]))


def test_registrations():
    model = built("AnyUp")
    image, features = draw(1, 3, 9, 8), draw(1, 4, 3, 2)
    calls = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_statistics", "_rectangle"):
            op = getattr(_image_regions, name)
            patch.setattr(_image_regions, name, lambda *a, op=op, name=name: calls.setdefault(name, a) and op(*a))
        model(image, features, region=(1, 2, 3, 4))
    torch.library.opcheck(torch.ops.murf_fast.image_statistics.default, calls["_statistics"])
    torch.library.opcheck(torch.ops.murf_fast.image_rectangle.default, calls["_rectangle"])
    model, calls = built("NAF, one block"), {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_statistics", "_rectangle"):
            op = getattr(_naf_regions, name)
            patch.setattr(_naf_regions, name, lambda *a, op=op, name=name: calls.setdefault(name, a) and op(*a))
        statistics = model.statistics(image, grids=[(3, 2)])
        model.encode_image(image, region=(1, 2, 3, 4), statistics=statistics)
    torch.library.opcheck(torch.ops.murf_fast.naf_statistics.default, calls["_statistics"])
    torch.library.opcheck(torch.ops.murf_fast.naf_rectangle.default, calls["_rectangle"])


PEAK = """
    import torch
    from murf_fast.cli.meter import observed
    from murf_fast.nn import AnyUp
    torch.set_num_threads(2)
    model = AnyUp().eval().requires_grad_(False)
    n, tile = 512, (128, 64, 64, 64)
    image, features, weight = torch.randn(1, 3, n, n), torch.randn(1, 96, 16, 16), torch.randn(150, 96)
    small = model.statistics(image[..., :64, :64], grids=[features], recompute=True)
    model(model.encode_image(image[..., :64, :64], 64, region=(1, 1, 9, 9), statistics=small), features)
    def run():
        statistics = model.statistics(image, grids=[features], recompute=True)
        return model(model.encode_image(image, region=tile, statistics=statistics), features)
    print(observed(run)[1])
    encoded = model.encode_image(image, grids=[features])
    print(observed(lambda: model.predict(encoded, features, weight, reduce="argmax"))[1])
"""


@pytest.mark.skipif(_extension.load_error() is not None, reason=str(_extension.load_error()))
def test_memory_grows_with_the_crop_and_the_labels():
    script = [sys.executable, "-c", textwrap.dedent(PEAK)]
    peaks = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()
    if "None" in peaks:
        pytest.skip("the system does not tell the resident high-water mark")
    tile, labels = (int(peak) / (4 * 128 * 512**2) for peak in peaks)
    assert tile < 0.6  # of one map of activations: bands of 8 MiB, three at a time
    assert labels < 0.3  # of 150 / 128 maps of logits


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"values": torch.ones(1, 6, 4, 5)},
            ValueError,
            r"`values` must have batch and grid .* \(1, 5, 4\), got \(1, 4",
        ),
        ({"values": torch.ones(1, 6, 5, 4).int()}, TypeError, "`values` must have one of the dtypes"),
        ({"values": torch.ones(1, 5, 5, 4)}, ValueError, "`values` must have a multiple of 2 channels, got 5"),
        ({"features": []}, TypeError, "`features` must be a map or a non-empty list"),
        (
            {"features": [torch.ones(1, 6, 5, 4)] * 2, "values": torch.ones(1, 6, 5, 4)},
            ValueError,
            "`values` must have one entry for each of the 2 maps, got one tensor",
        ),
        (
            {"region": (0, 0, 21, 4)},
            ValueError,
            r"`region` must lie within the output of \(20, 17\), got \(0, 0, 21, 4\)",
        ),
        ({"features": [torch.ones(1, 6, 5, 4)], "values": 3}, ValueError, "of the 1 maps, got a int"),
        ({"region": (0, 0, 4)}, TypeError, r"`region` must be \(top, left, height, width\), got \(0, 0, 4\)"),
        ({"region": (0, -1, 4, 4)}, ValueError, r"`region\[1\]` must be at least 0, got -1"),
        ({"region": (0, 0, 0, 4)}, ValueError, r"`region\[2\]` must be at least 1, got 0"),
    ],
)
def test_bad_input(change, error, words):
    image, features = inputs(1)
    with pytest.raises(error, match=words):
        built("NAF")(**{"image": image, "features": features, **change})


def test_bad_predictions_and_maps():
    model, (image, features) = built("AnyUp"), inputs()
    with pytest.raises(ValueError, match=r"`weight` must have one column per channel .* 6 = 6, got 5"):
        model.predict(image, features, draw(3, 5))
    with pytest.raises(ValueError, match=r"`reduce` must be None or one of .*, got 'max'"):
        model.predict(image, features, draw(3, 6), reduce="max")
    with pytest.raises(ValueError, match="`features` must be one map, got 2"):
        model.predict(image, [features, features], draw(3, 6))
    with pytest.raises(TypeError, match=r"`query` must be \(row, column\), got 3"):
        model.attention_map(image, features, 3)
    for query in ((20, 0), (0, 17)):
        with pytest.raises(ValueError, match=r"attention_map: `query` must lie within the output of \(20, 17\), got"):
            model.attention_map(image, features, query)
    with pytest.raises(ValueError, match=r"`query\[0\]` must be at least 0, got -1"):
        model.attention_map(image, features, (-1, 0))
    with pytest.raises(ValueError, match=r"`query` must lie within the encoded region, \(2, 2, 9, 9\), got \(1, 3\)"):
        model.attention_map(model.encode_image(image, region=(2, 2, 9, 9)), features, (1, 3))
    with pytest.raises(TypeError, match=r"`query` must be .*, got a Tensor"):
        model.attention_map(image, features, image)
    with pytest.raises(ValueError, match="`features` must be one map, got 2"):
        model.attention_map(image, [features, features], (0, 0))
    with pytest.raises(TypeError, match="`q_chunk_size` must be an integer, got 'x'"):
        model(image, features, q_chunk_size="x")


def test_bad_encoded_images():
    model, (image, features) = built("AnyUp"), inputs()
    encoded = model.encode_image(image, grids=[(5, 4)], region=(2, 2, 9, 9))
    with pytest.raises(ValueError, match=r"`features` must have one of the grids .* \(5, 4\), got \(4, 5\)"):
        model(encoded, draw(2, 6, 4, 5))
    with pytest.raises(ValueError, match=r"`region` must lie within that of the encoded image, \(2, 2, 9, 9\), got"):
        model(encoded, features, region=(1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"`output_size` must be that of the encoded image, \(20, 17\), got 9"):
        model(encoded, features, 9)
    with pytest.raises(ValueError, match="`features` must have the batch size of `image`, 2, got 1"):
        model(encoded, features[:1])
    with pytest.raises(ValueError, match="encoded by this model, whose queries have 32 channels, got one of AnyUp"):
        built("NAF")(encoded, features)
    with pytest.raises(TypeError, match="`grids` must be a list"):
        model.encode_image(image, grids=5)
    statistics = model.statistics(image)
    with pytest.raises(ValueError, match=r"`grids\[0\]` must be \(B, C, H, W\), got shape"):
        model.encode_image(image, grids=[features[0]])
    with pytest.raises(TypeError, match=r"`region` must be .*, got a Tensor"):
        model.encode_image(image, region=features)
    for wrong in (3, encoded):
        with pytest.raises(TypeError, match="`statistics` must be what `statistics` returns, got"):
            model.encode_image(image, statistics=wrong)
    with pytest.raises(ValueError, match=r"`statistics` must be those of this image, .*\(2, 9, 9\), got .*\(2, 20"):
        model.encode_image(draw(2, 3, 9, 9), statistics=statistics)
    for dtype in (torch.float32, torch.float64):
        of_one = model.to(dtype).statistics(image[:1].to(dtype))
        with pytest.raises(ValueError, match=r"`statistics` must be those .* \(2, 20, 17\), got .* \(1, 20, 17\)"):
            model.encode_image(image.to(dtype), statistics=of_one)
    model.float()
    with pytest.raises(ValueError, match=r"`statistics` must be this model's, whose keys .*, got those of AnyUp with"):
        built("JAFAR").encode_image(image, statistics=statistics)
    with pytest.raises(ValueError, match="`grids` are those of `statistics`"):
        model.encode_image(image, grids=[(5, 4)], statistics=statistics)
    of_another = built("JAFAR").statistics(image, 9)
    with pytest.raises(ValueError, match=r"`statistics` must be those of an output of \(20, 17\), got .* \(9, 9\)"):
        built("JAFAR").encode_image(image, statistics=of_another)
    model.requires_grad_(True)
    for call in (lambda: model.statistics(image), lambda: model.encode_image(image, statistics=statistics)):
        with pytest.raises(ValueError, match="have no gradient; call under"):
            call()
