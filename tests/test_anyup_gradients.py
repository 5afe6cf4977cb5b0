"""AnyUp's encoders in training: gradients of what is computed again are those of plain PyTorch, which keeps all."""

from __future__ import annotations

import pytest
import torch
from guided import LAYOUTS, draw, seeded
from torch.autograd import forward_ad
from util import assert_gradient_within_budget, assert_within_budget, nudged, worst

import murf_fast
from murf_fast import backends
from murf_fast.nn import AnyUp
from murf_fast.nn.guided import _recomputed
from murf_fast.reference import anyup as plain

NAME = "image_encoder"


@pytest.fixture(params=[5, 64, 10**6], ids="band{}".format)
def band(request, monkeypatch):
    monkeypatch.setattr(_recomputed, "_BAND", request.param)


def model(dtype=torch.float64, dim=32):
    return seeded(AnyUp(dim)).to(dtype)


def image_of(batch=2):
    return draw(batch, 3, 13, 11) + 3  # means that the norms must take off


def encoded(room, weights, image):
    return room.mixed_with_positions(room.encoder(weights, NAME, image), weights["rope.freqs"])


def leaves_of(weights, image):
    return {"image": image, **{n: p for n, p in weights.items() if n.startswith(NAME) or n == "rope.freqs"}}


def gradients(room, dtype, image=None, device="cpu", **options):
    weights = dict(model(dtype).to(device).named_parameters())
    image = (image_of() if image is None else image).to(device, dtype, copy=True).requires_grad_()
    leaves = leaves_of(weights, image)
    result = encoded(room, weights, image)
    direction = draw(*result.shape, seed=1).to(device, dtype)
    found = torch.autograd.grad(result, list(leaves.values()), direction, **options)
    return {"result": result, **dict(zip(leaves, found, strict=True))}, list(leaves.values())


def check_float32(actual):
    oracle, _ = gradients(plain, torch.float64)
    images = [nudged(image_of(), seed).contiguous(memory_format=m) for seed in range(4) for m in LAYOUTS]
    theirs = [gradients(plain, torch.float32, image)[0] for image in images]
    for name, value in actual.items():
        same = worst([t[name].detach() for t in theirs], oracle[name].detach())
        assert_gradient_within_budget(value.detach().cpu(), oracle[name].detach(), same, name)


def test_float64(band):
    expected, actual = (gradients(room, torch.float64)[0] for room in (plain, _recomputed))
    for name, value in actual.items():
        # Both statements round in float64; sums over all pixels have the roundings of their terms.
        terms = 1e3 * float(expected[name].detach().abs().max())
        assert_within_budget(value, expected[name], expected[name], name, terms)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_float32(band, backend):
    if backends.reasons_against(backend, "cpu"):
        pytest.skip("; ".join(backends.reasons_against(backend, "cpu")))
    with murf_fast.use_backend(backend):
        check_float32(gradients(_recomputed, torch.float32)[0])


def test_triton(device):
    with murf_fast.use_backend("triton"):
        check_float32(gradients(_recomputed, torch.float32, device=device)[0])


def test_gradients_of_gradients():
    both = []
    for room in (plain, _recomputed):
        found, leaves = gradients(room, torch.float64, create_graph=True)
        total = sum(found[name].square().sum() for name in ("image", f"{NAME}.1.block.2.weight", "rope.freqs"))
        both.append(torch.autograd.grad(total, leaves))
    for expected, actual in zip(*both, strict=True):
        assert_within_budget(actual, expected, expected, terms=1e3 * float(expected.abs().max()))


def test_tangents_and_transforms_take_the_plain_path():
    weights = {n: p.detach() for n, p in model().named_parameters()}
    image, direction = image_of().double(), draw(2, 3, 13, 11, seed=1).double()
    results = [
        torch.func.jvp(lambda x, room=room: encoded(room, weights, x), (image,), (direction,))
        for room in (plain, _recomputed)
    ]
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


def test_duals_take_the_plain_path():
    weights, image = dict(model().named_parameters()), image_of().double()
    results = []
    for room in (plain, _recomputed):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(image, draw(2, 3, 13, 11, seed=1).double())
            results.append(forward_ad.unpack_dual(encoded(room, weights, dual)).tangent)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "frozen", [(f"{NAME}.1.block.2.weight", f"{NAME}.2.block.3.bias", "rope.freqs"), (f"{NAME}.2.block.5.weight",)]
)
def test_a_frozen_parameter_has_no_gradient(frozen):
    trained = model(torch.float32)
    for name in frozen:
        trained.get_parameter(name).requires_grad_(False)
    weights, image = dict(trained.named_parameters()), image_of().requires_grad_()
    result = encoded(_recomputed, weights, image)
    result.backward(draw(*result.shape, seed=1))
    expected, _ = gradients(_recomputed, torch.float32)
    for name, leaf in leaves_of(weights, image).items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, expected[name]), name


def test_autocast_changes_nothing():
    weights, image = dict(model(torch.float32).named_parameters()), image_of()
    found = []
    for enabled in (False, True):
        result = encoded(_recomputed, weights, image)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(result, weights[f"{NAME}.1.block.2.weight"], torch.ones_like(result))[0])
    assert torch.equal(*found)


def test_half_types_are_summed_in_float32():
    expected, actual = (gradients(r, d)[0] for r, d in ((plain, torch.float64), (_recomputed, torch.bfloat16)))
    theirs, _ = gradients(plain, torch.bfloat16)
    for name, value in actual.items():
        assert value.dtype == torch.bfloat16
        ours, plains = ((v[name].double() - expected[name]).norm() for v in (actual, theirs))
        assert ours <= 2 * plains, name


def kept(trained, monkeypatch, room):
    """Maps of the image's size that a forward keeps, by their storages."""
    monkeypatch.setattr(_recomputed, "encoder", room[0])
    monkeypatch.setattr(_recomputed, "mixed_with_positions", room[1])
    image, storages = draw(1, 3, 40, 40), {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = trained(image, draw(1, 6, 4, 4), (8, 8))
    assert result.requires_grad
    one = 40 * 40 * trained.qk_dim * 4
    return sum(x.untyped_storage().nbytes() >= one for x in storages.values())


def test_eight_maps_are_kept(monkeypatch):
    trained = model(torch.float32)
    ours = kept(trained, monkeypatch, (_recomputed.encoder, _recomputed.mixed_with_positions))
    assert ours <= 8
    assert 3 * ours <= kept(trained, monkeypatch, (plain.encoder, plain.mixed_with_positions))
