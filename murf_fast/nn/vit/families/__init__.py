"""The vision transformers that a packed pass knows; which of them a model is.

A family is one entry of the tables in ``huggingface`` and ``hub``: a :class:`Layout` that says where its parts are.
"""

from __future__ import annotations

import functools
import itertools

from torch import nn

from murf_fast.nn.vit.families import hub, huggingface
from murf_fast.nn.vit.families._family import Family, Make
from murf_fast.nn.vit.families._layout import Layout
from murf_fast.nn.vit.families._transformers import Transformers
from murf_fast.nn.vit.families._wrappers import check_wrapper, hint, unwrapped

LAYOUTS = (*huggingface.LAYOUTS, *hub.LAYOUTS)
SUPPORTED = "; ".join(layout.name for layout in LAYOUTS)
HOLDERS = dict(itertools.chain.from_iterable(layout.holders for layout in LAYOUTS))

_WINDOWS = "its blocks attend in windows, with relative positions added to the scores"
# Vision transformers that are asked for and have no packed pass, by the name of the class.
REFUSED = {
    **dict.fromkeys(("ImageEncoderViT", "SamVisionEncoder", "SamVisionModel", "SamHQVisionEncoder"), _WINDOWS),
    **dict.fromkeys(("VitDetModel", "VitDetBackbone"), _WINDOWS),
    **dict.fromkeys(("SwinModel", "Swinv2Model", "SwinTransformer", "SwinTransformerV2"), _WINDOWS),
    **dict.fromkeys(("Hiera", "HieraModel", "Sam2VisionModel"), "its blocks pool their tokens"),
    **dict.fromkeys(("Beit", "BeitModel", "Data2VecVisionModel"), "its scores have relative positions added"),
    "FullyShardedDataParallel": "its parameters are sharded; shard the encoder, not the model in it",
    "RADIOModel": "its `patch_generator` makes the tokens; C-RADIO is taken as RadioModel of transformers",
    "ViTMAEModel": "it drops patches at random in every call; ViTModel.from_pretrained takes its weights",
}


def resolved(model: nn.Module) -> tuple[nn.Module, Make]:
    """The vision transformer in a model, and what makes a view of it by its family.

    Raises:
        TypeError: It is none of the supported ones; the message says what it lacks, or where in it one is.
        ValueError: A wrapper must not be left out.
    """
    inner = unwrapped(model, HOLDERS) if isinstance(model, nn.Module) else model
    layout, reason = _layout_of(inner)
    if layout is None:
        is_known = any(kind.__name__ in REFUSED for kind in type(inner).__mro__)
        where = hint(inner, is_supported) if isinstance(inner, nn.Module) and not is_known else ""
        name = type(inner).__name__
        name = name if inner is model else f"{name} in {type(model).__name__}"
        raise TypeError(
            f"murf_fast.MultiResolutionEncoder: `model` must be a vision transformer of a known family, got {name}: "
            f"{reason}{where}. Known are: {SUPPORTED}"
        )
    check_wrapper(model)
    return inner, functools.partial(hub.Hub if layout in hub.LAYOUTS else Transformers, layout=layout)


def is_supported(model: nn.Module) -> bool:
    """Whether a model is of a known family, or holds one that is."""
    return _layout_of(unwrapped(model, HOLDERS))[0] is not None


def _layout_of(model: nn.Module) -> tuple[Layout | None, str]:
    """The family of a model, or None and what is in its way."""
    kinds = type(model).__mro__
    names = [k.__name__ for k in kinds if getattr(k, "forward", None) is getattr(kinds[0], "forward", None)]
    refused = next((REFUSED[k.__name__] for k in kinds if k.__name__ in REFUSED), "")
    if refused:
        return None, refused
    # A class that torch derives from a model's (for a parametrization, say) has the model's forward.
    named = [layout for name in names for layout in LAYOUTS if name in layout.models]
    reasons = []
    for layout in named:
        missing = layout.missing(model)
        reason = f"it has no `{missing[0]}`" if missing else ""
        if not reason and layout in hub.LAYOUTS:
            reason = hub.reason_against(model, layout)
        if not reason:
            return layout, ""
        reasons.append(f"to be {layout.name} {reason}")
    if reasons:
        return None, "; ".join(reasons)
    inherited = next((k.__name__ for k in kinds for layout in LAYOUTS if k.__name__ in layout.models), "")
    if inherited:
        return None, f"it is a {inherited} with a `forward` of its own, which a packed pass would not call"
    return None, _nearest(model)


def _nearest(model: nn.Module) -> str:
    """What a model of an unknown class has of the families' parts."""
    candidates = [layout for layout in LAYOUTS if layout.blocks not in layout.missing(model)]
    if not candidates:
        return "no family has a class of this name, nor a list of blocks where it has one"
    layout = min(candidates, key=lambda layout: len(layout.missing(model)) / len(layout.required))
    missing = layout.missing(model)
    lacks = f"of which it lacks `{'`, `'.join(missing)}`" if missing else "whose parts it has: derive its class from it"
    return f"no family has a class of this name; the nearest is {layout.name}, {lacks}"


__all__ = ["LAYOUTS", "SUPPORTED", "Family", "is_supported", "resolved"]
