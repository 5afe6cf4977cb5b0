"""For every test: Triton's interpreter where there is no GPU, poisoned memory, and the levels of the CPU kernels."""

from __future__ import annotations

import gc
import os
import sys

import torch

if not torch.cuda.is_available():
    # Read by Triton when the kernels are first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

from murf_fast import _extension, backends

# The same examples in every run: a change is judged by what it changes. `--hypothesis-profile=default` draws others.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

HAS_GPU = torch.cuda.is_available()


def pytest_addoption(parser):
    group = parser.getgroup("fuzz", "random cases of every operation (tests/test_fuzz.py)")
    group.addoption("--fuzz-cases", type=int, default=5000, help="cases of all operations together")
    group.addoption("--fuzz-seed", type=int, default=0, help="other cases")
    group.addoption("--fuzz-case", metavar="OP:SEED:INDEX", help="one case, as a failure prints it")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if config.getoption("--fuzz-case"):
        others = [item for item in items if getattr(item, "originalname", None) != "test_random_cases"]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_collection_finish():
    """Modules and tests stay: the collections of what tests leave, a second each where they are all in it, pass by
    what there is before the first. Memory is measured after collections, a dozen for a table.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def settled():
    """What a test has launched is over when it ends: a fault is shown as that of the test that made it."""
    yield
    if HAS_GPU:
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """`torch.empty` holds NaN (or the largest integer), so that an element nobody wrote is seen."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if type(tensor) is torch.Tensor and not tensor.is_meta:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
                elif tensor.dtype != torch.bool and not tensor.is_complex():
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True, scope="session")
def as_on_a_gpu():
    """Every launch in Triton's interpreter has its addresses checked, and its products have a GPU's digits."""
    if HAS_GPU or backends.triton_problems():
        yield
        return
    from checked_memory import checked
    from interpreted_masks import truth_values
    from quick_interpreter import quick
    from tensor_cores import tensor_cores

    with checked(), truth_values(), tensor_cores(), quick():
        yield


@pytest.fixture(autouse=True)
def cut_sums(request, monkeypatch):
    """Sums of the interpreter's products are a GPU's where a GPU is asked first: those tests draw their budgets from
    several roundings, which the errors of such sums are compared with.
    """
    model = sys.modules.get("tensor_cores")
    if model and request.node.get_closest_marker("gpu_quick"):
        monkeypatch.setattr(model, "CUTS", True)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_GPU else "cpu"])
def device(request):
    """Where a test of a Triton kernel runs: on the GPU where there is one (marked gpu), else in the interpreter."""
    reasons = backends.reasons_against("triton", request.param)
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


@pytest.fixture
def gpu(device):
    """For what the interpreter cannot show: streams, graphs, large results."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture
def three_threads():
    """Enough threads that kernels cut their work in bands, whatever this machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


_LEVELS = _extension.available_levels() if _extension.load_error() is None else []


@pytest.fixture(params=[level for level in _LEVELS if level != "amx"])
def level(request, monkeypatch):
    """Every instruction-set level of the C++ extension that this processor runs, but the one that differs from the
    last of these only in layers on rows of pixels.
    """
    monkeypatch.setenv("MURF_FAST_CPU", request.param)
    return request.param


@pytest.fixture(params=_LEVELS)
def level_of_layers(request, monkeypatch):
    """Every level, for layers on rows of pixels."""
    monkeypatch.setenv("MURF_FAST_CPU", request.param)
    return request.param


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A tiny Dinov2Model on disk."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=56, patch_size=14
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """For bits that are compared between processes, or between batches: two threads may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
