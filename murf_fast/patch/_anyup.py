"""AnyUp, run by this library."""

from __future__ import annotations

import importlib
import importlib.util
import types
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from murf_fast.nn._parts import is_as_written
from murf_fast.nn.guided._anyup_checkpoint import canonical, lacks_output_projection, with_output_projection
from murf_fast.nn.guided._anyup_forward import upsample, window_rule
from murf_fast.nn.guided._image_range import imagenet_normalized
from murf_fast.nn.guided.anyup import check_features, check_image
from murf_fast.patch._attention_colors import oklab_plane, show
from murf_fast.patch._block_mask import windows_of
from murf_fast.patch._replacements import replace

_MODEL = "anyup.model"
_original = "_forward_without_murf_fast"
# What a module of AnyUp's has beside the model. The attention of Falcon Perception's splits the values over the heads.
_CLASSES, _SPLIT = ("AnyUp", "ResBlock", "LearnedFeatureUnification"), "FlexCrossAttention"


def anyup(module: types.ModuleType | None = None) -> None:
    """Replaces ``AnyUp.forward`` of the installed package ``anyup`` (or of its clone by torch.hub); see ``unpatch``.

    Models that exist already are affected, too; weights stay where they are, and the windows are those the model was
    made with: the dense rule, or with ``use_natten=True`` NATTEN's (also where natten is installed). ``q_chunk_size``
    has no use any more and no effect. ``vis_attn=True`` shows the original's picture (matplotlib), made without the
    matrix of weights; as there, not of models with NATTEN's windows, which warn. Models with hooks, parametrizations or
    replaced parts still take the original's way, as do replicas of ``nn.DataParallel``. Calling it again changes
    nothing.

    Args:
        module: Another module that holds AnyUp's classes under their names (``AnyUp``, ``ResBlock``,
            ``LearnedFeatureUnification``), of whatever package: a copy, or ``falcon_perception.anyup``. A module with
            ``FlexCrossAttention`` is one of the latter kind: heads share out the channels, images are in -1..1, and
            ``attn_mask`` tells the windows, if it is what ``build_upsampler_block_mask`` makes; with any other mask
            the original's way is taken. A model that was compiled before keeps what it was compiled to. None: the
            package ``anyup``.

    Raises:
        ModuleNotFoundError: There is no package ``anyup``, and no module is given.
        TypeError, ValueError: ``module`` is none, or lacks a class; the message names it.

    Memory: as :meth:`murf_fast.nn.AnyUp.forward`.

    Source: github.com/wimmerth/anyup; github.com/tiiuae/Falcon-Perception.
    """
    module = _installed() if module is None else _checked(module)
    model = module.AnyUp
    if getattr(model.forward, "__module__", None) == __name__:
        return
    own = (module.__name__.partition(".")[0], model.__module__.partition(".")[0], "natten")
    make = _split_forward if hasattr(module, _SPLIT) else _forward
    replace(model, _original, model.forward)
    replace(model, "forward", make(own))


def _installed() -> types.ModuleType:
    if importlib.util.find_spec("anyup") is None:
        raise ModuleNotFoundError("murf_fast.patch.anyup: the package anyup is not installed", name="anyup")
    return importlib.import_module(_MODEL)


def _checked(module: object) -> types.ModuleType:
    if not isinstance(module, types.ModuleType):
        raise TypeError(f"murf_fast.patch.anyup: `module` must be a module, got {type(module).__name__}")
    missing = [name for name in _CLASSES if not isinstance(getattr(module, name, None), type)]
    if missing:
        raise ValueError(
            f"murf_fast.patch.anyup: `module` must hold the classes {', '.join(_CLASSES)}; {module.__name__} lacks "
            f"{', '.join(missing)}"
        )
    return module


def _forward(packages: tuple[str, ...]) -> Callable[..., Any]:
    def forward(
        self: Any,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int] | None = None,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
    ) -> Tensor:
        given = _weights(self, packages)
        if given is None:
            return getattr(self, _original)(image, features, output_size, vis_attn=vis_attn, q_chunk_size=q_chunk_size)
        weights = canonical(given)
        size = _size(self, image, features, output_size, weights)
        name = "dense" if weights.keys() == given.keys() else "natten"
        rule = window_rule(name, self.window_ratio, size, features.shape[2:])
        heads = _heads(self.cross_decode.cross_attn)
        if vis_attn and name == "natten":
            warnings.warn("murf_fast.patch.anyup: `vis_attn` shows nothing for NATTEN's windows", stacklevel=3)
        elif vis_attn:
            colors = oklab_plane(features.shape[2:]).to(image)
            first = (image[:1], features[:1])
            show(colors, upsample(weights, *first, size, rule, heads, values=colors[None])[0])
        return upsample(weights, image, features, size, rule, heads)

    return forward


def _split_forward(packages: tuple[str, ...]) -> Callable[..., Any]:
    def forward(
        self: Any,
        images: Tensor,
        features: Tensor,
        attn_mask: object,
        output_size: tuple[int, int] | None = None,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
    ) -> Tensor:
        given = _weights(self, packages)
        grid, size = tuple(features.shape[2:]), tuple(images.shape[2:] if output_size is None else output_size)
        rule = None if given is None else windows_of(attn_mask, size, grid)
        if given is None or rule is None or not lacks_output_projection(given):
            return getattr(self, _original)(
                images, features, attn_mask, output_size, vis_attn=vis_attn, q_chunk_size=q_chunk_size
            )
        weights = with_output_projection(given)
        heads = self.cross_decode.cross_attn.num_head
        image = imagenet_normalized(images, (-1, 1)).to(features.dtype)
        size = _size(self, image, features, size, weights)
        if features.shape[1] % heads:
            raise ValueError(
                f"murf_fast.AnyUp: `features` must have a multiple of {heads} channels, got {features.shape[1]}"
            )
        return upsample(weights, image, features, size, rule, heads, by_head="split")

    return forward


def _weights(model: nn.Module, packages: tuple[str, ...]) -> dict[str, Tensor] | None:
    """Its parameters; None if more than those has a say."""
    given: dict[str, Tensor] = dict(model.named_parameters())
    return given if "rope.freqs" in given and is_as_written(model, packages) else None


def _size(model: Any, image: Tensor, features: Tensor, output_size: Any, weights: Any) -> tuple[int, int]:
    """The output's, of arguments that fit."""
    output_size = None if output_size is None else tuple(output_size)
    size = check_image(image, output_size, weights["rope.freqs"], model.image_encoder[0].in_channels)
    check_features(features, image)
    return size


def _heads(attention: Any) -> int:
    inner = getattr(attention, "attention", attention)
    return inner.num_heads
