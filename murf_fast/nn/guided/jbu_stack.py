"""FeatUp's joint bilateral upsampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.annotations import Reduce
from murf_fast.nn import _checkpoints
from murf_fast.nn.guided import _jbu_checkpoint
from murf_fast.nn.guided._attend import REDUCTIONS
from murf_fast.nn.guided._jbu_levels import run_levels
from murf_fast.nn.guided.jbu_level import JBULevel
from murf_fast.ops import _checks
from murf_fast.ops.linear_head import check_head
from murf_fast.ops.upsample_argmax import label_dtype

SCALES = (2, 4, 8, 16)


class JBUStack(nn.Module):
    """Feature maps of any backbone, sixteen times as fine, along the edges of the image they come from.

    Four doublings ``up1``, ..., ``up4``, each a :class:`JBULevel`, and a 1x1 convolution ``fixup_proj`` that adds a
    tenth of its result; it runs at the resolution of the source, where it is exact and 256 times cheaper.

    Args:
        dim: Channels of the source, or None for a stack without ``fixup_proj``, which takes any.
        shared: One level ``up`` for all four doublings (SimFeatUp).
        radius: Half the width of the kernels; None: 3, or 5 if shared.
        norm: Normalize the source's channels first (the layer norm at the end of FeatUp's backbones).
        guides: Channels of the guidance.

    Raises:
        ValueError: ``norm=True`` without ``dim``.

    Source: FeatUp (arXiv 2403.10516), ``JBUStack``; SegEarth-OV, ``JBUOne``.
    """

    def __init__(
        self,
        dim: int | None,
        *,
        shared: bool = False,
        radius: int | None = None,
        norm: bool = False,
        guides: int = 3,
    ) -> None:
        super().__init__()
        dim = None if dim is None else _arguments.integer("JBUStack", "dim", dim, 1)
        shared, norm = _arguments.flag("JBUStack", "shared", shared), _arguments.flag("JBUStack", "norm", norm)
        if norm and dim is None:
            raise ValueError("murf_fast.JBUStack: `norm=True` needs `dim`, the number of channels")
        self.dim, self.shared = dim, shared
        if radius is None:
            radius = 5 if shared else 3
        for name in ["up"] if shared else [f"up{i + 1}" for i in range(len(SCALES))]:
            self.add_module(name, JBULevel(radius, guides=guides))
        self.fixup_proj = None if dim is None else nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(dim, dim, 1))
        self.norm = nn.LayerNorm(dim) if norm else None

    @classmethod
    def from_checkpoint(cls, checkpoint: str | PathLike[str] | Mapping[str, Any]) -> JBUStack:
        """A stack with released weights, in eval mode; its shape follows from theirs.

        Entries ``state_dict``, ``model``, ``teacher`` are opened, and prefixes ``module.``, ``_orig_mod.``, ``model.``
        and ``teacher.`` taken off if all names have them.

        Args:
            checkpoint: A Lightning ``.ckpt`` of FeatUp or SimFeatUp, a ``.safetensors`` file, or a state dict. Names
                are FeatUp's, with or without the prefix ``upsampler.``; beside that prefix, ``model.1.norm.*`` is taken
                as the norm, and entries of other networks are passed over.

        Raises:
            TypeError: ``checkpoint`` is neither a path nor a state dict.
            ValueError: Keys are missing or unexpected, or a shape is wrong (all of them are listed); or the file is
                missing, empty, damaged, no checkpoint, or a pickle of more than tensors and plain values, which is not
                loaded (``weights_only=True``).
        """
        layout, opened = _jbu_checkpoint.read(checkpoint)
        stack = cls(layout.dim, shared=layout.shared, radius=layout.radius, norm=layout.norm, guides=layout.guides)
        _checkpoints.load_into(stack, opened)
        return stack.eval()

    @property
    def levels(self) -> list[JBULevel]:
        """The four levels, first to last; the same one four times if shared."""
        if self.shared:
            return [cast("JBULevel", self.up)] * len(SCALES)
        return [getattr(self, f"up{i + 1}") for i in range(len(SCALES))]

    @overload
    def forward(self, source: Tensor, guidance: Tensor, *, scale: int = 16) -> Tensor: ...
    @overload
    def forward(self, source: Sequence[Tensor], guidance: Tensor, *, scale: int = 16) -> list[Tensor]: ...
    def forward(self, source: Tensor | Sequence[Tensor], guidance: Tensor, *, scale: int = 16) -> Tensor | list[Tensor]:
        """Upsamples by ``scale``: 2, 4, 8 or 16, with as many levels.

        Args:
            source: (B, dim, h, w), h, w >= 2 (at a radius of 3); or several of one size, which share the kernels.
            guidance: (B, guides, H, W) of any size, usually the ImageNet-normalized image; every level averages it over
                the pixels of its output. In the dtype of the source, or float32 beside a half type.
            scale: Factor of both sides.

        Returns:
            (B, dim, scale * h, scale * w) in dtype and layout of the source; a list if ``source`` is one. Autocast
            changes nothing.

        Raises:
            TypeError, ValueError: An argument is wrong, or a level or one of its parts has hooks or was replaced, whose
                weights alone are read; the message names it.

        Memory: the result, the map of half its size that it is made from, and kernels in bands, as
        :func:`murf_fast.joint_bilateral_upsample`. Where gradients are needed also the maps between all levels,
        together a third of the result, and the kernels of every level, (B, (2 radius + 1)^2, rows, columns) in float32.
        """
        results = self._run("JBUStack", source, guidance, scale)
        return results[0] if isinstance(source, Tensor) else results

    if TYPE_CHECKING:
        __call__ = forward

    def predict(
        self,
        source: Tensor,
        guidance: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: int = 16,
        reduce: Reduce | None = None,
    ) -> Tensor:
        """A linear head on the upsampled source, without the upsampled source.

        ``weight forward(source, guidance) + bias``: levels are linear and treat all channels alike, so the head comes
        first, together with ``fixup_proj``, and its K logits go through the levels. Their kernels do not sum to one:
        biases are added at the end.

        Args:
            source, guidance, scale: As for :meth:`forward`; one map.
            weight: (K, dim) or (K, dim, 1, 1) in the dtype of the source.
            bias: (K,), any floating dtype.
            reduce: None: logits; ``"softmax"``: probabilities; ``"argmax"``: the class of the largest logit.

        Returns:
            (B, K, scale * h, scale * w) in dtype and layout of the source, differentiable; or with ``"argmax"`` labels
            (B, scale * h, scale * w), uint8 up to 256 classes, int16 up to 32768, int32 above.

        Raises:
            TypeError, ValueError: As for :meth:`forward`; the message names the argument.

        Memory: as :meth:`forward`, of K channels; probabilities are made of all logits, labels of those of a few rows
        at a time.
        """
        what = "JBUStack.predict"
        _checks.choice(what, "reduce", reduce, REDUCTIONS, optional=True)
        source = _checks.map_(what, "source", source)
        with torch.autocast(source.device.type, enabled=False):
            check_head(what, [source], weight, bias, None, None, source.shape[2:])
        head = weight.flatten(1), bias
        if reduce == "argmax":
            with torch.no_grad():  # labels have no gradient
                return self._run(what, source, guidance, scale, head, label_dtype(len(weight)))[0]
        (logits,) = self._run(what, source, guidance, scale, head)
        return logits if reduce is None else logits.softmax(1)

    def _run(
        self, what: str, source: Any, guidance: Any, scale: Any, head: Any = None, labels: Any = None
    ) -> list[Tensor]:
        sources = _checks.maps(what, source, same_channels=True, name="source")
        if self.dim is not None and sources[0].shape[1] != self.dim:
            raise ValueError(f"murf_fast.{what}: `source` must have {self.dim} channels, got {sources[0].shape[1]}")
        if scale not in SCALES:
            raise ValueError(f"murf_fast.{what}: `scale` must be one of {SCALES}, got {scale!r}")
        names = ["up"] * len(SCALES) if self.shared else [f"up{i + 1}" for i in range(len(SCALES))]
        levels = list(zip(names, self.levels, strict=True))[: SCALES.index(scale) + 1]
        return run_levels(
            what,
            levels,
            [2] * len(levels),
            sources,
            guidance,
            mode="bicubic",
            norm=self.norm,
            final=self.fixup_proj,
            head=head,
            labels=labels,
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, shared={self.shared}"
