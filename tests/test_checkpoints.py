"""Every loader of weights: what a state dict may be wrapped in, and files that are no checkpoints."""

from __future__ import annotations

import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from murf_fast.nn import JAFAR, NAF, AnyUp, DepthHead, FeatSharpJBU, JBUStack, SegmentationHead
from murf_fast.nn._checkpoint_files import PREFIXES, WRAPPERS

MODULES = {
    "AnyUp": (AnyUp(16, num_heads=2), lambda c: AnyUp.from_checkpoint(c, num_heads=2)),
    "NAF": (NAF(32, num_heads=2, kernel_size=3), NAF.from_checkpoint),
    "JAFAR": (JAFAR(6, qk_dim=16), JAFAR.from_checkpoint),
    "JBUStack": (JBUStack(6, norm=True), JBUStack.from_checkpoint),
    "JBUStack, shared": (JBUStack(None, shared=True), JBUStack.from_checkpoint),
    "FeatSharpJBU": (FeatSharpJBU(6), lambda c: FeatSharpJBU.from_checkpoint(c, 6)),
    "SegmentationHead": (SegmentationHead(5, 3), SegmentationHead.from_state_dict),
    "DepthHead": (DepthHead(5, 3, depth_range=(1, 2)), lambda c: DepthHead.from_state_dict(c, depth_range=(1, 2))),
}
OF_FILES = [name for name in MODULES if not name.endswith("Head")]


def assert_same_weights(loaded: nn.Module, expected: nn.Module) -> None:
    loaded, expected = loaded.state_dict(), expected.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=12, deadline=None)
@given(
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=3),
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=2),
    rest=st.dictionaries(st.sampled_from(["epoch", "optimizer", "config"]), st.integers(), max_size=2),
)
def test_prefixes_and_wrappers(name, prefixes, wrappers, rest):
    module, load = MODULES[name]
    state = {"".join(prefixes) + key: value for key, value in module.state_dict().items()}
    for wrapper in wrappers:
        state = {**rest, wrapper: state}
    assert_same_weights(load(state), module)


@pytest.mark.parametrize("name", MODULES)
def test_a_prefix_that_one_entry_lacks_is_a_name(name):
    module, load = MODULES[name]
    first, *others = module.state_dict()
    weights = {f"module.{key}": module.state_dict()[key] for key in others} | {first: module.state_dict()[first]}
    with pytest.raises(ValueError, match=f"murf_fast.{name.split(',')[0]}: .*module"):
        load(weights)


@pytest.mark.parametrize("name", OF_FILES)
def test_files(name, tmp_path):
    from safetensors.torch import save_file

    module, load = MODULES[name]
    state = {f"module.{key}": value for key, value in module.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    torch.save({"model": state, "epoch": 3}, tmp_path / "b.pth")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for file in ("a.safetensors", "b.pth", "c.pt"):
        assert_same_weights(load(tmp_path / file), module)
        assert_same_weights(load(str(tmp_path / file)), module)


def bad_files(folder, weights):
    """Name by name a file that holds no weights, and words of what is said of it."""
    from safetensors.torch import save

    def saved(value, **options):
        torch.save(value, folder / "scratch", **options)
        return (folder / "scratch").read_bytes()

    zipped, pickled = saved(weights), saved(weights, _use_new_zipfile_serialization=False)
    tensors = save({key: value.contiguous() for key, value in weights.items()})
    return {
        "empty.pth": (b"", "is empty"),
        "empty.safetensors": (b"", "is empty"),
        "text.pth": (b"version https://git-lfs.github.com/spec/v1\n", "is no file of torch.save"),
        "text.safetensors": (b"<!DOCTYPE html><html></html>", "is no whole file of safetensors"),
        "pickle_marker.pth": (b"\x80", "is no whole file of torch.save"),
        "archive_marker.pth": (b"PK\x03\x04 and no archive", "is no whole file of torch.save"),
        "list.pth": (saved(list(weights.values())), "must hold weights by their names, got list"),
        "tensor.pth": (saved(torch.ones(3)), "must hold weights by their names, got Tensor"),
        "numbers.pth": (saved({"epoch": 3}), "must hold tensors by their names, got int under 'epoch'"),
        "positions.pth": (saved(dict(enumerate(weights.values()))), "must hold tensors by their names, .* under 0"),
        "nothing.pth": (saved({}), "must hold .* got the keys none"),
        "safetensors.pth": (tensors, "it holds safetensors, which end in .safetensors"),
        "zip.safetensors": (zipped, "is no whole file of safetensors"),
        **{
            f"cut_{kind}_{share}.{suffix}": (data[: int(share * len(data))], f"is no whole file of {of}")
            for kind, data, suffix, of in (
                ("zip", zipped, "pth", "torch.save"),
                ("pickle", pickled, "pth", "torch.save"),
                ("tensors", tensors, "safetensors", "safetensors"),
            )
            for share in (0.1, 0.5, 0.99)
        },
    }


@pytest.mark.parametrize("name", OF_FILES)
def test_bad_files(name, tmp_path):
    module, load = MODULES[name]
    for file, (data, words) in bad_files(tmp_path, module.state_dict()).items():
        (tmp_path / file).write_bytes(data)
        with pytest.raises(
            ValueError, match=f"murf_fast.{name.split(',')[0]}: .*{re.escape(file)} {words}|{words}"
        ) as e:
            load(tmp_path / file)
        assert file in str(e.value)


@pytest.mark.parametrize("name", OF_FILES)
def test_no_files(name, tmp_path):
    _, load = MODULES[name]
    os.mkfifo(tmp_path / "fifo.pth")
    for file, words in (("gone.pth", "does not exist"), (".", "is not a regular file"), ("fifo.pth", "regular file")):
        with pytest.raises(ValueError, match=words) as error:
            load(tmp_path / file)
        assert (tmp_path / file).name in str(error.value)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("checkpoint", [None, [1], 3, b"x"], ids=repr)
def test_neither_files_nor_state_dicts(name, checkpoint):
    with pytest.raises(TypeError, match=rf"murf_fast.{name.split(',')[0]}: `(checkpoint|state_dict)` must be"):
        MODULES[name][1](checkpoint)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_weights_of_another_kind(name, dtype):
    module, load = MODULES[name]
    state = module.state_dict()
    key = next(reversed([key for key in state if key.endswith("weight")]))
    with pytest.raises(ValueError, match=f"{re.escape(key)}.* {dtype}"):
        load({**state, key: state[key].to(dtype)})
