"""JBUStack and FeatSharpJBU: against the plain formula, the originals' outputs, and their checkpoints."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from guided import LargestTensor
from suite import TRITON_DTYPES
from util import assert_gradient_within_budget, assert_within_budget, layouts, nudged, worst

import murf_fast
from murf_fast import reference
from murf_fast.nn import FeatSharpJBU, JBULevel, JBUStack
from murf_fast.nn.guided import _jbu_levels

GOLDEN = Path(__file__).parent / "golden"
ORIGINALS = Path(os.environ.get("MURF_FAST_ORIGINALS", Path(__file__).resolve().parents[2] / "shared"))


DIRECTIONS = 10


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def seeded(module):
    """Weights for which every part of the module matters."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        scale = {"range_temp": 0.2, "sigma_spatial": 0.1}.get(name.rpartition(".")[2], 0.3)
        values = scale * torch.randn(p.shape, generator=generator) + (0.9 if name.endswith("sigma_spatial") else 0.0)
        p.data.copy_(values)
    return module.eval()


def plain_level(level, source, guidance):
    """The original's order of operations on the definition's kernels."""

    def masks(network, channels):
        drop = [m for m in network if isinstance(m, torch.nn.Dropout2d)]
        ones = torch.ones(len(source), channels, 1, 1)
        return drop[0](ones)[..., 0, 0] if drop else None

    layers = [level.range_proj[0], level.range_proj[-1]]
    range_mask, fixup_mask = masks(level.range_proj, layers[0].out_channels), None
    if level.fixup_proj is not None:
        layers += [level.fixup_proj[0], level.fixup_proj[-1]]
        fixup_mask = masks(level.fixup_proj, layers[2].out_channels)
    params = [level.range_temp, level.sigma_spatial, *(p for m in layers for p in (m.weight, m.bias))]
    kernels = reference.bilateral_kernels(guidance, params, level.radius, range_mask, fixup_mask)
    return reference.adaptive_conv(source, kernels, guidance.shape[2:], None, level.mode)


