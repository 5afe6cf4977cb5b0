"""What AnyUp, NAF and JAFAR have in common: attention of an image's queries to windows of a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast._layout import is_channels_last
from murf_fast.annotations import Integers, Reduce, Size, Values
from murf_fast.nn.guided._attend import REDUCTIONS, Attention, predicted
from murf_fast.nn.guided._encoded import EncodedImage, ImageStatistics, Pair, Region, check_region
from murf_fast.ops import _checks
from murf_fast.ops._resize import place
from murf_fast.ops.linear_head import check_head
from murf_fast.windows import Windows

Maps = Tensor | Sequence[Tensor]
Grids = Sequence[tuple[int, int] | Tensor]


class GuidedUpsampler(nn.Module):
    """Attention of the queries of an image to windows of feature maps.

    ``out(p) = sum_j P(p, j) v(j)``: the weights ``P`` come from the image and the features, and weigh whatever values.
    So a linear head of the result is the result of the head's logits, and the queries of one image serve many maps.
    """

    # How heads use the values, see window_attention.
    _values: Values = "mean"
    num_heads: int

    def encode_image(
        self,
        image: Tensor,
        output_size: Size | None = None,
        *,
        grids: Grids | None = None,
        region: Integers | None = None,
        statistics: ImageStatistics | None = None,
    ) -> EncodedImage:
        """What the model makes of an image alone, for calls with it in the image's place.

        Args:
            image: As for ``forward``.
            output_size: (height, width) of the output; None: that of the image.
            grids: (height, width) of the feature maps to come, or the maps themselves; None: they may have any grid,
                and a map of the keys' channels at the image's size (NAF: the output's) is kept.
            region: (top, left, height, width) of the output whose queries are wanted; None: all.
            statistics: Those of this image, which have the keys as well (``grids`` is theirs). Then only the pixels
                under the region are encoded, in bands of rows.

        Returns:
            An :class:`EncodedImage`. Differentiable, without ``statistics``.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.

        Memory: the queries of the region, the keys, and as for :meth:`forward` while it runs; with ``statistics`` a few
        bands of rows in place of the latter.
        """
        what = type(self).__name__
        size = self._check_image(image, output_size)
        region = check_region(what, region, size)
        if statistics is None:
            return self._encode(image, size, region, None if grids is None else check_grids(what, grids))
        if grids is not None:
            raise ValueError(f"murf_fast.{what}: `grids` are those of `statistics`, and cannot be given beside them")
        self._check_statistics(statistics, image)
        if statistics.output_size not in (None, size):
            raise ValueError(
                f"murf_fast.{what}: `statistics` must be those of an output of {size}, got those of one of "
                f"{statistics.output_size}"
            )
        if self._wants_gradients(image):
            raise ValueError(f"murf_fast.{what}: `statistics` have no gradient; call under torch.no_grad()")
        return self._encode(image, size, region, None, statistics)

    def _check_statistics(self, statistics: ImageStatistics, image: Tensor) -> None:
        what = type(self).__name__
        if not isinstance(statistics, ImageStatistics):
            raise TypeError(
                f"murf_fast.{what}: `statistics` must be what `statistics` returns, got {type(statistics).__name__}"
            )
        keys = statistics.keys.any()
        have, wanted = (statistics.model, keys.shape[1]), (what, self._query_channels())
        if have != wanted:
            raise ValueError(
                f"murf_fast.{what}: `statistics` must be this model's, whose keys have {wanted[1]} channels, got those "
                f"of {have[0]} with {have[1]}"
            )
        have, wanted = (keys.shape[0], *statistics.image_size), (image.shape[0], *image.shape[2:])
        if have != wanted:
            raise ValueError(
                f"murf_fast.{what}: `statistics` must be those of this image, of batch and size {wanted}, got those of "
                f"one of {have}"
            )

    def statistics(
        self,
        image: Tensor,
        output_size: Size | None = None,
        *,
        grids: Grids | None = None,
        recompute: bool = False,
    ) -> ImageStatistics:
        """What every region of an image's output needs of the whole image: group norms, and the image's keys.

        For outputs in tiles: made once, and passed to :meth:`encode_image` with every tile's region.

        Args:
            image, output_size, grids: As for :meth:`encode_image`. AnyUp's statistics are for outputs of any size.
            recompute: Compute the layers in bands of rows, from the image on for every norm, which takes three to
                five times as long and keeps nothing of the image's size.

        Returns:
            An :class:`ImageStatistics`, without gradients. Where images are encoded by plain PyTorch (float64, no
            backend but the reference, and what the class says) there are keys only, and regions encode the whole image.

        Raises:
            TypeError, ValueError: An argument is wrong, or gradients are needed; the message names it.

        Memory: three maps of the queries' channels at the image's size (JAFAR: and one at the output's, if that is
        another; NAF: one and a half at the output's, if that is another one and one at the image's) while it runs, or
        with ``recompute`` three bands of rows (24 MiB on a CPU; NAF: a dozen, with their borders); the keys of every
        grid.
        """
        what = f"{type(self).__name__}.statistics"
        size = self._check_image(image, output_size)
        _arguments.flag(what, "recompute", recompute)
        if self._wants_gradients(image):
            raise ValueError(f"murf_fast.{what}: statistics have no gradient; call under torch.no_grad()")
        return self._statistics(image, size, None if grids is None else check_grids(what, grids), recompute)

    def predict(
        self,
        image: Tensor | EncodedImage,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        output_size: Size | None = None,
        *,
        reduce: Reduce | None = None,
        region: Integers | None = None,
    ) -> Tensor:
        """A linear head on the upsampled features, without the upsampled features.

        ``weight forward(image, features) + bias``: both are linear, so the head comes first, on the features' grid, and
        its K logits are upsampled. Where heads of the attention share out the channels (NAF), so do as many partial
        heads, whose logits are added; if that is more work than upsampling all channels, the head comes last, band by
        band of rows.

        Args:
            image, features, output_size, region: As for ``forward``; one map.
            weight: (K, C) or (K, C, 1, 1) in the dtype of the features.
            bias: (K,), any floating dtype.
            reduce: None: logits; ``"softmax"``: probabilities; ``"argmax"``: the class of the largest logit, the lowest
                of equal ones.

        Returns:
            (B, K, height, width) in the dtype of the features, differentiable; or with ``"argmax"`` labels (B, height,
            width), uint8 up to 256 classes, int16 up to 32768, int32 above. Autocast does not change the head.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.

        Memory: that of ``forward`` with the result (for labels: a few rows of logits) in place of its result.
        """
        what = f"{type(self).__name__}.predict"
        _checks.choice(what, "reduce", reduce, REDUCTIONS, optional=True)
        maps = _one_map(what, features)
        with torch.autocast(maps[0].device.type, enabled=False):
            check_head(what, maps, weight, bias, None, None, maps[0].shape[2:])
        self._check_values(maps, None, single=False)
        encoded = self._encoded(image, maps, output_size, region)
        attention, dtype = self._attention(encoded, maps[0], maps[0].dtype)
        if reduce == "argmax":  # labels have no gradient
            attention = attention._replace(queries=attention.queries.detach(), keys=attention.keys.detach())
            maps, weight, bias = [maps[0].detach()], weight.detach(), None if bias is None else bias.detach()
        with torch.autocast(maps[0].device.type, enabled=False):
            result = predicted(attention, maps[0].to(dtype), weight.flatten(1).to(dtype), bias, reduce)
        return result if reduce == "argmax" else result.to(maps[0].dtype)

    @torch.no_grad()
    def attention_map(
        self,
        image: Tensor | EncodedImage,
        features: Tensor,
        query: tuple[int, int],
        output_size: Size | None = None,
    ) -> Tensor:
        """How much one pixel of the output attends to every pixel of the features (AnyUp's Figure 8).

        Args:
            image, features, output_size: As for ``forward``; one map.
            query: (row, column) of the output.

        Returns:
            (B, heads, h, w) in float32 (float64 for float64 features), each head's weights of sum one, zero outside the
            window; the result is the features' sum weighed with their mean over heads (NAF: by head). No gradients.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.

        Memory: as ``forward`` with ``region``, of one pixel.
        """
        what = f"{type(self).__name__}.attention_map"
        maps = _one_map(what, features)
        if not _checks.is_sequence(query) or len(query) != 2:
            found = f"a {type(query).__name__}" if isinstance(query, Tensor) else repr(query)
            raise TypeError(f"murf_fast.{what}: `query` must be (row, column), got {found}")
        query = [_checks.integer(what, f"query[{i}]", n, 0) for i, n in enumerate(query)]
        if isinstance(image, EncodedImage):
            first, size = image.region[:2], image.region[2:]
        else:
            first, size = (0, 0), self._check_image(image, output_size)
        if any(not m <= n < m + k for n, m, k in zip(query, first, size, strict=True)):
            place = f"the output of {size}" if first == (0, 0) else f"the encoded region, {(*first, *size)}"
            raise ValueError(f"murf_fast.{what}: `query` must lie within {place}, got {tuple(query)}")
        encoded = self._encoded(image, maps, output_size, (query[0], query[1], 1, 1))
        attention, dtype = self._attention(encoded, maps[0], maps[0].dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        heads = self.num_heads
        q, k = (x.to(dtype).unflatten(1, (heads, -1)) for x in (attention.queries[..., 0, 0], attention.keys))
        rows, columns = (
            torch.from_numpy(table.multiplicity()).to(dtype=dtype, device=k.device)[0]
            for table in attention.rule.tables((1, 1), tuple(k.shape[3:]))
        )
        scores = torch.einsum("bnd,bndyx->bnyx", q, k) * q.shape[2] ** -0.5
        scores = scores + rows.log()[:, None] + columns.log()
        return scores.flatten(2).softmax(2).view_as(scores)

    def _upsample(
        self,
        image: Tensor | EncodedImage,
        features: Maps,
        output_size: Size | None,
        values: Maps | None,
        region: Integers | None,
    ) -> Tensor | list[Tensor]:
        """``forward`` of all three."""
        what = type(self).__name__
        single = isinstance(features, Tensor) or not isinstance(features, Sequence)
        maps: list[Tensor] = [features] if single else list(features)  # type: ignore[list-item]
        if not maps:
            raise TypeError(f"murf_fast.{what}: `features` must be a map or a non-empty list of them, got an empty one")
        given = self._check_values(maps, values, single)
        encoded = self._encoded(image, maps, output_size, region)
        results = []
        for f, v in zip(maps, given, strict=True):
            attention, dtype = self._attention(encoded, f, v.dtype, like=v)
            results.append(attention(v.to(dtype)).to(v.dtype))
        return results[0] if single else results

    def _check_values(self, maps: list[Tensor], values: Any, single: bool) -> list[Tensor]:
        what = type(self).__name__
        for f in maps:
            _checks.map_(what, "features", f)
        if values is None:
            given = maps
        else:
            given = [values] if single else values
            if not single and not (isinstance(values, Sequence) and len(values) == len(maps)):
                kind = "one tensor" if isinstance(values, Tensor) else f"a {type(values).__name__}"
                count = len(values) if isinstance(values, Sequence) else kind
                raise ValueError(
                    f"murf_fast.{what}: `values` must have one entry for each of the {len(maps)} maps, got {count}"
                )
            for f, v in zip(maps, given, strict=True):
                _checks.map_(what, "values", v)
                _checks.same_device(what, "values", v, "features", f)
                if v.shape[0] != f.shape[0] or v.shape[2:] != f.shape[2:]:
                    raise ValueError(
                        f"murf_fast.{what}: `values` must have batch and grid of `features`, "
                        f"{(f.shape[0], *f.shape[2:])}, got {(v.shape[0], *v.shape[2:])}"
                    )
        name = "features" if values is None else "values"
        for v in given:
            if self._values == "split" and v.shape[1] % self.num_heads:
                raise ValueError(
                    f"murf_fast.{what}: `{name}` must have a multiple of {self.num_heads} channels, got {v.shape[1]}"
                )
        return list(given)

    def _encoded(
        self, image: Tensor | EncodedImage, maps: list[Tensor], output_size: Size | None, region: Integers | None
    ) -> EncodedImage:
        """The image's part of a call with these maps."""
        what = type(self).__name__
        if isinstance(image, EncodedImage):
            if image.model != what or image.queries.shape[1] != self._query_channels():
                raise ValueError(
                    f"murf_fast.{what}: `image` must have been encoded by this model, whose queries have "
                    f"{self._query_channels()} channels, got one of {image.model} with {image.queries.shape[1]}"
                )
            if output_size is not None and tuple(_checks.grid(what, "output_size", output_size)) != image.output_size:
                raise ValueError(
                    f"murf_fast.{what}: `output_size` must be that of the encoded image, {image.output_size}, "
                    f"got {output_size!r}"
                )
            self._check_parts()
            encoded = image if region is None else image.crop(region)
            for f in maps:
                self._check_features(f, encoded.queries)
                self._check_windows(encoded.output_size, f)
            return encoded
        size = self._check_image(image, output_size)
        region = check_region(what, region, size)
        for f in maps:
            self._check_features(f, image)
            self._check_windows(size, f)
        return self._encode(image, size, region, check_grids(what, maps))

    def _attention(
        self, encoded: EncodedImage, features: Tensor, dtype: torch.dtype, like: Tensor | None = None
    ) -> tuple[Attention, torch.dtype]:
        """Attention to features for values of ``dtype`` (in the layout of ``like``), and the dtype it runs in."""
        grid = (features.shape[2], features.shape[3])
        keys = self._keys(encoded.keys.on(type(self).__name__, grid), features)
        rule = self._rule(encoded.output_size, grid)
        if encoded.region != (0, 0, *encoded.output_size):
            rule = rule.crop(*encoded.region, out=encoded.output_size)
        dtype = self._arithmetic(encoded.queries.dtype, dtype)
        planar = like is not None and self._keeps_layout and not is_channels_last(like)
        layout = torch.contiguous_format if planar else torch.channels_last
        queries = encoded.queries.to(dtype).contiguous(memory_format=layout)
        return Attention(queries, keys.to(dtype), rule, self.num_heads, self._values), dtype

    # Whether results have the layout of the values; else they are channels_last.
    _keeps_layout = True

    def _arithmetic(self, own: torch.dtype, values: torch.dtype) -> torch.dtype:
        """The dtype of the attention, of the queries' and the values'."""
        return values

    def _check_features(self, features: Tensor, image: Tensor) -> None:
        """Features beside an image, or its queries."""
        what = type(self).__name__
        _checks.map_(what, "features", features)
        if image.shape[0] != features.shape[0]:
            raise ValueError(
                f"murf_fast.{what}: `features` must have the batch size of `image`, {image.shape[0]}, "
                f"got {features.shape[0]}"
            )
        if features.device != image.device:
            raise ValueError(
                f"murf_fast.{what}: `features` must be on the device of `image`, {image.device}, got {features.device}"
            )

    def _check_parts(self) -> None:
        """Refuses submodules that would not be called."""

    def _check_windows(self, size: Pair, features: Tensor) -> None:
        """Whether the windows of an output of this size fit the features."""

    def _check_image(self, image: Tensor, output_size: Size | None) -> Pair:
        """The output's size, of arguments that fit."""
        raise NotImplementedError

    def _query_channels(self) -> int:
        raise NotImplementedError

    def _rule(self, size: Pair, grid: Pair) -> Windows:
        raise NotImplementedError

    def _encode(
        self,
        image: Tensor,
        size: Pair,
        region: Region,
        grids: list[Pair] | None,
        known: ImageStatistics | None = None,
    ) -> EncodedImage:
        """``known`` has the keys, and saves the pass over the whole image."""
        raise NotImplementedError

    def _statistics(self, image: Tensor, size: Pair, grids: list[Pair] | None, recompute: bool) -> ImageStatistics:
        raise NotImplementedError

    def _wants_gradients(self, image: Tensor) -> bool:
        """Whether the image's part of a call wants one."""
        raise NotImplementedError

    def _keys(self, of_image: Tensor, features: Tensor) -> Tensor:
        """Projected keys (B, D, h, w) of the image's and the features' part."""
        raise NotImplementedError


def check_grids(what: str, grids: Grids) -> list[Pair]:
    """(height, width) of maps, or given; each once."""
    if not isinstance(grids, Sequence) and (isinstance(grids, Tensor) or not _arguments.is_sequence(grids)):
        found = f"a {type(grids).__name__}" if isinstance(grids, Tensor) else repr(grids)
        raise TypeError(f"murf_fast.{what}: `grids` must be a list of (height, width) or of maps, got {found}")
    sizes = [
        _checks.map_(what, f"grids[{i}]", g).shape[2:]
        if isinstance(g, Tensor)
        else _checks.grid(what, f"grids[{i}]", g)
        for i, g in enumerate(grids)
    ]
    each: list[Pair] = []
    for height, width in sizes:
        place(each, (height, width))
    return each


def _one_map(what: str, features: Maps) -> list[Tensor]:
    maps = _checks.maps(what, features, same_channels=True)
    if len(maps) != 1:
        raise ValueError(f"murf_fast.{what}: `features` must be one map, got {len(maps)}")
    return maps
