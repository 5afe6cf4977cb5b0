"""anomalib's PatchCore, run by this library."""

from __future__ import annotations

import importlib
import importlib.util
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from murf_fast.nn._parts import is_as_written
from murf_fast.ops import gaussian_blur, k_center_greedy, nearest_distance
from murf_fast.ops._checks import DTYPES
from murf_fast.ops.nearest_distance import NearestIndex
from murf_fast.patch._blurred_cells import blurred_cells
from murf_fast.patch._gaussian_kernel import sigma_of
from murf_fast.patch._replacements import replace
from murf_fast.patch._state import State

_SAMPLER = "anomalib.models.components.sampling.k_center_greedy"
_BLUR = "anomalib.models.components.filters.blur"
_MAPS = "anomalib.models.image.patchcore.anomaly_map"
_MODEL = "anomalib.models.image.patchcore.torch_model"
_SUPER = "anomalib.models.image.super_add.torch_model"
_original = "_{}_without_murf_fast"
_OLDEST = (2, 1)
# The random first row belongs to the coreset since 2.4, and is drawn on the features' device since 2.2.
_KEEPS_START, _DRAWS_ON_DEVICE = (2, 4), (2, 2)


def anomalib() -> None:
    """Replaces, in the installed package ``anomalib`` (2.1 or later), what its PatchCore spends its time on; see
    ``unpatch``.

    - ``PatchcoreModel.nearest_neighbors``, and searches of ``SuperADDModel``, where there is one, in its memory bank:
      :func:`nearest_distance`. The bank is prepared at the first search and again when it has changed.
    - ``KCenterGreedy.select_coreset_idxs``: :func:`k_center_greedy`, after anomalib's own random projection and from
      the first row that it would draw. Ctrl-C ends it within a second.
    - ``GaussianBlur2d.forward``: :func:`gaussian_blur`, where the kernel is one Gaussian cut off at four sigma.
    - ``AnomalyMapGenerator.compute_anomaly_map`` of PatchCore, which AnomalyDINO uses, too: nearest-neighbour
      upsampling and blur as one matrix per axis.

    The results are anomalib's, from the same random numbers, but for what it owes to rounding: distances are those of
    direct differences instead of ``|x|^2 - 2 x y + |y|^2``, so that a row of the bank is at distance 0 of itself, and
    where two rows are as far but for rounding, as with half precision they often are, the one that is nearer, or
    farther, is taken. Models that exist already are affected, too. anomalib's own way is taken while a model is
    exported, traced or compiled, where gradients are needed, on devices other than CPU and CUDA, and for what is not
    described above. Calling it again changes nothing.

    Raises:
        ModuleNotFoundError: There is no package ``anomalib``.
        ValueError: It is older than 2.1. Later, from a patched function: rows of the bank or of an image that are not
            finite, which give NaN without the patch.

    Memory: as :class:`NearestIndex`, kept as long as the model and its bank are, and :func:`nearest_distance`;
    :func:`k_center_greedy`; a map, and the matrices of its axes.

    Source: github.com/open-edge-platform/anomalib.
    """
    if importlib.util.find_spec("anomalib") is None:
        raise ModuleNotFoundError("murf_fast.patch.anomalib: the package anomalib is not installed", name="anomalib")
    version = _version(importlib.import_module("anomalib"))
    model, maps, blur, sampler = (importlib.import_module(name) for name in (_MODEL, _MAPS, _BLUR, _SAMPLER))
    if getattr(model.PatchcoreModel.nearest_neighbors, "__module__", None) == __name__:
        return
    _replace(model.PatchcoreModel, "nearest_neighbors", _nearest_neighbors)
    _replace(maps.AnomalyMapGenerator, "compute_anomaly_map", _compute_anomaly_map)
    _replace(blur.GaussianBlur2d, "forward", _blur)
    _replace(sampler.KCenterGreedy, "select_coreset_idxs", _selection(version))
    if importlib.util.find_spec(_SUPER.rpartition(".")[0]) is not None:
        _replace(importlib.import_module(_SUPER).SuperADDModel, "nearest_neighbors", _nearest_of_many)


def _version(package: types.ModuleType) -> tuple[int, int]:
    major, minor = package.__version__.split(".")[:2]
    version = int(major), int(minor)
    if version < _OLDEST:
        raise ValueError(
            f"murf_fast.patch.anomalib: anomalib must be version {'.'.join(map(str, _OLDEST))} or later, got "
            f"{package.__version__}"
        )
    return version


def _replace(owner: type, name: str, function: Callable[..., Any]) -> None:
    replace(owner, _original.format(name), getattr(owner, name))
    replace(owner, name, function)


def _left_as_it_was(self: object, name: str, *arguments: Any) -> Any:
    return getattr(self, _original.format(name))(*arguments)