def plain_stack(stack, source, guidance, scale=16):
    if stack.norm is not None:
        source = stack.norm(source.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    for level in stack.levels[: scale.bit_length() - 1]:
        h, w = source.shape[2:]
        source = plain_level(level, source, F.adaptive_avg_pool2d(guidance, (2 * h, 2 * w)))
    return source if stack.fixup_proj is None else stack.fixup_proj(source) * 0.1 + source


def results_of(call, stack, dtype, source, guidance):
    """Result and gradients to source, guidance and every parameter that is used, in ``dtype``; in many directions, as
    the error of a scalar's gradient in a single one may be any small number by chance.
    """
    stack = stack.to(dtype)
    leaves = [t.to(dtype).requires_grad_() for t in (source, guidance)]
    torch.manual_seed(3)
    result = call(stack, *leaves)
    parameters = dict(stack.named_parameters())
    gradients = []
    for seed in range(DIRECTIONS):
        direction = draw(*result.shape, seed=seed).to(dtype)
        inputs = [*leaves, *parameters.values()]
        gradients.append(torch.autograd.grad(result, inputs, direction, retain_graph=True, allow_unused=True))
    gradients = [None if g[0] is None else torch.stack(g) for g in zip(*gradients, strict=True)]
    stack.to(torch.float32)
    names = ("source", "guidance", *parameters)
    return {"result": result.detach()} | {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


STACKS = (
    # arguments, scale, training
    ({"dim": 6}, 4, False),
    ({"dim": 6}, 4, True),
    ({"dim": 5, "norm": True}, 2, False),
    ({"dim": 7, "shared": True, "radius": 2}, 4, False),
    ({"dim": 3, "shared": True}, 4, True),
    ({"dim": None, "guides": 2}, 4, False),
)


def assert_parity(ours, plain, module, source, guidance):
    """Within the budget of the plain formula in float32. All pixels share the rounding of their logits, and sums over
    them may cancel it by chance: the worst of several draws counts.
    """
    oracle = results_of(plain, module, torch.float64, source, guidance)
    theirs = [results_of(plain, module, torch.float32, source, guidance)]
    for seed in range(8):
        other = copy.deepcopy(module)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(nudged(parameter, seed))
        theirs.append(results_of(plain, other, torch.float32, nudged(source, seed), nudged(guidance, seed)))
    actual = results_of(ours, module, torch.float32, source, guidance)
    assert actual.keys() == oracle.keys()
    for name, value in actual.items():
        check = assert_within_budget if name == "result" else assert_gradient_within_budget
        check(value, oracle[name], worst([t[name] for t in theirs], oracle[name]), name)


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_stack(case):
    arguments, scale, training = case
    stack = seeded(JBUStack(**arguments)).train(training)
    source, guidance = draw(2, arguments["dim"] or 4, 3, 3), draw(2, arguments.get("guides", 3), 21, 19)

    def plain(stack, source, guidance):
        return plain_stack(stack, source, guidance, scale)

    def ours(stack, source, guidance):
        return stack(source, guidance, scale=scale)

    assert_parity(ours, plain, stack, source, guidance)


def test_training_drops_channels():
    stack = seeded(JBUStack(6))
    source, guidance = draw(1, 6, 2, 2), draw(1, 3, 9, 9)
    results = [stack.train(mode)(source, guidance, scale=2) for mode in (False, False, True, True)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[2], results[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("guidance_dtype", ["same", "float32"])
def test_dtypes(dtype, guidance_dtype):
    """Every level rounds its result to the type once; the definition in that type rounds far more often."""
    stack = seeded(JBUStack(None))
    source, guidance = draw(1, 5, 3, 4).to(dtype), draw(1, 3, 20, 30).to(dtype)
    oracle = plain_stack(stack.double(), source.double(), guidance.double())
    same = plain_stack(stack.to(dtype), source, guidance)
    given = guidance if guidance_dtype == "same" else guidance.float()
    for module in (stack, stack.float()):  # parameters may have any type; theirs were rounded to this one
        result = module(source, given)
        assert result.dtype == dtype
        assert_within_budget(result, oracle, same)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens", "sliced"])
def test_layouts(layout):
    stack = seeded(JBUStack(6))
    source, guidance = draw(2, 6, 3, 4), draw(2, 3, 21, 19)
    result = stack(layouts(source)[layout], guidance)
    # The last layer is torch's convolution, whose sums follow the layout on some processors.
    plain = stack(source, guidance)
    oracle = plain_stack(copy.deepcopy(stack).double(), source.double(), guidance.double())
    assert_within_budget(result, oracle, plain_stack(stack, source, guidance))
    assert_within_budget(plain, oracle, plain_stack(stack, source, guidance))
    channels_last = layout in ("channels_last", "tokens")
    assert result.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_sources_share_the_kernels():
    stack = seeded(JBUStack(6))
    sources, guidance = (
        [draw(1, 6, 3, 4), draw(1, 6, 3, 4, seed=1).contiguous(memory_format=torch.channels_last)],
        draw(1, 3, 9, 9),
    )
    results = stack(sources, guidance)
    for result, source in zip(results, sources, strict=True):
        alone = stack(source, guidance)
        assert torch.equal(result, alone)
        assert result.stride() == alone.stride()


def test_a_level_by_itself():
    level = seeded(JBULevel())
    source, guidance = draw(2, 5, 3, 3), draw(2, 3, 7, 5)

    def ours(level, source, guidance):
        return level(source, guidance)

    assert_parity(ours, plain_level, level, source, guidance)


def test_empty_batch():
    assert seeded(JBUStack(6))(draw(0, 6, 2, 3), draw(0, 3, 9, 9)).shape == (0, 6, 32, 48)


def test_compile():
    stack = seeded(JBUStack(6))
    source, guidance = draw(1, 6, 2, 3), draw(1, 3, 20, 30)
    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(stack, fullgraph=True)(source, guidance)
        same = plain_stack(stack, source, guidance)
        assert_within_budget(result, plain_stack(stack.double(), source.double(), guidance.double()), same)


def golden(path, prefix=""):
    with np.load(path) as arrays:
        return {k.removeprefix(prefix): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(prefix)}


def assert_close(actual, expected, allowed):
    assert actual.shape == expected.shape
    assert float((actual.detach().double() - expected.double()).abs().max()) <= allowed


# Allowed errors: what the files' authors state for float32, see tests/golden/README.md.
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-6), (torch.float32, 9e-6)], ids=str)
def test_levels_of_clip(dtype, allowed):
    data = golden(GOLDEN / "featup__clip_levels.npz")
    stack = JBUStack.from_checkpoint(golden(GOLDEN / "featup__clip_levels.npz", "param.")).to(dtype)
    assert stack.dim is None
    assert not stack.training
    for n in (1, 2, 3, 4):
        result = stack(data["source"].to(dtype), data["guidance"].to(dtype), scale=2**n)
        expected = data[f"level{n}.f64"]
        assert_close(result[:, : expected.shape[1]], expected, allowed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_a_clip_level(dtype):
    data = golden(GOLDEN / "featup__clip_grads.npz")
    level = JBULevel().to(dtype).eval()
    level.load_state_dict({k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")})
    leaves = [data[k].to(dtype).requires_grad_() for k in ("source", "guidance")]
    parameters = dict(level.named_parameters())
    result = level(*leaves)
    assert_close(result, data["output.f64"], 9e-6)
    gradients = torch.autograd.grad(result, [*leaves, *parameters.values()], data["grad_output"].to(dtype))
    for name, gradient in zip(("source", "guidance", *parameters), gradients, strict=True):
        expected = data[f"grad.{name}.f64"]
        assert_close(gradient, expected, 1.1e-5 * float(expected.abs().max()))


def original(name):
    path = ORIGINALS / name
    if not path.is_file():
        pytest.skip(
            f"no {name} in {ORIGINALS}; MURF_FAST_ORIGINALS names the folder of the originals' weights and outputs"
        )
    return path


def test_clip_stack():
    data = golden(original("golden/featup__clip_stack.npz"))
    stack = JBUStack.from_checkpoint(original("assets/upsamplers/featup_clip_jbu_stack.safetensors"))
    with torch.no_grad():
        result = stack(data["source"], data["guidance"])
    assert_close(result[:, data["channels"]], data["output.f64"], 1e-5)
    assert_close(result.mean(1), data["output.channel_mean.f64"], 1e-5)
    assert_close(result.mean((2, 3)), data["output.pixel_mean.f64"], 1e-5)


def test_clip_stack_of_a_photo():
    data = golden(original("golden/featup_stack.npz"))
    stack = JBUStack.from_checkpoint(original("assets/upsamplers/featup_clip_jbu_stack.safetensors"))
    assert stack.dim == 512
    with torch.no_grad():
        assert_close(stack(data["source"], data["guidance"])[:, data["channels"]], data["output64"], 8e-6)
    free = JBUStack.from_checkpoint(original("assets/upsamplers/featup_clip_jbu_stack_dimfree.safetensors"))
    for n in (1, 2, 3, 4):
        level = free(data["source"][:, data["channels"]], data["guidance"], scale=2**n)
        assert_close(level, data[f"level{n}"], 8e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_clip_stack_gradients(dtype):
    data = golden(original("golden/featup__clip_grads.npz"), "stack.")
    stack = JBUStack.from_checkpoint(original("assets/upsamplers/featup_clip_jbu_stack.safetensors")).to(dtype)
    leaves = [data[k].to(dtype).requires_grad_() for k in ("source", "guidance")]
    direction = data["grad_output_channel"].view(1, -1, 1, 1) * data["grad_output_pixel"]
    parameters = dict(stack.named_parameters())
    gradients = torch.autograd.grad(stack(*leaves), [*leaves, *parameters.values()], direction.to(dtype))
    checked = 0
    for name, gradient in zip(("source", "guidance", *parameters), gradients, strict=True):
        expected = data.get(f"grad_{name}.f64", data.get(f"grad.{name}.f64"))
        if expected is not None:
            # A scalar is a sum over all that cancels: float32 says little about it.
            if gradient.ndim or dtype == torch.float64:
                assert_close(gradient, expected, 1.1e-5 * float(expected.abs().max()))
            checked += 1
    assert checked == sum(key.startswith("grad") and key.endswith(".f64") for key in data)


def test_lightning_checkpoint(tmp_path):
    """As FeatUp publishes them: a prefix, the backbone's norm, and other networks in the same file."""
    expected = seeded(JBUStack(6, norm=True))
    weights = {f"upsampler.{k}": v for k, v in expected.state_dict().items() if not k.startswith("norm.")}
    weights |= {f"model.1.norm.{k}": v for k, v in expected.norm.state_dict().items()}
    weights |= {"model.0.cls_token": draw(1, 1, 6), "downsampler.weight": draw(3), "scale_net.net.0.bias": draw(3)}
    path = tmp_path / "clip_jbu_stack_cocostuff.ckpt"
    torch.save({"state_dict": weights, "epoch": 10, "hyper_parameters": {"lr": 1e-3}}, path)
    stack = JBUStack.from_checkpoint(path)
    source, guidance = draw(1, 6, 2, 3), draw(1, 3, 9, 9)
    assert torch.equal(stack(source, guidance), expected(source, guidance))
    assert stack.norm is not None


def test_shared_checkpoint():
    expected = seeded(JBUStack(6, shared=True))
    stack = JBUStack.from_checkpoint(expected.state_dict())
    assert stack.shared
    assert stack.up.radius == 5
    assert [n for n, _ in stack.named_children()] == ["up", "fixup_proj"]


class Surprise:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_are_not_run(tmp_path, capfd):
    path = tmp_path / "stack.ckpt"
    torch.save({"state_dict": JBUStack(3).state_dict(), "callback": Surprise()}, path)
    with pytest.raises(ValueError, match=r"stack.ckpt holds more than tensors .*"):
        JBUStack.from_checkpoint(path)
    assert "executed" not in capfd.readouterr().out


def test_checkpoints_that_do_not_fit():
    weights = JBUStack(4).state_dict()
    weights["up5.range_temp"] = weights.pop("up3.range_temp")
    weights["up2.fixup_proj.0.bias"] = torch.zeros(48)
    words = (
        "missing keys: up3.range_temp; unexpected keys: up5.range_temp; wrong shapes: up2.fixup_proj.0.bias (48,) "
        "(expected (49,))"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        JBUStack.from_checkpoint(weights)
    with pytest.raises(ValueError, match=r"must hold up1.range_proj.0.weight .* got the keys head.weight"):
        JBUStack.from_checkpoint({"head.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"source": torch.ones(1, 5, 2, 2)}, ValueError, "`source` must have 6 channels, got 5"),
        ({"source": torch.ones(6, 2, 2)}, ValueError, r"`source\[0\]` must be \(B, C, H, W\)"),
        ({"source": torch.ones(1, 6, 1, 2)}, ValueError, r"needs at least 4 rows and columns, got \(2, 4\)"),
        ({"source": [torch.ones(1, 6, 2, 2), torch.ones(1, 6, 3, 2)]}, ValueError, r"`source\[1\]` must have the size"),
        ({"guidance": torch.ones(2, 3, 9, 9)}, ValueError, "`guidance` must have the batch size of `source`, 1, got 2"),
        ({"guidance": torch.ones(1, 1, 9, 9)}, ValueError, "`guidance` must have 3 channels, got 1"),
        ({"guidance": torch.ones(1, 3, 9, 9).half()}, TypeError, "`guidance` must have the dtype of `source`"),
        ({"guidance": torch.ones(1, 3, 9, 9).byte()}, TypeError, "`guidance` must have one of the dtypes"),
        ({"scale": 14}, ValueError, r"`scale` must be one of \(2, 4, 8, 16\), got 14"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"source": torch.ones(1, 6, 2, 2), "guidance": torch.ones(1, 3, 9, 9), **change}
    with pytest.raises(error, match=words):
        JBUStack(6)(**arguments)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`norm=True` needs `dim`"):
        JBUStack(None, norm=True)
    with pytest.raises(ValueError, match="`factor` must be at least 1, got 0"):
        FeatSharpJBU(0)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_launches_of_a_stack(dtype, device):
    """A level: the guidance averaged; both networks, the kernels between them; folding and the convolution. Before the
    levels the last convolution and its sum, and its bias for the last level; half types have their weights rounded."""
    if device != "cpu":
        pytest.skip("launches are counted in the interpreter")
    from counted_launches import counted

    stack = seeded(JBUStack(5)).requires_grad_(False)
    source, guidance = (draw(1, n, 4, 6).to(dtype).contiguous(memory_format=torch.channels_last) for n in (5, 3))
    with murf_fast.use_backend("triton"), counted("joint_bilateral_upsample") as launches:
        stack(source[..., :2, :3], guidance, scale=4)
    kernels = {"_two_layers": 2, "_bilateral_kernels": 1, "_fold": 1, "_adaptive_conv": 1}
    assert launches.triton == {name: 2 * n for name, n in kernels.items()}
    once = {"aten::convolution": 1, "aten::add": 1, "aten::mul": 1}
    if dtype != torch.float32:
        once["aten::_to_copy"] = 1
    assert launches.torch == {"aten::_adaptive_avg_pool2d": 2, **once}


@pytest.mark.parametrize(("factor", "factors"), [(1, []), (2, [2]), (3, [3]), (6, [2, 3]), (8, [2, 2, 2]), (7, [7])])
def test_featsharp_factors(factor, factors):
    upsampler = seeded(FeatSharpJBU(factor))
    assert upsampler.factors == factors
    source, guidance = draw(1, 5, 4, 3), draw(1, 3, 4 * factor, 3 * factor)

    def plain(upsampler, source, guidance):
        for level, f in zip(upsampler.ups, factors, strict=True):
            size = [f * n for n in source.shape[2:]]
            source = plain_level(level, source, F.adaptive_avg_pool2d(guidance, size))
        return source * 1

    assert_parity(lambda u, s, g: u(s, g) * 1, plain, upsampler, source, guidance if factors else guidance[:, :3])


@pytest.mark.parametrize("file", ["featsharp_level_c24_x2.npz", "featsharp_level_c32_x3.npz"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_featsharp_level(file, dtype):
    path = GOLDEN / file
    data = golden(path if path.is_file() else original(f"golden/{file}"))
    upsampler = FeatSharpJBU(int(data["factor"]))
    weights = {k.removeprefix("param.jbu."): v for k, v in data.items() if k.startswith("param.jbu.")}
    assert upsampler.state_dict().keys() == weights.keys()
    upsampler.load_state_dict(weights)
    size = [n * int(data["factor"]) for n in data["lr"].shape[2:]]
    guidance = murf_fast.resize(data["guidance"], size).to(dtype)
    assert_close(upsampler.to(dtype)(data["lr"].to(dtype), guidance), data["jbu_output"], 2e-5)


@pytest.mark.parametrize("stack", ["plain", "shared", "no final"])
@pytest.mark.parametrize("scale", [2, 4])
def test_predict(stack, scale):
    """The head of the result is the result of the head, and kernels do not sum to one."""
    make = {"plain": lambda: JBUStack(6, norm=True), "shared": lambda: JBUStack(6, shared=True, radius=1)}
    model = seeded(make.get(stack, lambda: JBUStack(None))()).requires_grad_(False)
    source, guidance, weight, bias = draw(2, 6, 4, 5), draw(2, 3, 16, 20), draw(4, 6), draw(4)
    oracle, same = (
        torch.einsum(
            "kc,bchw->bkhw", weight.to(dtype), model.to(dtype)(source.to(dtype), guidance.to(dtype), scale=scale)
        )
        + bias.to(dtype)[:, None, None]
        for dtype in (torch.float64, torch.float32)
    )
    model.float()
    logits = model.predict(source, guidance, weight[:, :, None, None], bias, scale=scale)
    assert_within_budget(logits, oracle, same)
    shares = model.predict(source, guidance, weight, bias, scale=scale, reduce="softmax")
    assert_within_budget(shares, oracle.softmax(1), same.softmax(1))
    labels = model.predict(source, guidance, weight, bias, scale=scale, reduce="argmax")
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, logits.argmax(1).to(torch.uint8))
    bare = model.predict(source, guidance, weight, scale=scale)
    assert_within_budget(bare, oracle - bias[:, None, None], same - bias[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_labels_in_bands(dtype, monkeypatch):
    """Those of the logits, of which a few rows exist at a time."""
    model = seeded(JBUStack(6)).to(dtype)
    source, guidance = draw(2, 6, 4, 5).to(dtype), draw(2, 3, 16, 20).to(dtype)
    weight, bias = draw(40, 6).to(dtype), draw(40)
    logits = model.predict(source, guidance, weight, bias)
    assert logits.requires_grad
    monkeypatch.setitem(_jbu_levels._BAND_BYTES, "cpu", 10 * 2 * 40 * 80 * source.element_size())
    with LargestTensor() as largest:
        labels = model.predict(source, guidance, weight, bias, reduce="argmax")
    assert torch.equal(labels, logits.argmax(1).to(torch.uint8))
    assert largest.elements < logits.numel() / 3


def test_bad_predictions():
    model, source, guidance = seeded(JBUStack(6)), draw(1, 6, 4, 5), draw(1, 3, 16, 20)
    with pytest.raises(ValueError, match=r"JBUStack.predict: `weight` must have one column per channel .* got 5"):
        model.predict(source, guidance, draw(3, 5))
    with pytest.raises(ValueError, match=r"JBUStack.predict: `scale` must be one of .* got 3"):
        model.predict(source, guidance, draw(3, 6), scale=3)
    with pytest.raises(TypeError, match="`source` must be a tensor, got list"):
        model.predict([source], guidance, draw(3, 6))
