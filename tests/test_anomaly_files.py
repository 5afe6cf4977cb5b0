"""Saved detectors from anywhere: what is damaged, moved, exchanged or not a file is one ValueError that names it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_anomaly_detector import OPTIONS, images, model

from murf_fast._files import sha256_of_json
from murf_fast.anomaly import MultiResolutionDetector

IMAGE = images(1, seed=5)[0]


@pytest.fixture(scope="module")
def vit():
    return model()


@pytest.fixture(scope="module")
def fitted(vit):
    return MultiResolutionDetector(vit, **OPTIONS).fit(images(2))


@pytest.fixture
def saved(fitted, tmp_path):
    fitted.save(tmp_path / "bank")
    return tmp_path / "bank"


def index_of(folder):
    return json.loads((folder / "detector.json").read_text())


def sign(folder, index):
    """Writes an index whose own checksum is right, as somebody would who means it."""
    index = {name: value for name, value in index.items() if name != "sha256"}
    (folder / "detector.json").write_text(json.dumps({**index, "sha256": sha256_of_json(index)}))


def resave(folder, position, change):
    """One bank rewritten by `change(bytes)`, with its right checksum in the index."""
    index = index_of(folder)
    path = folder / index["banks"][position]["file"]
    path.write_bytes(change(path.read_bytes()))
    index["banks"][position]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    sign(folder, index)


def refused(folder, vit, words, **options):
    with pytest.raises(ValueError, match=words):
        MultiResolutionDetector.load(folder, vit, **options)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{absolute}", "a/../b", "..", ".", "", "C:x", "a\\b", "a\0b", 3, None, ["a"]]
)
def test_names_stay_in_the_folder(saved, vit, name):
    shutil.copy(saved / "bank-000.safetensors", saved.parent / "outside.safetensors")
    index = index_of(saved)
    absolute = str(saved.parent / "outside.safetensors")
    index["banks"][0]["file"] = absolute if name == "{absolute}" else name
    sign(saved, index)
    refused(saved, vit, "is not the name of a file in the folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["bank-001.safetensors", "detector.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "hanging link", "device"])
def test_only_regular_files_are_opened(saved, vit, name, kind):
    target = saved / "moved"
    (saved / name).rename(target)
    if kind == "pipe":
        os.mkfifo(saved / name)
    elif kind == "folder":
        (saved / name).mkdir()
    else:
        (saved / name).symlink_to({"link": target, "hanging link": "nowhere", "device": "/dev/zero"}[kind])
    refused(saved, vit, "it is not a regular file")


def test_bank_and_place_are_compared(saved, vit):
    original = index_of(saved)
    banks = original["banks"]
    for changed, words in (
        (banks[:-1], "names 3 banks, and the encoder has 4"),
        ([*banks, banks[0]], "names 5 banks, and the encoder has 4"),
        (banks[::-1], "is of .*, expected"),
        ([banks[1], banks[0], *banks[2:]], "is of .*, expected"),
        ([{**b, "place": p["place"]} for b, p in zip(banks[::-1], banks, strict=True)], "has shape|is of"),
        ([{**banks[0], "file": banks[1]["file"]}, *banks[1:]], "names a bank twice"),
        ([{**banks[0], "shape": [1, 24]}, *banks[1:]], r"has shape \[40, 24\], expected \[1, 24\]"),
    ):
        sign(saved, {**original, "banks": changed})
        refused(saved, vit, words)
    # Two files exchanged, also where checksums are not looked at: each says itself which bank it is.
    sign(saved, original)
    a, b = (saved / f"bank-00{i}.safetensors" for i in (0, 1))
    a_bytes = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(a_bytes)
    refused(saved, vit, "its checksum is not that of the index")
    refused(saved, vit, "is of .*, expected", verify=False)


def test_width_and_dtype_are_those_of_the_encoder(saved, vit):
    narrow = torch.zeros(40, 23)
    for rows, words in (
        (narrow, "has 23 columns, the encoder's features have 24"),
        (narrow.new_zeros(40, 24).double(), "holds torch.float64"),
    ):
        from murf_fast.anomaly import _files

        index = index_of(saved)
        entry = index["banks"][0]
        entry["sha256"] = _files.write_rows(saved / entry["file"], rows, entry["place"])
        entry["shape"] = list(rows.shape)
        sign(saved, index)
        refused(saved, vit, words)


def test_one_flipped_bit_anywhere_is_noticed(saved, vit):
    path = saved / "bank-002.safetensors"
    whole = path.read_bytes()
    for at in (*range(0, 200, 7), *range(200, len(whole), len(whole) // 20)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        refused(saved, vit, r"bank-002\.safetensors is damaged or missing")
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(saved, vit, r"bank-002\.safetensors is damaged or missing")
        refused(saved, vit, r"bank-002\.safetensors is damaged or missing", verify=False)
    path.write_bytes(whole + b"x")
    refused(saved, vit, r"bank-002\.safetensors is damaged or missing", verify=False)


@pytest.mark.parametrize(
    "header",
    [
        b"{}", b"[]", b"3", b"{", b"\xff", b'{"rows": 1}',
        b'{"rows": {"dtype": "F32", "shape": [40], "data_offsets": [0, 3840]}}',
        b'{"rows": {"dtype": "F99", "shape": [40, 24], "data_offsets": [0, 3840]}}',
        b'{"rows": {"dtype": "F32", "shape": [-40, -24], "data_offsets": [0, 3840]}}',
        b'{"rows": {"dtype": "F32", "shape": ["40", 24], "data_offsets": [0, 3840]}}',
        b'{"rows": {"dtype": "F32", "shape": [40, 24], "data_offsets": [8, 3848]}}',
        b'{"rows": {"dtype": "F32", "shape": [4000000000000, 24], "data_offsets": [0, 384000000000000]}}',
        b"[" * 100_000,
    ],
    ids=range(13),
)  # fmt: skip
def test_headers_of_any_kind(saved, vit, header):
    resave(saved, 0, lambda data: len(header).to_bytes(8, "little") + header + data[-3840:])
    refused(saved, vit, r"bank-000\.safetensors is damaged or missing")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_indices_are_one_error(fitted, vit, tmp_path, data):
    folder = tmp_path / "bank"
    if not folder.exists():
        fitted.save(folder)
        shutil.copy(folder / "detector.json", tmp_path / "whole.json")
    index = json.loads((tmp_path / "whole.json").read_text())
    # A path through the index, whose end is removed or replaced.
    at, key = index, data.draw(st.sampled_from(sorted(index)))
    while isinstance(at[key], (dict, list)) and len(at[key]) and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
    old = at[key]
    if data.draw(st.booleans()):
        del at[key]
    else:
        at[key] = data.draw(VALUES.filter(lambda v: v != old))
    # Signed or not; what changes no meaning, such as rules by their default, loads.
    if data.draw(st.booleans()):
        sign(folder, index)
        try:
            MultiResolutionDetector.load(folder, vit, foreground=lambda image: image[0] >= 0)
        except ValueError as error:
            message = str(error)
            assert "murf_fast." in message
    else:
        (folder / "detector.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"murf_fast\."):
            MultiResolutionDetector.load(folder, vit)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("pixels", 10**400, "`pixels` must be a number or null"),
        ("scales", [10**400], "`scales` must be a list of numbers"),
        ("version", True, "has version True"),
        ("version", 2.0, r"has version 2\.0"),
        ("sha256", None, r"`banks\[0\]` must have a `sha256` that is text, got None"),
    ],
)
def test_signed_values_of_another_kind(saved, vit, name, value, words):
    index = index_of(saved)
    (index["banks"][0] if name == "sha256" else index)[name] = value
    sign(saved, index)
    refused(saved, vit, words)


@pytest.mark.parametrize("text", ["", "{", "3", "[]", "null", "[" * 100_000, "\ud800", '{"format": 1}'])
def test_an_index_that_is_none(saved, vit, text):
    (saved / "detector.json").write_bytes(text.encode(errors="surrogatepass"))
    refused(saved, vit, "is damaged|was not written by a detector")
    refused(saved / "detector.json", vit, "it is not a folder")


def test_version_1_loads_with_a_warning(saved, vit, fitted):
    index = {n: v for n, v in index_of(saved).items() if n not in ("sha256", "on_empty")}
    index["banks"] = [{n: b[n] for n in ("file", "shape")} for b in index["banks"]]
    (saved / "detector.json").write_text(json.dumps({**index, "version": 1}))
    with pytest.warns(UserWarning, match="has version 1, which has no checksums"):
        loaded = MultiResolutionDetector.load(saved, vit)
    assert torch.equal(loaded.score(IMAGE).map, fitted.score(IMAGE).map)


def test_saved_into_its_own_folder(saved, vit, fitted):
    """The banks are mapped from the files that are replaced; links in the way are not written through."""
    (saved.parent / "victim").write_text("untouched")
    for name in ("part", "whole", "rows"):
        (saved / f"bank-000.safetensors.{name}").symlink_to(saved.parent / "victim")
    (saved / "detector.json.part").symlink_to(saved.parent / "victim")
    loaded = MultiResolutionDetector.load(saved, vit)
    with pytest.raises(ValueError, match="holds a detector; overwrite=True replaces it"):
        loaded.save(saved)
    loaded.save(saved, overwrite=True)
    again = MultiResolutionDetector.load(saved, vit, verify=False)
    assert torch.equal(again.score(IMAGE).map, fitted.score(IMAGE).map)
    assert (saved.parent / "victim").read_text() == "untouched"
