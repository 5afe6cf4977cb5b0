from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from util import assert_gradient_within_budget, assert_within_budget

import murf_fast

tables = sys.modules["murf_fast.ops.resample_pos_embed"]  # the package holds the op under this name

FOLDER = Path(__file__).parent / "golden"
DINOV2, SIGLIP, PATCH = (
    np.load(FOLDER / f"posembed__{name}.npz") for name in ("dinov2_37", "siglip_16", "patch_kernel")
)
# The stored float32 originals are off by up to this much from their own formula in float64 (golden/README.md).
ORIGINAL_ERROR = {
    "dinov2_hub": 1.7e-6,
    "dinov2_hub_reg": 2.3e-6,
    "hf_dinov2": 3.3e-6,
    "hf_dinov2_with_registers": 2.3e-6,
    "timm_abs": 2.3e-6,
    "hf_siglip": 1.2e-6,
    "siglip2": 1.0e-6,
    "timm_patch": 8.6e-7,
}
FLAVOR = {
    "dinov2_hub": "dinov2-hub",
    "dinov2_hub_reg": "dinov2-reg",
    "hf_dinov2": "dinov2-hf",
    "hf_dinov2_with_registers": "dinov2-reg",
    "timm_abs": "timm",
    "hf_siglip": "siglip",
}
FLAVORS = ("dinov2-hub", "dinov2-hf", "dinov2-reg", "clip", "open-clip", "siglip", "siglip2", "timm")
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])


def keys(archive, prefix=""):
    return [k for k in archive.files if re.fullmatch(rf"{prefix}\w*\.\d+x\d+", k)]


def grid_of(key):
    return tuple(int(n) for n in key.split(".")[1].split("x"))


@BACKENDS
@pytest.mark.parametrize("key", keys(DINOV2))
def test_golden_dinov2(key, backend):
    flavor = key.split(".")[0]
    table = torch.from_numpy(DINOV2["table37"])
    actual = murf_fast.resample_pos_embed(
        table, grid_of(key), flavor=FLAVOR[flavor], num_prefix_tokens=1, backend=backend
    )
    assert actual.shape == DINOV2[key].shape
    assert np.abs(actual.numpy() - DINOV2[key]).max() <= 2 * ORIGINAL_ERROR[flavor]
    assert torch.equal(actual[:, 0], table[:, 0])


@BACKENDS
@pytest.mark.parametrize("key", keys(SIGLIP, "hf_siglip"))
def test_golden_siglip(key, backend):
    table = torch.from_numpy(SIGLIP["table16"])
    actual = murf_fast.resample_pos_embed(table, grid_of(key), flavor="siglip", backend=backend)
    assert np.abs(actual.numpy() - SIGLIP[key][0]).max() <= 2 * ORIGINAL_ERROR["hf_siglip"]


@BACKENDS
def test_golden_siglip2_ragged(backend):
    table, shapes = torch.from_numpy(SIGLIP["table16"]), SIGLIP["siglip2.spatial_shapes"]
    grids = [tuple(int(n) for n in s) for s in shapes]
    for dtype, key, error in (
        (torch.float32, "siglip2.padded", 2 * ORIGINAL_ERROR["siglip2"]),
        (torch.bfloat16, "siglip2.padded_bf16_table", 2.0**-8 * float(table.abs().max())),
    ):
        results = murf_fast.resample_pos_embed(table.to(dtype), grids, flavor="siglip2", backend=backend)
        for actual, (h, w), padded in zip(results, grids, SIGLIP[key], strict=True):
            assert actual.dtype == dtype
            assert np.abs(actual.float().numpy() - padded[: h * w]).max() <= error


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parity_and_gradient(dtype, flavor):
    values = torch.sin(torch.arange(2 + 35 * 9, dtype=torch.float64)[:, None] * torch.arange(1, 6)).to(dtype)

    def run(table, backend):
        table = table.detach().requires_grad_()
        options = {"flavor": flavor, "num_prefix_tokens": 2, "source_grid": (35, 9), "backend": backend}
        result = murf_fast.resample_pos_embed(table, (17, 12), **options)
        direction = torch.cos(torch.arange(result.numel(), dtype=torch.float64)).view(result.shape).to(result.dtype)
        return result, torch.autograd.grad(result, table, direction)[0]

    oracle, same_dtype = run(values.double(), "reference"), run(values, "reference")
    actual = run(values, "native")
    assert_within_budget(actual[0], oracle[0], same_dtype[0])
    assert_gradient_within_budget(actual[1], oracle[1], same_dtype[1])


def test_flavors_differ():
    table = torch.from_numpy(DINOV2["table37"])
    results = {
        f: murf_fast.resample_pos_embed(table, (16, 16), flavor=f, num_prefix_tokens=1)
        for f in ("dinov2-hub", "dinov2-hf", "dinov2-reg", "siglip2")
    }
    names = list(results)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (results[a] - results[b]).abs().max() > 1e-3, (a, b)


