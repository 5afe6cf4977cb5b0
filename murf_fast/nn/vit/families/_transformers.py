"""What the vision transformers of Hugging Face transformers have in common."""

from __future__ import annotations

import sys
from collections.abc import Collection

from torch import Tensor, nn

from murf_fast.nn.vit.families._family import Family, tokens_in

# The attentions of transformers that all mean softmax(scale q k^T) v without a mask.
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


class Transformers(Family):
    """What the families of transformers have in common."""

    def call_block(self, block, x, rotation):
        return tokens_in(block(x, None))

    def call_container(self, x, rotation, wanted):
        return self._encoded(wanted, self.container, x)

    def call_model(self, model, patches, grid):
        return model(self.pixels(patches, grid))

    def _encoded(self, wanted: Collection[int], encoder: nn.Module, *arguments, **options) -> dict[int, Tensor]:
        last = len(self.blocks) - 1
        if set(wanted) == {last}:
            return {last: tokens_in(encoder(*arguments, **options))}
        output = encoder(*arguments, **options, output_hidden_states=True)
        hidden = getattr(output, "hidden_states", None)
        if hidden is None or len(hidden) != last + 2:
            raise ValueError(
                f"murf_fast.MultiResolutionEncoder: `layers` must be the last block only: the model's "
                f"{type(encoder).__name__} has hooks or a forward of its own, and returns no hidden states"
            )
        return {i: tokens_in(output) if i == last else hidden[i + 1] for i in wanted}


def attention_parts(
    attention: nn.Module, config: object
) -> tuple[tuple[tuple[nn.Module, ...], nn.Module], int, float | None]:
    """((q, k, v), output), heads and scale, under the names of transformers 5, of its 4.x Dinov2 and of Siglip."""
    if hasattr(attention, "q_proj"):
        inner = attention
        output = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
        parts = (attention.q_proj, attention.k_proj, attention.v_proj), output
    else:
        inner = attention.attention
        parts = (inner.query, inner.key, inner.value), attention.output.dense
    heads = getattr(inner, "num_heads", None) or getattr(inner, "num_attention_heads", config.num_attention_heads)
    return parts, heads, getattr(inner, "scaling", getattr(inner, "scale", None))


def is_usual_attention(config: object) -> bool:
    """Whether attention is one of transformers' own."""
    name = getattr(config, "_attn_implementation", None)
    if name is None or name.startswith("kernels-community/"):
        return True
    if name not in ATTENTIONS:
        return False
    loaded = sys.modules.get("transformers.modeling_utils")
    function = None if loaded is None else loaded.ALL_ATTENTION_FUNCTIONS.get(name)
    return function is None or getattr(function, "__module__", "").startswith("transformers.")
