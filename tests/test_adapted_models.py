"""Models that were adapted, quantized, pruned, compiled or trained: features are those of the model as it is now."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_live_model import SIZES, encoder_of, images_of, own
from test_multi_resolution_encoder import MEAN, STD, dinov2, hub, model_of, siglip
from test_s2 import plain_target, siglip_forward
from torch import nn
from torch.nn.utils import parametrizations, prune
from util import assert_within_budget

from murf_fast.nn import S2, MuRF, multi_scale_target
from murf_fast.nn.vit import _blocks

BUILDS = (dinov2, hub)  # q, k and v by themselves, and fused
every_build = pytest.mark.parametrize("build", BUILDS, ids=lambda f: f.__name__)


def linears(model):
    heads = ("head", "vision_model.head")
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(heads)]


def assert_the_model_s(build, model, encoder):
    """Within the budget of the model's own forward in its dtype, against a copy of it in float64."""
    with torch.no_grad():
        features = encoder(images_of())
        exact = copy.deepcopy(model).double()
        for s, size in enumerate(SIZES):
            oracle, same = (own(build, m, size) for m in (exact, model))
            assert_within_budget(features.tokens[0].block(s), oracle, same, f"{build.__name__} at {size}")


# What is put into a model, before or after the encoder is made.


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank addition, as peft, loralib and timm's forks write it."""

    def __init__(self, base, rank=2):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(0.2 * torch.randn(base.out_features, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.mT @ self.lora_B.mT


def lora(model):
    for name, linear in linears(model):
        model.set_submodule(name, LoraLinear(linear))


def weight_norm(model):
    for _, linear in linears(model):
        parametrizations.weight_norm(linear)
        with torch.no_grad():
            linear.parametrizations.weight.original0.mul_(1.5)


def weight_norm_of_hooks(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it has a successor, and users
        for _, linear in linears(model):
            nn.utils.weight_norm(linear)
            with torch.no_grad():
                linear.weight_g.mul_(1.5)


def pruned(model):
    for _, linear in linears(model):
        prune.l1_unstructured(linear, "weight", 0.5)


def pruned_for_good(model):
    pruned(model)
    for _, linear in linears(model):
        prune.remove(linear, "weight")


def tied_blocks(model):
    blocks = encoder_of(model).family.blocks
    blocks[1] = blocks[0]


def tied_weights(model):
    """Of one shape and in several blocks, and the layer itself in two."""
    groups = {}
    for _, linear in linears(model):
        first = groups.setdefault(linear.weight.shape, linear)
        linear.weight = first.weight


def hooked_layers(model):
    for _, linear in linears(model)[::2]:
        linear.register_forward_pre_hook(lambda module, inputs: (0.9 * inputs[0],))
        linear.register_forward_hook(lambda module, inputs, output: output + 0.1)


def compiled_in_place(model):
    for block in encoder_of(model).family.blocks:
        block.compile(backend="eager")


def compiled_blocks(model):
    blocks = encoder_of(model).family.blocks
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")


ADAPTERS = [lora, weight_norm, weight_norm_of_hooks, pruned, pruned_for_good, tied_blocks, tied_weights, hooked_layers,
            compiled_in_place, compiled_blocks]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("adapt", ADAPTERS, ids=lambda f: f.__name__)
@every_build
def test_adapted(build, adapt, when):
    torch.manual_seed(2)
    model = model_of(build)
    plain = copy.deepcopy(model)
    encoder = encoder_of(model) if when == "after" else None
    if encoder is not None:
        encoder(images_of())  # whatever is kept of the weights is kept now
    adapt(model)
    assert_the_model_s(build, model, encoder or encoder_of(model))
    if not adapt.__name__.startswith("compiled"):
        with torch.no_grad():
            assert not torch.allclose(own(build, plain, SIZES[0]), own(build, model, SIZES[0]), rtol=0.01, atol=0.01)


# Weights that change between two calls.


def optimizer_step(model):
    with torch.enable_grad():
        linear_weights = [m.weight.requires_grad_() for _, m in linears(model)]
        optimizer = torch.optim.AdamW(linear_weights, lr=0.05)
        sum(w.square().sum() for w in linear_weights).backward()
        optimizer.step()
    model.requires_grad_(False)


def sgd_step(model):
    """By foreach kernels, on a model that stays in training."""
    with torch.enable_grad():
        model.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=True)
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        model.zero_grad()


def edited_in_place(model):
    with torch.no_grad():
        for _, linear in linears(model):
            linear.weight.mul_(1.3)
            linear.weight[0] = 0.5


def edited_in_inference_mode(model):
    with torch.inference_mode():
        for _, linear in linears(model):
            linear.weight.mul_(1.3)


def edited_data(model):
    """``.data`` does not count versions."""
    for _, linear in linears(model):
        linear.weight.data.mul_(1.3)
        linear.bias.data.add_(0.1)


def edited_in_numpy(model):
    for _, linear in linears(model):
        linear.weight.detach().numpy()[:] *= 1.3


def assigned_data(model):
    for _, linear in linears(model):
        linear.weight.data = 1.3 * linear.weight.data


def loaded(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def loaded_by_assignment(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()}, assign=True)


def replaced(model):
    for _, linear in linears(model):
        linear.weight = nn.Parameter(1.3 * linear.weight.detach(), requires_grad=False)
        linear.bias = nn.Parameter(linear.bias.detach() + 0.1, requires_grad=False)


def swapped_layers(model):
    """Other layers of the same kind, whose memory and names may be those of the ones before."""
    for name, linear in linears(model):
        other = copy.deepcopy(linear)
        with torch.no_grad():
            other.weight.mul_(1.3)
        model.set_submodule(name, other)


def merged(model):
    """What an adapter does when it is merged, and what undoes it."""
    for _, linear in linears(model):
        a, b = torch.randn(2, linear.in_features), 0.2 * torch.randn(linear.out_features, 2)
        linear.weight.data += b @ a


UPDATES = [optimizer_step, sgd_step, edited_in_place, edited_in_inference_mode, edited_data, edited_in_numpy,
           assigned_data, loaded, loaded_by_assignment, replaced, swapped_layers, merged]  # fmt: skip


@pytest.mark.parametrize("update", UPDATES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("build", "dtype"), [(dinov2, torch.float32), (hub, torch.bfloat16)], ids=["dinov2", "hub-bfloat16"]
)
def test_the_next_call_has_the_new_weights(build, dtype, update):
    if dtype == torch.bfloat16 and update is edited_in_numpy:
        pytest.skip("NumPy has no bfloat16")
    torch.manual_seed(4)
    model = model_of(build).to(dtype)
    encoder = encoder_of(model)
    with torch.no_grad():
        before = [t.clone() for t in encoder(images_of()).maps]
        encoder(images_of())
    for _ in range(2):
        update(model)
        assert_the_model_s(build, model, encoder)
        with torch.no_grad():
            after = encoder(images_of()).maps
        assert not any(torch.allclose(a, b, rtol=0.01, atol=0.01) for a, b in zip(before, after, strict=True))
        before = [t.clone() for t in after]


def test_training_steps():
    """An optimizer's steps between calls with gradients give the losses of the model itself."""

    def losses(forward):
        torch.manual_seed(0)
        model = model_of(dinov2).requires_grad_(True)
        call, optimizer, found = forward(model), torch.optim.SGD(model.parameters(), lr=1e-3), []
        for _ in range(3):
            loss = sum(x.square().mean() for x in call(model))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            with torch.no_grad():
                call(model)
        return found

    def of_encoder(model):
        encoder = encoder_of(model)
        return lambda model: [encoder(images_of()).tokens[0].block(s) for s in range(len(SIZES))]

    ours = losses(of_encoder)
    theirs = losses(lambda model: lambda model: [own(dinov2, model, size) for size in SIZES])
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[2] < ours[0]


@pytest.mark.parametrize("change", ["model.bfloat16", "encoder.bfloat16", "model.half", "model.half and back"])
@every_build
def test_other_dtypes_later(build, change):
    model = model_of(build)
    encoder = encoder_of(model)
    encoder(images_of())
    if change == "model.half and back":
        model.half().float()
    else:
        owner, _, name = change.partition(".")
        getattr({"model": model, "encoder": encoder}[owner], name)()
    assert_the_model_s(build, model, encoder)


# Quantized layers.


class Int8(torch.Tensor):
    """A weight of eight bits and a scale for each row, of which a linear layer is all that there is, as torchao's."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight):
        self.scales = weight.detach().abs().amax(1, keepdim=True) / 127
        self.numbers = (weight.detach() / self.scales).round().to(torch.int8)

    def whole(self):
        return self.numbers * self.scales

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.whole(), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{func} of an eight-bit weight")


class Doubled(nn.Module):
    """The same numbers in a model that float64 can compute."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("w", linear.weight.whole().double())
        self.register_buffer("b", linear.bias.double())

    def forward(self, x):
        return F.linear(x, self.w, self.b)


@pytest.mark.parametrize("when", ["before", "after"])
@every_build
def test_weights_of_eight_bits(build, when):
    model = model_of(build)
    encoder = encoder_of(model) if when == "after" else None
    for _, linear in linears(model):
        linear.weight = nn.Parameter(Int8(linear.weight), requires_grad=False)
    if encoder is None:
        with pytest.warns(UserWarning, match="parameters of type"):
            encoder = encoder_of(model)
    exact = model_of(build).double()
    for name, linear in linears(model):
        exact.set_submodule(name, Doubled(linear))
    with torch.no_grad():
        features = encoder(images_of())
        for s, size in enumerate(SIZES):
            assert_within_budget(features.tokens[0].block(s), own(build, exact, size), own(build, model, size))


def quantized(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


class Rounded(nn.Linear):
    """The same of floating-point numbers."""

    def forward(self, x):
        scale = x.abs().amax() / 127
        return super().forward((x / scale).round() * scale)


def rounded(model):
    for _, linear in linears(model):
        linear.__class__ = Rounded
    return model


@pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="this torch has no quantized layers")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", [quantized, rounded], ids=lambda f: f.__name__)
@every_build
def test_dynamic_quantization(build, how, when, monkeypatch):
    """Such a layer rounds by the largest value of all its tokens, so a block sees those that it sees in the model."""
    model = model_of(build)
    encoder = encoder_of(model) if when == "after" else None
    model = how(model)
    encoder = encoder or encoder_of(model)
    monkeypatch.setattr(_blocks, "_in_place", None)
    with torch.no_grad():
        encoder(images_of())


# The other ways in.


@pytest.mark.parametrize("changes", [(lora,), (lora, optimizer_step), (edited_data,), (hooked_layers,)],
                         ids=lambda fs: " and ".join(f.__name__ for f in fs))  # fmt: skip
def test_every_entrance(changes):
    """MuRF, S2 and SigLIP-HD's targets have the features of the model as it is now."""
    torch.manual_seed(6)
    model = model_of(siglip)
    murf = MuRF(model, SIZES, mean=MEAN, std=STD)
    s2 = S2(model, img_sizes=[24, 48], max_split_size=24, mean=MEAN, std=STD)
    images = F.interpolate(images_of(), (48, 48))
    with torch.no_grad():
        murf.features(images), s2(images)
        for change in changes:
            change(model)
        exact = copy.deepcopy(model).double()

        def tokens(model, size):
            return own(siglip, model, size)

        def fused(model):
            maps = [tokens(model, s).mT.unflatten(2, (s[0] // 4, s[1] // 4)) for s in SIZES]
            return torch.cat([F.interpolate(m, maps[1].shape[2:], mode="bilinear") for m in maps], 1)

        assert_within_budget(murf.features(images_of(), (6, 6)), fused(exact), fused(model), "MuRF")
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

        def plain(x):
            pixels = (x - mean.to(x)) / std.to(x)
            owner = {torch.float32: model, torch.float64: exact}[x.dtype]
            return owner(pixels, interpolate_pos_encoding=True).last_hidden_state

        callable_s2 = S2(plain, img_sizes=[24, 48], max_split_size=24)
        assert_within_budget(s2(images), callable_s2(images.double()), callable_s2(images), "S2")

        target = multi_scale_target(model, images, (1, 2))
        oracle, same = (
            plain_target(x, (1, 2), (24, 24), siglip_forward(m)) for x, m in ((images.double(), exact), (images, model))
        )
        assert_within_budget(target, oracle, same, "multi_scale_target")


@pytest.mark.parametrize("when", ["before", "after"])
def test_data_parallel(when):
    model = model_of(dinov2)
    if when == "before":
        lora(model)
    encoder = encoder_of(nn.DataParallel(model))
    if when == "after":
        encoder(images_of())
        lora(model)
    assert_the_model_s(dinov2, model, encoder)