def test_equal_grids_share_one_tensor():
    table = torch.randn(16, 3)
    results = murf_fast.resample_pos_embed(table, [(3, 5), (2, 2), (3, 5)], flavor="siglip2")
    assert results[0] is results[2]
    assert [len(r) for r in results] == [15, 4, 15]


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", [(28, 70), (56, 42), (70, 70)])
def test_installed_transformers(registers, size):
    transformers = pytest.importorskip("transformers")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=70, patch_size=14
    )
    embeddings = getattr(transformers, f"{name}Model")(config).embeddings.eval()
    torch.nn.init.normal_(embeddings.position_embeddings)
    grid = tuple(n // 14 for n in size)
    tokens = torch.zeros(1, 1 + grid[0] * grid[1], 8)
    with torch.no_grad():
        expected = embeddings.interpolate_pos_encoding(tokens, *size)
        actual = murf_fast.resample_pos_embed(
            embeddings.position_embeddings,
            grid,
            flavor="dinov2-reg" if registers else "dinov2-hf",
            num_prefix_tokens=1,
        )
    # torch resizes in float32 with float32 coordinates; the original's recorded error bounds that.
    assert (actual - expected).abs().max() <= 2 * ORIGINAL_ERROR["hf_dinov2"]


def test_compile():
    table = torch.randn(1, 26, 8)

    def function(table):
        return murf_fast.resample_pos_embed(table, (7, 6), flavor="dinov2-hub", num_prefix_tokens=1) * 2

    assert torch.equal(torch.compile(function, fullgraph=True)(table), function(table))


@pytest.mark.parametrize("key", keys(PATCH, "timm_patch"))
def test_golden_patch_kernel(key):
    weight = torch.from_numpy(PATCH["weight14"])
    actual = murf_fast.resample_patch_embed(weight, grid_of(key))
    assert np.abs(actual.numpy() - PATCH[key]).max() <= 4 * ORIGINAL_ERROR["timm_patch"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 16), (5, 9)])
def test_patch_kernel_parity_and_gradient(size, dtype):
    weight = torch.sin(torch.arange(2 * 3 * 49, dtype=torch.float64)).view(2, 3, 7, 7).to(dtype)

    def run(function, weight):
        weight = weight.detach().requires_grad_()
        result = function(weight)
        direction = torch.cos(torch.arange(result.numel(), dtype=torch.float64)).view(result.shape)
        return result, torch.autograd.grad(result, weight, direction.to(result.dtype))[0]

    def plain(weight):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return murf_fast.reference.resample_patch_embed(wide, size).to(weight.dtype)

    oracle, same_dtype = run(plain, weight.double()), run(plain, weight)
    actual = run(lambda w: murf_fast.resample_patch_embed(w, size), weight)
    for a, o, s in zip(actual, oracle, same_dtype, strict=True):
        assert_within_budget(a, o, s)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pos_embed": torch.ones(3, 17, 4)}, ValueError, r"`pos_embed` must be \(N, D\) or \(1, N, D\)"),
        ({"pos_embed": torch.ones(17, 4).long()}, TypeError, "`pos_embed` must be a floating-point tensor"),
        ({"flavor": "dino"}, ValueError, "`flavor` must be one of"),
        ({"num_prefix_tokens": 17}, ValueError, r"`num_prefix_tokens` must be in \[0, 17\), got 17"),
        ({"num_prefix_tokens": 0}, ValueError, "`source_grid` is needed for a table of 17 rows"),
        ({"source_grid": (3, 5)}, ValueError, "`source_grid` must hold the 16 rows"),
        ({"grid": (0, 3)}, ValueError, "`grid` must be positive"),
        ({"grid": []}, ValueError, "`grid` must be"),
        ({"keep": "always"}, ValueError, "`keep` must be one of"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"pos_embed": torch.ones(17, 4), "grid": (3, 3), "flavor": "timm", "num_prefix_tokens": 1, **change}
    with pytest.raises(error, match=words):
        murf_fast.resample_pos_embed(**arguments)


def test_kept_tables():
    table = torch.randn(1, 1 + 36, 8)
    call = {"flavor": "dinov2-hf", "num_prefix_tokens": 1, "keep": True}
    first = murf_fast.resample_pos_embed(table, [(4, 5), (6, 6)], **call)
    again = murf_fast.resample_pos_embed(table, (4, 5), **call)
    assert again is first[0]
    assert murf_fast.resample_pos_embed(table, (4, 5), **{**call, "flavor": "timm"}) is not again
    kept = murf_fast.resample_pos_embed(table, [(4, 5), (6, 6)], **call)
    kept.clear()  # the caller's own list
    kept = murf_fast.resample_pos_embed(table, [(4, 5), (6, 6)], **call)
    assert all(a is b for a, b in zip(kept, first, strict=True))
    with murf_fast.use_backend("reference"):
        assert murf_fast.resample_pos_embed(table, (4, 5), **call) is not again
    with pytest.raises(TypeError, match="`grid`"):
        murf_fast.resample_pos_embed(table, (4.0, 5), **call)
    with torch.inference_mode():
        assert murf_fast.resample_pos_embed(table, (4, 5), **call) is again
    table.mul_(2)
    changed = murf_fast.resample_pos_embed(table, (4, 5), **call)
    torch.testing.assert_close(changed, 2 * again)
    table.requires_grad_(True)
    learned = murf_fast.resample_pos_embed(table, (4, 5), **call)
    assert learned.requires_grad
    assert not murf_fast.resample_pos_embed(table.detach(), (4, 5), **call).requires_grad


