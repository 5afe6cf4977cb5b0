"""Images of mixed sizes: which of them share a pass, and where their sequences lie in its buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from murf_fast.nn.vit.families._family import Rotation
from murf_fast.ops.patch_embed import Block, PackedTokens

Grid = tuple[int, int]


def passes(grids: Sequence[Sequence[Grid]], budget: int) -> Iterator[list[int]]:
    """Indices of the images of every pass: neighbours in size, of at most ``budget`` patches together.

    ``grids``: per image those of all its sequences, as sequences of one grid attend together. An image of more patches
    than that is a pass of its own.
    """
    counts = [sum(rows * columns for rows, columns in its) for its in grids]
    group: list[int] = []
    total = 0
    for i in sorted(range(len(grids)), key=lambda i: (counts[i], grids[i])):
        if group and total + counts[i] > budget:
            yield group
            group, total = [], 0
        group.append(i)
        total += counts[i]
    yield group


@dataclass(frozen=True)
class ByGrid:
    """Sequences of several images, those of one grid behind each other whichever image they are of.

    Attributes:
        packed: One block for every grid, of all its sequences.
        rotations: Those of its grids.
        blocks: The resolutions of all images, image by image: rows of ``packed.tokens``.
    """

    packed: PackedTokens
    rotations: list[Rotation | None]
    blocks: list[Block]

    @classmethod
    def of(cls, packed: PackedTokens, rotations: Sequence[Rotation | None]) -> ByGrid:
        """From tokens in the order of the images: one copy of them."""
        prefix, old = packed.prefix, packed.blocks
        order = sorted(range(len(old)), key=lambda i: (old[i].length(prefix), old[i].grid))
        moved, start = list(old), 0
        merged: list[Block] = []
        its_rotations: list[Rotation | None] = []
        for i in order:
            block = moved[i] = replace(old[i], start=start)
            if merged and merged[-1].grid == block.grid:
                merged[-1] = replace(merged[-1], batch=merged[-1].batch + block.sequences)
            else:
                merged.append(Block(start, block.sequences, block.grid))
                its_rotations.append(rotations[i])
            start += block.sequences * block.length(prefix)
        rows = [packed.tokens[_rows(old[i], prefix)] for i in order]
        return cls(PackedTokens(torch.cat(rows), tuple(merged), prefix), its_rotations, moved)

    def image(self, i: int, resolutions: int, values: Tensor) -> PackedTokens:
        """The sequences of image ``i`` alone, in order of its resolutions, from ``values`` (T, ...): a copy."""
        prefix, blocks, start = self.packed.prefix, [], 0
        its_blocks = self.blocks[i * resolutions : (i + 1) * resolutions]
        for block in its_blocks:
            blocks.append(replace(block, start=start))
            start += block.sequences * block.length(prefix)
        return PackedTokens(torch.cat([values[_rows(b, prefix)] for b in its_blocks]), tuple(blocks), prefix)


def _rows(block: Block, prefix: int) -> slice:
    return slice(block.start, block.start + block.sequences * block.length(prefix))
