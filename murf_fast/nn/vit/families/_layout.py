"""What a family must name: where its models keep the parts that a packed pass calls. A family is one :class:`Layout`.

Paths are attributes, ``"embeddings.patch_embeddings"``; `` | `` stands between the names of different versions, of
which the first that is there is taken; ``""`` is what a family does not have. Widths, activations, epsilons and gated
MLPs are not named: norms and MLPs are called as the modules they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.annotations import Layout as PatchLayout
from murf_fast.annotations import PositionFlavor


@dataclass(frozen=True)
class Weights:
    """A projection that its attention computes from parameters: ``x weight^T + cat(biases)``."""

    weight: str
    biases: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockLayout:
    """Paths in a pre-norm block; what the parts do is said by :class:`Layer`."""

    norm1: str
    # (q, k, v) or one fused projection, and the same for other ways to keep them.
    projections: tuple[tuple[str | Weights, ...], ...]
    output: str
    norm2: str
    mlp: str
    heads: str
    scale: str = ""
    scale1: str = ""
    scale2: str = ""
    query_norm: str = ""
    key_norm: str = ""
    inner_norm: str = ""


@dataclass(frozen=True)
class Layout:
    """One family of models.

    Attributes:
        name: For messages and documents.
        models: Names of its classes.
        tower: The module that all other paths start from, where it is not the model.
        projection: The patch embedding's convolution or product.
        blocks: The list of blocks.
        block: What is in one.
        norm: The final norm.
        embedders: Modules that the model calls one after another before the first block. The patch embedding comes
            first or is in the first; what follows does nothing in evaluation, but for ``pre_norm``, the last.
        pre_norm: The norm between embeddings and blocks.
        container: The module that calls the blocks.
        keyword: Under which it gets the tokens, if not by position.
        prefix: Parameters of the tokens before the patches: CLS, then registers.
        positioned: How many of them have rows in the table of positions.
        positions: The table of absolute positions.
        flavor: Who resizes the table, a name of :func:`resample_pos_embed`; "" if the model has to be asked.
        rotary: Who rotates queries and keys: "transformers", "timm" or "dinov3".
        rope: The module of rotary positions.
        patch_size: Where the projection does not tell it.
        is_normed: Whether the model's last tokens are those of the final norm.
        calls_embeddings: Whether the embedders are more than patches, positions and tokens, and are always called.
        normalizes: Whether they subtract a mean and divide by a deviation.
        patch_layout: Order of the numbers of a patch, as for :func:`image_to_patches`.
        options: Arguments of the model's and of the embeddings' forward that ask for other sizes than its own.
        marks: Paths that tell models of this family from others of the same class name.
        holders: Classes of models that hold one of this family, and the attribute that it is.
    """

    name: str
    models: tuple[str, ...]
    projection: str
    blocks: str
    block: BlockLayout
    norm: str
    embedders: tuple[str, ...]
    tower: str = ""
    pre_norm: str = ""
    container: str = ""
    keyword: str = ""
    prefix: tuple[str, ...] = ()
    positioned: int = 1
    positions: str = ""
    flavor: PositionFlavor | Literal[""] = ""
    rotary: str = ""
    rope: str = ""
    patch_size: str = ""
    is_normed: bool = True
    calls_embeddings: bool = False
    normalizes: bool = False
    patch_layout: PatchLayout = "cyx"
    options: tuple[tuple[str, object], ...] = ()
    marks: tuple[str, ...] = ()
    holders: tuple[tuple[str, str], ...] = ()

    def root(self, model: nn.Module) -> nn.Module:
        """Where the paths start."""
        return find(model, self.tower) or model

    @property
    def required(self) -> tuple[str, ...]:
        """Paths that every model of this family has."""
        return (self.projection, self.blocks, *self.marks)

    def missing(self, model: nn.Module) -> list[str]:
        """Those of them that a model has not."""
        root = self.root(model)
        return [path for path in self.required if find(root, path) is None]


@dataclass(frozen=True)
class Product:
    """A projection without a module of its own."""

    weight: Tensor
    bias: Tensor | None
    owner: nn.Module | None  # where the weight lies

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class Factor:
    """A layer scale without a module of its own."""

    gamma: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.gamma


def find(root: object, path: str) -> Any:
    """What lies at a path; None where nothing does."""
    for name in path.split(" | ") if path else ():
        found: Any = root
        for part in name.split("."):
            found = getattr(found, part, None)
            if found is None:
                break
        if found is not None:
            return found
    return None


def part(root: object, path: str) -> Any:
    """What lies at a path. AttributeError: nothing does."""
    found = find(root, path)
    if found is None:
        raise AttributeError(f"{type(root).__name__} has no `{path}`")
    return found