CHANGES = {  # ways to change a table, of which some leave its version counter alone
    "in place": lambda t: t.mul_(2),
    "one value": lambda t: t.view(-1)[5:6].add_(1),
    "average of a teacher": lambda t: t.data.mul_(0.99).add_(torch.ones_like(t), alpha=0.01),
    "one value through .data": lambda t: t.data.view(-1)[-1:].add_(1),
    "detached": lambda t: t.detach().numpy().__setitem__((0, 3, 2), 7.0),
    "other memory": lambda t: setattr(t, "data", torch.randn_like(t)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_checked_tables_follow_every_change(change):
    table = torch.randn(1, 1 + 36, 8)
    call = {"flavor": "dinov2-hf", "num_prefix_tokens": 1}
    grids = [(4, 5), (6, 6), (9, 2), (4, 5)]
    first = murf_fast.resample_pos_embed(table, grids, keep="checked", **call)
    assert first[0] is first[3]
    again = murf_fast.resample_pos_embed(table, grids, keep="checked", **call)
    assert all(a is b for a, b in zip(again, first, strict=True))
    change(table)
    changed = murf_fast.resample_pos_embed(table, grids, keep="checked", **call)
    for a, b in zip(changed, murf_fast.resample_pos_embed(table, grids, **call), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(changed[1], first[1])


@pytest.mark.parametrize("keep", [True, "checked"])
@pytest.mark.parametrize("bound", ["KEPT_TABLES", "KEPT_BYTES"])
def test_kept_tables_are_bounded(keep, bound, monkeypatch):
    table = torch.randn(1 + 16, 8)
    call = {"flavor": "timm", "num_prefix_tokens": 1, "keep": keep}
    limit = 7 if bound == "KEPT_TABLES" else 20_000
    monkeypatch.setattr(tables, bound, limit)
    most = 0
    for n in range(1, 40):  # the largest call takes more than the bound
        grids = [(n, 3), (n, 5), (n, n)]
        results = murf_fast.resample_pos_embed(table, grids, **call)
        kept = tables._kept[table].tables
        taken = len(kept) if bound == "KEPT_TABLES" else sum(t.nbytes for t in kept.values())
        latest = len(set(grids)) if bound == "KEPT_TABLES" else sum(t.nbytes for t in set(results))
        assert taken <= max(limit, latest)
        most = max(most, len(kept))
        again = murf_fast.resample_pos_embed(table, grids, **call)
        assert all(a is b for a, b in zip(again, results, strict=True))
    assert most > 3


def test_what_was_used_last_is_kept(monkeypatch):
    monkeypatch.setattr(tables, "KEPT_TABLES", 2)
    table = torch.randn(16, 8)
    call = {"flavor": "timm", "keep": True}
    first = murf_fast.resample_pos_embed(table, (3, 3), **call)
    second = murf_fast.resample_pos_embed(table, (5, 3), **call)
    assert murf_fast.resample_pos_embed(table, (3, 3), **call) is first
    murf_fast.resample_pos_embed(table, (7, 3), **call)
    assert murf_fast.resample_pos_embed(table, (3, 3), **call) is first
    assert murf_fast.resample_pos_embed(table, (5, 3), **call) is not second


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda z: f(z).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
    "vmap": lambda f, x: torch.vmap(f)(x[None].repeat(2, 1)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("keep", [False, True, "checked"])
def test_tables_beside_what_is_transformed(transform, trains, keep):
    """A table that no transform is about, with and without a gradient of its own; nothing of a transform is kept."""
    table = torch.randn(16, 5, requires_grad=trains)

    def resized():
        return murf_fast.resample_pos_embed(table, (3, 7), flavor="dinov2-hf", keep=keep)

    TRANSFORMS[transform](lambda z: resized() * z, torch.ones(5))
    with torch.no_grad():
        after = resized()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(after)
    assert torch.equal(after, murf_fast.resample_pos_embed(table.detach(), (3, 7), flavor="dinov2-hf"))


@pytest.mark.parametrize("keep", [False, True, "checked"])
def test_vmap_over_tables(keep):
    tables = torch.randn(3, 16, 5)
    found = torch.vmap(lambda t: murf_fast.resample_pos_embed(t, (3, 7), flavor="dinov2-hf", keep=keep))(tables)
    for table, one in zip(tables, found, strict=True):
        torch.testing.assert_close(one, murf_fast.resample_pos_embed(table, (3, 7), flavor="dinov2-hf"))
