"""Labels of attended logits: against the reference's logits in float64, ties, NaN, every level, bad input."""

from __future__ import annotations

import pytest
import torch
from suite import DTYPES, HAS_GPU, LAYOUTS, TRITON_DTYPES, every_kernel, for_triton
from test_window_attention import CASES, MANY_KEYS, SMALL, TRITON_CASES, VALUES, by_name, double, inputs, on
from util import assert_labels_within_budget

import murf_fast
from murf_fast import reference, windows


def arguments(case, values, dtype=torch.float32, layout="channels_last", device="cpu"):
    """The call's tensors, and its other arguments; every other case has a bias of its classes, or one per image."""
    q, k, v, *bias = on(inputs(case, values, dtype, layout), device)
    classes = v.shape[1] // (case.heads if values == "split" else 1)
    shape = ((classes,), (case.batch, classes), None)[len(case.name) % 3]
    class_bias = None
    if shape is not None:
        class_bias = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    options = {"windows": case.rule, "num_heads": case.heads, "values": values, "bias": tuple(bias) or None}
    return (q, k, v), {**options, "class_bias": class_bias}


def logits(tensors, options, dtype):
    """The reference's, in float64 or as it computes ``dtype``."""
    cast = double if dtype == torch.float64 else list
    options = {**options, "bias": options["bias"] and tuple(cast(options["bias"]))}
    if options["class_bias"] is not None:
        options["class_bias"] = cast([options["class_bias"]])[0]
    return reference.window_attention_argmax(*cast(tensors), **options)[1]


def check_labels(case, values, dtype, layout="channels_last", backend="native", device="cpu"):
    """The chosen logit is the best of float64's, within the error of the reference and that of a weight's dtype."""
    tensors, options = arguments(case, values, dtype, layout, device)
    labels = murf_fast.window_attention_argmax(*tensors, **options, backend=backend)
    oracle, same = logits(tensors, options, torch.float64), logits(tensors, options, dtype)
    assert labels.shape == oracle[:, 0].shape
    assert labels.dtype == torch.uint8
    if not labels.numel():
        return
    # Native arithmetic is float32 throughout; a matrix product on a GPU takes weights in the dtype of the values.
    weights = dtype if backend == "triton" else torch.float32
    allowed = assert_labels_within_budget(labels, oracle, same, weights, terms=float(tensors[2].double().abs().max()))
    # Where the margin says so, it is the label.
    margin = oracle.amax(1) - oracle.scatter(1, oracle.argmax(1, True), -torch.inf).amax(1)
    clear = margin > allowed
    assert torch.equal(labels.long()[clear], oracle.argmax(1)[clear])
    assert case.name == "one_pixel" or clear.any()


@VALUES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype, values):
    check_labels(case, values, dtype, "contiguous")


@VALUES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, values):
    for case in SMALL:
        check_labels(case, values, torch.float32, layout)


@VALUES
def test_every_level(level, values):
    for dtype in DTYPES:
        for case in (*SMALL, *MANY_KEYS):
            check_labels(case, values, dtype)


# One step of keys, several, and biases; the interpreter affords half precision once.
FEW = [c for c in TRITON_CASES if c.name in ("ratio", "shifted", "wide")]


@VALUES
@pytest.mark.parametrize("dtype", TRITON_DTYPES if HAS_GPU else [torch.float32], ids=str)
@pytest.mark.parametrize("case", for_triton(FEW, [c for c in CASES if c.batch]), ids=str)
def test_triton(case, dtype, values, device):
    check_labels(case, values, dtype, backend="triton", device=device)


def test_triton_in_half_precision(device):
    check_labels(FEW[-1], "split", torch.float16, backend="triton", device=device)


def one_key(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries whose only key has these logits (K,)."""
    return torch.randn(1, 2, 3, 2), torch.randn(1, 2, 1, 1), values[None, :, None, None]


FULL = {"windows": windows.full(), "num_heads": 1}


@every_kernel
@pytest.mark.parametrize("classes", [1, 3, 70])
def test_ties_go_to_the_lower_class(classes, backend, device):
    for value in (0.0, -torch.inf):
        tensors = on(one_key(torch.full((classes,), value)), device)
        assert not murf_fast.window_attention_argmax(*tensors, **FULL, backend=backend).any()
    logits = torch.zeros(70)
    logits[[9, 25, 68]] = 1
    tensors = on(one_key(logits), device)
    assert (murf_fast.window_attention_argmax(*tensors, **FULL, backend=backend) == 9).all()


@every_kernel
@pytest.mark.parametrize("first", [0, 20, 66])
def test_nan_beats_everything_as_in_torch(first, backend, device):
    logits = torch.randn(70)
    logits[[first, 67]], logits[2] = torch.nan, torch.inf
    tensors = on(one_key(logits), device)
    assert (murf_fast.window_attention_argmax(*tensors, **FULL, backend=backend) == first).all()


@pytest.mark.parametrize("classes", [256, 257, 32769])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_smallest_label_type(backend, classes):
    logits = torch.zeros(classes)
    logits[-1] = 1
    labels = murf_fast.window_attention_argmax(*one_key(logits), **FULL, backend=backend)
    assert labels.dtype == {256: torch.uint8, 257: torch.int16, 32769: torch.int32}[classes]
    assert (labels.long() == classes - 1).all()


@VALUES
def test_threads(values, three_threads):
    tensors, options = arguments(by_name["ratio"], values)
    three = murf_fast.window_attention_argmax(*tensors, **options)
    torch.set_num_threads(1)
    assert torch.equal(murf_fast.window_attention_argmax(*tensors, **options), three)


def test_registration_and_compile():
    tensors, options = arguments(by_name["same_grid"], "mean")
    rule, (bias_y, bias_x) = options["windows"], options["bias"]
    op = torch.ops.murf_fast.window_attention_argmax.default
    torch.library.opcheck(
        op, (*tensors, bias_y, bias_x, options["class_bias"], rule.rows, rule.columns, 2, True, 0.5, "native")
    )

    def function(*tensors):
        return murf_fast.window_attention_argmax(*tensors, **options)

    torch.compiler.reset()
    assert torch.equal(torch.compile(function, fullgraph=True)(*tensors), function(*tensors))


Q, V = torch.ones(2, 4, 3, 2), torch.ones(2, 6, 3, 2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"class_bias": torch.ones(5)}, ValueError, r"`class_bias` must have shape \(6,\) or \(2, 6\), one"),
        ({"class_bias": torch.ones(6), "values": "split"}, ValueError, r"shape \(3,\) or \(2, 3\).*got \(6,\)"),
        ({"class_bias": [1.0]}, TypeError, "`class_bias` must be a floating-point tensor, got list"),
        ({"class_bias": torch.ones(6, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"v": V[:, :5], "values": "split"}, ValueError, "must divide the 5 channels of `v`"),
        ({"k": Q.double()}, TypeError, "murf_fast.window_attention_argmax: `k` must have the dtype of `q`"),
    ],
)  # fmt: skip
def test_bad_input(change, error, words):
    call = {"q": Q, "k": Q, "v": V, "windows": windows.full(), "num_heads": 2, **change}
    with pytest.raises(error, match=words):
        murf_fast.window_attention_argmax(**call)
