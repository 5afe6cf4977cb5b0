"""Features of many images on disk: extracted by ``murf-fast extract``, read as a dataset."""

from murf_fast.data.features import Features

__all__ = ["Features"]
