"""The modules that upsample features along an image, as people change them: hooks, replaced parts, replicas, dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from guided import draw, seeded
from torch import nn
from torch.nn.utils import parametrize

from murf_fast.nn import JAFAR, NAF, AnyUp, FeatSharpJBU, JBUStack
from murf_fast.nn._parts import submodules_of

BUILD = {
    "AnyUp": lambda: AnyUp(16, num_heads=2),
    "NAF": lambda: NAF(32, num_heads=2, kernel_size=3),
    "JAFAR": lambda: JAFAR(6, qk_dim=16),
    "JBUStack": lambda: JBUStack(6, norm=True),
    "JBUStack, shared": lambda: JBUStack(6, shared=True, radius=1),
    "FeatSharpJBU": lambda: FeatSharpJBU(4),
}
FEATURES = [torch.float32, torch.bfloat16, torch.float16]
every_module = pytest.mark.parametrize("name", BUILD)


def built(name):
    return seeded(BUILD[name]())


def call(model, image, features):
    if isinstance(model, JBUStack):
        return model(features, image, scale=4)
    return model(features, image) if isinstance(model, FeatSharpJBU) else model(image, features)


def inputs():
    return draw(1, 3, 16, 16), draw(1, 6, 4, 4)


def called_or_refused(model, path, was_called):
    """Whether a call either calls the submodule or says that it does not."""
    try:
        with torch.no_grad():
            call(model, *inputs())
    except ValueError as error:
        return path.split(".")[-1] in str(error)
    return was_called()


class Calls:
    """Counts the calls of a module."""

    def __init__(self):
        self.count = 0

    def any(self):
        return self.count > 0

    def add(self, *_):
        self.count += 1

    def listen(self, module, kind):
        """Returns what ends it."""
        if kind != "forward":
            register = module.register_forward_hook if kind == "forward hook" else module.register_forward_pre_hook
            return register(self.add).remove
        own = module.forward

        def forward(*args, **options):
            self.add()
            return own(*args, **options)

        module.forward = forward
        return lambda: delattr(module, "forward")


def without_forward(module):
    return type(module).forward is nn.Module.forward or isinstance(module, nn.ModuleList)


@every_module
@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "forward"])
def test_every_submodule_is_called_or_refused(name, kind):
    model = built(name)
    used = {path: m for path, m in submodules_of(model).items() if not (without_forward(m) and kind == "forward")}
    if name.startswith("JBUStack"):  # at a scale of 4 the last levels have no part
        used = {path: m for path, m in used.items() if not path.startswith(("up3", "up4"))}
    used.pop("ups", None)
    for path, module in used.items():
        calls = Calls()
        undo = calls.listen(module, kind)
        assert called_or_refused(model, path, calls.any), path
        undo()
    with torch.no_grad():
        call(model, *inputs())


class Sum(nn.Module):
    """An adapter: a module and something beside it, with the attributes of the module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args):
        self.seen = True
        return 2 * self.module(*args)


@every_module
def test_every_layer_may_be_wrapped_or_is_refused(name):
    layers = {
        p: m for p, m in submodules_of(built(name)).items() if isinstance(m, (nn.Conv2d, nn.GroupNorm, nn.RMSNorm))
    }
    layers = {p: m for p, m in layers.items() if not p.startswith(("up3", "up4"))}
    for path in layers:
        model = built(name)
        parent, _, leaf = path.rpartition(".")
        adapter = Sum(layers[path])
        setattr(model.get_submodule(parent), leaf, adapter)
        assert called_or_refused(model, path, lambda a=adapter: hasattr(a, "seen")), path


@pytest.mark.parametrize("name", ["AnyUp", "JBUStack", "JBUStack, shared", "FeatSharpJBU"])
def test_another_activation_is_refused(name):
    model = built(name)
    swapped = [
        (p, m)
        for p, m in submodules_of(model).items()
        if isinstance(m, (nn.SiLU, nn.GELU)) and p[:3] not in ("up3", "up4")
    ]
    assert swapped
    for path, module in swapped:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.ReLU())
        with pytest.raises(ValueError, match="ReLU"):
            call(model, *inputs())
        setattr(model.get_submodule(parent), leaf, module)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@every_module
def test_parametrized_weights(name):
    model, expected = built(name), built(name)
    for path, module in submodules_of(model).items():
        if isinstance(module, nn.Conv2d):
            parametrize.register_parametrization(module, "weight", Doubled())
            expected.get_submodule(path).weight.data.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(call(model, *inputs()), call(expected, *inputs()))


def replica_of(module):
    """As nn.DataParallel makes them: parameters and buffers are plain attributes."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = replica_of(child)
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        replica._buffers.pop(name, None)
        replica.__dict__[name] = tensor
    return replica


@every_module
def test_replicas(name):
    model = built(name)
    with torch.no_grad():
        assert torch.equal(call(replica_of(model), *inputs()), call(model, *inputs()))


@pytest.mark.parametrize("name", ["NAF", "JAFAR"])
def test_a_norms_result_belongs_to_who_holds_it(name):
    """An identity in a norm's place leaves the block's input as it was, and a hook sees what the norm made."""
    model, seen = built(name), []
    block = (model.image_encoder.encoder if name == "NAF" else model.image_encoder)[1]
    block.norm1 = nn.Identity()
    block.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[0].clone())))
    block.norm2.register_forward_hook(lambda _, __, result: seen.append((result, result.clone())))
    with torch.no_grad():
        call(model, *inputs())
    assert len(seen) == 2
    assert all(torch.equal(held, at_the_time) for held, at_the_time in seen)


@every_module
@pytest.mark.parametrize("dtype", FEATURES, ids=str)
def test_autocast(name, dtype):
    """Features of any dtype, as a backbone under autocast gives them; results are in their dtype."""
    model, (image, features) = built(name), inputs()
    features = features.to(dtype)
    with torch.no_grad():
        expected = call(model, image, features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = call(model, image, features)
        assert result.dtype == expected.dtype == dtype
        if name not in ("NAF", "JAFAR"):  # autocast changes nothing
            assert torch.equal(result, expected)
            return
        oracle = call(copy.deepcopy(model).double(), image.double(), features.double())
        lower = call(copy.deepcopy(model).bfloat16(), image.bfloat16(), features.bfloat16())
    assert (result.double() - oracle).norm() <= 2 * (lower.double() - oracle).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_anyup_attends_in_the_wider_dtype(dtype):
    """Features of another dtype than the parameters': one rounding, that of the result."""
    model, (image, features) = built("AnyUp"), inputs()
    features = features.to(dtype)
    with torch.no_grad():
        result, same = model(image, features), model(image, features.float())
        oracle = model.double()(image.double(), features.double())
    if dtype == torch.float64:
        assert result.dtype == dtype
        assert (result - oracle).norm() <= 2 * (same.double() - oracle).norm()
    else:
        assert torch.equal(result, same.to(dtype))
