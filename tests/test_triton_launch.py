"""Every Triton kernel through Triton's own launcher, against a stand-in for the CUDA driver: what reaches the driver is
what was passed, and calls of extreme shapes compile.
"""

from __future__ import annotations

import compiled_record
import offline
import pytest
import registry
from edge_shapes import CALLS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What came of every call, by its name."""
    return {call["call"]: call for call in offline.launched(tmp_path_factory)}


@pytest.mark.parametrize("name", registry.all_configurations())
def test_the_driver_gets_what_was_passed(found, name):
    """In float32; in half precision only the pointers' types differ, and float16 is that of the extreme shapes."""
    call = found[name]
    assert call["error"] is None
    assert call["faults"] == []
    assert call["kernels"]


def test_every_kernel_is_launched(found):
    launched = {kernel["name"] for call in found.values() for kernel in call["kernels"]}
    assert launched == offline.launched_kernels()


def test_the_record_is_right(tmp_path):
    """Of one call, compiled here: what the compiler tells of a kernel is what is recorded of it."""
    if offline.reasons_against_launches():
        pytest.skip(offline.reasons_against_launches())
    known = compiled_record.read(compiled_record.LAUNCHED)
    call = offline.launched_now("upsample_argmax", tmp_path)
    assert call["kernels"]
    for kernel in call["kernels"]:
        facts = {name: value for name, value in kernel.items() if name != "hash"}
        assert known.get(kernel["hash"], facts) == facts


@pytest.mark.parametrize("name", CALLS)
def test_extreme_shapes_compile(found, name):
    assert found[name]["error"] is None
    assert found[name]["faults"] == []
