"""The training-free detector: banks of normal patches at several resolutions, and distances to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.annotations import AnomalyMethod, AnomalyRules, BankIndex, Image, Precision, Projection
from murf_fast.anomaly import _description, _files, _fitting, _images, _saving, _searching
from murf_fast.anomaly._encoder import PatchAtLeast, normalization_of
from murf_fast.anomaly._fit_arguments import share
from murf_fast.anomaly._images import Size
from murf_fast.anomaly._indices import Index, Sharded, prepared
from murf_fast.anomaly._options import DetectorOptions
from murf_fast.anomaly._overlap import encoded
from murf_fast.anomaly._patches import WHAT, LookedAt, PatchEncoder, Patches
from murf_fast.anomaly.methods import configured
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.anomaly.ray_workers import RayWorkers
from murf_fast.anomaly.result import Anomaly
from murf_fast.anomaly.scoring import PRESETS, ScoringRules, rules_of
from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit import _resolutions
from murf_fast.nn.vit.families import resolved
from murf_fast.ops._random_projection import PROJECTIONS
from murf_fast.ops.nearest_distance import PRECISIONS

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
        return _fitting.fit(
            self,
            images,
            folder,
            overwrite=overwrite,
            resume=resume,
            held_out=held_out,
            batch=batch,
            cluster=cluster,
            progress=progress,
            references_progress=references_progress,
            coreset_progress=coreset_progress,
        )

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
        return _fitting.add(
            self,
            images,
            in_place=in_place,
            overwrite=overwrite,
            resume=resume,
            held_out=held_out,
            batch=batch,
            progress=progress,
        )

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
        _saving.save(self, folder, overwrite)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the detector was made with but encoder and functions, as an index of a saved one holds it."""
        return _description.settings_of(self)

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
        return _saving.load(
            cls,
            folder,
            encoder,
            foreground,
            group=group,
            cluster=cluster,
            verify=verify,
            any_precision=any_precision,
        )

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
        return _searching.searched(of_image, self._searchable() if indices is None else indices, self.rules)

    def _anomaly(
        self,
        size: tuple[int, int],
        maps: list[Tensor | None],
        weighted: list[float],
        banks: Sequence[int] | None = None,
    ) -> Anomaly:
        """What the banks with these indices (None: all) say of an image of ``size``, by the rules."""
        return _searching.anomaly(size, maps, weighted, self.rules, self._weights, self._patches.device, banks)

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

    def _searchable(self) -> list[Index | None]:
        """The banks, prepared at the first search; None for those without rows."""
        if not self._indices:
            self._indices = self._prepared(self.banks_, self._sharded)
        return self._indices

    def _prepared(self, banks: Sequence[Tensor], sharded: Sharded | None, least: int = 1) -> list[Index | None]:
        """None for banks of fewer rows than ``least``."""
        how = (self.index, self.rules, self.precision, self._patches.device, sharded)
        return [prepared(i, bank, *how) if len(bank) >= least else None for i, bank in enumerate(banks)]
