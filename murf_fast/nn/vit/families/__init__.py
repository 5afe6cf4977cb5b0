"""The vision transformers that a packed pass knows, a file for each family; which one a model belongs to."""

from __future__ import annotations

from torch import nn

from murf_fast.nn.vit.families import dinov2, dinov3, hub, siglip
from murf_fast.nn.vit.families._family import Family

SUPPORTED = (
    "transformers Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, SiglipVisionModel and Siglip2VisionModel, and "
    "the VisionTransformer of the DINO and DINOv2 hubs and of timm"
)
# By the name of the model's class.
FAMILIES = {
    **dict.fromkeys(dinov2.MODELS, dinov2.HuggingFaceDinov2),
    **dict.fromkeys(dinov3.MODELS, dinov3.HuggingFaceDinov3),
    **dict.fromkeys(siglip.MODELS, siglip.HuggingFaceSiglip),
    **dict.fromkeys(hub.MODELS, hub.Hub),
}


def family_of(model: nn.Module) -> type[Family]:
    """The family of a model.

    Raises:
        TypeError: It is none of the supported ones; the message says what it lacks.
    """
    kind, reason = _family_class(model)
    if kind is None:
        reason = f": {reason}" if reason else ""
        raise TypeError(
            f"murf_fast.MultiResolutionEncoder: `model` must be one of {SUPPORTED}, got {type(model).__name__}{reason}"
        )
    return kind


def is_supported(model: nn.Module) -> bool:
    return _family_class(model)[0] is not None


def _family_class(model: nn.Module) -> tuple[type[Family] | None, str]:
    """The family, or None and what is in its way."""
    kinds = type(model).__mro__
    # A class that torch derives from a model's (for a parametrization, say) has the model's forward.
    kind = next((k for k in kinds if k.__name__ in FAMILIES and k.forward is kinds[0].forward), None)
    if kind is None:
        return None, ""
    family = FAMILIES[kind.__name__]
    reason = hub.reason_against(model) if family is hub.Hub else ""
    return (None, reason) if reason else (family, "")
