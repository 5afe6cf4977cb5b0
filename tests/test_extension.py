"""The native surface by itself: arguments by name, and what it refuses before a kernel runs."""

from __future__ import annotations

import pytest
import torch

from murf_fast import _extension
from murf_fast.tables.resize import axis

pytestmark = pytest.mark.skipif(_extension.load_error() is not None, reason="the extension is not built")


@pytest.fixture
def call():
    """A valid call of ``upsample_sum``, with changes to it and to its map."""
    extension = _extension.module()
    x, out = torch.randn(1, 3, 4, 5), torch.zeros(1, 3, 8, 9)
    y_axis, x_axis = axis(4, 8), axis(5, 9)

    def run(function="upsample_sum", of_map=None, **changes):
        fields = {"data": x.data_ptr(), "shape": x.shape, "strides": x.stride(), "y": y_axis.native, "x": x_axis.native}
        arguments = {
            "dtype": "f32",
            "maps": [extension.Map(**{**fields, **(of_map or {})})],
            "grid": out.shape,
            "bias": extension.Bias(data=0, stride_b=0),
            "out": out.data_ptr(),
            "channels_last": False,
            "out_stride_b": 3 * 8 * 9,
            "threads": 1,
        }
        if function != "upsample_sum":
            arguments = {name: arguments[name] for name in ("dtype", "maps", "grid", "out", "threads")}
        getattr(extension, function)(**{**arguments, **changes})
        return x, out

    return run


def test_a_call(call):
    x, out = call()
    torch.testing.assert_close(out, torch.nn.functional.interpolate(x, (8, 9), mode="bilinear"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"of_map": {"stride": (1, 1, 1, 1)}}, TypeError, "unexpected keyword argument 'stride'"),
        ({"output": 0}, TypeError, "unexpected keyword argument 'output'"),
        ({"bias": (0, 0)}, TypeError, r"expected .*Bias, got tuple"),
        ({"of_map": {"y": None}}, TypeError, "expected a table"),
        ({"of_map": {"y": "rows"}}, TypeError, "cast"),
        ({"of_map": {"data": -8}}, OverflowError, "negative"),
        ({"of_map": {"strides": (1, 2, 3)}}, ValueError, "expected 4 entries"),
        ({"of_map": {"strides": 60}}, TypeError, "expected a tuple or list"),
        ({"dtype": "float32"}, TypeError, "does not know 'float32'"),
        ({"channels_last": 0}, TypeError, "True or False"),
        ({"threads": 2**40}, ValueError, "out of range"),
        ({"out_stride_b": 1.5}, TypeError, "float"),
        ({"maps": []}, ValueError, "do not make up the result"),
        ({"grid": (1, 3, 8, 8)}, ValueError, "disagree"),
        ({"grid": (1, 4, 8, 9)}, ValueError, "disagree"),
        ({"grid": (2, 3, 8, 9)}, ValueError, "disagree"),
        ({"of_map": {"shape": (1, 3, 5, 4)}}, ValueError, "disagree"),
        ({"of_map": {"shape": (1, 2, 4, 5)}}, ValueError, "disagree"),
    ],
)
def test_refused(call, changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("function", ["upsample_concat", "upsample_concat_planar"])
def test_maps_make_up_the_result(call, function):
    call(function)
    with pytest.raises(ValueError, match="do not make up the result"):
        call(function, of_map={"shape": (1, 2, 4, 5)})


def test_everything_has_a_name():
    extension = _extension.module()
    with pytest.raises(TypeError, match="keyword arguments only"):
        extension.Bias(0, 0)
    with pytest.raises(TypeError, match="misses the argument 'stride_b'"):
        extension.Bias(data=0)
    assert extension.Bias(stride_b=3, data=8) == (8, 3)


@pytest.mark.parametrize("count", [1, 4096, 20011])
@pytest.mark.parametrize("threads", [1, 3])
def test_stream_fill(count, threads):
    memory = torch.zeros(count + 2)
    out = memory[1:-1]
    _extension.module().stream_fill(out=out.data_ptr(), bytes=out.nbytes, threads=threads)
    assert memory.tolist() == [0.0, *[1.0] * count, 0.0]
