"""Approximate search is faiss's job: its inverted file with flat lists, as the papers use it."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.annotations import Metric
from murf_fast.ops import _checks


class IVFIndex:
    """faiss IndexIVFFlat over a bank: only the ``nprobe`` nearest of ``nlist`` clusters are searched.

    A neighbour in another cluster is missed, so distances can only come out too large. Needs the extra ``[anomaly]``.

    Args:
        bank: (M, D) on the CPU, floating point; copied by faiss in float32.
        nlist: Clusters; at most M. Fewer than the paper's 512 for a bank that is too small for them.
        nprobe: Clusters searched.
        cosine: Search unit rows.

    Source: MRF-AD section 5 (IndexIVFFlat, nlist 512, nprobe 32).
    """

    def __init__(self, bank: Tensor, *, nlist: int = 512, nprobe: int = 32, cosine: bool = False) -> None:
        try:
            import faiss
        except ModuleNotFoundError as error:
            message = "murf_fast: approximate search needs faiss: pip install 'murf-fast[anomaly]'"
            raise ModuleNotFoundError(message, name="faiss") from error
        nlist, nprobe = _checks.integer("IVFIndex", "nlist", nlist, 1), _checks.integer("IVFIndex", "nprobe", nprobe, 1)
        if not isinstance(bank, Tensor) or bank.ndim != 2 or not bank.is_floating_point() or bank.device.type != "cpu":
            raise TypeError("murf_fast.IVFIndex: `bank` must be a floating-point tensor (M, D) on the CPU")
        _checks.dense("IVFIndex", "bank", bank)
        if not 1 <= nprobe <= nlist <= len(bank):
            raise ValueError(
                "murf_fast.IVFIndex: needs 1 <= `nprobe` <= `nlist` <= rows of the bank, got "
                f"{nprobe}, {nlist}, {len(bank)}"
            )
        self.bank, self.cosine, self.device = bank, _checks.flag("IVFIndex", "cosine", cosine), bank.device
        rows = self._rows("bank", bank)
        self._faiss = faiss.IndexIVFFlat(faiss.IndexFlatL2(bank.shape[1]), bank.shape[1], nlist)
        if _fork.is_child():
            faiss.omp_set_num_threads(1)  # faiss has a pool of its own, which does not exist there either
        self._faiss.train(rows)
        self._faiss.add(rows)
        self._faiss.nprobe = nprobe

    def __len__(self) -> int:
        return len(self.bank)

    def search(self, query: Tensor, k: int, metric: Metric) -> tuple[Tensor, Tensor]:
        """As :func:`nearest_distance`. Where the searched clusters hold fewer than k rows: infinity and -1."""
        squared, indices = self._faiss.search(self._rows("query", query), k)
        squared, indices = torch.from_numpy(squared).clamp(min=0), torch.from_numpy(indices)
        squared = squared.masked_fill(indices < 0, torch.inf)
        return {"l2": squared.sqrt(), "l2sq": squared, "cosine": squared / 2}[metric], indices

    def _rows(self, name: str, x: Tensor):
        rows = x.detach().resolve_neg()
        if self.cosine:
            # The largest entry is brought to one first: squares of tiny entries are zero. Rows of zeros become NaN.
            rows = rows.double() / rows.double().abs().amax(1, keepdim=True)
            rows = rows / rows.square().sum(1, keepdim=True).sqrt()
        rows = rows.float()
        wrong = ~rows.isfinite().all(1)
        if bool(wrong.any()):
            what = "finite and not zero" if self.cosine else "finite in float32"
            raise ValueError(
                f"murf_fast.IVFIndex: `{name}` must be {what}, rows {wrong.nonzero().flatten()[:5].tolist()} are not"
            )
        return rows.contiguous().numpy()