def _is_ours(*tensors: Tensor) -> bool:
    """Whether this library computes with these; not while a graph is made that others run."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # public, but not listed
        and first.device.type in ("cpu", "cuda")
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and all(x.dtype == first.dtype and x.device == first.device for x in tensors)
        and first.dtype in DTYPES
    )


def _nearest_neighbors(self: Any, embedding: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
    """(n,) or, of more than one neighbour, (n, k) distances and rows of the memory bank."""
    bank = self.memory_bank
    if embedding.ndim != 2 or not _is_ours(embedding, bank):
        return _left_as_it_was(self, "nearest_neighbors", embedding, n_neighbors)
    distances, rows = nearest_distance(embedding, _prepared(self, bank), k=n_neighbors)
    distances = distances.to(embedding.dtype)
    return (distances[:, 0], rows[:, 0]) if n_neighbors == 1 else (distances, rows)


def _nearest_of_many(
    self: Any, features_query: Tensor, features_key: Tensor, knn_neighbors: int, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """(..., n, k) of queries (..., n, d) among keys (m, d), which are a layer of the memory bank.

    Subsampling compares few features with each other, for a hundred neighbours: anomalib's matrix is faster there.
    """
    ours = features_key.ndim == 2 and not normalize and _is_ours(features_query, features_key)
    if not ours or features_key.untyped_storage().data_ptr() != self.memory_bank.untyped_storage().data_ptr():
        return _left_as_it_was(self, "nearest_neighbors", features_query, features_key, knn_neighbors, normalize)
    shape, index = (*features_query.shape[:-1], knn_neighbors), _prepared(self, features_key)
    distances, rows = nearest_distance(features_query.flatten(0, -2), index, k=knn_neighbors)
    return distances.to(features_query.dtype).view(shape), rows.view(shape)


# Per model, its bank as it was, and the indices of that or, of SuperADD, of the parts of that which are layers.
_indices: weakref.WeakKeyDictionary[nn.Module, tuple[State, dict[tuple[Any, ...], NearestIndex]]] = (
    weakref.WeakKeyDictionary()
)


def _prepared(model: Any, rows: Tensor) -> Tensor | NearestIndex:
    """``rows``, all or part of the model's bank, prepared once; as they are where changes of them could not be seen."""
    bank = model.memory_bank
    if bank.is_inference():
        return rows
    if model not in _indices or not _indices[model][0].is_of(bank):
        _indices[model] = State.of(bank), {}
    known = _indices[model][1]
    part = (rows.data_ptr(), rows.shape, rows.stride())
    if part not in known:
        known[part] = NearestIndex(rows)
    return known[part]


def _selection(version: tuple[int, int]) -> Any:
    keeps_start = version >= _KEEPS_START

    def select_coreset_idxs(self: Any, selected_idxs: list[int] | None = None) -> list[int]:
        embedding, count = self.embedding, self.coreset_size
        others = count if keeps_start else count + 1
        if selected_idxs or not (_is_ours(embedding) and count > 0 and others <= len(embedding)):
            return _left_as_it_was(self, "select_coreset_idxs", *([selected_idxs] if selected_idxs else []))
        from tqdm import tqdm  # anomalib's own

        if embedding.ndim == 2:
            self.model.fit(embedding)
            self.features = self.model.transform(embedding)
        else:
            self.features = embedding.flatten(1)
        self.reset_distances()
        device = self.features.device if version >= _DRAWS_ON_DEVICE else torch.get_default_device()
        start = torch.randint(len(embedding), (1,), dtype=torch.int64, device=device).to(self.features.device)
        with tqdm(total=count, desc="Selecting Coreset Indices.") as bar:
            chosen = k_center_greedy(
                self.features,
                count=count,
                start=start,
                include_start=keeps_start,
                progress=lambda done, wanted: bar.update(done - (wanted - count) - bar.n),
            )
        return chosen.tolist()

    return select_coreset_idxs


def _blur(self: Any, input_tensor: Tensor) -> Tensor:
    sigma = _sigma(self, input_tensor)
    if sigma is None or min(input_tensor.shape[2:]) <= self.height // 2:
        return _left_as_it_was(self, "forward", input_tensor)
    return gaussian_blur(input_tensor, sigma, border="reflect")


def _sigma(blur: Any, x: Tensor) -> float | None:
    """Of a blur that :func:`gaussian_blur` does to ``x``."""
    if not _is_ours(x, blur.kernel) or x.ndim != 4 or x.shape[1] != blur.channels:
        return None
    return sigma_of(blur) if blur.padding == "same" and blur.border_type == "reflect" else None


def _compute_anomaly_map(self: Any, patch_scores: Tensor, image_size: Any = None) -> Tensor:
    """(B, 1, H, W) of (B, 1, h, w), each value repeated and all smoothed."""
    sigma = None if image_size is None else _sigma(self.blur, patch_scores)
    if sigma is None or min(image_size) <= self.blur.height // 2 or not is_as_written(self, ("anomalib",)):
        return _left_as_it_was(self, "compute_anomaly_map", patch_scores, image_size)
    return blurred_cells(patch_scores, (int(image_size[0]), int(image_size[1])), sigma)
