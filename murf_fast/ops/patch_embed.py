"""Images to the tokens of a ViT at several resolutions, packed in one buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast import reference
from murf_fast.annotations import Backend, Keep, Layout, Mode, PositionFlavor, Remainder, Size, Sizes
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import writes_nothing
from murf_fast.ops.image_to_patches import image_to_patches, padded_patches
from murf_fast.ops.resample_pos_embed import resample_pos_embed

REMAINDERS = ("raise", "drop")

# Bytes of patches that are made before they are projected on a CPU: they stay in cache, and their memory is reused.
PATCHES_AT_A_TIME = 8 << 20

# Rows of both operands of a product begin at multiples of so many bytes on a GPU: where they do not, as 588 numbers of
# half a float do not, cuBLAS leaves its fastest kernels (NVIDIA's guide to matrix multiplication, "tensor core
# requirements"). A patch of 14 becomes 592 numbers then, four of them zeros.
ROW_BYTES = 16


@dataclass(frozen=True)
class Block:
    """Sequences of one length, one behind the other: those of one resolution (and of its tiles)."""

    start: int  # first row in the buffer
    batch: int  # images
    grid: tuple[int, int]  # patches of one sequence
    tiles: tuple[int, int] = (1, 1)  # (rows, columns): an image is so many sequences, tile-major

    @property
    def sequences(self) -> int:
        return self.tiles[0] * self.tiles[1] * self.batch

    def length(self, prefix: int) -> int:
        """Tokens of one sequence."""
        return prefix + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class PackedTokens:
    """Token sequences of several lengths in one buffer. Everything that slices is a view.

    Attributes:
        tokens: (T, D). Each sequence is its ``prefix`` tokens (CLS, registers), then its patches in raster order.
        blocks: The resolutions, in order.
        prefix: Tokens before the patches of every sequence.
    """

    tokens: Tensor
    blocks: tuple[Block, ...]
    prefix: int

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [block.grid for block in self.blocks]

    @property
    def cu_seqlens(self) -> Tensor:
        """(sequences + 1,) int32 on the CPU: where each sequence starts, as variable-length attention takes it."""
        lengths = [block.length(self.prefix) for block in self.blocks for _ in range(block.sequences)]
        return torch.tensor([0, *lengths], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)

    def with_tokens(self, tokens: Tensor) -> PackedTokens:
        """The same sequences with other values."""
        return PackedTokens(tokens, self.blocks, self.prefix)

    def block(self, s: int) -> Tensor:
        """(sequences, P + N, D): all sequences of resolution ``s``."""
        block = self.blocks[s]
        n = block.length(self.prefix)
        return self.tokens[block.start : block.start + block.sequences * n].unflatten(0, (block.sequences, n))

    def sequence(self, s: int, b: int) -> Tensor:
        """(P + N, D): image ``b`` at resolution ``s`` (a tile of it, if that is tiled; tile-major, batch-minor)."""
        return self.block(s)[b]

    def map(self, s: int, *, merge: bool = True) -> Tensor:
        """(B, D, h, w): the patches of resolution ``s``, channels_last by strides. Tiles are put together (a copy), or
        without ``merge`` stay the maps of their sequences (tiles B, D, rows, columns), tile-major.
        """
        block = self.blocks[s]
        rows, columns = block.grid
        patches = self.block(s)[:, self.prefix :]
        if block.tiles == (1, 1) or not merge:
            return patches.mT.unflatten(2, (rows, columns))
        (down, across), width = block.tiles, patches.shape[-1]
        merged = patches.reshape(down, across, block.batch, rows, columns, width).permute(2, 0, 3, 1, 4, 5)
        return merged.reshape(block.batch, down * rows, across * columns, width).permute(0, 3, 1, 2)

    def maps(self) -> list[Tensor]:
        return [self.map(s) for s in range(len(self))]

    def prefix_tokens(self, s: int) -> Tensor:
        """(B, P, D), or with tiles their mean over the tiles of an image (as S2 does)."""
        block = self.blocks[s]
        tokens = self.block(s)[:, : self.prefix]
        return tokens if block.tiles == (1, 1) else tokens.unflatten(0, (math.prod(block.tiles), block.batch)).mean(0)


def patch_embed(
    images: Tensor | Sequence[Tensor],
    sizes: Sizes | Sequence[Sizes],
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    patch_size: int,
    flavor: PositionFlavor | None = None,
    num_prefix_tokens: int = 0,
    source_grid: Size | None = None,
    prefix: Tensor | None = None,
    tiles: Sizes | None = None,
    remainder: Remainder = "raise",
    mode: Mode = "bilinear",
    antialias: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: Layout = "cyx",
    keep: Keep = "checked",
    backend: Backend | None = None,
) -> PackedTokens:
    """Resize, normalize, cut and project images at several resolutions, with positions, into one packed buffer.

    ``patches(resize(image)) W^T + bias + positions``, with the prefix tokens before each sequence.

    Args:
        images: (B, 3, H, W) or (B, H, W, 3), uint8 or floating point; or a list of such batches of different sizes.
        sizes: (height, width) in pixels per resolution. With a list of batches, one such list for each batch, and the
            blocks of the result are batch by batch.
        weight: (D, 3 * p * p), or the (D, 3, p, p) of a convolution.
        bias: (D,) or None.
        pos_embed: The table of :func:`resample_pos_embed`, or None (rotary models).
        patch_size: p in pixels.
        flavor, num_prefix_tokens, source_grid: As for :func:`resample_pos_embed`. The table's prefix rows are added to
            the first prefix tokens; registers behind them have no position.
        prefix: (P, D): CLS and register tokens, or None.
        tiles: Per resolution (rows, columns), or one integer for as many of both: cut the resized image into so many
            non-overlapping tiles, which become sequences of their own with the positions of one tile (S2, SigLIP-HD,
            AnyRes). None: no tiles.
        remainder: What to do with a size that is no multiple of the patch: ``"raise"``, or ``"drop"`` the pixels beyond
            the last whole patch, as convolutions do.
        mode, antialias, mean, std, layout: As for :func:`image_to_patches`.
        keep: Whether resized tables are kept for the next call, as for :func:`resample_pos_embed`.
        backend: As for :func:`image_to_patches`; ``"reference"`` for all parts.

    Returns:
        :class:`PackedTokens` in the dtype of ``weight``. Gradients go to ``weight``, ``bias``, ``pos_embed`` and
        ``prefix``, not to the images; tangents come from all of them.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the tokens, the resized tables, and the patches of one resolution, which the product reads: 3 p p numbers
    a token, on GPUs rounded up to whole 16 bytes, with a copy of the weight if that rounds; on CPUs those of as many
    images as take 8 MB, at least one. Where gradients are needed also a copy of the tokens and the patches of every
    resolution.

    Source: MuRF, section 3; the embeddings of DINOv2, DINOv3, SigLIP and SigLIP 2.
    """
    op = "patch_embed"
    patch_size = _checks.integer(op, "patch_size", patch_size, 1)
    weight, batches, grids, tiles = _checked(op, images, sizes, weight, bias, patch_size, prefix, tiles, remainder)
    _checks.mode(op, mode, antialias)
    backend_name = _checks.backend(backend, weight)
    count = 0 if prefix is None else len(prefix)
    blocks = _blocks(batches, grids, tiles, patch_size, count)
    tables: Sequence[Tensor | None] = [None] * len(blocks)
    if pos_embed is not None:
        if isinstance(pos_embed, Tensor) and pos_embed.dtype in _checks.DTYPES and pos_embed.dtype != weight.dtype:
            # A narrower table must not be rounded to its own dtype again, between its resize and the sum.
            pos_embed = pos_embed.to(torch.promote_types(pos_embed.dtype, weight.dtype))
        tables = resample_pos_embed(
            pos_embed,
            [block.grid for block in blocks],
            flavor=cast("PositionFlavor", flavor),
            num_prefix_tokens=num_prefix_tokens,
            source_grid=source_grid,
            keep=keep,
            backend=backend,
        )
        tables = [table.flatten(0, -2) for table in tables]
    trainable = [x for x in (weight, bias, pos_embed, prefix) if x is not None]
    # Writing into the buffer has no gradient, and compilers fuse the plain expression themselves.
    functional = backend_name == "reference" or writes_nothing([*trainable, *batches])
    total = sum(block.sequences * block.length(count) for block in blocks)
    buffer = weight[:0] if functional else weight.new_empty((total, weight.shape[0]))
    packed = PackedTokens(buffer, tuple(blocks), count)
    options: dict[str, Any] = {"mode": mode, "antialias": antialias, "mean": mean, "std": std, "layout": layout}
    options |= {"dtype": weight.dtype, "backend": backend}
    pairs = [(batch, size) for batch, its_sizes in zip(batches, grids, strict=True) for size in its_sizes]
    head = _with_positions(prefix, tables[0], num_prefix_tokens)
    multiple = 1 if functional else _row_multiple(weight)
    operand = F.pad(weight, (0, -weight.shape[1] % multiple)) if weight.shape[1] % multiple else weight
    pieces = []
    for i, ((batch, size), block, table) in enumerate(zip(pairs, blocks, tables, strict=True)):
        positions = None if table is None else table[num_prefix_tokens:]
        if functional:
            (patches,) = image_to_patches(batch, [size], patch_size, **options)
            tokens = reference.patch_embed(_cut(patches, block), weight, None, None, None)
            added = _added(bias, positions, weight.dtype)
            tokens = tokens if added is None else tokens + added
            if head is not None:
                tokens = torch.cat([head.to(weight.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
            pieces.append(tokens.flatten(0, 1))
            continue
        out = packed.block(i)
        if head is not None:
            out[:, :count] = head
        rows = out[:, count:].unflatten(0, (math.prod(block.tiles), block.batch))
        if not _is_on_cpu(weight):
            (patches,) = padded_patches(batch, [size], patch_size, multiple, **options)
            patches = _cut(patches, block).unflatten(0, (math.prod(block.tiles), -1))
            _project_all(rows, patches, operand, bias, positions)
            continue
        added = _added(bias, positions, weight.dtype)
        for images_at_a_time in _groups(block, weight):
            (patches,) = image_to_patches(batch[images_at_a_time], [size], patch_size, **options)
            patches = _cut(patches, block).unflatten(0, (math.prod(block.tiles), -1))
            _project_each(rows[:, images_at_a_time], patches, weight, added)
    return packed.with_tokens(torch.cat(pieces)) if functional else packed


def cut_sequences(
    images: Tensor,
    sizes: Sizes,
    *,
    patch_size: int,
    prefix: int,
    dtype: torch.dtype,
    tiles: Sizes | None = None,
    remainder: Remainder = "raise",
    **options,
) -> Iterator[tuple[Block, Tensor]]:
    """The patches (tiles B, h w, 3 p p) of each resolution's sequences, for embeddings that are called as modules.

    ``prefix`` counts the tokens before the patches of every sequence, ``options`` are those of
    :func:`image_to_patches`; the rest is as for :func:`patch_embed`.
    """
    weight = torch.empty((1, 3 * patch_size * patch_size), dtype=dtype, device="meta")
    checked = _checked("patch_embed", images, sizes, weight, None, patch_size, None, tiles, remainder)
    _, (batch,), (grids,), tiles = checked
    for size, block in zip(grids, _blocks([batch], [grids], tiles, patch_size, prefix), strict=True):
        (patches,) = image_to_patches(batch, [size], patch_size, dtype=dtype, **options)
        yield block, _cut(patches, block)


def _blocks(batches, grids, tiles: Sequence[tuple[int, int]] | None, patch_size: int, prefix: int) -> list[Block]:
    """One behind the other: the resolutions of every batch."""
    blocks, start = [], 0
    for batch, its_sizes in zip(batches, grids, strict=True):
        for s, (rows, columns) in enumerate(its_sizes):
            t = (1, 1) if tiles is None else tiles[s]
            block = Block(start, batch.shape[0], (rows // patch_size // t[0], columns // patch_size // t[1]), t)
            start += block.sequences * block.length(prefix)
            blocks.append(block)
    return blocks


def _groups(block: Block, weight: Tensor) -> Iterator[slice]:
    """Images whose patches are in memory at once on a CPU."""
    an_image = math.prod(block.tiles) * math.prod(block.grid) * weight.shape[1] * weight.element_size()
    step = max(1, PATCHES_AT_A_TIME // an_image)
    for start in range(0, block.batch, step):
        yield slice(start, start + step)


def _cut(patches: Tensor, block: Block) -> Tensor:
    """(B, down h across w, K) patches of whole images -> (down across B, h w, K), tile-major."""
    if block.tiles == (1, 1):
        return patches
    (down, across), (rows, columns) = block.tiles, block.grid
    tiled = patches.unflatten(1, (down, rows, across, columns)).permute(1, 3, 0, 2, 4, 5)
    return tiled.reshape(-1, rows * columns, tiled.shape[-1])


def _with_positions(prefix: Tensor | None, table: Tensor | None, rows: int) -> Tensor | None:
    """The prefix tokens with the first ``rows`` of a table of positions, which no grid resizes."""
    if prefix is None or table is None or not rows:
        return prefix
    return torch.cat([prefix[:rows] + table[:rows], prefix[rows:]])


def _is_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu"


def _row_multiple(weight: Tensor) -> int:
    """Of what the number of columns must be a multiple."""
    return 1 if _is_on_cpu(weight) else max(1, ROW_BYTES // weight.element_size())


def _added(bias: Tensor | None, positions: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the product, in its dtype: (D,), (N, D) or nothing."""
    terms = [x for x in (positions, bias) if x is not None]
    return sum(terms[1:], terms[0]).to(dtype) if terms else None


