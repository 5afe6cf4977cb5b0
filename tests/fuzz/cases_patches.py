"""``image_to_patches`` and ``patch_embed``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzz.cases_positions import FLAVORS, table_at
from fuzz.cases_resize import drawn_rule, written
from fuzz.compare import Comparison, arithmetic, derived, unit
from fuzz.draw import DTYPES, Draw
from fuzz.maps import drawn_map, drawn_vector, laid_out
from fuzz.resampling import resize_of

__all__ = ["image_to_patches", "patch_embed"]

IMAGE_TYPES = (torch.uint8, *DTYPES)


def drawn_images(d: Draw, name: str, batch: int, types=IMAGE_TYPES) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) or (B, H, W, 3) as given, and (B, 3, H, W) in float64, in 0..1 where they are uint8."""
    dtype = d.choice(f"{name}.dtype", types, [2 if t in (torch.uint8, torch.float32) else 1 for t in types])
    if d.interpreted and dtype in (torch.bfloat16, torch.float64):
        dtype = torch.float32
    shape = (batch, 3, d.side(f"{name}.height", 33), d.side(f"{name}.width", 33))
    if dtype == torch.uint8:
        d.note(name, shape)
        x = torch.randint(0, 256, shape, generator=d.generator, dtype=torch.uint8)
        layouts = ("contiguous", "channels_last", "expanded", "permuted", "offset", "strided")
        if d.chance(f"{name}.cropped", 0.3):
            x = F.pad(x, (1, 2, 3, 0))[:, :, 3:, 1:-2]
        elif (layout := d.choice(f"{name}.layout", layouts)) == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "expanded":
            x = x[:, :1].expand(-1, 3, -1, -1)
        elif layout == "permuted":
            x = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        elif layout == "strided":
            x = x.repeat_interleave(2, 3)[..., ::2]
        pixels = x.double() / 255
    else:
        x = drawn_map(d, name, shape, dtype, ("normal", "offset", "constant"))
        pixels = x.double()
    if d.chance(f"{name}.channels last", 0.4) and shape[2] != 3:
        return x.permute(0, 2, 3, 1), pixels
    return x, pixels


def drawn_normalization(d: Draw) -> tuple[dict, Tensor, Tensor]:
    """Arguments, and mean and deviation (3, 1, 1)."""
    given, mean, std = {}, [0.0] * 3, [1.0] * 3
    if d.chance("mean", 0.6):
        mean = [d.number(f"mean{c}", -1, 1) for c in range(3)]
        given["mean"] = d.choice("mean.form", (list, tuple, torch.tensor), (2, 2, 0))(mean)
    if d.chance("std", 0.6):
        std = [d.number(f"std{c}", 0.1, 2) or 0.1 for c in range(3)]
        given["std"] = tuple(std)
    as_column = [torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std)]
    return given, *as_column


def cut(x: Tensor, patch: int, layout: str) -> Tensor:
    """Rows (B, N, 3 p p): patches in raster order, what is beyond the last whole one left out."""
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    patches = [
        x[:, :, y * patch : (y + 1) * patch, c * patch : (c + 1) * patch] for y in range(rows) for c in range(columns)
    ]
    order = (0, 1, 2, 3) if layout == "cyx" else (0, 2, 3, 1)
    return torch.stack([p.permute(order).flatten(1) for p in patches], 1)


