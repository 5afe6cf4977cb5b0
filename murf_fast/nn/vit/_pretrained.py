"""Weights of transformers from a folder or its cache, and how their images are normalized."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from murf_fast.nn.vit.families import resolved

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
NONE = {"mean": None, "std": None}

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5

Normalization = dict[str, Any]


def normalization_of(model: nn.Module) -> Normalization:
    """``mean`` and ``std`` that a family's models were trained with; timm's models say their own.

    ViTModel of transformers is taken as DINO's, whose are ImageNet's.
    """
    inner, family = resolved(model)
    kind = family(inner).kind
    if kind.normalizes:
        return dict(NONE)
    own = getattr(inner, "pretrained_cfg", None) or {}
    if "mean" in own and "std" in own:
        return {"mean": tuple(own["mean"]), "std": tuple(own["std"])}
    if kind.name.startswith("SigLIP"):
        return dict(HALF)
    return dict(OPENAI if kind.name.startswith("CLIP") else IMAGENET)


def pretrained(name: str, dtype: torch.dtype | str, **options: Any) -> tuple[nn.Module, Normalization | None]:
    """A model, and mean and deviation by the processor that lies beside it, if one does.

    Raises:
        ValueError: Weights of the vision transformer are missing, or the processor's file does not fit.
        TypeError: It is none of a known family.
    """
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    inner, family = resolved(model)
    vit = family(inner)
    used = {id(p) for part in (*vit.embedders, *vit.blocks, vit.final_norm) if part for p in part.parameters()}
    unused = {"mask_token"}  # of training
    names = [n for n, p in model.named_parameters() if id(p) in used and n.rpartition(".")[2] not in unused]
    missing = sorted(set(names) & set(info["missing_keys"]))
    if missing:
        raise ValueError(f"it lacks {missing[0]} and {len(missing) - 1} other weights of a {type(inner).__name__}")
    return model, _processor(name, vit.patch_size, **options)


def _processor(name: str, patch_size: int, **options: Any) -> Normalization | None:
    from transformers.utils import cached_file

    for file in PROCESSORS:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
        if path is None:
            continue
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        settings = settings.get("image_processor", settings) if isinstance(settings, dict) else {}
        if settings.get("patch_size", patch_size) != patch_size:
            raise ValueError(f"`patch_size` of {file} is {settings['patch_size']!r}, the model's is {patch_size}")
        if settings.get("do_normalize") is False:
            return dict(NONE)
        if "image_mean" in settings and "image_std" in settings:
            for key in ("image_mean", "image_std"):
                if not isinstance(settings[key], list) or len(settings[key]) != 3:
                    raise ValueError(f"`{key}` of {file} must be three numbers, got {settings[key]!r}")
            return {"mean": tuple(settings["image_mean"]), "std": tuple(settings["image_std"])}
    return None


def frozen(
    what: str, name_or_folder: str | os.PathLike[str], dtype: torch.dtype | str, local_files_only: bool
) -> tuple[nn.Module, Normalization]:
    """:func:`pretrained` in eval mode and without gradients, its normalization, or that of its family; errors are in
    one sentence.
    """
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"murf_fast.{what}: needs transformers: pip install 'murf-fast[models]'") from error
    if not isinstance(name_or_folder, (str, os.PathLike)):
        kind = type(name_or_folder).__name__
        raise TypeError(f"murf_fast.{what}: `name_or_folder` must be a name of the hub or a folder, got {kind}")
    name = os.fspath(name_or_folder)
    folder = Path(name).expanduser()
    is_path = isinstance(name_or_folder, os.PathLike) or folder.is_absolute() or name.startswith((".", "~"))
    if not folder.is_dir() and (is_path or name.count("/") > 1):
        raise FileNotFoundError(f"murf_fast.{what}: `name_or_folder` must be a folder with a config.json, got {name}")
    is_local = folder.is_dir()
    try:
        model, normalization = pretrained(
            str(folder) if is_local else name, dtype, local_files_only=is_local or local_files_only
        )
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:  # the loaders of damaged files raise anything
        if isinstance(error, OSError) and not is_local and local_files_only:
            raise FileNotFoundError(
                f"murf_fast.{what}: {name} is no folder and not in the local Hugging Face cache; "
                "local_files_only=False downloads it"
            ) from error
        if isinstance(error, TypeError) and str(error).startswith("murf_fast."):  # it loads, and is of no known family
            raise
        raise ValueError(f"murf_fast.{what}: {name} does not load: {' '.join(str(error).split())[:300]}") from error
    return model.eval().requires_grad_(False), normalization or normalization_of(model)
