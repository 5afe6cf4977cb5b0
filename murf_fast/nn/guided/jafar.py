"""JAFAR: jack up any feature at any resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast import windows
from murf_fast.annotations import Integers, Size
from murf_fast.nn._checkpoint_files import open_checkpoint
from murf_fast.nn._checkpoints import few, load_into
from murf_fast.nn._parts import forms_of, refuse_peculiar
from murf_fast.nn.guided._encoded import EncodedImage, ImageKeys, ImageStatistics, grids_of
from murf_fast.nn.guided._encoders import GROUPS, Encoder, check_image, fused_backend, precise
from murf_fast.nn.guided._upsampler import GuidedUpsampler
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import derivatives_wanted
from murf_fast.ops._image_encoders import flat, image_queries
from murf_fast.ops._image_regions import image_rectangle, image_statistics

_IMAGE, _FEATURES = "image_encoder.0.weight", "key_features_encoder.0.weight"
_ATTENTION = "cross_decode.cross_attn."
_OF_IMAGE = ("image_encoder", "key_encoder", "query_encoder")
# The original asks its attention for the weights only; what it does to the values never reaches the result.
_DEAD = tuple(
    _ATTENTION + name
    for name in ("norm_v.weight", "attention.v_proj_weight", "attention.out_proj.weight", "attention.out_proj.bias")
)
# torch's `eps` of an RMSNorm that is given none, in float32; kept in other dtypes, so that it is one function in all.
_EPS = torch.finfo(torch.float32).eps


class JAFAR(GuidedUpsampler):
    """Features of the backbone it was trained for at any resolution: every output attends to all features.

    With ``e = rope(image_encoder(image))``: queries ``GN(pool(query_encoder(e), out))`` through a 3x3 convolution; keys
    ``gamma(f) GN(pool(key_encoder(e), (h, w))) + beta(f)`` of ``f = key_features_encoder(features / |features|)``; both
    RMS-normalized and projected; ``out(p) = sum_j mean_n softmax_j(<q_n(p), k_n(j)> / sqrt(D)) features(j)``.

    Without gradients the image's encoders run as passes over the pixels that read and write activations once per group
    norm; where gradients are needed, in float64, under autocast, and if a submodule has hooks or was replaced, they are
    plain PyTorch.

    The state dict has the original's names. Its entries that have no influence (``norm_v``, ``v_proj_weight``,
    ``out_proj``) are passed over by :meth:`load_state_dict` and :meth:`from_checkpoint`.

    Args:
        v_dim: Channels of the features.
        qk_dim: Channels of queries and keys, a multiple of 8 and of the heads.
        num_heads: Heads; contiguous groups of channels.
        kernel_size: Of the image encoder's first convolution, 1 or 3.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: JAFAR (arXiv 2506.11136), github.com/PaulCouairon/JAFAR.
    """

    def __init__(self, v_dim: int = 384, *, qk_dim: int = 128, num_heads: int = 4, kernel_size: int = 1) -> None:
        super().__init__()
        v_dim, qk_dim = _checks.integer("JAFAR", "v_dim", v_dim, 1), _checks.integer("JAFAR", "qk_dim", qk_dim, 1)
        num_heads = _checks.integer("JAFAR", "num_heads", num_heads, 1)
        if qk_dim % GROUPS or qk_dim % num_heads:
            raise ValueError(
                f"murf_fast.JAFAR: `qk_dim` must be a multiple of {GROUPS} and of the {num_heads} heads, got {qk_dim}"
            )
        if _checks.integer("JAFAR", "kernel_size", kernel_size) not in (1, 3):
            raise ValueError(f"murf_fast.JAFAR: `kernel_size` must be 1 or 3, got {kernel_size!r}")
        self.v_dim, self.qk_dim, self.num_heads, self.kernel_size = v_dim, qk_dim, num_heads, kernel_size
        options: dict[str, Any] = {"block": 1, "blocks": 2, "bias": False, "residual": True}
        self.image_encoder = Encoder(3, qk_dim, kernel_size=kernel_size, **options)
        self.key_encoder = Encoder(qk_dim, qk_dim, kernel_size=1, **options)
        self.query_encoder = Encoder(qk_dim, qk_dim, kernel_size=1, **options)
        self.key_features_encoder = Encoder(v_dim, qk_dim, kernel_size=1, **options)
        self.cross_decode = _CrossDecode(qk_dim)
        self.sft_key = _Modulation(qk_dim)
        self.rope = _LearnedRotation(qk_dim)
        self.register_load_state_dict_pre_hook(_keep_used)
        self._forms = forms_of(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: str | PathLike[str] | Mapping[str, Any], *, num_heads: int = 4) -> JAFAR:
        """A model with released weights, in eval mode; all but the heads follows from their shapes.

        Entries ``state_dict``, ``model``, ``teacher`` are opened, and prefixes ``module.``, ``_orig_mod.``, ``model.``
        and ``teacher.`` taken off if all names have them.

        Args:
            checkpoint: A file of a state dict, perhaps as its entry ``jafar`` (the released ``.pth``), or a
                ``.safetensors`` file, or a state dict; names are the original's.
            num_heads: Not part of the checkpoint; 4 in the releases.

        Raises:
            TypeError: ``checkpoint`` is neither a path nor a state dict.
            ValueError: Keys are missing or unexpected, or a shape is wrong (all of them are listed); or the file is
                missing, empty, damaged, no checkpoint, or a pickle of more than tensors and plain values, which is not
                loaded (``weights_only=True``).
        """
        opened = open_checkpoint("JAFAR", checkpoint)
        weights = opened.weights
        if not all(name in weights and weights[name].ndim == 4 for name in (_IMAGE, _FEATURES)):
            raise ValueError(
                f"murf_fast.JAFAR: {opened.origin} must hold {_IMAGE} and {_FEATURES}; got the keys {few(weights)}"
            )
        _keep_used(None, weights, "")
        (qk_dim, _, kernel_size, _), v_dim = weights[_IMAGE].shape, weights[_FEATURES].shape[1]
        model = cls(v_dim, qk_dim=qk_dim, num_heads=num_heads, kernel_size=kernel_size)
        load_into(model, opened)
        return model.eval()

    @overload
    def forward(
        self,
        image: Tensor | EncodedImage,
        features: Tensor,
        output_size: Size | None = None,
        *,
        values: Tensor | None = None,
        region: Integers | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image: Tensor | EncodedImage,
        features: Sequence[Tensor],
        output_size: Size | None = None,
        *,
        values: Sequence[Tensor] | None = None,
        region: Integers | None = None,
    ) -> list[Tensor]: ...
    def forward(
        self,
        image: Tensor | EncodedImage,
        features: Tensor | Sequence[Tensor],
        output_size: Size | None = None,
        *,
        values: Tensor | Sequence[Tensor] | None = None,
        region: Integers | None = None,
    ) -> Tensor | list[Tensor]:
        """Upsamples ``features`` along the edges of ``image``.

        Args:
            image: (B, 3, H, W) of any size (from 2 x 2 for a 3x3 convolution), ImageNet-normalized, in the dtype of the
                parameters. Or what :meth:`encode_image` made of it.
            features: (B, v_dim, h, w), any floating-point dtype; queries and keys are rounded to it. Or a list of such
                maps, of any grids, which share the queries.
            output_size: (height, width) of the result, or one number for both; None: those of the image.
            values: (B, K, h, w) to weigh in place of the features, which then give the attention alone; a list beside a
                list. Queries and keys are rounded to their dtype.
            region: (top, left, height, width) of the output: the result is this rectangle of the whole one. None: all.

        Returns:
            (B, v_dim, height, width) in dtype and layout of the features (or the values, with their channels); a list
            if ``features`` is one. Differentiable with respect to the image, the features, the values and every
            parameter. Autocast gives convolutions and projections its dtype, and changes nothing else.

        Raises:
            TypeError, ValueError: An argument is wrong, or ``cross_decode`` or its ``cross_attn``, which are not
                called, have hooks; the message names it.

        Memory: without gradients the result and its queries, or, if that is more, two maps of ``qk_dim`` channels at
        the image's size (three, and as many at the output's, if that is another; of a region three), which are gone
        when the result is made; no scores. A region saves the last convolution, the projection and the attention of the
        rest; the encoders run over the whole image, whose norms :meth:`statistics` keeps for many regions. With hooks,
        replaced layers or autocast the encoders are called, which takes six maps; where gradients are needed, about
        fifty maps of ``qk_dim`` channels at the image's size are kept beside the result.
        """
        return self._upsample(image, features, output_size, values, region)

    if TYPE_CHECKING:
        __call__ = forward

    def _encode(self, image: Tensor, size: Any, region: Any, grids: Any, known: Any = None) -> EncodedImage:
        network, backend = self._network(image)
        if backend is None:
            q, keys = self._called(image, size, region, grids if known is None else ())
            return EncodedImage("JAFAR", q, keys if known is None else known.keys, size, region)
        if known is not None and known.norms is not None:
            q = image_rectangle(image, known.norms, flat(*network), size, region, backend, normalize=True)
            return EncodedImage("JAFAR", q, known.keys, size, region)
        named = grids_of(image, grids) if known is None else ()
        q, *maps = image_queries(image, *network, size, region, named, backend, normalize=True)  # type: ignore[call-arg, misc]
        return EncodedImage("JAFAR", q, ImageKeys.of(maps, grids) if known is None else known.keys, size, region)

    def _statistics(self, image: Tensor, size: Any, grids: Any, recompute: Any) -> ImageStatistics:
        network, backend = self._network(image)
        image_size = (image.shape[2], image.shape[3])
        if backend is None:
            return ImageStatistics("JAFAR", None, self._called_keys(self._called_image(image), grids), image_size, size)
        norms, *maps = image_statistics(
            image, flat(*network), size, grids_of(image, grids), recompute, backend, normalize=True
        )
        return ImageStatistics("JAFAR", norms, ImageKeys.of(maps, grids), image_size, size)

    def _network(self, image: Tensor) -> tuple[Any, str | Any]:
        """The parameters as the passes over pixels take them, and their backend; None where modules are called."""
        block, backend = self.cross_decode.cross_attn, fused_backend(self, self._forms, image, self._of_image())
        encoders = [getattr(self, name).weights() for name in _OF_IMAGE]
        # The weights of the norm scale the columns of the projection.
        weight, bias = block.attention.q_proj_weight * block.norm_q.weight, block.attention.in_proj_bias.chunk(3)[0]
        return (encoders, self.rope.freqs, self.cross_decode.conv2d.weight, (weight, bias)), backend

    def _of_image(self) -> list[Tensor]:
        """The parameters of the image's part."""
        block = self.cross_decode.cross_attn
        of_queries = [self.cross_decode.conv2d.weight, block.norm_q.weight, block.attention.q_proj_weight]
        encoders = [w for name in _OF_IMAGE for w in getattr(self, name).weights()]
        return [*encoders, self.rope.freqs, *of_queries, block.attention.in_proj_bias]

    def _wants_gradients(self, image: Tensor) -> bool:
        return derivatives_wanted((image, *self._of_image()))

    def _called(self, image: Tensor, size: Any, region: Any, grids: Any) -> tuple[Tensor, ImageKeys]:
        """Queries and keys by the encoders' modules."""
        encoded = self._called_image(image)
        keys = self._called_keys(encoded, grids)
        q = self.query_encoder(encoded, size)
        del encoded
        return self.cross_decode.queries(F.group_norm(q, GROUPS), region), keys

    def _called_image(self, image: Tensor) -> Tensor:
        return self.rope(self.image_encoder(image.contiguous(memory_format=torch.channels_last)))

    def _called_keys(self, encoded: Tensor, grids: Any) -> ImageKeys:
        return ImageKeys.of([self.key_encoder(encoded, grid) for grid in grids_of(encoded, grids)], grids)

    def _keys(self, of_image: Tensor, features: Tensor) -> Tensor:
        known = F.normalize(features.to(precise(features)), dim=1).to(self.rope.freqs.dtype)
        return self.cross_decode.keys(self.sft_key(of_image, self.key_features_encoder(known)))

    def _rule(self, size: Any, grid: Any) -> windows.Windows:
        return windows.full()

    def _query_channels(self) -> int:
        return self.qk_dim

    def _check_image(self, image: Tensor, output_size: Any) -> tuple[int, int]:
        self._check_parts()
        return check_image("JAFAR", image, output_size, self.rope.freqs, reflects=self.kernel_size > 1)

    def _check_parts(self) -> None:
        block = self.cross_decode.cross_attn
        uncalled = {"cross_decode": self.cross_decode, "cross_attn": block, "cross_attn.attention": block.attention}
        refuse_peculiar("JAFAR", uncalled)

    def _check_features(self, features: Tensor, image: Tensor) -> None:
        super()._check_features(features, image)
        if features.shape[1] != self.v_dim:
            raise ValueError(f"murf_fast.JAFAR: `features` must have {self.v_dim} channels, got {features.shape[1]}")

    def extra_repr(self) -> str:
        return f"v_dim={self.v_dim}, qk_dim={self.qk_dim}, num_heads={self.num_heads}"