def image_to_patches(d: Draw) -> list[Comparison]:
    images, pixels = drawn_images(d, "images", d.batch())
    patch = d.choice("patch_size", (1, 2, 3, 7, 14))
    sizes = []
    for s in range(d.integer("sizes", 1, 3)):
        size = tuple(d.integer(f"size{s}.{axis}", patch, patch * 3 + 5) for axis in ("height", "width"))
        sizes.append((size, written(d, f"size{s}", size)))
    mode, antialias = drawn_rule(d)
    normalization, mean, std = drawn_normalization(d)
    layout = d.choice("layout", ("cyx", "yxc"))
    types = (None, torch.float32, torch.float16, *(() if d.interpreted else (torch.bfloat16,)))
    asked = d.choice("dtype", types)
    results = d.call(
        "image_to_patches",
        images,
        [given for _, given in sizes],
        d.as_number("patch_size", patch),
        mode=mode,
        antialias=antialias,
        layout=layout,
        dtype=asked,
        **normalization,
    )
    dtype = asked or (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    assert len(results) == len(sizes)
    checks = []
    for s, ((size, _), result) in enumerate(zip(sizes, results, strict=True)):
        want, bound = normalized(pixels, size, mode, antialias, mean, std, images.dtype, dtype)
        checks.append(derived(f"size {s}", result, cut(want, patch, layout), cut(bound, patch, layout), dtype))
    return checks


def normalized(
    pixels: Tensor, size, mode: str, antialias: bool, mean: Tensor, std: Tensor, source: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The resized, normalized image and the roundings of its arithmetic: in the dtype of the result, or float32."""
    wide = arithmetic(dtype)
    rule = resize_of(tuple(pixels.shape[2:]), size, mode, antialias, None, None, wide)
    want = (rule(pixels) - mean) / std
    # The gain and what is subtracted are rounded, in either order with the resize.
    size_of_terms = rule.magnitude(pixels) + mean.abs() + (pixels.abs().max() if pixels.numel() else 0)
    # What has a float64 image or result goes through torch, whose positions are rounded relative to the size of a map.
    sides = max(max(m.shape) for step in rule.steps for m in step) if torch.float64 in (source, dtype) else 0
    return want, (2 * rule.roundings + 8 + 8 * sides) * unit(wide) * size_of_terms / std


def patch_embed(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    patch = d.choice("patch_size", (1, 2, 4, 7))
    width = d.choice("width", (1, 3, 8, 17))
    tiles = d.choice("tiles", (None, 1, 2, (1, 2), (3, 2)), (8, 2, 2, 1, 1))
    down, across = tiles if isinstance(tiles, tuple) else (tiles or 1, tiles or 1)
    remainder = d.choice("remainder", ("raise", "drop"))
    count = d.integer("sizes", 1, 2)
    batches = [drawn_images(d, f"images{b}", d.batch()) for b in range(d.choice("batches", (1, 2), (3, 1)))]
    several = len(batches) > 1 or d.chance("list of batches", 0.1)
    sizes = []
    for b in range(len(batches)):
        sizes.append([])
        for s in range(count):
            size = [patch * t * d.integer(f"size{b}.{s}.{axis}", 1, 3) for axis, t in (("h", down), ("w", across))]
            if remainder == "drop" and down == across == 1:
                size = [n + d.integer(f"rest{b}.{s}.{i}", 0, patch - 1) for i, n in enumerate(size)]
            sizes[-1].append(tuple(size))
    d.note("sizes", sizes)
    mode, antialias = drawn_rule(d)
    normalization, mean, std = drawn_normalization(d)
    layout = d.choice("layout", ("cyx", "yxc"))
    weight = torch.randn(width, 3, patch, patch, generator=d.generator, dtype=torch.float64).to(dtype)
    weight = laid_out(d, "weight", weight, ("contiguous", "channels_last", "sliced"))
    if d.chance("weight.flat", 0.5):
        weight = weight.flatten(1)
    bias = drawn_vector(d, "bias", (width,), (dtype,)) if d.chance("bias", 0.6) else None
    prefix_rows = d.choice("prefix", (0, 1, 3))
    prefix = torch.randn(prefix_rows, width, generator=d.generator, dtype=torch.float64).to(dtype)
    table, positions = None, {}
    if d.chance("pos_embed", 0.6):
        rows = d.integer("table prefix", 0, prefix_rows)
        grid = (d.integer("table.h", 2, 4), d.integer("table.w", 2, 4))
        table = torch.randn(rows + grid[0] * grid[1], width, generator=d.generator, dtype=torch.float64).to(dtype)
        positions = {
            "pos_embed": table,
            "flavor": d.choice("flavor", tuple(FLAVORS)),
            "num_prefix_tokens": rows,
            "source_grid": grid,
        }
    wants = d.chance("gradients", 0.3)
    leaves = {"weight": weight, "bias": bias, "pos_embed": table, "prefix": prefix if prefix_rows else None}
    leaves = {name: x.detach().requires_grad_(wants) for name, x in leaves.items() if x is not None}
    positions |= {"pos_embed": leaves["pos_embed"]} if table is not None else {}
    packed = d.call(
        "patch_embed",
        [images for images, _ in batches] if several else batches[0][0],
        sizes if several else sizes[0],
        leaves["weight"],
        leaves.get("bias"),
        patch_size=d.as_number("patch_size", patch),
        prefix=leaves.get("prefix"),
        tiles=None if tiles is None else [tiles] * count,
        remainder=remainder,
        mode=mode,
        antialias=antialias,
        layout=layout,
        **normalization,
        **positions,
    )
    flat = leaves["weight"].double().flatten(1)
    checks, at, rounded = [], 0, unit(dtype)
    wide = arithmetic(dtype)
    wanted = []
    for b, (images, pixels) in enumerate(batches):
        for size in sizes[b]:
            resized, bound = normalized(pixels, size, mode, antialias, mean, std, images.dtype, dtype)
            grid = tuple(n // patch // t for n, t in zip(size, (down, across), strict=True))
            pieces = [resized, bound]
            if down * across > 1:
                pieces = [torch.cat([c for r in p.chunk(down, 2) for c in r.chunk(across, 3)]) for p in pieces]
            # Rows are rounded to the dtype of the weight before the product, which rounds and adds up.
            patches, slack = (cut(p, patch, layout) for p in pieces)
            slack = slack + rounded * (patches.abs() + slack)
            tokens = patches @ flat.T
            terms = flat.shape[1] + 4
            error = slack @ flat.detach().abs().T + terms * unit(wide) * patches.abs() @ flat.detach().abs().T
            added = torch.zeros(grid[0] * grid[1], width, dtype=torch.float64)
            size_of_added = added
            if bias is not None:
                added, size_of_added = leaves["bias"].double() + added, leaves["bias"].detach().double().abs() + added
            head = torch.zeros(0, width, dtype=torch.float64)
            if prefix_rows:
                head = leaves["prefix"].double()
            head_error = torch.zeros_like(head)
            if table is not None:
                rows = positions["num_prefix_tokens"]
                moved, moved_error = table_at(
                    leaves["pos_embed"], rows, positions["source_grid"], grid, positions["flavor"]
                )
                moved_error = moved_error + rounded * moved.detach().abs()
                added, size_of_added = added + moved[rows:], size_of_added + moved[rows:].detach().abs()
                error = error + moved_error[rows:] + rounded * (added.abs() + 2 * moved[rows:].detach().abs())
                if prefix_rows:
                    head = torch.cat([head[:rows] + moved[:rows], head[rows:]])
            sequences = len(tokens)
            product = tokens
            tokens = tokens + added
            # Product and sums in the dtype of the weight, whatever their order.
            error = error + 3 * rounded * (product.detach().abs() + size_of_added)
            want = torch.cat([head.expand(sequences, -1, -1), tokens], 1)
            error = torch.cat([head_error.expand(sequences, -1, -1), error], 1).detach()
            got = packed.block(at)
            checks.append(derived(f"block {at}", got, want.detach(), error, dtype))
            wanted.append((got, want, patches.abs() + slack / rounded))
            at += 1
    assert len(packed) == at
    if wants and not any(len(images) == 0 for images, _ in batches):
        checks += _gradients(d, leaves, wanted, dtype)
    return checks


def _gradients(d: Draw, leaves: dict[str, Tensor], wanted: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype):
    """By autograd through the float64 tokens; a linear operation, so relative to the sums of absolute terms."""
    cotangents = [torch.randn(got.shape, generator=d.generator, dtype=torch.float64).to(dtype) for got, *_ in wanted]
    got = torch.autograd.grad([g for g, *_ in wanted], list(leaves.values()), cotangents, retain_graph=True)
    want = torch.autograd.grad([w for _, w, _ in wanted], list(leaves.values()), [c.double() for c in cotangents])
    checks = []
    for name, g, w in zip(leaves, got, want, strict=True):
        terms = sum(c.shape[0] * c.shape[1] for c in cotangents)
        # Root mean square of independent terms times their number bounds the sum of absolute terms.
        size = w.double().abs() + w.double().abs().max() + terms**0.5 * 4
        if name == "weight":
            # Rows of patches and what they were rounded to.
            pairs = zip(cotangents, wanted, strict=True)
            sums = sum(c.double().abs()[:, -p.shape[1] :].flatten(0, 1).T @ p.flatten(0, 1) for c, (*_, p) in pairs)
            size = sums.reshape(w.shape)
        checks.append(derived(f"gradient of {name}", g, w, 4 * unit(dtype) * size + terms * 2e-7 * size, dtype))
    return checks
