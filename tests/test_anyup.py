"""AnyUp: against its code's order of operations, the original's outputs, and its checkpoints."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from originals import asset, golden
from PIL import Image
from util import assert_gradient_within_budget, assert_within_budget, layouts, nudged, worst
from whole_graphs import needs_graph_of_anyup

import murf_fast
from murf_fast import _extension, backends, windows
from murf_fast.nn import AnyUp
from murf_fast.nn.guided.anyup import _warn_of_chunks
from murf_fast.ops import _image_encoders
from murf_fast.reference.anyup import anyup as dense

# In one direction the error of the comparison may be any small number by chance.
DIRECTIONS = 6
HALVES = (torch.float16, torch.bfloat16)
WEIGHTS = "upsamplers/anyup_paper.safetensors"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def seeded(model):
    """Weights for which every part of the model matters, and windows are sharp enough to see a wrong key."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        values = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            values = 0.3 * values + (1.0 if name.endswith("weight") else 0.0)
        elif "basis" not in name and "freqs" not in name:
            values = values / p[0].numel() ** 0.5 * (2.0 if "in_proj" in name else 1.0)
        p.data.copy_(values)
    return model.eval()


def rule_of(model, size, grid):
    if model.windows == "dense":
        return windows.ratio(size, grid, model.window_ratio)
    full = model.window_ratio <= 0 or model.window_ratio >= 0.5
    count = [n if full else max(3, round(2 * model.window_ratio * n)) for n in grid]
    return windows.neighborhood(size, grid, tuple(n if full else n + (n + 1) % 2 for n in count))


def plain(model, image, features, output_size=None):
    size = tuple(output_size or image.shape[2:])
    weights = dict(model.named_parameters())
    return dense(weights, image, features, rule_of(model, size, tuple(features.shape[2:])), size, model.num_heads)


def assert_parity(model, image, features, output_size=None):
    """Within the budget of the plain formula in float32, of which a single run may be right by chance: where a map has
    few pixels, all share the rounding errors of few sums. The worst of inputs and weights within a rounding counts.
    """
    with torch.no_grad():
        actual = model(image, features, output_size)
        draws = [plain(model, image, features, output_size)]
        for seed in range(4):
            other = copy.deepcopy(model)
            for p in other.parameters():
                p.copy_(nudged(p, seed))
            draws.append(plain(other, nudged(image, seed), nudged(features, seed), output_size))
        with murf_fast.use_backend("reference"):
            oracle = plain(model.double(), image.double(), features.double(), output_size)
        model.float()
    assert actual.dtype == features.dtype
    assert_within_budget(actual, oracle, worst(draws, oracle))
    return actual


