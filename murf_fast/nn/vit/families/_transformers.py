"""How the vision transformers of Hugging Face transformers are called."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from murf_fast.nn.vit.families._family import Family, Rotation, tokens_in
from murf_fast.nn.vit.families._layout import Layout, find

# The attentions of transformers that all mean softmax(scale q k^T) v without a mask.
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")

# Random changes of rotary positions in training.
AUGMENTS = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")


@functools.cache
def _masks_without_default(kind: type[nn.Module]) -> int:
    """How many masks blocks want beside their tokens: none to two, as models and versions of transformers have it."""
    _, _, *others = inspect.signature(kind.forward).parameters.values()
    return sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in others)


class Transformers(Family):
    """A model of transformers: one module makes the tokens of the pixels."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__(model, layout)
        config = self.model.config
        self.has_usual_attention = _is_usual_attention(config)
        self.is_naflex = layout.patch_layout == "yxc"
        if layout.rotary:
            self.rope = find(self.model, layout.rope)
            self.augments_positions = any(getattr(config, name, None) is not None for name in AUGMENTS)

    def rotation(self, grid: Any, dtype: Any, device: Any) -> Any:
        if self.rope is None:
            return None
        # Cosine and sine are rounded to the model's dtype, as in transformers; the hub keeps them in float32.
        axes = [2 * (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n - 1 for n in grid]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        angles = 2 * math.pi * points[:, :, None] * self.rope.inv_freq.to(device)
        angles = angles.flatten(1).tile(2)
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))

    def call_embeddings(self, patches: Any, grid: Any) -> Any:
        x = patches if self.is_naflex else self.pixels(patches, grid)
        for embedder in self.embedders:
            if embedder is not self.embeddings:
                x = embedder(x)
            elif self.is_naflex:
                x = embedder(x, torch.tensor([grid] * len(x), device=x.device))
            else:
                x = embedder(x, **dict(self.kind.options))
        return x

    @property
    def embeddings(self) -> nn.Module:
        """The embedder that makes tokens."""
        return self.model.embeddings

    def call_block(self, block: Any, x: Tensor, rotation: Any) -> Any:
        if rotation is not None:
            return tokens_in(block(x, position_embeddings=(rotation.cos, rotation.sin)))
        return tokens_in(block(x, *[None] * _masks_without_default(cast("Any", type(block)))))

    def call_container(self, x: Tensor, rotation: Any, wanted: Any) -> Any:
        options = {} if rotation is None else {"position_embeddings": (rotation.cos, rotation.sin)}
        return self._encoded(wanted, self.container, x, **options)

    def call_model(self, model: Any, patches: Any, grid: Any) -> Any:
        if not self.is_naflex:
            return model(self.pixels(patches, grid), **dict(self.kind.options))
        mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
        return model(patches, mask, torch.tensor([grid] * len(patches), device=patches.device))

    def _encoded(self, wanted: Collection[int], encoder: nn.Module, x: Tensor, **options: Any) -> dict[int, Tensor]:
        last = len(self.blocks) - 1
        given = () if self.kind.keyword else (x,)
        options |= {self.kind.keyword: x} if self.kind.keyword else {}
        if set(wanted) == {last}:
            return {last: tokens_in(encoder(*given, **options))}
        output = encoder(*given, **options, output_hidden_states=True)
        hidden = getattr(output, "hidden_states", None)
        if hidden is None or len(hidden) != last + 2:
            raise ValueError(
                f"murf_fast.MultiResolutionEncoder: `layers` must be the last block only: the model's "
                f"{type(encoder).__name__} has hooks or a forward of its own, and returns no hidden states"
            )
        return {i: tokens_in(output) if i == last else hidden[i + 1] for i in wanted}


def _is_usual_attention(config: object) -> bool:
    """Whether attention is one of transformers' own."""
    name = getattr(config, "_attn_implementation", None)
    if name is None or name.startswith("kernels-community/"):
        return True
    if name not in ATTENTIONS:
        return False
    loaded = sys.modules.get("transformers.modeling_utils")
    function = None if loaded is None else loaded.ALL_ATTENTION_FUNCTIONS.get(name)
    return function is None or getattr(function, "__module__", "").startswith("transformers.")
