"""The training-free detector: banks of normal patches at several resolutions, and distances to them."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from murf_fast import _arguments, backends
from murf_fast.annotations import AnomalyMethod, AnomalyRules, BankIndex, Image, Precision, Projection
from murf_fast.anomaly import _description, _files, _images
from murf_fast.anomaly._coreset import coresets
from murf_fast.anomaly._encoder import PatchAtLeast, normalization_of
from murf_fast.anomaly._filling import Filling, OneProcess, fill
from murf_fast.anomaly._fit_arguments import is_cluster, several, share
from murf_fast.anomaly._growing import OF_ENCODER, GrowingBanks
from murf_fast.anomaly._images import Size
from murf_fast.anomaly._indices import Index, Sharded, over_ranks, prepared, search
from murf_fast.anomaly._options import DetectorOptions
from murf_fast.anomaly._overlap import encoded
from murf_fast.anomaly._patches import WHAT, HeldOut, LookedAt, PatchEncoder, Patches
from murf_fast.anomaly._references import references_of
from murf_fast.anomaly.methods import configured
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.anomaly.ray_workers import RayWorkers
from murf_fast.anomaly.result import Anomaly
from murf_fast.anomaly.scoring import PRESETS, ScoringRules, mean_top, reweighted_score, rules_of
from murf_fast.anomaly.sharded_index import ShardedIndex
from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit import _resolutions
from murf_fast.nn.vit._fingerprint import fingerprint, rounded
from murf_fast.nn.vit.families import resolved
from murf_fast.ops._random_projection import PROJECTIONS
from murf_fast.ops.gaussian_blur import gaussian_blur
from murf_fast.ops.k_center_greedy import k_center_greedy
from murf_fast.ops.nearest_distance import PRECISIONS, NearestIndex

if TYPE_CHECKING:
    from typing_extensions import Unpack

INDICES = ("exact", "cells", "coreset", "ivf")
ON_EMPTY = ("skip", "raise")
BACKGROUNDS = ("black", "keep")
HELD_OUT = 4


class MultiResolutionDetector:
    """Anomaly scores of an image from the distances of its patches to those of normal images (MRF-AD, MuRF).

    ``map = blur(mean_b U_b d_b)``, where ``d_b(p)`` is the mean distance of patch p's feature to the ``rules.k``
    nearest rows of bank b, and ``U_b`` resizes to the image. One bank per scale and layer holds the patches of all
    training images.

    Args:
        encoder: A frozen ViT that :class:`MultiResolutionEncoder` takes, in eval mode, whose images are normalized as
            its family's are; or such an encoder, which then decides about layers, scales and normalization.
        layers: 0-based blocks whose outputs are used.
        scales: Factors of the (prescaled) image's size.
        index: ``"exact"``: all rows. ``"cells"``: the same answers, by ``NearestIndex(cells="auto")``. ``"coreset"``: a
            share of the rows of every bank, chosen by :func:`k_center_greedy`, searched exactly. ``"ivf"``: all rows,
            searched approximately by faiss.
        foreground: Called with an image (3, H, W); gives an (H, W) mask, true on the object. Patches that are mostly
            background are in no bank and score 0.
        pixels: Images of more are made smaller, to about so many, keeping their shape; those that are near enough stay,
            as in the paper's Table 5. None: never.
        enlarge: Images of fewer are enlarged to about ``pixels``, too: the paper's protocol. Work, rows and memory
            grow as the pixels do: an image of 0.05 megapixels has a hundred times as many patches at 5.
        norm: Apply the model's final norm to the chosen layers; of an ``encoder`` that is none, its own counts.
        shorter_side: Instead of ``pixels``: images are brought to so many pixels of their shorter side, smaller or
            larger, as by AnomalyDINO and SuperAD (bicubic with antialiasing).
        rules: A name in ``PRESETS`` (``"mrf-ad"``, ``"mrf-max"``, ``"patchcore"``, ``"anomaly-dino"``, ``"superad"``)
            or :class:`ScoringRules`.
        coreset: Share of the rows that a coreset keeps.
        projection: ``"sparse"`` or ``"linear"``: rows of coresets are chosen by distances of random projections, see
            :func:`k_center_greedy`.
        references: Share of the images of :meth:`fit` whose patches fill the banks: those that :func:`k_center_greedy`
            chooses by the CLS tokens of the last of ``layers`` at the first scale, as in SuperAD. None: all of them.
        background: ``"black"`` blackens the background before encoding, as in MRF-AD; ``"keep"`` leaves it.
        precision: As for :class:`NearestIndex`.
        on_empty: Where an image has no patch at a scale, as the image is smaller than a patch there, or no patch is
            mostly foreground. ``"skip"``: a small image is enlarged to one patch; without foreground the scale is left
            out for this image, and a scale without any row altogether, with a warning; an image without foreground
            at all scores 0. ``"raise"``: a ValueError that names image and scale, before the image is encoded.

    Attributes:
        banks_: (rows, D) per scale and layer (layers fastest), mapped from disk; no rows where a scale is left out.
        images_: Number of images they come from.
        method: The name that :meth:`by_name` was given; None without one.
        normal_: :class:`NormalRange`, what normal images score that are not in the banks; None where it is not known,
            as for banks of one image or of earlier versions.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: features of one image; banks are files, of which searches hold a copy in ``precision``.

    Source: MRF-AD sections 4 and 5; MuRF section 3.2.
    """

    def __init__(
        self,
        encoder: nn.Module,
        layers: Sequence[int] = (7, 9, 11),
        scales: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7),
        index: BankIndex = "exact",
        foreground: Callable[[Tensor], Tensor] | None = None,
        pixels: float | None = 5e6,
        *,
        enlarge: bool = False,
        norm: bool = False,
        shorter_side: int | None = None,
        rules: AnomalyRules | ScoringRules = "mrf-ad",
        coreset: float = 0.1,
        projection: Projection | None = None,
        references: float | None = None,
        background: Literal["black", "keep"] = "black",
        precision: Precision = "auto",
        on_empty: Literal["skip", "raise"] = "skip",
    ) -> None:
        _arguments.flag(WHAT, "enlarge", enlarge)
        _arguments.choice(WHAT, "on_empty", on_empty, ON_EMPTY)
        _arguments.choice(WHAT, "index", index, INDICES)
        _arguments.choice(WHAT, "background", background, BACKGROUNDS)
        _arguments.choice(WHAT, "precision", precision, PRECISIONS)
        if pixels is not None:
            pixels = _arguments.number(WHAT, "pixels", pixels)
            if pixels <= 0:
                raise ValueError(f"murf_fast.{WHAT}: `pixels` must be positive or None, got {pixels!r}")
        if shorter_side is not None:
            shorter_side = _arguments.integer(WHAT, "shorter_side", shorter_side, 1)
            if enlarge:
                raise ValueError(f"murf_fast.{WHAT}: `enlarge` is of `pixels`, which `shorter_side` stands in for")
            pixels = None
        coreset = share("coreset", coreset)
        references = None if references is None else share("references", references)
        if projection is not None:
            _arguments.choice(WHAT, "projection", projection, PROJECTIONS)
        if foreground is not None and not callable(foreground):
            raise TypeError(f"murf_fast.{WHAT}: `foreground` must be callable, got {type(foreground).__name__}")
        rules = rules_of(rules)
        if index == "ivf" and rules.image_score == "reweighted":
            raise ValueError(
                f'murf_fast.{WHAT}: `rules` with "reweighted" scores need index="exact", "cells" or "coreset"'
            )
        if not isinstance(encoder, MultiResolutionEncoder):
            _resolutions.checked_scales(WHAT, scales)
            kind = PatchAtLeast if on_empty == "skip" else MultiResolutionEncoder
            _arguments.flag(WHAT, "norm", norm)
            encoder = kind(encoder, scales=scales, layers=layers, norm=norm, **normalization_of(encoder))
        if references is not None and encoder.family.prefix() is None:
            raise ValueError(f"murf_fast.{WHAT}: `references` are chosen by CLS tokens, which `encoder` has none of")
        patch = encoder.family.patch_size
        if pixels is not None and pixels < patch**2:
            raise ValueError(
                f"murf_fast.{WHAT}: `pixels` must be None or those of at least one patch, {patch**2} (five "
                f"megapixels are 5e6), got {pixels!r}"
            )
        if shorter_side is not None and shorter_side < patch:
            raise ValueError(
                f"murf_fast.{WHAT}: `shorter_side` must be at least the {patch} pixels of a patch, got {shorter_side}"
            )
        self.encoder, self.index, self.foreground, self.pixels = encoder, index, foreground, pixels
        self.rules, self.coreset, self.background, self.precision = rules, coreset, background, precision
        self.on_empty, self.enlarge, self.projection = on_empty, enlarge, projection
        self.shorter_side, self.references = shorter_side, references
        self.method: str | None = None
        self._weights = rules.bank_weights(self._patches.scales, len(encoder.layers))
        self.banks_: list[Tensor] = []
        self.images_ = 0
        self.normal_: NormalRange | None = None
        self._indices: list[Index | None] = []
        self._sharded: Sharded | None = None
        self._home: _files.Home | None = None

    @classmethod
    def by_name(
        cls, method: AnomalyMethod, encoder: nn.Module, **options: Unpack[DetectorOptions]
    ) -> MultiResolutionDetector:
        """A detector as a published method says: layers, norm, sizes, coreset and rules are those of ``METHODS``.

        Args:
            method: A name in ``METHODS``: ``"mrf-ad"``, ``"patchcore"``, ``"anomaly-dino"`` or ``"superad"``.
            encoder: The model. Layers are given as shares of its depth.
            options: Arguments of the class that are to be other than the method's; ``pixels`` and ``shorter_side``
                stand in for each other.

        Raises:
            TypeError, ValueError: As the class; there is no such method; ``encoder`` is a MultiResolutionEncoder, which
                has layers and scales already.
        """
        if isinstance(encoder, MultiResolutionEncoder):
            raise TypeError(f"murf_fast.{WHAT}.by_name: `encoder` must be a model, which the method chooses layers of")
        model, family = resolved(encoder)
        detector = cls(encoder, **configured(method, len(family(model).blocks), **options))
        detector.method = method
        return detector

    def __repr__(self) -> str:
        rules = next((repr(name) for name, preset in PRESETS.items() if preset == self.rules), repr(self.rules))
        rows = sum(map(len, self.banks_))
        fitted = f"{rows} rows of {self.images_} images in {len(self.banks_)} banks" if self.banks_ else "not fitted"
        return (
            f"MultiResolutionDetector({type(self.encoder.model).__name__}, layers={self.encoder.layers}, "
            f"scales={self.encoder.scales}, index={self.index!r}, pixels={self.pixels}, "
            f"rules={rules}, {''.join(self._particulars())}{fitted})"
        )

    def _particulars(self) -> Iterator[str]:
        """What is not as it is by default."""
        if self.index == "coreset":
            yield f"coreset={self.coreset}, projection={self.projection!r}, "
        for name in ("references", "shorter_side"):
            if getattr(self, name) is not None:
                yield f"{name}={getattr(self, name)}, "
        if self.encoder.norm:
            yield "norm=True, "

    def fit(
        self,
        images: Iterable[Image],
        *,
        folder: str | Path | None = None,
        overwrite: bool = False,
        resume: bool = False,
        held_out: int = HELD_OUT,
        batch: int | None = None,
        cluster: RayWorkers | None = None,
        progress: Callable[[int, int | None], None] | None = None,
        references_progress: Callable[[int, int], None] | None = None,
        coreset_progress: Callable[[int, int], None] | None = None,
    ) -> MultiResolutionDetector:
        """Fills the banks with the patches of normal images.

        Args:
            images: Several, of any sizes, as a list or any iterable (with ``references`` a list, they are gone through
                twice): tensors (3, H, W), arrays (H, W, 3), gray ones of
                either, PIL images or paths of image files; uint8, uint16 or in [0, 1]. An alpha channel is dropped.
            folder: Where the banks are written while they grow, and stay as :meth:`save` writes them. It is tried
                before the first image. None: files without a name, which vanish with the process however it ends.
            overwrite: Replace a detector, or an unfinished fit, that ``folder`` holds; the detector stays until the
                new one is whole.
            resume: Go on with the fit that did not finish in ``folder``, if it holds one. Images that are done are read
                again, and not encoded: they, what ``foreground`` says of them, the encoder and all settings that
                decide about rows must be the same. Images that are not done may be others by now, more or fewer: the
                banks are those of a fit of the images that are given. Rows of coresets that are chosen stay chosen,
                and are not compared with the others again.
            held_out: So many images at most, and a quarter of all, are scored by the rows of those before them, which
                gives ``normal_``; 0: none. Their rows are in the banks all the same.
            batch: As for :meth:`score_many`.
            cluster: Its workers encode the images, read files by themselves, and choose the rows of coresets, each from
                a part of them; ``folder`` must lie where all see it. The files are those of one process, bit for bit
                on processors of one kind with as many threads, and either goes on with what the other began.
                ``foreground`` needs ``batch=1``; ``references`` are chosen in this process.
            progress: Called with (images done, images in all or None) after every image.
            references_progress: With ``references``, called with (images done, images in all) while they are chosen.
            coreset_progress: With ``index="coreset"``, called with (rows selected, rows wanted) of all banks together.

        Returns:
            The detector itself.

        Raises:
            TypeError, ValueError: An image is none, or has no patch at a scale (see ``on_empty``); those that lie in
                memory as a list are checked before the first is encoded, and so are files, each of which is decoded
                once for it. ``rules.k`` is more than the rows of a bank. ``folder`` holds a detector or an unfinished
                fit.
            OSError: ``folder`` cannot be written to.

        Memory: the features of one image, or of small ones that share a pass (up to the encoder's ``tokens_per_pass``
        patches together), what the encoder takes, and two images that are read ahead; rows go to files, which are
        mapped. A coreset beside that the rows it keeps, and what :func:`k_center_greedy` takes for one bank. Held-out
        images: what :meth:`score` takes.
        """
        place = None if folder is None else _files.folder_of(folder)
        given = {"overwrite": overwrite, "resume": resume, "cluster": is_cluster(cluster)}
        for name, value in given.items():
            if _arguments.flag(WHAT, name, value) and place is None:
                raise ValueError(f"murf_fast.{WHAT}: `{name}` needs a `folder`")
        if place is not None:
            _files.check_free(place, overwrite, resume)
        told = {"references_progress": references_progress, "coreset_progress": coreset_progress}
        images = self._patches.checked(several(images, held_out, batch, progress=progress, **told), self._check_rows)
        growing = GrowingBanks(_description.places(self.encoder), place, self._settings(place), resume)
        home = workers = None
        try:
            if self.references is not None:
                images = references_of(self._patches, images, self.references, references_progress)
            workers = None if cluster is None else cluster._fit(self._patches, images, batch)
            held = self._fill(growing, images, held_out, batch, progress, workers)
            rows = growing.mapped()
            self._tell_empty(rows)
            banks, chosen = rows, None
            if self.index == "coreset":
                of: dict[str, Any] = {
                    "projection": self.projection,
                    "backend": backends.resolve(None, "cpu", rows[0].dtype),
                }
                selection = functools.partial(growing.selection, **of)
                choose = {} if workers is None else {"choose": workers.choose(growing)}
                chosen = coresets(rows, self.coreset, self.projection, coreset_progress, selection, **choose)
                banks = [r[c] for r, c in zip(rows, chosen, strict=True)]
            self._check_rows([len(bank) for bank in banks[:: len(self.encoder.layers)]])
            held = held[-max(1, growing.done // 4) :] if growing.done > 1 else []
            before = [len(r) - sum(h.rows[i // len(self.encoder.layers)] for h in held) for i, r in enumerate(rows)]
            if not held:
                normal = None
            elif chosen is None:
                others = [r[:n] for r, n in zip(rows, before, strict=True)]
                sharded = None if workers is None or self.index == "ivf" else workers.sharded(growing)
                normal = self._normal_range(held, rows, others, sharded)
            else:
                others = [r[c[c < n]] for r, c, n in zip(rows, chosen, before, strict=True)]
                normal = self._normal_range(held, rows, others)
            if place is not None:
                description = self._entries(growing.done, normal)
                whole = chosen is None
                entries = growing.put_in_place() if whole else _files.write_banks(place, banks, growing.places)
                home = _files.commit(place, {**description, "banks": entries})
        except BaseException:
            growing.stop()
            raise
        finally:
            if workers is not None:
                workers.close()
        growing.close()
        self.banks_, self.images_, self.normal_ = banks, growing.done, normal
        self._sharded, self._home, self._indices = None, home, []
        return self

    def add(
        self,
        images: Iterable[Image],
        *,
        in_place: bool = False,
        overwrite: bool = False,
        resume: bool = False,
        held_out: int = HELD_OUT,
        batch: int | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> MultiResolutionDetector:
        """Adds the patches of more normal images to the banks, after :meth:`fit` or :meth:`load`.

        Exact and approximate banks are those that :meth:`fit` makes of the old images and the new ones. A coreset is
        chosen anew, from the rows it had and all rows of the new images, and grows by its share of these: rows that
        it once left out are not looked at again. ``references`` are of a fit: of the new images all count.

        Args:
            images, held_out, batch, progress: As for :meth:`fit`. ``normal_`` is joined with what up to ``held_out`` of
                the new images score by the old banks.
            in_place: Write the larger banks to the folder that the detector was loaded from, fitted into or saved to.
                It holds the old detector until the new one is whole, and then that, whatever ends this. False: the
                folder stays as it is; :meth:`save` writes the larger banks.
            overwrite: Start anew where the folder has an addition, or a fit, that did not finish.
            resume: Go on with the addition that did not finish in the folder, as for :meth:`fit`; there must be one.

        Returns:
            The detector itself.

        Raises:
            TypeError, ValueError: As for :meth:`fit`; ranks or workers hold parts of the banks (``group``
                or ``cluster`` of :meth:`load`); ``in_place`` without a folder, or another detector is in it by now.

        Memory: as for :meth:`fit`; old and new rows are written to the folder, or to files without a name.
        """
        self._fitted()
        if self._sharded is not None:
            raise ValueError(
                f"murf_fast.{WHAT}: banks of which ranks or workers hold parts take no further images; load() them "
                "whole"
            )
        dtype = next(self.encoder.model.parameters()).dtype
        other = next((bank.dtype for bank in self.banks_ if len(bank) and bank.dtype != dtype), None)
        if other is not None:
            raise ValueError(
                f"murf_fast.{WHAT}: banks in {other} take no rows of an encoder in {dtype}, as `any_precision` allows"
            )
        place, settings = self._place_of_addition(in_place, overwrite, resume)
        n, coreset = len(self.encoder.layers), self.index == "coreset"
        images = self._patches.checked(
            several(images, held_out, batch, progress=progress),
            self._check_rows,
            [len(bank) for bank in self.banks_[::n]],
        )
        growing, home = GrowingBanks(_description.places(self.encoder), place, settings, resume), self._home
        try:
            if not coreset and not growing.done:
                growing.begin_with(self.banks_)
            held = self._fill(growing, images, held_out, batch, progress)
            rows = growing.mapped()
            normal = self._normal_range(held, rows, None) if held else None
            if normal is None or self.normal_ is not None:
                normal = self.normal_ if normal is None else cast("NormalRange", self.normal_).joined(normal)
            banks = rows
            if coreset:
                banks = [self._chosen_anew(*pair) for pair in zip(self.banks_, rows, strict=True)]
            self._check_rows([len(bank) for bank in banks[::n]])
            count = self.images_ + growing.done
            if place is not None:
                description = self._entries(count, normal)
                cast("_files.Home", home).check()
                entries = _files.write_banks(place, banks, growing.places) if coreset else growing.put_in_place()
                home = _files.commit(place, {**description, "banks": entries})
        except BaseException:
            growing.stop()
            raise
        growing.close()
        self.banks_, self.images_, self.normal_, self._home, self._indices = banks, count, normal, home, []
        return self

    def _place_of_addition(self, in_place: bool, overwrite: bool, resume: bool) -> tuple[Path | None, dict[str, Any]]:
        """The folder that grows, and what must be the same for an addition to go on."""
        for name, value in (("overwrite", overwrite), ("resume", resume)):
            if _arguments.flag(WHAT, name, value) and not in_place:
                raise ValueError(f"murf_fast.{WHAT}: `{name}` needs `in_place`")
        if not _arguments.flag(WHAT, "in_place", in_place):
            return None, {}
        if self._home is None:
            raise ValueError(f"murf_fast.{WHAT}: `in_place` needs a folder: load() the detector, or save() it first")
        self._home.check()
        _files.check_finished(self._home.folder, overwrite, resume)
        if resume and not (self._home.folder / _files.UNFINISHED).exists():
            raise ValueError(
                f"murf_fast.{WHAT}: {self._home.folder} holds no addition that did not finish, so `resume` would add "
                "images that may be in it already"
            )
        settings = {**self._settings(self._home.folder), "detector": self._home.digest}
        return self._home.folder, settings

    def _fill(
        self,
        growing: GrowingBanks,
        images: Iterable[Image],
        held_out: int,
        batch: int | None,
        progress: Callable[..., Any] | None,
        workers: Filling | None = None,
    ) -> list[HeldOut]:
        """Writes the rows of all images, which ``workers`` or this process encode. Returns the last ``held_out``."""
        total = len(cast("Any", images)) if hasattr(images, "__len__") else None
        filling = workers or OneProcess(self._patches, images, batch, growing.folder is not None)
        return fill(growing, filling, total, held_out, progress)

    def _chosen_anew(self, bank: Tensor, new: Tensor) -> Tensor:
        """A coreset of the rows of one and of new ones, larger by its share of these."""
        if not len(new):
            return bank
        union = torch.cat([bank.to(new.dtype), new]) if len(bank) else new
        count = len(bank) + max(1, int(self.coreset * len(new)))
        return union[k_center_greedy(union, count=count, projection=self.projection)]

    @torch.no_grad()
    def _normal_range(
        self,
        held: Sequence[HeldOut],
        rows: Sequence[Tensor],
        others: Sequence[Tensor] | None,
        sharded: Sharded | None = None,
    ) -> NormalRange | None:
        """What images whose rows are the last of ``rows`` score by banks of ``others``; None: by the detector's own."""
        n, device = len(self.encoder.layers), self._patches.device
        indices = None
        if others is not None:
            indices = self._prepared(others, sharded, self.rules.k)
        ends, found = [len(r) for r in rows], []
        for image in reversed(held):
            of_image = []
            for i, of_bank in enumerate(rows):
                count = image.rows[i // n]
                of_image.append(
                    Patches(of_bank[ends[i] - count : ends[i]].to(device), image.kept[i // n], image.grids[i // n])
                )
                ends[i] -= count
            maps, weighted = self._searched(of_image, indices)
            if any(m is not None for m in maps):
                found.append(self._anomaly(image.size, maps, weighted))
        return NormalRange.of(found)

    def score(self, image: Image) -> Anomaly:
        """The anomaly map of an image, at its own size, and its score.

        Args:
            image: One, of any size: a tensor (3, H, W), an array (H, W, 3), a gray one of either, a PIL image or the
                path of an image file; uint8, uint16 or in [0, 1]. An alpha channel is dropped.

        Raises:
            TypeError, ValueError: It is no image, or has no patch at a scale (see ``on_empty``); or neither
                :meth:`fit` nor :meth:`load` was called.

        Memory: the features of the image, what the encoder takes, and a few maps of the image's size. The first call
        prepares the banks for searches: a copy in ``precision`` where that is not float32 (with ``"ivf"`` always).
        """
        self._fitted()
        looked, of_image = self._patches.encode_one(image)
        return self._anomaly(looked.size, *self._searched(of_image))

    def score_many(self, images: Iterable[Image], *, batch: int | None = None) -> Iterator[Anomaly]:
        """What :meth:`score` says of every image, one after another in their order.

        Images that are small share passes of the encoder, and files are read while those before them are scored. On a
        GPU the next images of a list, or files, are encoded on a stream of their own while those before them are
        searched; a result belongs to the stream that is current when it is asked for. The results are those of
        :meth:`score`, bit by bit where the encoder's features of an image do not depend on what shares its pass, as
        with ``batch=1``; else up to the rounding of its products.

        Args:
            images: As for :meth:`fit`.
            batch: So many images at most share a pass. None: as many as ``tokens_per_pass`` of the encoder allows,
                which holds for every ``batch``, too.

        Raises:
            TypeError, ValueError: As for :meth:`score`, when the image's turn comes; images of a list as for
                :meth:`fit`, before the first is encoded.

        Memory: as for :meth:`score`, times the images that share a pass, and two images that are read ahead; on a GPU
        the features of two passes.
        """
        self._fitted()
        if batch is not None:
            batch = _arguments.integer(WHAT, "batch", batch, 1)
        # Banks have rows enough; an image may have as few as it likes.
        enough = [self.rules.k] * self._patches.scales
        return self._scored(self._patches.checked(_images.many(images), self._check_rows, enough), batch)

    def score_each_scale(self, image: Image) -> list[Anomaly]:
        """What every scale says by itself and, last, what :meth:`score` says; from one encoding.

        Arguments, errors and memory are those of :meth:`score`.
        """
        self._fitted()
        looked, of_image = self._patches.encode_one(image)
        maps, weighted = self._searched(of_image)
        n = len(self.encoder.layers)
        parts = [range(i, i + n) for i in range(0, len(maps), n)]
        return [self._anomaly(looked.size, maps, weighted, banks) for banks in (*parts, None)]

    def grids(self, size: tuple[int, int], name: str = "an image") -> list[tuple[int, int]]:
        """Patches (rows, columns) per resolution of an image of ``size`` (height, width); a ValueError where none."""
        return self._patches.grids(size, name)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the banks (safetensors) and a description (JSON) with their checksums, which :meth:`load` reads.

        Args:
            folder: Made if it is not there.
            overwrite: Replace the detector, or the unfinished fit, that it holds.

        Raises:
            TypeError, ValueError: ``folder`` is no path or no folder, holds a detector, or is written to by another
                call; or there is nothing to save.

        Memory: a few megabytes.
        """
        self._fitted()
        _arguments.flag(WHAT, "overwrite", overwrite)
        folder = _files.folder_of(folder)
        _files.check_free(folder, overwrite)
        _files.make_folder(folder)
        description = self._entries(self.images_, self.normal_)
        lock = _files.lock(folder)
        try:
            entries = _files.write_banks(folder, self.banks_, _description.places(self.encoder))
            self._home = _files.commit(folder, {**description, "banks": entries})
        finally:
            _files.unlock(lock)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the detector was made with but encoder and functions, as an index of a saved one holds it."""
        return _description.settings_of(self)

    def _entries(self, images: int, normal: NormalRange | None) -> dict[str, Any]:
        """What the index says, but for the banks."""
        return {
            "fingerprint": fingerprint(self.encoder),
            "type": _description.type_of(self.encoder),
            "rounded": rounded(self.encoder),
            "images": images,
            **self.settings,
            "normal": normal and dataclasses.asdict(normal),
        }

    def _settings(self, place: Path | None) -> dict[str, Any]:
        """What decides about the rows of a fit into a folder."""
        if place is None:
            return {}
        of_images = ("pixels", "enlarge", "shorter_side", "references", "background", "on_empty", "foreground")
        names = (*OF_ENCODER, *of_images)
        return {"encoder": fingerprint(self.encoder), **{name: self.settings[name] for name in names}}

    @classmethod
    def load(
        cls,
        folder: str | Path,
        encoder: nn.Module,
        *,
        foreground: Callable[[Tensor], Tensor] | None = None,
        group: dist.ProcessGroup | None = None,
        cluster: RayWorkers | None = None,
        verify: bool = True,
        any_precision: bool = False,
    ) -> MultiResolutionDetector:
        """A saved detector; its banks are mapped.

        Only regular files that lie in the folder are opened. Folders of version 1, without checksums, load with a
        warning; those of versions 1 and 2 enlarge images to ``pixels``, as they did when they were made.

        Args:
            folder: As given to :meth:`save`.
            encoder: The model, or encoder, that the banks were made with.
            foreground: Again, where the detector had one: functions are not saved.
            group: A ``torch.distributed`` process group (``dist.group.WORLD`` for all ranks): every rank searches its
                part of every bank, and all get the same scores for the same images.
            cluster: Its workers search the banks, of each of which every one holds a part; they open the same folder,
                of which this process checks the files. Images are encoded here. The detector is used while the cluster
                is.
            verify: Read every bank once, in blocks, to compare its sha256. False, for banks too large for that, still
                checks their number, order, shapes and types.
            any_precision: Take the same weights in another floating-point type, such as a float16 copy for a GPU. Its
                features are off by their rounding, so normal patches score that much more, and scores are not those of
                the encoder that the banks were made with.

        Raises:
            TypeError: ``folder`` is no path, or ``encoder`` no supported model.
            ValueError: The folder holds no detector, one of another version or for another encoder (the message says
                if it has the same weights in another type), or damaged files.

        Memory: the banks are mapped; a block of 4 MB while they are verified.
        """
        folder = _files.folder_of(folder)
        home, told = _files.Home.of(folder), _description.told(folder)
        if is_cluster(cluster) and group is not None:
            raise ValueError(f"murf_fast.{WHAT}: `group` and `cluster` exclude each other")
        if told["index"] == "ivf" and (group is not None or cluster is not None):
            raise ValueError(f'murf_fast.{WHAT}: banks with index="ivf" cannot be sharded')
        detector = cls(
            encoder,
            told["layers"],
            told["scales"] or (1.0,),
            told["index"],
            foreground,
            told["pixels"],
            enlarge=told["enlarge"],
            norm=told["norm"],
            shorter_side=told["shorter_side"],
            rules=told["rules"],
            coreset=told["coreset"],
            projection=told["projection"],
            references=told["references"],
            background=told["background"],
            precision=told["precision"],
            on_empty=told["on_empty"],
        )
        expected, found = told["fingerprint"], fingerprint(detector.encoder)
        theirs = None if found == expected else _description.same_weights(told, found, detector.encoder)
        if theirs is not None and not any_precision:
            raise _description.OtherEncoderError(
                f"murf_fast.{WHAT}: {folder} was made with the same weights in {theirs}, `encoder` has them in "
                f"{_description.type_of(detector.encoder)}; convert it (model.to(torch.{theirs})), or accept that "
                "features are off by the rounding with any_precision=True"
            )
        if found != expected and theirs is None:
            model = f" ({told['model']})" if told["model"] else ""
            raise _description.OtherEncoderError(
                f"murf_fast.{WHAT}: {folder} was made with another encoder{model}: its fingerprint is {expected[:12]}, "
                f"that of `encoder` {found[:12]}"
            )
        if told["foreground"] and foreground is None:
            raise ValueError(f"murf_fast.{WHAT}: {folder} was made with a `foreground` function; give it again")
        banks = _description.banks(folder, told, detector.encoder, verify, theirs is not None)
        detector._check_rows([len(bank) for bank in banks[:: len(detector.encoder.layers)]])
        detector.banks_ = banks
        detector.images_, detector.normal_ = told["images"], told["normal"]
        detector.method, detector._home = told["method"], home
        if group is not None:
            detector._sharded = over_ranks(group, detector._patches.device)
        elif cluster is not None:
            detector._sharded = cluster._sharded(folder, [bank["file"] for bank in told["banks"]])
        return detector

    def _encoded(self, images: Iterable[Image], batch: int | None) -> Iterator[list[tuple[LookedAt, list[Patches]]]]:
        patches = self._patches
        return encoded(patches.groups(patches.look_at_each(images), batch), patches.encode, patches.device)

    def _scored(self, images: Iterable[Image], batch: int | None) -> Iterator[Anomaly]:
        for pairs in self._encoded(images, batch):
            while pairs:  # an image's features go when it is done
                yield self._scored_pair(*pairs.pop(0))

    def _scored_pair(self, looked: LookedAt, of_image: list[Patches]) -> Anomaly:
        return self._anomaly(looked.size, *self._searched(of_image))

    @torch.no_grad()
    def _searched(
        self, of_image: Sequence[Patches], indices: Sequence[Index | None] | None = None
    ) -> tuple[list[Tensor | None], list[float]]:
        """Per bank, a (1, 1, h, w) map of distances and, where the rules want them, PatchCore's image scores.

        None where the scale is left out: the bank is empty, or no patch of the image counts. ``indices`` are other
        banks than the detector's, None for those without rows.
        """
        indices = self._searchable() if indices is None else indices
        maps: list[Tensor | None] = []
        weighted: list[float] = []
        for patches, index in zip(of_image, indices, strict=True):
            if patches.rows is None or not len(patches.rows) or index is None:
                maps.append(None)
                weighted.append(0.0)
                continue
            found, nearest = search(index, patches.rows, self.rules)
            distances = patches.rows.new_zeros(patches.grid[0] * patches.grid[1], dtype=torch.float32)
            distances[slice(None) if patches.kept is None else patches.kept] = self.rules.of_neighbors(found).float()
            maps.append(distances.view(1, 1, *patches.grid))
            reweighted = self.rules.image_score == "reweighted"
            own = cast("NearestIndex | ShardedIndex", index)  # the others are refused with these rules
            weighted.append(reweighted_score(patches.rows, found[:, 0], nearest[:, 0], own) if reweighted else 0.0)
        return maps, weighted

    def _anomaly(
        self,
        size: tuple[int, int],
        maps: list[Tensor | None],
        weighted: list[float],
        banks: Sequence[int] | None = None,
    ) -> Anomaly:
        """What the banks with these indices (None: all) say of an image of ``size``, by the rules."""
        rules, weights = self.rules, self._weights
        banks = range(len(maps)) if banks is None else banks
        banks = [i for i in banks if maps[i] is not None and (weights is None or weights[i])]
        if not banks:
            return Anomaly(torch.zeros(size, dtype=torch.float32, device=self._patches.device), 0.0)
        those = [cast("Tensor", maps[i]) for i in banks]
        weights = weights and [weights[i] for i in banks]
        fused = rules.fused(those, size, weights)
        if rules.sigma:
            fused = gaussian_blur(fused, rules.sigma, border=rules.border)
        if rules.image_score == "reweighted":
            return Anomaly(fused[0, 0], rules.fused_numbers([weighted[i] for i in banks], weights))
        finest = max((m.shape[2:] for m in those), key=lambda grid: grid[0] * grid[1])
        patches = rules.fused(those, (finest[0], finest[1]), weights, mode="bilinear")
        score = float(patches.max()) if rules.image_score == "max" else mean_top(patches)
        return Anomaly(fused[0, 0], score)

    @property
    def _patches(self) -> PatchEncoder:
        """By the attributes as they are now."""
        size = Size(self.pixels, self.enlarge, self.shorter_side)
        return PatchEncoder(self.encoder, self.foreground, size, self.background, self.on_empty)

    def _fitted(self) -> None:
        if not self.banks_:
            raise ValueError(f"murf_fast.{WHAT}: call fit() or load() first")

    def _check_rows(self, rows: Sequence[int]) -> None:
        """Every resolution with rows must have as many as a patch is compared with. ``rows``: those of each."""
        for i, count in enumerate(rows):
            if 0 < count < self.rules.k:
                raise ValueError(
                    f"murf_fast.{WHAT}: `rules.k` must be at most the {count} rows of a bank of "
                    f"{self._patches.resolution(i)}, got {self.rules.k}"
                )

    def _tell_empty(self, banks: list[Tensor]) -> None:
        """Scales that no row came from, as the foreground covers no patch there."""
        empty = [
            self._patches.resolution(i)
            for i in range(0, len(banks) // len(self.encoder.layers))
            if not len(banks[i * len(self.encoder.layers)])
        ]
        if len(empty) * len(self.encoder.layers) == len(banks):
            raise ValueError(f"murf_fast.{WHAT}: `foreground` covers no patch of any image at any scale")
        if empty:
            warnings.warn(
                f"murf_fast.{WHAT}: `foreground` covers no patch of any image at {', '.join(empty)}: left out",
                stacklevel=3,
            )

    def _searchable(self) -> list[Index | None]:
        """The banks, prepared at the first search; None for those without rows."""
        if not self._indices:
            self._indices = self._prepared(self.banks_, self._sharded)
        return self._indices

    def _prepared(self, banks: Sequence[Tensor], sharded: Sharded | None, least: int = 1) -> list[Index | None]:
        """None for banks of fewer rows than ``least``."""
        how = (self.index, self.rules, self.precision, self._patches.device, sharded)
        return [prepared(i, bank, *how) if len(bank) >= least else None for i, bank in enumerate(banks)]
