from __future__ import annotations

import importlib

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from test_image_to_patches import MEAN, STD, images
from util import assert_gradient_within_budget, assert_within_budget

import murf_fast

PATCH, WIDTH = 7, 24
SIZES = [(28, 35), 14]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parameters(dtype=torch.float64):
    def wave(*shape):
        n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        return (torch.sin(1 + 0.7 * n) / shape[-1] ** 0.5).view(shape).to(dtype)

    return {
        "weight": wave(WIDTH, 3, PATCH, PATCH),
        "bias": wave(WIDTH),
        "pos_embed": wave(1, 1 + 9, WIDTH),
        "prefix": wave(3, WIDTH),
    }


def embed(x, dtype, backend, sizes=SIZES, **options):
    tensors = {**parameters(dtype), **{k: v for k, v in options.items() if k in parameters()}}
    rest = {k: v for k, v in options.items() if k not in tensors}
    return murf_fast.patch_embed(
        x,
        sizes,
        patch_size=PATCH,
        flavor="dinov2-hf",
        num_prefix_tokens=1,
        mean=MEAN,
        std=STD,
        backend=backend,
        **tensors,
        **rest,
    )


def plain(x, size, dtype):
    """One resolution, the way models do it: resize, convolution, flatten, prefix, positions."""
    p = parameters(dtype)
    pixels = (x.permute(0, 3, 1, 2).to(dtype) / 255 - torch.tensor(MEAN, dtype=dtype).view(3, 1, 1)) / torch.tensor(
        STD, dtype=dtype
    ).view(3, 1, 1)
    resized = murf_fast.reference.resize(pixels, size)
    tokens = torch.nn.functional.conv2d(resized, p["weight"], p["bias"], stride=PATCH)
    grid = tokens.shape[2:]
    table = p["pos_embed"][:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    positions = murf_fast.reference.resize(table, grid, "bicubic").flatten(2).mT
    head = p["prefix"].clone()
    head[0] += p["pos_embed"][0, 0]
    return torch.cat([head.expand(len(x), -1, -1), tokens.flatten(2).mT + positions], dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_parity_with_a_model_run_once_per_size(backend, dtype):
    x = images("uint8 hwc")
    packed = embed(x, dtype, backend)
    for s, size in enumerate(((28, 35), (14, 14))):
        oracle, same_dtype = plain(x, size, torch.float64), plain(x, size, dtype)
        assert_within_budget(packed.block(s), oracle, same_dtype)
        assert packed.map(s).shape == (2, WIDTH, size[0] // PATCH, size[1] // PATCH)
        assert torch.equal(packed.map(s).flatten(2).mT, packed.block(s)[:, 3:])


def test_slices_are_views_and_offsets_fit():
    packed = embed(images("uint8 hwc"), torch.float32, "native")
    lengths = packed.cu_seqlens.diff().tolist()
    assert lengths == [23, 23, 7, 7]
    assert packed.cu_seqlens[-1] == len(packed.tokens)
    for s, b, start in ((0, 0, 0), (0, 1, 23), (1, 0, 46), (1, 1, 53)):
        sequence = packed.sequence(s, b)
        assert sequence.data_ptr() == packed.tokens[start].data_ptr()
        assert packed.map(s)[b].data_ptr() == packed.tokens[start + 3].data_ptr()


def test_batches_of_different_sizes():
    first, second = images("uint8 hwc"), images("uint8 hwc", 40, 22, 1)
    packed = embed([first, second], torch.float32, "native", sizes=[SIZES, [(21, 7)]])
    alone = embed(second, torch.float32, "native", sizes=[(21, 7)])
    assert len(packed) == 3
    assert torch.equal(packed.block(2), alone.block(0))
    assert torch.equal(packed.block(0), embed(first, torch.float32, "native").block(0))


def test_tiles_are_images_of_their_own():
    x = images("uint8 hwc", 28, 28)
    packed = embed(x, torch.float32, "native", sizes=[28], tiles=[2])
    corner = embed(x[:, :14, 14:], torch.float32, "native", sizes=[14])
    torch.testing.assert_close(packed.block(0).unflatten(0, (4, 2))[1], corner.block(0))
    assert packed.map(0).shape == (2, WIDTH, 4, 4)


@pytest.mark.parametrize("name", ["weight", "bias", "pos_embed", "prefix"])
def test_gradients(name):
    x = images("uint8 hwc")

    def gradient(dtype, backend):
        leaf = parameters(dtype)[name].requires_grad_()
        tokens = embed(x, dtype, backend, **{name: leaf}).tokens
        direction = torch.cos(torch.arange(tokens.numel(), dtype=torch.float64)).view(tokens.shape).to(dtype)
        return torch.autograd.grad(tokens, leaf, direction)[0]

    oracle, same_dtype = gradient(torch.float64, "reference"), gradient(torch.float32, "reference")
    assert_gradient_within_budget(gradient(torch.float32, "native"), oracle, same_dtype)


def test_positions_are_kept_until_the_table_changes():
    x, table = images("uint8 hwc"), parameters(torch.float32)["pos_embed"]
    first = embed(x, torch.float32, "native", pos_embed=table).tokens
    assert torch.equal(embed(x, torch.float32, "native", pos_embed=table).tokens, first)
    table.mul_(2)
    doubled = embed(x, torch.float32, "native", pos_embed=table).tokens
    assert not torch.equal(doubled, first)
    assert torch.equal(doubled, embed(x, torch.float32, "native", pos_embed=table.clone()).tokens)


def test_compile():
    x = images("uint8 hwc")

    def function(x, weight):
        return embed(x, torch.float32, "native", weight=weight).tokens * 2

    weight = parameters(torch.float32)["weight"]
    torch.testing.assert_close(
        torch.compile(function, fullgraph=True, backend="aot_eager")(x, weight), function(x, weight)
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.ones(WIDTH, 3, 5, 5)}, ValueError, r"`weight` must be \(D, 147\) or \(D, 3, 7, 7\)"),
        ({"weight": torch.ones(WIDTH, 147).long()}, TypeError, "`weight` must be a floating-point tensor"),
        ({"bias": torch.ones(3)}, ValueError, r"`bias` must have shape \(24,\)"),
        ({"prefix": torch.ones(2, 5)}, ValueError, r"`prefix` must be \(P, 24\), got \(2, 5\)"),
        ({"sizes": []}, TypeError, "`sizes` must be a non-empty list"),
        ({"sizes": [(28, 30)]}, ValueError, "must be a multiple of 7 pixels"),
        ({"sizes": [3]}, ValueError, "must hold a patch of 7 pixels"),
        ({"tiles": [2]}, ValueError, "`tiles` must hold one entry for each of 2 sizes"),
        ({"remainder": "pad"}, ValueError, "`remainder` must be one of"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        embed(images("uint8 hwc"), torch.float32, "native", **change)


@pytest.mark.parametrize("tiles", [None, [1, 2]])
def test_groups_of_images_change_nothing(tiles, monkeypatch):
    x = images("uint8 hwc")
    sizes = [(28, 35), (42, 56)]
    whole = embed(x, torch.float32, "native", sizes=sizes, tiles=tiles).tokens
    monkeypatch.setattr(importlib.import_module("murf_fast.ops.patch_embed"), "PATCHES_AT_A_TIME", 1)
    torch.testing.assert_close(embed(x, torch.float32, "native", sizes=sizes, tiles=tiles).tokens, whole)
    assert embed(x[:0], torch.float32, "native", sizes=sizes, tiles=tiles).tokens.shape == (0, WIDTH)


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "matmul")


@pytest.mark.parametrize("tiles", [None, [1, 2, 4]])
@pytest.mark.parametrize("has_bias", [True, False])
def test_one_product_per_resolution_on_a_gpu(tiles, has_bias):
    shapes = {k: v.shape for k, v in parameters().items()}
    with fake_cuda(capture=True) as operations:
        x = torch.empty(8, 60, 50, 3, dtype=torch.uint8, device=CUDA)
        tensors = {k: torch.empty(s, dtype=torch.bfloat16, device=CUDA) for k, s in shapes.items()}
        if not has_bias:
            tensors |= {"bias": None, "pos_embed": None}
        packed = embed(x, torch.bfloat16, "triton", sizes=[28, 56, 84], tiles=tiles, **tensors)
        assert packed.tokens.device == CUDA
    made = {name: n for name, n in operations.counts.items() if name.split("::")[1].rstrip("_") in PRODUCTS}
    assert sum(made.values()) == 3, made
    assert operations.counts["murf_fast::image_to_patches"] == 3


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_positions", [True, False])
def test_what_the_products_of_a_gpu_add_to(has_bias, has_positions):
    """Into rows of a buffer that hold anything before."""
    generator = torch.Generator().manual_seed(0)
    patches, weight, bias, positions = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5, 8), (6, 8), (6,), (5, 6))
    )
    bias, positions = bias if has_bias else None, positions if has_positions else None
    out = torch.full((2, 3, 7, 6), torch.nan, dtype=torch.float64)
    importlib.import_module("murf_fast.ops.patch_embed")._project_all(out[:, :, 2:], patches, weight, bias, positions)
    expected = patches @ weight.mT + (bias if has_bias else 0) + (positions if has_positions else 0)
    torch.testing.assert_close(out[:, :, 2:], expected)
    assert out[:, :, :2].isnan().all()


@pytest.mark.parametrize("tiles", [None, [1, 2]])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_products_of_a_gpu_have_the_same_values(backend, tiles, device, monkeypatch):
    if backend == "native" and device != "cpu":
        pytest.skip("the C++ kernels run on CPUs")
    x, sizes = images("uint8 hwc", 9, 7).to(device), [(7, 14), (14, 14)]
    same, oracle = (embed(x.cpu(), d, "reference", sizes=sizes, tiles=tiles) for d in (torch.float16, torch.float64))
    of_op = importlib.import_module("murf_fast.ops.patch_embed")
    monkeypatch.setattr(of_op, "_is_on_cpu", lambda weight: False)
    columns = []
    project = of_op._project_all
    monkeypatch.setattr(of_op, "_project_all", lambda *args: (columns.append(args[1].shape[-1]), project(*args)))
    tensors = {k: v.to(device) for k, v in parameters(torch.float16).items()}
    actual = embed(x, torch.float16, backend, sizes=sizes, tiles=tiles, **tensors)
    assert columns == [152, 152]
    assert_within_budget(actual.tokens.cpu(), oracle.tokens, same.tokens)
