"""Every public op on small tensors, for tests of what all ops have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import murf_fast as mf

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """An op's tensors for maps of about ``n`` pixels a side, and its call; sizes follow from the tensors.

    main: Tensors of one dtype, which decides that of the result. companions: those that may have another.
    constants: Floating-point tensors that have no gradient.
    """

    name: str
    make: Callable[[int, int], Tensors]
    call: Callable[..., Tensor]
    main: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    linear: bool = False  # forward mode exists
    differentiable: bool = True
    large: tuple[str, ...] = ()
    products: bool = False  # dense products, which round in the dtype of their operands

    def __str__(self) -> str:
        return self.name

    def tensors(self, n: int = 4, batch: int = 2, seed: int = 0) -> Tensors:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(n, batch)

    def variables(self, tensors: Tensors) -> list[str]:
        """Names of what can have a derivative."""
        return [name for name, t in tensors.items() if t.is_floating_point() and name not in self.constants]


def r(*shape: int) -> Tensor:
    return torch.randn(shape)


def grown(x: Tensor) -> tuple[int, int]:
    return 2 * x.shape[2] + 1, 2 * x.shape[3] - 1


def maps(n: int, b: int) -> Tensors:
    return {"a": r(b, 3, n, n + 1), "c": r(b, 3, n + 2, n)}


def expectation(norm: str) -> Op:
    return Op(
        f"upsample_expectation[{norm}]",
        lambda n, b: maps(n, b) | {"bias": r(3), "values": r(3)},
        lambda t, **k: mf.upsample_expectation(
            [t["a"], t["c"]], grown(t["a"]), t["values"], bias=t["bias"], norm=norm, **k
        ),
        ("a", "c"),
        ("bias", "values"),
    )


def cross_entropy() -> Op:
    return Op(
        "upsample_cross_entropy",
        lambda n, b: (
            maps(n, b) | {"bias": r(b, 3), "weight": torch.rand(3) + 0.5, "target": torch.randint(0, 3, (b, 2 * n, 5))}
        ),
        lambda t, **k: mf.upsample_cross_entropy(
            [t["a"], t["c"]], t["target"], bias=t["bias"], weight=t["weight"], reduction="sum", **k
        ),
        ("a", "c"),
        ("bias", "weight"),
        ("weight",),
    )


def bilateral(n: int, b: int) -> Tensors:
    shapes = {"range_weight0": (4, 3), "range_bias0": (4,), "range_weight1": (4, 4), "range_bias1": (4,)}
    shapes |= {"fixup_weight0": (9, 12), "fixup_bias0": (9,), "fixup_weight1": (9, 9), "fixup_bias1": (9,)}
    params = {"range_temp": torch.tensor(0.3), "sigma_spatial": torch.tensor(0.7)}
    params |= {name: r(*shape) for name, shape in shapes.items()}
    return params | {"range_mask": torch.rand(b, 4), "fixup_mask": torch.rand(b, 9), "guidance": r(b, 3, 2 * n, n + 3)}


PARAMS = mf.BilateralParams._fields
MASKS = ("range_mask", "fixup_mask")


def params_of(t: Tensors) -> dict:
    params = mf.BilateralParams(**{name: t[name] for name in PARAMS})
    return {"params": params, "radius": 1, "range_mask": t["range_mask"], "fixup_mask": t["fixup_mask"]}


def embedded(n: int, b: int) -> Tensors:
    return {
        "images": torch.rand(b, 3, 4 * n, 4 * n),
        "weight": r(5, 12),
        "bias": r(5),
        "pos_embed": r(10, 5),
        "prefix": r(1, 5),
    }


def embed(t: Tensors, **k) -> Tensor:
    return mf.patch_embed(
        t["images"],
        [tuple(t["images"].shape[2:])],
        t["weight"],
        t["bias"],
        t["pos_embed"],
        patch_size=2,
        flavor="timm",
        num_prefix_tokens=1,
        prefix=t["prefix"],
        **k,
    ).tokens


OPS = (
    Op("resize", lambda n, b: {"x": r(b, 3, n, n + 1)}, lambda t, **k: mf.resize(t["x"], grown(t["x"]), **k), ("x",),
       linear=True),
    Op("upsample_concat", maps, lambda t, **k: mf.upsample_concat([t["a"], t["c"]], grown(t["a"]), **k), ("a", "c"),
       linear=True),
    Op("upsample_sum", lambda n, b: maps(n, b) | {"bias": r(b, 3)},
       lambda t, **k: mf.upsample_sum([t["a"], t["c"]], grown(t["a"]), bias=t["bias"], mode="bicubic", **k),
       ("a", "c"), ("bias",), linear=True),
    Op("upsample_mean", lambda n, b: maps(n, b) | {"weights": torch.tensor([3.0, -2.0])},
       lambda t, **k: mf.upsample_mean([t["a"], t["c"]], grown(t["a"]), t["weights"], **k),
       ("a", "c"), ("weights",), linear=True),
    Op("upsample_argmax", lambda n, b: maps(n, b) | {"bias": r(3)},
       lambda t, **k: mf.upsample_argmax([t["a"], t["c"]], grown(t["a"]), bias=t["bias"], **k),
       ("a", "c"), ("bias",), differentiable=False),
    Op("upsample_confusion", lambda n, b: maps(n, b) | {"bias": r(3), "target": torch.randint(0, 3, (b, 2 * n, 5))},
       lambda t, **k: mf.upsample_confusion([t["a"], t["c"]], t["target"], bias=t["bias"], **k),
       ("a", "c"), ("bias",), differentiable=False),
    cross_entropy(),
    expectation("softmax"),
    expectation("linear"),
    Op("linear_head", lambda n, b: maps(n, b) | {"weight": r(4, 8), "bias": r(4), "cls": r(b, 2)},
       lambda t, **k: mf.linear_head([t["a"], t["c"]], t["weight"], t["bias"], size=grown(t["a"]),
                                     cls=[t["cls"], None], **k),
       ("a", "c", "weight", "cls"), ("bias",), linear=True, products=True),
    Op("adaptive_conv", lambda n, b: {"source": r(b, 3, n, n + 1), "kernels": r(b, 9, 2 * n, n + 3), "bias": r(3)},
       lambda t, **k: mf.adaptive_conv(t["source"], t["kernels"], bias=t["bias"], **k),
       ("source",), ("kernels", "bias"), linear=True, large=("kernels",)),
    Op("bilateral_kernels", bilateral, lambda t, **k: mf.bilateral_kernels(t["guidance"], **params_of(t), **k),
       ("guidance",), (*PARAMS, *MASKS), MASKS),
    Op("joint_bilateral_upsample", lambda n, b: bilateral(n, b) | {"source": r(b, 5, n, n), "bias": r(5)},
       lambda t, **k: mf.joint_bilateral_upsample(t["source"], t["guidance"], bias=t["bias"], **params_of(t), **k),
       ("source",), ("guidance", "bias", *PARAMS, *MASKS), MASKS,
       large=("guidance",)),
    Op("feature_unify", lambda n, b: {"features": r(b, 3, n, n + 1), "basis": r(2, 1, 3, 3)},
       lambda t, **k: mf.feature_unify(t["features"], t["basis"], **k), ("features",), ("basis",)),
    Op("window_attention",
       lambda n, b: {"q": r(b, 4, n, n + 1), "k": r(b, 4, 3, 2), "v": r(b, 6, 3, 2), "rows": r(2, n, 3),
                     "columns": r(2, n + 1, 2)},
       lambda t, **k: mf.window_attention(t["q"], t["k"], t["v"], windows=mf.windows.full(), num_heads=2,
                                          bias=(t["rows"], t["columns"]), **k),
       ("q", "k", "v"), ("rows", "columns")),
    Op("window_attention_argmax",
       lambda n, b: {"q": r(b, 4, n, n + 1), "k": r(b, 4, 3, 2), "v": r(b, 6, 3, 2), "rows": r(2, n, 3),
                     "columns": r(2, n + 1, 2), "class_bias": r(6)},
       lambda t, **k: mf.window_attention_argmax(t["q"], t["k"], t["v"], windows=mf.windows.full(), num_heads=2,
                                                 bias=(t["rows"], t["columns"]), class_bias=t["class_bias"], **k),
       ("q", "k", "v"), ("rows", "columns", "class_bias"), differentiable=False),
    Op("neighborhood_attention",
       lambda n, b: {"q": r(b, n, n + 1, 2, 3), "k": r(b, n, n + 1, 2, 3), "v": r(b, n, n + 1, 2, 5), "rows": r(2),
                     "columns": r(2)},
       lambda t, **k: mf.neighborhood_attention(t["q"], t["k"], t["v"], kernel_size=3,
                                                bias=(t["rows"], t["columns"]), **k),
       ("q", "k", "v"), ("rows", "columns")),
    Op("gaussian_bilateral_upsample",
       lambda n, b: {"features": r(b, 5, n, 3), "guidance": r(b, 3, 2 * n, n + 3), "low_guidance": r(b, 3, n, 3)}
       | {name: torch.rand(b, 1, n, 3) + 0.5 for name in ("sigma_x", "sigma_y", "theta", "sigma_r")},
       lambda t, **k: mf.gaussian_bilateral_upsample(**t, radius=2, reach=1.3, **k), ("features",),
       ("guidance", "low_guidance", "sigma_x", "sigma_y", "theta", "sigma_r"), large=("guidance", "low_guidance")),
    Op("gaussian_blur", lambda n, b: {"x": r(b, 1, n, n + 1)}, lambda t, **k: mf.gaussian_blur(t["x"], 1.0, **k),
       ("x",), linear=True, differentiable=False),
    Op("image_to_patches", lambda n, b: {"images": torch.rand(b, 3, n, n + 1)},
       lambda t, **k: mf.image_to_patches(t["images"], [grown(t["images"])], 2, mean=(0.1, 0.2, 0.3), **k)[0],
       ("images",), linear=True, differentiable=False),
    Op("patch_embed", embedded, embed, ("weight",), ("images", "bias", "pos_embed", "prefix"), ("images",),
       products=True),
    Op("resample_pos_embed", lambda n, b: {"pos_embed": r(1 + n * n, 3)},
       lambda t, **k: mf.resample_pos_embed(t["pos_embed"], (5, 7), flavor="timm", num_prefix_tokens=1, **k),
       ("pos_embed",), linear=True),
    Op("nearest_distance", lambda n, b: {"query": r(b * n, 3), "bank": r(7, 3)},
       lambda t, **k: mf.nearest_distance(t["query"], t["bank"], **k)[0], ("query",), ("bank",),
       differentiable=False),
    Op("k_center_greedy", lambda n, b: {"features": r(7, 3), "projection": r(2, 3)},
       lambda t, **k: mf.k_center_greedy(t["features"], count=5, projection=t["projection"], **k),
       ("features",), ("projection",), differentiable=False),
)  # fmt: skip
