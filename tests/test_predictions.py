"""The record of what the Triton kernels cost without a GPU (benchmarks/offline.py): its tool counts loops as they are,
no kernel is missing, and none has grown unseen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import offline
import predictions
import pytest
import torch
from weightless import LARGE, Weightless

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def record() -> dict:
    return predictions.recorded()


def _run(script: Path, *arguments: str, factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    if offline.missing_tools():
        pytest.skip(offline.missing_tools())
    environment = offline.environment(offline.shared_folder(factory))
    return subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)


def test_loops_are_counted(tmp_path_factory):
    """Unrolled ones, those of lists in memory, of a division, of a reduction; and not those that end by data."""
    done = _run(ROOT / "tests" / "counted_loops.py", factory=tmp_path_factory)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 17
    for one in found:
        assert one["counted"] == one["again"] == one["expected"], one
        assert one["by_data"] == (one["kernel"] in ("_rare", "_endless")), one


def test_every_kernel_is_recorded(record):
    """python benchmarks/offline.py OP makes the rows of an operation."""
    assert {row["kernel"] for row in record["rows"]} | set(predictions.BY_DATA) == offline.launched_kernels()


def test_no_kernel_has_grown(record, tmp_path_factory):
    """Where instructions were worth it, `python benchmarks/offline.py` records them."""
    triton = pytest.importorskip("triton")
    if triton.__version__ != record["triton"]:
        pytest.skip(f"the record is of Triton {record['triton']}, here is {triton.__version__}")
    done = _run(ROOT / "benchmarks" / "offline.py", "--check", factory=tmp_path_factory)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("sealed", "share"), [(True, 1.0), (True, 0.5), (False, 0.5)])
def test_a_wrong_record_is_found(record, tmp_path_factory, tmp_path, sealed, share):
    """A row is not made anew while its seal holds, which is that of the instructions, too."""
    rows = [row | {} for row in record["rows"] if (row["op"], row["dtype"]) == ("upsample_argmax", "float32")]
    for row in rows:
        row["instructions"] = int(share * row["instructions"])
        if not sealed:
            row.pop("seal", None)
    predictions.write(record | {"rows": rows}, tmp_path)
    done = _run(ROOT / "benchmarks" / "offline.py", "--check", "--record", tmp_path, factory=tmp_path_factory)
    if share == 1.0:
        assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    else:
        assert done.returncode == 1, done.stderr
        assert "_upsample_argmax in upsample_argmax" in done.stdout


def test_growth_and_loss_are_seen():
    row = {"kernel": "_a", "op": "a", "case": "large", "dtype": "float32", "instructions": 1000}
    assert predictions.faults([row], [row | {"instructions": 1099}]) == []
    assert "1,101" in predictions.faults([row], [row | {"instructions": 1101}])[0]
    assert "not launched" in predictions.faults([row], [row | {"kernel": "_b"}])[0]


def test_the_page_is_that_of_the_record(record):
    assert (predictions.FOLDER / "README.md").read_text() == predictions.page(record), "python benchmarks/offline.py"


def test_the_least_time_is_that_of_the_slowest_part():
    device = predictions.Device(issue=1e12, bytes=1e12, flops={"half": 1e15, "float32": 1e14})
    row = {"instructions": 1e9, "read": 1e9, "written": 2e9, "flops": {"half": 2e12, "float32": 1e11}}
    assert predictions.bounds(row, device) == pytest.approx({"issue": 1e-3, "memory": 3e-3, "products": 2e-3})


def test_large_tensors_are_not_computed():
    with Weightless():
        small = torch.arange(5) * 2
        large = torch.ones(LARGE) + 1
        assert small.tolist() == [0, 2, 4, 6, 8]
        assert (large.view(2, -1) @ torch.ones(LARGE // 2, 3)).shape == (2, 3)
        assert large.mul_(2) is large
        assert bool(large.isfinite().all())
    assert not large.any()
