"""AnyUp, run by this library."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

from torch import Tensor, nn

from murf_fast.nn._parts import is_as_written
from murf_fast.nn.guided._anyup_checkpoint import canonical
from murf_fast.nn.guided._anyup_forward import upsample, window_rule
from murf_fast.nn.guided.anyup import check_features, check_image
from murf_fast.patch._attention_colors import oklab_plane, show
from murf_fast.patch._replacements import replace

_MODEL = "anyup.model"
_original = "_forward_without_murf_fast"


def anyup() -> None:
    """Replaces ``AnyUp.forward`` of the installed package ``anyup`` (or of its clone by torch.hub); see ``unpatch``.

    Models that exist already are affected, too; weights stay where they are, and the windows are those the model was
    made with: the dense rule, or with ``use_natten=True`` NATTEN's (also where natten is installed). ``q_chunk_size``
    has no use any more and no effect. ``vis_attn=True`` shows the original's picture (matplotlib), made without the
    matrix of weights; as there, not of models with NATTEN's windows, which warn. Models with an ``lfu_dim`` of their
    own, and models with hooks, parametrizations or replaced parts still take the original's way, as do replicas of
    ``nn.DataParallel``. Calling it again changes nothing.

    Raises:
        ModuleNotFoundError: There is no package ``anyup``.

    Memory: as :meth:`murf_fast.nn.AnyUp.forward`.

    Source: github.com/wimmerth/anyup.
    """
    if importlib.util.find_spec("anyup") is None:
        raise ModuleNotFoundError("murf_fast.patch.anyup: the package anyup is not installed", name="anyup")
    model = importlib.import_module(_MODEL).AnyUp
    if getattr(model.forward, "__module__", None) == __name__:
        return
    replace(model, _original, model.forward)
    replace(model, "forward", _forward)


def _forward(
    self,
    image: Tensor,
    features: Tensor,
    output_size: tuple[int, int] | None = None,
    vis_attn: bool = False,
    q_chunk_size: int | None = None,
) -> Tensor:
    given = dict(self.named_parameters())
    as_written = "rope.freqs" in given and is_as_written(self, ("anyup", "natten"))
    if self.lfu_dim != self.qk_dim or not as_written:
        return getattr(self, _original)(image, features, output_size, vis_attn=vis_attn, q_chunk_size=q_chunk_size)
    weights = canonical(given)
    output_size = None if output_size is None else tuple(output_size)
    size = check_image(_Allowed, image, output_size, given["rope.freqs"], self.image_encoder[0].in_channels)
    check_features(features, image)
    name = "dense" if weights.keys() == given.keys() else "natten"
    rule = window_rule(name, self.window_ratio, size, features.shape[2:])
    heads = _heads(self.cross_decode.cross_attn)
    if vis_attn and name == "natten":
        warnings.warn("murf_fast.patch.anyup: `vis_attn` shows nothing for NATTEN's windows", stacklevel=3)
    elif vis_attn:
        colors = oklab_plane(features.shape[2:]).to(image)
        first = (image[:1], features[:1])
        show(colors, upsample(weights, *first, size, rule, heads, values=colors[None])[0])
    return upsample(weights, image, features, size, rule, heads)


class _Allowed:
    """The original takes bfloat16 without a word, and so does its replacement."""

    allow_bfloat16 = True


def _heads(attention: nn.Module) -> int:
    inner = getattr(attention, "attention", attention)
    return inner.num_heads
