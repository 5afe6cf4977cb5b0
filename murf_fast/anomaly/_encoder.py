"""The encoder of a detector: how images are normalized, and images that may be smaller than a patch."""

from __future__ import annotations

from torch import nn

from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit.families import resolved
from murf_fast.scales import scaled_pixels

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
NONE = {"mean": None, "std": None}


def normalization_of(model: nn.Module) -> dict[str, tuple[float, float, float] | None]:
    """``mean`` and ``std`` that a family's models were trained with; timm's models say their own.

    ViTModel of transformers is taken as DINO's, whose are ImageNet's.
    """
    inner, family = resolved(model)
    kind = family(inner).kind
    if kind.normalizes:
        return dict(NONE)
    own = getattr(inner, "pretrained_cfg", None) or {}
    if "mean" in own and "std" in own:
        return {"mean": tuple(own["mean"]), "std": tuple(own["std"])}
    if kind.name.startswith("SigLIP"):
        return dict(HALF)
    return dict(OPENAI if kind.name.startswith("CLIP") else IMAGENET)


class PatchAtLeast(MultiResolutionEncoder):
    """An encoder at scales that enlarges an image to one patch where a scale would leave less of it, per axis."""

    def sizes_for(self, height: int, width: int) -> list[tuple[int, int]]:
        patch = self.family.patch_size
        return [
            tuple(max(patch, scaled_pixels(scale, n) // patch * patch) for n in (height, width))
            for scale in self.scales
        ]
