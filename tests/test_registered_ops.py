"""What ``torch.ops.murf_fast.*`` does with arguments that the ops' functions would have refused: it raises.

Every registered op has a valid call here, with the shape of every tensor by letters: a size is tied to the other places
of its letter, to the numbers in an argument of that name, or, written as a digit, to the op; a dot is any size. From
these, every argument is made wrong in every way its type allows, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import murf_fast
from murf_fast.backends import BackendUnavailableError, native_problems, triton_problems

pytestmark = pytest.mark.skipif(bool(native_problems()), reason="needs the C++ extension")

REFUSED = (TypeError, ValueError, BackendUnavailableError)
ANY, FLOATS, LABELS = "any floating dtype", "one of the floating dtypes", "one of the dtypes of labels"
B, C, H, W = 2, 6, 9, 11


SCHEMAS = Path(__file__).parent / "golden" / "schemas.txt"


def test_schemas_are_those_that_saved_programs_hold():
    """A change is a new minor version; the file is then made by ``python tests/test_registered_ops.py``."""
    assert list(schemas()) == SCHEMAS.read_text().splitlines()


def test_no_schema_has_a_dtype():
    """Packages of AOTInductor give an op another one under torch 2.11 (``ops/_dtypes.py``)."""
    assert not [schema for schema in schemas() if "ScalarType" in schema]


def schemas() -> Iterator[str]:
    for name in dir(torch.ops.murf_fast):
        if hasattr(packet := getattr(torch.ops.murf_fast, name), "overloads"):
            yield str(packet.default._schema)


@dataclass
class Argument:
    """A tensor of an op: its sizes by letters, how it is made, and which dtypes are its own affair."""

    sizes: str
    make: Callable[[tuple[int, ...]], Tensor] = torch.randn
    dtypes: str | None = None  # ANY: read in any floating dtype; FLOATS, LABELS: in any a kernel takes


@dataclass
class Op:
    """A valid call: arguments in the order of the schema; lists of tensors are lists of arguments."""

    arguments: dict[str, object]
    letters: dict[str, int] = field(default_factory=dict)


def sizes(letters: dict[str, int], text: str) -> tuple[int, ...]:
    free = {".": 7}
    return tuple(int(s) if s.isdigit() else {**letters, **free}[s] for s in text.split())


def positive(shape) -> Tensor:
    return torch.rand(shape) + 0.5


def labels(shape) -> Tensor:
    return torch.randint(0, C, shape)


def radii(shape) -> Tensor:
    return torch.randint(1, 3, shape, dtype=torch.uint8)


def doubles(size: tuple[int, ...]) -> Tensor:
    return torch.rand(size, dtype=torch.float64)


def maps(dtypes=None) -> list[Argument]:
    return [Argument("B C . .", dtypes=dtypes), Argument("B C . .", dtypes=dtypes)]


RULE = {"interpolation": "bilinear", "antialias": False, "via": None}
GUIDED = [
    *(Argument(s, positive, ANY) for s in ("", "", "K G", "K", "K K", "K")),
    *(Argument(s, positive, ANY) for s in ("9 P", "9", "9 9", "9")),
]
NETWORK = {
    "params": GUIDED,
    "range_mask": Argument("B K", positive, ANY),
    "fixup_mask": Argument("B 9", positive, ANY),
}
GUIDE = {"G": 3, "K": 5, "P": 12}
ATTENTION = {
    "q": Argument("B Q H W"),
    "k": Argument("B Q h w"),
    "v": Argument("B V h w"),
    "bias_y": Argument("N H h", dtypes=ANY),
    "bias_x": Argument("N W w", dtypes=ANY),
    "rows": "full",
    "columns": "ratio 0.3",
    "num_heads": 2,
    "mean": True,
    "scale": 0.5,
}
HEADS = {"Q": 8, "V": 6, "h": 4, "w": 5, "N": 2}
GAUSSIANS = {
    "guidance": Argument("B G H W"),
    "low_guidance": Argument("B G h w"),
    **{name: Argument("B 1 h w", positive, ANY) for name in ("sigma_x", "sigma_y", "theta", "sigma_r")},
    "radii": Argument("B 1 H W", radii),
    "max_radius": 2,
}
CELLS = {"G": 3, "h": 4, "w": 5}
LOSS = {
    "features": maps(),
    "bias": Argument("B C", dtypes=ANY),
    "target": Argument("B H W", labels),
    "weight": Argument("C", positive, ANY),
}
BLOCK = ("D", "D", "D D 1 1") * 4
QUERIES = [
    *(Argument(s, dtypes=ANY) for inputs in ("3", "D", "D") for s in (f"D {inputs} 1 1", *BLOCK)),
    *(Argument(s, dtypes=ANY) for s in ("2 D", "D D 3 3", "D D", "D")),
]
PATHS = [Argument(s, dtypes=ANY) for k in ("1 1", "3 3") for s in (f"D 3 {k}", "D", *("D", "D", f"D D {k}", "D") * 4)]

OPS = {
    "adaptive_conv": Op(
        {
            "source": Argument("B C . .", dtypes=FLOATS),
            "kernels": Argument("B 9 H W"),
            "bias": Argument("C", dtypes=ANY),
            "interpolation": "bicubic",
            "padding": "reflect",
            "channels_last": True,
        }
    ),
    "adaptive_conv_backward_source": Op(
        {
            "grad": Argument("B C H W", dtypes=FLOATS),
            "kernels": Argument("B 9 H W"),
            "in_size": [5, 6],
            "interpolation": "bicubic",
            "padding": "reflect",
            "channels_last": True,
        }
    ),
    "adaptive_conv_backward_kernels": Op(
        {
            "grad": Argument("B C H W"),
            "source": Argument("B C . ."),
            "taps": 9,
            "interpolation": "bicubic",
            "padding": "reflect",
            "kernels_dtype": "float32",
        }
    ),
    "bilateral_kernels": Op(
        {"guidance": Argument("B G H W", dtypes=FLOATS), **NETWORK, "radius": 1, "kernels_dtype": "float32"}, GUIDE
    ),
    "bilateral_kernels_backward": Op(
        {"grad": Argument("B 9 H W"), "guidance": Argument("B G H W", dtypes=FLOATS), **NETWORK, "radius": 1}, GUIDE
    ),
    "feature_unify": Op(
        {"features": Argument("B C . .", dtypes=FLOATS), "basis": Argument("M 1 3 3", dtypes=ANY), "released": True},
        {"M": 4},
    ),
    "feature_unify_backward": Op(
        {
            "grad": Argument("B M H W"),
            "features": Argument("B C H W"),
            "basis": Argument("M 1 3 3", dtypes=ANY),
            "released": False,
            "wanted": [True, True],
        },
        {"M": 4},
    ),
    "dense_attention": Op(
        {**{name: Argument("S T N D") for name in "qkv"}, "scale": 0.5}, {"S": 2, "T": 9, "N": 3, "D": 8}
    ),
    "gaussian_bilateral_upsample": Op(
        {"features": Argument("B C h w", dtypes=FLOATS), **GAUSSIANS, "channels_last": True}, CELLS
    ),
    "gaussian_bilateral_upsample_backward": Op(
        {
            "grad": Argument("B C H W", dtypes=FLOATS),
            "features": Argument("B C h w"),
            **GAUSSIANS,
            "wanted": [True] * 7,
        },
        CELLS,
    ),
    "gaussian_blur": Op(
        {"x": Argument(". . . .", dtypes=FLOATS), "sigma": 1.5, "border": "symmetric", "channels_last": False}
    ),
    "image_queries": Op(
        {
            "image": Argument("B 3 H W", dtypes=FLOATS),
            "parameters": QUERIES,
            "size": [9, 11],
            "region": [2, 3, 4, 5],
            "grids": [4, 5, 3, 3],
            "normalize": True,
        },
        {"D": 16},
    ),
    "image_rectangle": Op(
        {
            "image": Argument("B 3 H W", dtypes=FLOATS),
            "norms": Argument("B 12 2 D", positive),
            "parameters": QUERIES,
            "size": [9, 11],
            "region": [2, 3, 4, 5],
            "normalize": False,
        },
        {"D": 16},
    ),
    "image_statistics": Op(
        {
            "image": Argument("B 3 H W", dtypes=FLOATS),
            "parameters": QUERIES,
            "size": [9, 11],
            "grids": [4, 5, 3, 3],
            "normalize": True,
            "recompute": True,
        },
        {"D": 16},
    ),
    "image_to_patches": Op(
        {
            "images": Argument("B 3 H W", lambda shape: torch.randint(0, 256, shape, dtype=torch.uint8), FLOATS),
            "size": [8, 12],
            "patch_size": 4,
            "interpolation": "bilinear",
            "antialias": False,
            "gain": [1.0, 1.0, 1.0],
            "offset": [0.0, 0.0, 0.0],
            "channels_first": True,
            "row_size": 56,
            "dtype": "float32",
        }
    ),
    "joint_bilateral_upsample": Op(
        {
            "sources": maps(),
            "guidance": Argument("B G H W"),
            **NETWORK,
            "bias": Argument("C", dtypes=ANY),
            "span": [2, 5],
            "radius": 1,
            "interpolation": "bicubic",
            "channels_last": [True, False],
        },
        GUIDE,
    ),
    "k_center_greedy": Op(
        {
            "features": Argument(". .", dtypes=FLOATS),
            "start": Argument("S", lambda shape: torch.zeros(shape, dtype=torch.int64)),
            "count": 3,
        },
        {"S": 1},
    ),
    "naf_queries": Op(
        {
            "image": Argument("B 3 H W", dtypes=FLOATS),
            "parameters": PATHS,
            "rows": Argument("Y P"),
            "columns": Argument("X P"),
            "num_heads": 2,
            "grids": [4, 5, 3, 3],
        },
        {"D": 16, "P": 4, "X": 9, "Y": 11},
    ),
    "naf_rectangle": Op(
        {
            "image": Argument("B 3 H W", dtypes=FLOATS),
            "norms": Argument("B 8 2 D", positive),
            "parameters": PATHS,
            "rows": Argument("Y P"),
            "columns": Argument("X P"),
            "num_heads": 2,
            "region": [2, 3, 4, 5],
        },
        {"D": 16, "P": 4, "X": 11, "Y": 9},
    ),
    "naf_statistics": Op(
        {
            "image": Argument("B 3 H W", dtypes=FLOATS),
            "parameters": PATHS,
            "rows": Argument("Y P"),
            "columns": Argument("X P"),
            "num_heads": 2,
            "grids": [4, 5, 3, 3],
            "recompute": True,
        },
        {"D": 16, "P": 4, "X": 9, "Y": 11},
    ),
    "nearest_distance": Op(
        {
            "query": Argument(". D", dtypes=ANY),
            "bank": Argument("R D", dtypes=ANY),
            "index": [],
            "k": 2,
            "metric": "l2",
            "precision": "float32",
        },
        {"R": 20, "D": 5},
    ),
    "nearest_distance_cells": Op(
        {
            "query": Argument(". D", dtypes=FLOATS),
            "bank": Argument("R D", dtypes=FLOATS),
            "index": [
                Argument("D"),
                Argument("R", doubles),
                Argument("R W", lambda size: torch.randn(size).bfloat16()),
                *[Argument("N", doubles)] * 2,
            ],
            "cells": [
                Argument("R", lambda size: torch.arange(*size)),
                Argument("E", lambda size: torch.arange(size[0]) * 10),
                *(Argument(s, doubles) for s in ("N D", "N", "N N", "N N", "1")),
            ],
            "k": 2,
            "metric": "cosine",
        },
        {"R": 20, "D": 5, "N": 2, "E": 3, "W": 16},
    ),
    "resize": Op(
        {"x": Argument(". . . .", dtypes=FLOATS), "size": [H, W], **RULE, "scale_factor": None, "channels_last": True}
    ),
    "resize_out": Op({"x": Argument("B C . ."), **RULE, "scale_factor": None, "out": Argument("B C . .")}),
    "resize_adjoint": Op(
        {
            "grad": Argument(". . . .", dtypes=FLOATS),
            "in_size": [4, 5],
            **RULE,
            "scale_factor": None,
            "channels_last": True,
        }
    ),
    "resize_gram": Op(
        {"x": Argument(". . . .", dtypes=FLOATS), "size": [H, W], "interpolation": "bilinear", "antialias": False}
    ),
    "upsample_argmax": Op(
        {
            "features": maps(),
            "bias": Argument("B C", dtypes=ANY),
            "size": [H, W],
            **RULE,
            "return_values": True,
        }
    ),
    "upsample_confusion": Op(
        {
            "features": maps(),
            "bias": Argument("B C", dtypes=ANY),
            "target": Argument("B H W", labels, LABELS),
            **RULE,
            "ignore_index": -100,
        }
    ),
    "upsample_concat": Op(
        {"features": [Argument("B . . ."), Argument("B . . .")], "size": [H, W], **RULE, "channels_last": True}
    ),
    "upsample_concat_out": Op({"features": maps(), "size": [H, W], **RULE, "out": Argument("B T H W")}, {"T": 2 * C}),
    "upsample_cross_entropy": Op({**LOSS, **RULE, "ignore_index": -100, "label_smoothing": 0.1}),
    "upsample_cross_entropy_backward": Op(
        {
            "grad": Argument("B H W", dtypes=ANY),
            **LOSS,
            "lse": Argument("2 B H W"),
            **RULE,
            "ignore_index": -100,
            "label_smoothing": 0.1,
        }
    ),
    "upsample_expectation": Op(
        {
            "features": maps(),
            "bias": Argument("B C", dtypes=ANY),
            "values": Argument("C", dtypes=ANY),
            "size": [H, W],
            "softmax": True,
            **RULE,
        }
    ),
    "upsample_expectation_backward": Op(
        {
            "grad": Argument("B . .", dtypes=ANY),
            "features": maps(),
            "bias": Argument("B C", dtypes=ANY),
            "values": Argument("C", dtypes=ANY),
            "softmax": False,
            **RULE,
            "values_gradient": True,
        }
    ),
    "upsample_sum": Op(
        {"features": maps(), "bias": Argument("B C", dtypes=ANY), "size": [H, W], **RULE, "channels_last": False}
    ),
    "upsample_sum_out": Op(
        {
            "features": maps(),
            "bias": Argument("B C", dtypes=ANY),
            "size": [H, W],
            **RULE,
            "out": Argument("B C H W"),
        }
    ),
    "window_attention": Op({**ATTENTION, "return_lse": True}, HEADS),
    "window_attention_argmax": Op({**ATTENTION, "class_bias": Argument("B V", dtypes=ANY)}, HEADS),
    "window_attention_backward": Op(
        {
            "grad_out": Argument("B V H W"),
            "grad_lse": Argument("B N H W", dtypes=ANY),
            **ATTENTION,
            "wanted": [True] * 5,
        },
        HEADS,
    ),
}

# Other values of arguments that are no tensors, none of which is valid beside the rest of the call above.
WRONG = {
    "backend": ["cuda", "reference", ""],
    "border": ["zeros"],
    "channels_last": [[True], [True] * 3],  # of a list
    "columns": ["nonsense", "", "ratio", "neighborhood 9 1 9", "clamped -1", "given 0123"],
    "count": [0, -1, 99],
    "dtype": ["float64", "int8", ""],
    "gain": [[1.0], [1.0] * 4],
    "grids": [[0, 5], [4, -1], [4], [4, 5, 6]],
    "in_size": [[0, 6], [5, -1], [5], [5, 6, 7]],
    "index": [[torch.zeros(5)], [torch.zeros(5)] * 4, [torch.zeros(5)] * 5, [torch.zeros(5)] * 6],
    "interpolation": ["nonsense", "", "Bilinear"],
    "k": [0, -1, 21],
    "kernels_dtype": ["float64", "bfloat16", "int8", ""],
    "label_smoothing": [-0.1, 1.5, float("nan")],
    "max_radius": [0, -1, 33],
    "metric": ["L2", "", "manhattan"],
    "num_heads": [0, -2, 3, 16],
    "offset": [[0.0], [0.0] * 4],
    "padding": ["nonsense", "Reflect"],
    "patch_size": [0, -4, 9],
    "row_size": [0, -1, 47],
    "precision": ["float64", ""],
    "radius": [-1, 2, 9],
    "region": [[0, 0, 10, 1], [0, 11, 1, 1], [-1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1], [0, 0, 1, 1, 1]],
    "rows": ["nonsense", "", "ratio 1e-9", "neighborhood 10 1 1", "clamped 1", "given 0123"],
    "scale": [float("nan"), float("inf")],
    "scale_factor": [
        *([1.0], [0.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], [1.0, 1.0, 1.0]),
        *([1e-300, 1e-300], [1e300, 1e300], [1e-12, 1e-12], [0.1, 0.1]),  # of other sizes
    ],
    "sigma": [0.0, -1.0, float("nan"), float("inf"), 1e7],
    "size": [[0, 11], [9, -1], [9], [9, 11, 2]],
    "span": [[5, 5], [-1, 2], [2, 99], [2], [2, 3, 4]],
    "taps": [0, -9, 4, 8, 10, 16],
    "via": [[0, 4], [4, -1], [4], [4, 4, 4]],
    "wanted": [[True], [True] * 6],
}


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("murf_fast::") for n in names if n.startswith("murf_fast::")}


def call(name: str, arguments: dict[str, object], backend: str = "native"):
    schema = getattr(torch.ops.murf_fast, name).default._schema
    given = {**arguments, "backend": arguments.get("backend", backend)}
    assert given.keys() == {a.name for a in schema.arguments}, name
    return getattr(torch.ops.murf_fast, name)(*[given[a.name] for a in schema.arguments])


def made(name: str) -> dict[str, object]:
    torch.manual_seed(0)
    op = OPS[name]
    letters = {"B": B, "C": C, "H": H, "W": W, **op.letters}

    def value(x):
        if isinstance(x, list):
            return [value(entry) for entry in x]
        return x.make(sizes(letters, x.sizes)) if isinstance(x, Argument) else x

    return {key: value(x) for key, x in op.arguments.items()}


def wrong_tensors(x: Tensor, argument: Argument, tied: set[str], alone: bool) -> Iterator[tuple[str, Tensor]]:
    """A tensor in every way wrong: dtype, device (beside others), dimensions, and every size that is tied."""
    dtypes = {torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.complex64, torch.bool}
    own = {
        ANY: {torch.float64, torch.float16, torch.bfloat16, torch.float32},
        FLOATS: {*dtypes} - {torch.float64, torch.int32},
    }
    own[LABELS] = {torch.int32}
    allowed = {x.dtype} | {d for d in own.get(argument.dtypes, set()) if not d.is_complex and d != torch.bool}
    # Factors of dropout are multiplied: 0 and 1 are as good as numbers.
    allowed |= {torch.bool} if argument.sizes in ("B K", "B 9") else set()
    yield from ((f"dtype {d}", x.to(d)) for d in sorted(dtypes - allowed, key=str))
    if not alone:
        yield "device meta", x.to("meta")
    if argument.sizes not in ("K G", "K K", "9 P", "9 9", "D D"):
        yield "one dimension more", x[None]
    # (C,) is a bias, too, and (M, k, k) a basis.
    if x.ndim and argument.sizes not in ("B C", "B V", "M 1 3 3"):
        yield "one dimension less", x[0]
    for i, letter in enumerate(argument.sizes.split()):
        if letter.isdigit() or letter in tied:
            yield f"dimension {i} longer", torch.cat([x, x.narrow(i, 0, 1)], i)
            if x.shape[i] > 1:
                yield f"dimension {i} shorter", x.narrow(i, 0, x.shape[i] - 1)


def tensors_of(op: Op) -> list[Argument]:
    flat = [a for x in op.arguments.values() for a in (x if isinstance(x, list) else [x])]
    return [a for a in flat if isinstance(a, Argument)]


def tied_letters(op: Op) -> set[str]:
    """Letters of more than one place. A given size is another one of those of ``out``."""
    places = [letter for a in tensors_of(op) for letter in a.sizes.split()]
    if "out" in op.arguments and "size" in op.arguments:
        places += ["H", "W", "T"]
    return {letter for letter in places if places.count(letter) > 1 and letter != "."}


def wrong_calls(name: str) -> Iterator[tuple[str, dict[str, object]]]:
    op, tied, alone = OPS[name], tied_letters(OPS[name]), len(tensors_of(OPS[name])) == 1
    valid = made(name)
    for key, argument in op.arguments.items():
        if isinstance(argument, Argument):
            for what, wrong in wrong_tensors(valid[key], argument, tied, alone):
                yield f"{key}: {what}", {**valid, key: wrong}
        elif isinstance(argument, list) and argument and isinstance(argument[0], Argument):
            for i, entry in enumerate(argument):
                for what, wrong in wrong_tensors(valid[key][i], entry, tied, alone):
                    values = valid[key]
                    yield f"{key}[{i}]: {what}", {**valid, key: [*values[:i], wrong, *values[i + 1 :]]}
            yield f"{key}: empty", {**valid, key: []}
            if key in ("params", "parameters"):
                yield f"{key}: one less", {**valid, key: valid[key][:-1]}
                yield f"{key}: one more", {**valid, key: [*valid[key], torch.ones(())]}
        elif key in WRONG and not isinstance(argument, bool):
            for wrong in WRONG[key]:
                if wrong != argument:
                    yield f"{key}: {wrong!r:.60}", {**valid, key: wrong}
        else:
            assert isinstance(argument, bool) or key == "ignore_index", f"no wrong value of {name}'s `{key}` is known"
    for backend in WRONG["backend"]:
        yield f"backend: {backend}", {**valid, "backend": backend}
    if "target" in op.arguments:
        for label in (C, -1, 10**9, -(10**9), 2**62):
            target = valid["target"].clone()
            target[0, 0, 0] = label
            yield f"target: label {label}", {**valid, "target": target}
    if "out" in op.arguments:
        yield from wrong_outs(name)


def wrong_outs(name: str) -> Iterator[tuple[str, dict[str, object]]]:
    arguments = made(name)
    shape = arguments["out"].shape
    outs = {
        "expanded": torch.zeros(shape[0], 1, *shape[2:]).expand(shape),
        "one row for all": torch.zeros(shape[3]).expand(shape),
        "transposed": torch.zeros(*shape[:2], shape[3], shape[2]).mT,
        "every second column": torch.zeros(*shape[:3], 2 * shape[3])[..., ::2],
    }
    for what, out in outs.items():
        yield f"out: {what}", {**arguments, "out": out}
    whole = torch.zeros(8 * shape.numel())
    key = "features" if "features" in arguments else "x"
    first = arguments[key][0] if key == "features" else arguments[key]
    inside = whole[: first.numel()].view_as(first)
    value = [inside, *arguments[key][1:]] if key == "features" else inside
    for offset in (0, first.numel() - 1):
        out = whole[offset : offset + shape.numel()].view(shape)
        yield f"out: overlaps an input from {offset} on", {**arguments, key: value, "out": out}


def test_every_op_is_here():
    assert registered() == OPS.keys()


@pytest.mark.parametrize("name", sorted(OPS))
def test_valid_call(name):
    arguments = made(name)
    results = call(name, arguments)
    results = [results] if isinstance(results, Tensor) else [arguments["out"]] if results is None else results
    for result in results:
        assert result.is_cpu
        assert not result.is_floating_point() or bool(result.isfinite().all())


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", sorted(OPS))
def test_wrong_calls_are_refused(name, backend, monkeypatch):
    if backend == "triton" and triton_problems():
        pytest.skip("; ".join(triton_problems()))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    accepted, count = [], 0
    for what, arguments in wrong_calls(name):
        if backend == "triton" and name == "upsample_cross_entropy_backward" and what.startswith("target: label"):
            continue  # NaN, as where looking at them would stall the stream
        count += 1
        try:
            call(name, arguments, backend)
            accepted.append(what)
        except NotImplementedError as error:
            # Without any tensor the dispatcher finds nobody to ask.
            if not what.endswith("empty"):
                accepted.append(f"{what}: {error}")
        except REFUSED as error:
            if not str(error).startswith("murf_fast"):
                accepted.append(f"{what}: in no words of this library: {error}")
        except Exception as error:
            accepted.append(f"{what}: {type(error).__name__}: {error}")
    assert not accepted, "\n".join(accepted)
    assert count > 10


@pytest.mark.parametrize("name", sorted(OPS))
def test_backends_are_refused_where_they_cannot_run(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="triton"):
        call(name, made(name), "triton")


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_prepared_index(precision, cosine):
    bank, query = torch.randn(20, 5), torch.randn(7, 5)
    index = murf_fast.NearestIndex(bank, cosine=cosine, precision=precision).tensors
    metric = "cosine" if cosine else "l2"

    def search(tensors, metric=metric):
        return torch.ops.murf_fast.nearest_distance(query, bank, tensors, 2, metric, precision, "native")

    expected = search([])
    for actual, wanted in zip(search(index), expected, strict=True):
        assert torch.equal(actual, wanted)
    for other in {"l2", "cosine"} - {metric}:
        with pytest.raises(REFUSED):
            search(index, other)
    for i, x in enumerate(index):
        wrong = [x.to("meta"), x.to(torch.int32), torch.cat([x, x]) if len(x) else x.new_zeros(3, *x.shape[1:])]
        wrong += [x[:-1]] if len(x) else []
        for tensor in wrong:
            with pytest.raises(REFUSED):
                search([*index[:i], tensor, *index[i + 1 :]])


def test_a_bank_without_memory_is_refused():
    """What does not pass a registered op: preparing a bank, and a selection in pieces."""
    with FakeTensorMode(), pytest.raises(ValueError, match="without memory"):
        murf_fast.NearestIndex(torch.empty(5, 4))
    with FakeTensorMode(), pytest.raises(Exception, match=r"without memory|_local_scalar_dense"):
        murf_fast.k_center_greedy(torch.empty(5, 4), count=2, progress=lambda *_: None)
    with pytest.raises(REFUSED):
        murf_fast.NearestIndex(torch.empty(5, 4, device="meta"))


def test_a_negative_bit_is_resolved():
    bank, query = torch.randn(20, 5), torch.randn(7, 5)
    expected = murf_fast.nearest_distance(query, bank, k=3)
    chosen = murf_fast.k_center_greedy(bank, count=5)
    for other in (torch._neg_view(-bank), torch.complex(bank, -bank).conj().imag):
        assert other.is_neg()
        for actual in (
            murf_fast.nearest_distance(query, other, k=3),
            murf_fast.nearest_distance(query, murf_fast.NearestIndex(other), k=3),
            murf_fast.nearest_distance(torch._neg_view(-query), bank, k=3),
        ):
            assert torch.equal(actual[0], expected[0])
            assert torch.equal(actual[1], expected[1])
        for options in ({}, {"progress": lambda *_: None}):
            assert torch.equal(murf_fast.k_center_greedy(other, count=5, **options), chosen)


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_is_named(batch):
    features = [torch.randn(2, C, 3, 4), torch.randn(batch, C, 5, 5)]
    with pytest.raises(ValueError, match=r"features\[1\].*batch"):
        call("upsample_concat", {**made("upsample_concat"), "features": features})


@pytest.mark.parametrize("name", sorted(n for n in OPS if "out" not in OPS[n].arguments))
def test_meta_tensors_give_meta_results(name):
    def to_meta(x):
        if isinstance(x, list):
            return [to_meta(entry) for entry in x]
        return x.to("meta") if isinstance(x, Tensor) else x

    results = call(name, {key: to_meta(x) for key, x in made(name).items()})
    assert all(r.is_meta for r in ([results] if isinstance(results, Tensor) else results))


if __name__ == "__main__":
    SCHEMAS.write_text("".join(f"{schema}\n" for schema in schemas()))
