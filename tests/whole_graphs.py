"""Whole models as one graph of Dynamo's, which earlier versions of torch do not make."""

from __future__ import annotations

import pytest
import torch

# torch 2.6 and 2.8 do not trace how MuRF finds hooks of its model's parts, nor what AnyUp closes over.
needs_whole_graphs = pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="torch 2.8 and older trace no whole MuRF or AnyUp by Dynamo"
)
