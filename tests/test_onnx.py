"""Ops as standard nodes of ONNX, run by onnxruntime; and those that have none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import SMALL
from torch import Tensor, nn
from torch.export import Dim
from util import assert_within_budget

import murf_fast

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

OPEN = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}


class Function(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.function(*arguments)


def program_of(function: Callable, example: tuple, *, by_export: bool = False):
    dynamic, model = (tuple(OPEN for _ in example),), Function(function)
    with torch.no_grad():
        if by_export:
            return torch.onnx.export(torch.export.export(model, example, dynamic_shapes=dynamic), verbose=False)
        return torch.onnx.export(model, example, dynamic_shapes=dynamic, dynamo=True, verbose=False)


def ran(program, inputs: tuple) -> Tensor:
    proto = program.model_proto
    assert {node.domain for node in proto.graph.node} <= {""}, "not a standard node"
    assert not proto.functions
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    [result] = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})
    return torch.from_numpy(result)


def r(*shape: int) -> Tensor:
    return torch.randn(shape)


def head(a: Tensor, b: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 30, dtype=a.dtype).view(5, 6)
    return murf_fast.linear_head([a, b], weight, size=(13, 12), via=7)


ONE, TWO = lambda b, n: (r(b, 3, n, n + 1),), lambda b, n: (r(b, 3, n, n + 1), r(b, 3, n - 2, n))
CASES = {
    "resize": (lambda x: murf_fast.resize(x, (13, 12), mode="bicubic"), ONE),
    "resize_antialiased": (lambda x: murf_fast.resize(x, (4, 3), antialias=True), ONE),
    "upsample_concat": (lambda a, b: murf_fast.upsample_concat([a, b], (13, 12)), TWO),
    "linear_head": (head, TWO),
    "upsample_argmax": (lambda a, b: murf_fast.upsample_argmax([a, b], (13, 12)), TWO),
    "upsample_expectation": (
        lambda a, b: murf_fast.upsample_expectation([a, b], 13, torch.arange(3, dtype=a.dtype)),
        TWO,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ops_are_standard_nodes(name):
    function, make = CASES[name]
    torch.manual_seed(0)
    program = program_of(function, make(2, 6), by_export=name == "upsample_concat")
    inputs = make(4, 9)
    result = ran(program, inputs)
    if name == "upsample_argmax":
        assert torch.equal(result, function(*inputs))
        return
    with murf_fast.use_backend("reference"):
        assert_within_budget(result, function(*(x.double() for x in inputs)), function(*inputs))


def test_a_whole_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SMALL | {"num_hidden_layers": 1})
    vit = transformers.Dinov2Model(config).eval().requires_grad_(False)
    segmentation = murf_fast.nn.SegmentationHead(2 * config.hidden_size, 7).eval().requires_grad_(False)
    model = murf_fast.MuRF(vit, (24, 32), segmentation, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    shapes = (2, 3, 25, 27), (3, 3, 36, 41)
    example, images = (torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes)
    assert torch.equal(ran(program_of(model.segment, (example,)), (images,)), model.segment(images))


@pytest.mark.parametrize("by_export", [False, True])
def test_what_has_no_form_says_so(by_export):
    def attend(x: Tensor) -> Tensor:
        return murf_fast.window_attention(x, x, x, windows=murf_fast.windows.full(), num_heads=1)

    with pytest.raises(torch.onnx.OnnxExporterError, match="window_attention: this operation has no form in ONNX"):
        program_of(attend, (r(2, 4, 5, 6),), by_export=by_export)
