"""What decides about the features of an extraction, and by which it is told from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from murf_fast._files import sha256_of_json
from murf_fast.data.layout import Array
from murf_fast.data.sources.item import Source
from murf_fast.nn.vit._fingerprint import fingerprint
from murf_fast.nn.vit.murf import MuRF

# A model on a device, made in the process that runs it: by a function that pickles, as a worker's is made elsewhere.
Make = Callable[[torch.device], MuRF]

FUSIONS = ("concat", "none")
SHARD_BYTES = 256 << 20
MOST_PER_SHARD = 4096
BATCH = 16


@dataclass(frozen=True)
class Options:
    """What is wanted of every image, and how it is stored.

    Attributes:
        fuse: ``"concat"``: all maps on one grid, one array ``features``; ``"none"``: each map by itself, and its CLS
            token. Without meaning where the model has a head, whose ``labels`` or ``depth`` are stored.
        grid: (height, width) of what is stored; None: the largest grid of the maps, with a head the largest size.
        dtype: Of floating-point arrays as stored; None: the model's.
        form: ``"safetensors"``, ``"zarr"``, ``"parquet"`` or ``"arrow"``.
        batch: Images that are encoded together.
        shard: Images of a shard; None: as many as make 256 MB, and a multiple of ``batch`` if it can be.
    """

    fuse: str = "concat"
    grid: tuple[int, int] | None = None
    dtype: str | None = None
    form: str = "safetensors"
    batch: int = BATCH
    shard: int | None = None

    def images_per_shard(self, arrays: tuple[Array, ...]) -> int:
        if self.shard is not None:
            return self.shard
        most = max(1, min(MOST_PER_SHARD, SHARD_BYTES // sum(a.bytes_per_image for a in arrays)))
        return most // self.batch * self.batch or most


def settings_of(murf: MuRF, options: Options, arrays: tuple[Array, ...], source: Source) -> dict[str, Any]:
    """Everything that a bit of the result may depend on, but for the machine: as JSON, by names for messages."""
    return {
        "weights, sizes or layers": model_fingerprint(murf),
        "--fuse": options.fuse,
        "--grid": options.grid and list(options.grid),
        "--dtype": options.dtype,
        "--format": options.form,
        "--batch": options.batch,
        "--shard": options.images_per_shard(arrays),
        "SOURCE": source.fingerprint(),
    }


def model_fingerprint(murf: MuRF) -> str:
    """Of the encoder and, if there is one, of the head."""
    head = hashlib.sha256(repr(murf.head).encode())
    for name, tensor in (murf.head.state_dict() if murf.head is not None else {}).items():
        head.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        head.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256_of_json([fingerprint(murf.encoder), head.hexdigest()])


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names of what is not the same."""
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]