def _project_each(out: Tensor, patches: Tensor, weight: Tensor, added: Tensor | None) -> None:
    """One product per sequence straight into its rows of the buffer: (tiles, b, N, D) from (tiles, b, N, K).

    For CPUs, where neither a batch of products nor one product of all rows, copied into the buffer afterwards, was
    faster in a trial by hand (one thread of an AMX core; 1, 4 and 8 images at three sizes, widths of 384 and 768).
    """
    for rows, its_patches in zip(out.unbind(0), patches.unbind(0), strict=True):
        for row, patch in zip(rows, its_patches, strict=True):
            if added is None:
                torch.mm(patch, weight.mT, out=row)
            else:
                torch.addmm(added, patch, weight.mT, out=row)


def _project_all(out: Tensor, patches: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None) -> None:
    """One product for all sequences of a resolution, of which :func:`_project_each` makes one each.

    It reads patches that a launch before has written, 2 x 46 MB of traffic for 8 images at 266, 518 and 784 in
    bfloat16, 0.027 ms of an H100's. A kernel that made them as it loads its tiles would make them again for every tile
    of columns, three for the 768 of a ViT-B (128 rows of 256 float32 sums are half a multiprocessor's registers), and
    ``benchmarks/results/offline`` predicts 0.077 ms of instructions for making them once.
    """
    rows, patches = out.flatten(0, 1), patches.flatten(0, 1)  # views: all sequences lie at one distance
    if positions is not None and bias is not None:
        torch.add(positions.expand_as(rows), bias, out=rows)  # straight into the buffer, as one launch
    elif positions is not None or bias is not None:
        rows.copy_(cast("Tensor", bias) if positions is None else positions)
    beta = 0 if bias is None and positions is None else 1
    rows.baddbmm_(patches, weight.mT.expand(len(rows), -1, -1), beta=beta)


