"""The encoder of a detector, for images that may be smaller than a patch."""

from __future__ import annotations

from murf_fast.nn import MultiResolutionEncoder


class PatchAtLeast(MultiResolutionEncoder):
    """An encoder at scales that enlarges an image to one patch where a scale would leave less of it, per axis."""

    def sizes_for(self, height: int, width: int) -> list[tuple[int, int]]:
        patch = self.family.patch_size
        return [(max(patch, h), max(patch, w)) for h, w in super().sizes_for(height, width)]