class _LearnedRotation(nn.Module):
    """``e cos(angle) + rotate_half(e) sin(angle)``, ``angle = y freqs[0] + x freqs[1]``, y and x within 0..1.

    The frequencies start as an axial rotary embedding and are learned; after that it is no rotation any more.
    """

    def __init__(self, dim: int, theta: float = 100.0) -> None:
        super().__init__()
        quarter = theta ** torch.linspace(0, -1, dim // 4)
        half = torch.cat([quarter, quarter])
        rest = torch.zeros(dim - len(half))
        self.freqs = nn.Parameter(2 * torch.pi * torch.stack([torch.cat([half, rest]), torch.cat([rest, half])]))

    def forward(self, x: Tensor) -> Tensor:
        dtype = precise(x)
        y, x_ = (torch.linspace(0, 1, n, device=x.device, dtype=dtype)[:, None] for n in x.shape[2:])
        freqs = self.freqs.to(dtype)
        angle = (y * freqs[0])[:, None] + x_ * freqs[1]
        tokens = x.permute(0, 2, 3, 1)
        a, b = tokens.chunk(2, 3)
        turned = tokens * angle.cos().to(x.dtype) + torch.cat([-b, a], 3) * angle.sin().to(x.dtype)
        return turned.permute(0, 3, 1, 2)

    if TYPE_CHECKING:
        __call__ = forward


class _Modulation(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Conv2d(dim, dim, 1, bias=False)
        self.beta = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, keys: Tensor, features: Tensor) -> Tensor:
        return self.gamma(features) * F.group_norm(keys, GROUPS) + self.beta(features)

    if TYPE_CHECKING:
        __call__ = forward


class _CrossDecode(nn.Module):
    """What the original does to queries and keys before it attends, under its names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.cross_attn: Any = nn.Module()
        self.cross_attn.norm_q = nn.RMSNorm(dim, eps=_EPS)
        self.cross_attn.norm_k = nn.RMSNorm(dim, eps=_EPS)
        self.cross_attn.attention = attention = nn.Module()
        for name in ("q_proj_weight", "k_proj_weight"):
            attention.register_parameter(name, nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim))))
        attention.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))  # queries, keys, and values, which go unused

    def queries(self, q: Tensor, region: Sequence[int]) -> Tensor:
        """Projected queries of a region of the output."""
        top, left, rows, columns = region
        y, x = max(top - 1, 0), max(left - 1, 0)
        q = self.conv2d(q[:, :, y : top + rows + 1, x : left + columns + 1])
        q = q[:, :, top - y : top - y + rows, left - x : left - x + columns]
        block = self.cross_attn
        bias = block.attention.in_proj_bias.chunk(3)[0]
        return F.linear(block.norm_q(q.permute(0, 2, 3, 1)), block.attention.q_proj_weight, bias).permute(0, 3, 1, 2)

    def keys(self, k: Tensor) -> Tensor:
        """Projected keys."""
        block = self.cross_attn
        bias = block.attention.in_proj_bias.chunk(3)[1]
        return F.linear(block.norm_k(k.permute(0, 2, 3, 1)), block.attention.k_proj_weight, bias).permute(0, 3, 1, 2)


def _keep_used(module: nn.Module | None, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Drops what has no influence; takes apart the one matrix that torch keeps where ``v_dim`` is ``qk_dim``."""
    for name in _DEAD:
        state_dict.pop(prefix + name, None)
    attention = f"{prefix}{_ATTENTION}attention."
    together = state_dict.pop(f"{attention}in_proj_weight", None)
    if together is not None:
        state_dict[f"{attention}q_proj_weight"], state_dict[f"{attention}k_proj_weight"], _ = together.chunk(3)
