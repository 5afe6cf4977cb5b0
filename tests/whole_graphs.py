"""Whole models as one graph of Dynamo's, which earlier versions of torch do not make."""

from __future__ import annotations

import pytest
import torch


def _from(version: str, model: str) -> pytest.MarkDecorator:
    reason = f"torch before {version} does not trace a whole {model} by Dynamo"
    return pytest.mark.skipif(torch.__version__ < version, reason=reason)


# How it finds hooks of its model's parts. Not by 2.6 and 2.8; 2.9 has not been tried.
needs_graph_of_murf = _from("2.10", "MuRF")
# What its attention closes over. Not by 2.6, 2.8 and 2.10.
needs_graph_of_anyup = _from("2.11", "AnyUp")
