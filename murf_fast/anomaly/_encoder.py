"""The encoder of a detector: how images are normalized, and images that may be smaller than a patch."""

from __future__ import annotations

from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit._pretrained import normalization_of as normalization_of
from murf_fast.scales import scaled_pixels


class PatchAtLeast(MultiResolutionEncoder):
    """An encoder at scales that enlarges an image to one patch where a scale would leave less of it, per axis."""

    def sizes_for(self, height: int, width: int) -> list[tuple[int, int]]:
        patch = self.family.patch_size
        return [
            (
                max(patch, scaled_pixels(scale, height) // patch * patch),
                max(patch, scaled_pixels(scale, width) // patch * patch),
            )
            for scale in self.scales or ()
        ]