def _checked(op, images, sizes, weight, bias, patch_size, prefix, tiles, remainder):
    _checks.tensor(op, "weight", weight)
    columns = 3 * patch_size * patch_size
    shape = tuple(weight.shape)
    weight = weight.flatten(1) if weight.ndim == 4 else weight
    if weight.ndim != 2 or weight.shape[1] != columns:
        raise ValueError(
            f"murf_fast.{op}: `weight` must be (D, {columns}) or (D, 3, {patch_size}, {patch_size}), got {shape}"
        )
    if bias is not None:
        _checks.vector(op, "bias", bias, len(weight), weight, what="one entry per row of `weight`")
    if prefix is not None:
        _checks.tensor(op, "prefix", prefix)
        if prefix.ndim != 2 or prefix.shape[1] != len(weight):
            raise ValueError(f"murf_fast.{op}: `prefix` must be (P, {len(weight)}), got {tuple(prefix.shape)}")
    _checks.choice(op, "remainder", remainder, REMAINDERS)
    if not _checks.is_sequence(sizes) or len(sizes) == 0:
        raise TypeError(f"murf_fast.{op}: `sizes` must be a non-empty list of (height, width), got {sizes!r}")
    if not isinstance(images, (Tensor, list, tuple)):
        raise TypeError(f"murf_fast.{op}: `images` must be a tensor or a list of them, got {type(images).__name__}")
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor):
            raise TypeError(f"murf_fast.{op}: `images` must be tensors, got {type(batch).__name__}")
        _checks.dense(op, "images", batch)
    batches, lists = ([images], [sizes]) if isinstance(images, Tensor) else (list(images), list(sizes))
    if len(batches) != len(lists):
        raise ValueError(f"murf_fast.{op}: `sizes` must hold one list for each of {len(batches)} batches of images")
    grids = [[tuple(_checks.grid(op, "sizes", size)) for size in its_sizes] for its_sizes in lists]
    if tiles is not None:
        if not _checks.is_sequence(tiles):
            raise TypeError(f"murf_fast.{op}: `tiles` must be a list of integers or (rows, columns), got {tiles!r}")
        tiles = [_checks.pair(op, "tiles", t) for t in tiles]
    for its_sizes in grids:
        if tiles is not None and len(tiles) != len(its_sizes):
            raise ValueError(
                f"murf_fast.{op}: `tiles` must hold one entry for each of {len(its_sizes)} sizes, got {tiles!r}"
            )
        for s, size in enumerate(its_sizes):
            t = (1, 1) if tiles is None else tiles[s]
            units = (t[0] * patch_size, t[1] * patch_size)
            unit = units[0] if units[0] == units[1] else units
            if any(n < u for n, u in zip(size, units, strict=True)):
                raise ValueError(f"murf_fast.{op}: `sizes[{s}]` must hold a patch of {unit} pixels, got {size}")
            if any(n % u for n, u in zip(size, units, strict=True)) and (remainder == "raise" or t != (1, 1)):
                raise ValueError(
                    f"murf_fast.{op}: `sizes[{s}]` must be a multiple of {unit} pixels (patch size times tiles), got "
                    f'{size}; remainder="drop" drops the pixels beyond the last whole patch (without tiles)'
                )
    return weight, batches, grids, tiles