CASES = {
    # channels, batch, image, features, output, options
    "same size": (192, 1, (33, 41), (5, 4), None, {}),
    "batch": (50, 2, (24, 31), (4, 6), None, {}),
    "wide": (384, 1, (40, 24), (6, 3), (40, 24), {}),
    "larger output": (50, 1, (20, 17), (4, 5), (37, 29), {}),
    "smaller output": (50, 2, (40, 37), (4, 5), (19, 23), {}),
    "output of both kinds": (7, 1, (40, 17), (4, 5), (19, 43), {}),
    "image smaller than the features": (7, 1, (5, 6), (9, 8), (18, 20), {}),
    "output smaller than the features": (7, 1, (21, 22), (9, 8), (6, 5), {}),
    "one pixel of output": (7, 1, (21, 22), (3, 3), (1, 1), {}),
    "one pixel of image": (3, 1, (1, 1), (2, 3), (5, 6), {}),
    "whole map": (50, 1, (24, 31), (4, 6), None, {"window_ratio": 0.0}),
    "wide windows": (50, 1, (24, 31), (7, 8), None, {"window_ratio": 0.33}),
    "natten": (50, 1, (28, 30), (7, 10), None, {"windows": "natten"}),
    "natten, fraction": (50, 1, (31, 41), (9, 12), None, {"windows": "natten"}),
    "natten, whole map": (9, 1, (28, 30), (7, 10), None, {"windows": "natten", "window_ratio": 0.5}),
    "other sizes": (9, 1, (20, 30), (4, 5), None, {"qk_dim": 48, "num_heads": 3, "kernel_size_lfu": 3}),
    "large kernel": (9, 1, (20, 30), (4, 5), None, {"qk_dim": 32, "kernel_size": 3, "input_dim": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    channels, batch, image, grid, size, options = CASES[name]
    model = seeded(AnyUp(**options))
    inputs = draw(batch, options.get("input_dim", 3), *image), draw(batch, channels, *grid) * 2 + 1
    result = assert_parity(model, *inputs, size)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_levels(level):
    assert_parity(seeded(AnyUp()), draw(1, 3, 33, 41), draw(1, 20, 4, 5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens", "sliced"])
def test_layouts(layout):
    model = seeded(AnyUp(32))
    image, features = draw(2, 3, 21, 19), draw(2, 6, 3, 4)
    with torch.no_grad():
        expected = model(image, features)
        actual = model(layouts(image)[layout], layouts(features)[layout])
    # The layers at low resolution are PyTorch's, which sum in another order in another layout.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_images_of_a_batch_do_not_mix():
    model = seeded(AnyUp(32))
    image, features = draw(3, 3, 21, 19), draw(3, 6, 3, 4)
    with torch.no_grad():
        for size in (None, (13, 15)):
            together = model(image, features, size)
            for i in range(3):
                alone = model(image[i : i + 1], features[i : i + 1], size)[0]
                torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)


def test_bands_of_rows(monkeypatch):
    """The last convolution in bands of eight rows, with a rest, is what it is in one piece."""
    model = seeded(AnyUp(32))
    image, features = draw(1, 3, 35, 19), draw(1, 6, 3, 4)
    with torch.no_grad():
        expected = model(image, features)
        monkeypatch.setitem(_image_encoders._BAND_BYTES, "cpu", 1)
        torch.testing.assert_close(model(image, features), expected, rtol=1e-5, atol=1e-5)
        assert_parity(model, image, features)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [None, (37, 29), (9, 14)])
def test_half_types(dtype, size, level_of_layers):
    model = seeded(AnyUp(32)).to(dtype)
    image, features = draw(2, 3, 21, 19).to(dtype), draw(2, 6, 3, 4).to(dtype)
    with torch.no_grad():
        actual = model(image, features, size)
        same = plain(model, image, features, size)
        oracle = plain(model.double(), image.double(), features.double(), size)
    assert actual.dtype == dtype
    assert_within_budget(actual, oracle, same)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_keys_of_half_types_are_rounded_once(dtype):
    """What the basis makes of features lies within millionths of a constant: a rounding on the way would matter."""
    model = seeded(AnyUp(32)).to(dtype)
    of_image, features = draw(1, 32, 5, 4).to(dtype), draw(1, 40, 5, 4).to(dtype)
    with torch.no_grad():
        actual = model._keys(of_image, features)
        exact = model.double()._keys(of_image.double(), features.double())
    assert actual.dtype == dtype
    assert_within_budget(actual, exact, exact.to(dtype))


def test_threads_change_nothing_in_bfloat16(three_threads):
    model = seeded(AnyUp(32)).bfloat16()
    image, features = draw(1, 3, 95, 61).bfloat16(), draw(1, 6, 3, 4).bfloat16()
    with torch.no_grad():
        expected = model(image, features)
        torch.set_num_threads(1)
        assert torch.equal(model(image, features), expected)


def photo(size):
    """A photo, normalized, and features of its patches: 384 fixed mixtures of their pixels."""
    folder = Path(murf_fast.__file__).parent / "assets"
    pixels = torch.from_numpy(np.asarray(Image.open(folder / "chelsea.jpg").convert("RGB").resize((size, size))).copy())
    mean, deviation = (torch.tensor(t)[:, None, None] for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = ((pixels.permute(2, 0, 1) / 255 - mean) / deviation)[None]
    patches = F.unfold(image, 14, stride=14)
    features = draw(384, patches.shape[1]) @ patches / patches.shape[1] ** 0.5
    return image, features.unflatten(2, (size // 14, -1))


@pytest.mark.parametrize("file", ["anyup_paper", "anyup_multi_backbone"])
def test_half_types_on_a_photo(file, monkeypatch):
    """Within 1 % of float64 with weights, image and features in bfloat16, whatever multiplies; float16 has eight times
    the digits.
    """
    checkpoint, (image, features) = asset(f"upsamplers/{file}.safetensors"), photo(112)
    model = AnyUp.from_checkpoint(checkpoint).requires_grad_(False).double()
    exact = model(image.double(), features.double())
    levels = _extension.available_levels() if _extension.load_error() is None else [""]
    for dtype, allowed in zip(HALVES, (0.01 / 8, 0.01), strict=True):
        model = AnyUp.from_checkpoint(checkpoint).requires_grad_(False).to(dtype)
        inputs = image.to(dtype), features.to(dtype)
        results = [model(inputs[0].clone().requires_grad_(), inputs[1]).detach()]
        for level in levels[-2:]:
            monkeypatch.setenv("MURF_FAST_CPU", level)
            results.append(model(*inputs))
        monkeypatch.delenv("MURF_FAST_CPU")
        for result in results:
            assert (result.double() - exact).norm() < allowed * exact.norm()


def test_autocast_changes_nothing():
    model = seeded(AnyUp(32))
    image, features = draw(1, 3, 21, 19), draw(1, 6, 3, 4)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = model(image, features)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(model(image, features), expected)


def gradients(call, model, dtype, image, features, size):
    model = model.to(dtype)
    leaves = [t.to(dtype).requires_grad_() for t in (image, features)]
    result = call(model, *leaves, size)
    parameters = {n: p for n, p in model.named_parameters() if "out_proj" not in n}
    found = []
    for seed in range(DIRECTIONS):
        direction = draw(*result.shape, seed=seed).to(dtype)
        found.append(torch.autograd.grad(result, [*leaves, *parameters.values()], direction, retain_graph=True))
    model.float()
    found = [torch.stack(g) for g in zip(*found, strict=True)]
    return {"result": result.detach()} | dict(zip(("image", "features", *parameters), found, strict=True))


@pytest.mark.parametrize("size", [None, (13, 22)])
@pytest.mark.parametrize("rule", ["dense", "natten"])
def test_gradients(rule, size):
    model = seeded(AnyUp(32, windows=rule)).train()
    inputs = (draw(2, 3, 18, 16), draw(2, 9, 5, 4), size)
    oracle = gradients(plain, model, torch.float64, *inputs)
    theirs = [gradients(plain, model, torch.float32, *inputs)]
    for seed in range(3):
        image, features, *others = inputs
        theirs.append(gradients(plain, model, torch.float32, nudged(image, seed), nudged(features, seed), *others))
    actual = gradients(lambda m, *a: m(*a), model, torch.float32, *inputs)
    for name, value in actual.items():
        check = assert_within_budget if name == "result" else assert_gradient_within_budget
        if name.endswith("in_proj_bias"):  # that of the keys has no influence, but for rounding
            value, oracle[name] = value[:, :32], oracle[name][:, :32]
            theirs = [{**t, name: t[name][:, :32]} for t in theirs]
        check(value, oracle[name], worst([t[name] for t in theirs], oracle[name]), name)


def test_features_alone_need_gradients():
    """Then the image still takes the fast way, and the gradient is that of the slow one."""
    model = seeded(AnyUp(32)).requires_grad_(False)
    image, features = draw(1, 3, 18, 16), draw(1, 9, 5, 4)

    def gradient(call, dtype):
        leaf = features.to(dtype).requires_grad_()
        return torch.autograd.grad(call(model.to(dtype), image.to(dtype), leaf).square().sum(), leaf)[0]

    oracle, same = gradient(plain, torch.float64), gradient(plain, torch.float32)
    assert_gradient_within_budget(gradient(lambda m, *a: m(*a), torch.float32), oracle, same)


def test_chunks_of_queries_are_not_needed():
    model, (image, features) = seeded(AnyUp(16, num_heads=2)), (draw(1, 3, 9, 9), draw(1, 4, 3, 3))
    _warn_of_chunks.cache_clear()
    with torch.no_grad(), pytest.warns(UserWarning, match="`q_chunk_size` is not needed"):
        chunked = model(image, features, q_chunk_size=10)
    with torch.no_grad(), warnings.catch_warnings(action="error"):
        assert torch.equal(model(image, features, q_chunk_size=10), chunked)


def test_empty_batch():
    with torch.no_grad():
        assert seeded(AnyUp(32))(draw(0, 3, 9, 9), draw(0, 6, 2, 3)).shape == (0, 6, 9, 9)


@needs_graph_of_anyup
@pytest.mark.parametrize(("grad", "compiler"), [(False, "inductor"), (True, "aot_eager")])
def test_compile(grad, compiler):
    """With gradients up to what inductor is handed, a graph of forward and backward: it is slow, and torch's own."""
    model = seeded(AnyUp(32))
    image, features = draw(1, 3, 20, 31), draw(1, 6, 3, 4)
    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        result = torch.compile(model, fullgraph=True, backend=compiler)(image, features)
    with torch.no_grad():
        same = plain(model, image, features)
        assert_within_budget(result, plain(model.double(), image.double(), features.double()), same)


def test_opcheck():
    model = seeded(AnyUp(16, num_heads=2)).requires_grad_(False)
    image, features = draw(1, 3, 9, 8), draw(1, 4, 3, 2)
    calls = []
    op = _image_encoders._image_queries
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_image_encoders, "_image_queries", lambda *a: calls.append(a) or op(*a))
        model(image, features)
    torch.library.opcheck(torch.ops.murf_fast.image_queries.default, calls[0])


@pytest.mark.skipif(
    bool(backends.reasons_against("triton", "cpu")), reason="; ".join(backends.reasons_against("triton", "cpu"))
)
@pytest.mark.parametrize("size", [None, (6, 11)])
def test_triton(size):
    model = seeded(AnyUp(16, num_heads=2))
    with murf_fast.use_backend("triton"):
        assert_parity(model, draw(1, 3, 9, 8), draw(1, 5, 3, 2), size)


def test_without_the_extension():
    model = seeded(AnyUp(32))
    image, features = draw(1, 3, 21, 19), draw(1, 6, 3, 4)
    with torch.no_grad(), murf_fast.use_backend("reference"):
        result = model(image, features)
        torch.testing.assert_close(result, plain(model, image, features), rtol=1e-4, atol=1e-4)


PEAK = """
    import sys, torch
    from murf_fast.cli.meter import observed
    from murf_fast.nn import AnyUp
    torch.set_num_threads(2)
    model, n = AnyUp().eval(), int(sys.argv[1])
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64), torch.randn(1, 8, 8, 8))
        image, features = torch.randn(1, 3, n, n), torch.randn(1, 96, 16, 16)
        print(observed(lambda: model(image, features))[1])
"""


@pytest.mark.skipif(_extension.load_error() is not None, reason=str(_extension.load_error()))
def test_memory_grows_with_the_output():
    """Three maps of 128 channels and the bands of one convolution; then a third of them and the result."""
    n = 512
    script = [sys.executable, "-c", textwrap.dedent(PEAK), str(n)]
    peak = subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip()
    if peak == "None":
        pytest.skip("the system does not tell the resident high-water mark")
    maps = int(peak) / (4 * 128 * n * n)
    assert 2.5 < maps < 3.7


def opened(name):
    data = golden(name)
    return {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}


def paper(**options):
    return AnyUp.from_checkpoint(asset(WEIGHTS), **options)


def assert_close(actual, expected, allowed):
    assert actual.shape == expected.shape
    assert float((actual.detach().double() - expected.double()).abs().max()) <= allowed


# Allowed errors: what the files' authors state for float32, see tests/golden/README.md.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("file", "allowed"), [("c192", 6e-4), ("c384", 2e-3), ("c50", 1e-4)])
def test_released_weights(file, allowed, dtype):
    data = opened(f"anyup__paper_{file}")
    with torch.no_grad():
        size = tuple(data["output_size"].tolist())
        result = paper().to(dtype)(data["image"].to(dtype), data["features"].to(dtype), size)
    allowed = 1e-6 * float(data["output.f64"].abs().max()) if dtype == torch.float64 else allowed
    assert_close(result[:, data["channels"]], data["output.f64"], allowed)
    assert_close(result.mean((2, 3)), data["output.pixel_mean.f64"], allowed)


@pytest.mark.parametrize("case", ["int", "frac"])
def test_released_weights_with_natten_windows(case):
    data = {k.removeprefix(f"{case}."): v for k, v in opened("anyup__paper_natten").items()}
    model = paper(windows="natten")
    with torch.no_grad():
        result = model(data["image"], data["features"], tuple(data["output_size"].tolist()))
    assert_close(result[:, data["channels"]], data["output"], 1e-4)


@pytest.mark.parametrize("file", ["anyup_0", "anyup_1", "anyup_2"])
def test_released_weights_on_a_photo(file):
    data = opened(file)
    output = data["output"]
    with torch.no_grad():
        result = paper()(data["image"], data["features"], tuple(output.shape[2:]))
    channels = data.get("channels", torch.arange(output.shape[1]))
    assert_close(result[:, channels], output, 3 * 8.8e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_the_original(dtype):
    data = opened("anyup__paper_grads")
    model = paper().to(dtype)
    leaves = [data[k].to(dtype).requires_grad_() for k in ("image", "features")]
    result = model(*leaves, tuple(data["output_size"].tolist()))
    parameters = {n: p for n, p in model.named_parameters() if f"grad.{n}.f64" in data}
    assert len(parameters) == sum(key.startswith("grad.") for key in data)
    found = torch.autograd.grad(result, [*leaves, *parameters.values()], data["grad_output"].to(dtype))
    scales = {torch.float64: 1e-6, torch.float32: 1e-5}
    for name, gradient in zip(("grad_image", "grad_features", *parameters), found, strict=True):
        expected = data[f"{name}.f64" if name.startswith("grad_") else f"grad.{name}.f64"]
        # Sums over all pixels that cancel: float32 says less about parameters.
        allowed = scales[dtype] * (1 if name.startswith("grad_") or dtype == torch.float64 else 10)
        assert_close(gradient, expected, allowed * float(expected.abs().max()))


@pytest.mark.parametrize("file", ["anyup_paper", "anyup_multi_backbone"])
def test_both_checkpoints_load(file):
    model = AnyUp.from_checkpoint(asset(f"upsamplers/{file}.safetensors"))
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 878_080
    with torch.no_grad():
        assert_parity(model, draw(1, 3, 40, 32), draw(1, 30, 5, 4))


def natten_names(weights):
    """The names of the original's use_natten=True."""
    block, weights = "cross_decode.cross_attn", dict(weights)
    for kind in ("weight", "bias"):
        for p, w in zip("qk", weights.pop(f"{block}.attention.in_proj_{kind}").chunk(3), strict=False):
            weights[f"{block}.{p}_proj.{kind}"] = w[:, :, None, None] if kind == "weight" else w
        del weights[f"{block}.attention.out_proj.{kind}"]
    for p in "qk":
        weights[f"cross_decode.norm_{p}.weight"] = weights.pop(f"{block}.norm_{p}.weight")
    return weights


def test_checkpoint_files(tmp_path):
    expected = seeded(AnyUp(48, num_heads=3, kernel_size_lfu=3))
    inputs = draw(1, 3, 9, 9), draw(1, 6, 2, 3)
    path = tmp_path / "anyup_paper.pth"
    torch.save(expected.state_dict(), path)
    for checkpoint in (path, expected.state_dict(), natten_names(expected.state_dict())):
        model = AnyUp.from_checkpoint(checkpoint, num_heads=3)
        with torch.no_grad():
            assert torch.equal(model(*inputs), expected(*inputs))


class Surprise:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_are_not_run(tmp_path, capfd):
    path = tmp_path / "anyup.pth"
    torch.save({**AnyUp(16, num_heads=2).state_dict(), "callback": Surprise()}, path)
    with pytest.raises(ValueError, match=r"anyup.pth holds more than tensors .*"):
        AnyUp.from_checkpoint(path)
    assert "executed" not in capfd.readouterr().out


def test_checkpoints_that_do_not_fit():
    weights = AnyUp(16, num_heads=2).state_dict()
    weights["key_features_encoder.1.shortcut.weight"] = weights.pop("aggregation.1.block.3.bias")
    weights["cross_decode.conv2d.weight"] = torch.zeros(16, 16, 1, 1)
    words = (
        "missing keys: aggregation.1.block.3.bias; unexpected keys: key_features_encoder.1.shortcut.weight; wrong "
        "shapes: cross_decode.conv2d.weight (16, 16, 1, 1) (expected (16, 16, 3, 3))"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        AnyUp.from_checkpoint(weights, num_heads=2)
    with pytest.raises(ValueError, match=r"must hold AnyUp's weights, image_encoder.* got the keys head.weight"):
        AnyUp.from_checkpoint({"head.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"has the names of use_natten=True, but lacks .*k_proj.bias"):
        AnyUp.from_checkpoint({"cross_decode.cross_attn.q_proj.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"image": torch.ones(3, 9, 9)}, ValueError, r"`image` must be \(B, C, H, W\)"),
        ({"image": torch.ones(1, 4, 9, 9)}, ValueError, "`image` must have 3 channels, got 4"),
        ({"image": torch.ones(1, 3, 9, 9).byte()}, TypeError, "`image` must have one of the dtypes"),
        ({"image": torch.ones(1, 3, 9, 9).half()}, TypeError, "`image` must have the dtype of `the parameters`"),
        ({"features": torch.ones(1, 6, 2, 2).byte()}, TypeError, "`features` must have one of the dtypes"),
        ({"features": torch.ones(1, 6, 2, 2).to("meta")}, ValueError, "`features` must be on the device of `image`"),
        ({"features": torch.ones(2, 6, 2, 2)}, ValueError, "`features` must have the batch size of `image`, 1, got 2"),
        ({"features": torch.ones(1, 6, 1, 2)}, ValueError, r"at least 2 rows and columns, .* got \(1, 2\)"),
        ({"output_size": 0}, ValueError, "`output_size` must be positive, got 0"),
        ({"output_size": (4, 0)}, ValueError, r"`output_size` must be positive, got \(4, 0\)"),
        ({"output_size": (4.0, 4)}, TypeError, r"`output_size` must be \(height, width\)"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"image": torch.ones(1, 3, 9, 9), "features": torch.ones(1, 6, 2, 2), **change}
    with pytest.raises(error, match=words):
        AnyUp(16, num_heads=2)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"windows": "sparse"}, r"`windows` must be one of \('dense', 'natten'\), got 'sparse'"),
        ({"qk_dim": 100}, "`qk_dim` must be a multiple of 8 and of 8, twice the heads, got 100"),
        ({"kernel_size_lfu": 4}, "`kernel_size_lfu` must be odd, got 4"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        AnyUp(**arguments)
