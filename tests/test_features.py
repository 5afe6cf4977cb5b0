"""`murf_fast.data.Features`: a dataset for torch's loaders, and what it refuses to read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from extracting import make_images, recipe, run

from murf_fast._files import sha256_of_json
from murf_fast.data import Features, _records
from murf_fast.data.formats import FORMATS

LIBRARIES = {"zarr": ("zarr", "3"), "parquet": ("pyarrow", None), "arrow": ("pyarrow", None)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, weights):
    """A folder of features in every format whose library is here: eight images in shards of three."""
    top = tmp_path_factory.mktemp("features")
    make_images(top / "images", 8)
    murf = recipe(weights)(torch.device("cpu"))
    found = {}
    for form in FORMATS:
        try:
            run(top / "images", top / form, lambda device: murf, form=form)
        except ModuleNotFoundError:
            continue
        found[form] = top / form
    return found


@pytest.fixture(params=FORMATS)
def folder(request, folders, tmp_path):
    """A copy that a test may damage."""
    if request.param not in folders:
        pytest.skip(f"needs {LIBRARIES[request.param][0]}")
    return shutil.copytree(folders[request.param], tmp_path / "copy")


def test_an_item_is_a_copy(folder):
    data = Features(folder)
    before = data[4]["features"].clone()
    data[4]["features"].zero_()
    assert torch.equal(data[4]["features"], before)
    assert torch.equal(data[-4]["features"], before)
    assert before.any()


def test_indices(folders):
    data = Features(folders["safetensors"])
    for index in (8, -9):
        with pytest.raises(IndexError, match=rf"index {index} of 8 images"):
            data[index]
    with pytest.raises(TypeError):
        data["000.png"]
    assert data[torch.tensor(3)]["name"] == "003.png"
    assert "8 images, features (48, 3, 2) float32, safetensors" in repr(data)


def test_workers_of_a_loader(folder):
    """Those of a fork have what was opened before; that they may be started anew is test_a_pickled_dataset_..."""
    data = Features(folder)
    expected = [data[i] for i in range(8)]  # opened before the fork, too
    loader = torch.utils.data.DataLoader(data, 3, num_workers=2, multiprocessing_context="fork")
    found = list(loader)
    assert torch.equal(torch.cat([b["features"] for b in found]), torch.stack([e["features"] for e in expected]))
    assert [name for b in found for name in b["name"]] == [e["name"] for e in expected]


def test_distributed_samplers_share_the_images(folders):
    data = Features(folders["safetensors"])
    samplers = [torch.utils.data.DistributedSampler(data, 2, rank, shuffle=True, seed=3) for rank in range(2)]
    loaders = [torch.utils.data.DataLoader(data, 2, sampler=sampler) for sampler in samplers]
    names = [name for loader in loaders for batch in loader for name in batch["name"]]
    assert sorted(names) == list(data.names())


def test_a_pickled_dataset_is_its_folder(folder):
    data = pickle.loads(pickle.dumps(Features(folder)))
    assert torch.equal(data[0]["features"], Features(folder)[0]["features"])


def files_of(folder, shard):
    """The one file of a shard."""
    (path,) = [p for p in folder.rglob("*") if p.is_file() and is_of(p, shard)]
    return path


def is_of(path, shard):
    return (path.stem == f"{shard:06}" and path.parent.name == "data") or path.parts[-5:-3] == ("c", str(shard))


def told_again(folder, shard, /, **changes):
    """Changes a record, with checksums as if it had been written so."""
    path = folder / "records" / f"{shard:06}.json"
    record = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"} | changes
    path.write_text(json.dumps({**record, "sha256": sha256_of_json(record)}))
    index = {k: v for k, v in json.loads((folder / "features.json").read_text()).items() if k != "sha256"}
    index["shards"][shard]["sha256"] = sha256_of_json(record)
    (folder / "features.json").write_text(json.dumps({**index, "sha256": sha256_of_json(index)}))


def test_a_changed_byte_is_named(folder):
    path = files_of(folder, 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    data = Features(folder)
    assert data[0]["name"] == "000.png"  # of another shard
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or missing: its checksum"):
        data[4]
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or missing: its checksum"):
        data.verify()
    assert Features(folder, checksums=False)[4]["name"] == "004.png"


def test_a_missing_or_cut_file_is_named(folder):
    path = files_of(folder, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or missing: it has \d+ bytes"):
        Features(folder, checksums=False)[4]
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or missing: No such file"):
        Features(folder)[4]


def test_a_header_of_another_shard_is_refused(folder):
    """With checksums that are right: what a file says of itself is compared, too."""
    wrong, right = files_of(folder, 2), files_of(folder, 0)
    is_zarr = wrong.parts[-5:-3] == ("c", "2")
    content = bytes(right.stat().st_size) if is_zarr else wrong.read_bytes()  # of two images, not three
    right.write_bytes(content)
    told_again(folder, 0, files=[{"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}])
    with pytest.raises(ValueError, match=rf"{right.name} is damaged or missing"):
        Features(folder)[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"dtype": "F32"', b'"dtype": "I32"'), (b'"shape": [3, 48', b'"shape": [3, 84'), (b'"fingerprint": "', None)],
)
def test_a_header_of_the_same_length_is_refused(old, new, folders, tmp_path):
    folder = shutil.copytree(folders["safetensors"], tmp_path / "copy")
    path = folder / "data" / "000000.safetensors"
    content = path.read_bytes()
    at = content.index(old)
    if new is None:  # of another configuration
        old = content[at : at + len(old) + 8]
        new = old[:-8] + bytes(reversed(old[-8:]))
    content = content.replace(old, new)
    path.write_bytes(content)
    told_again(folder, 0, files=[{"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}])
    with pytest.raises(ValueError, match=r"000000\.safetensors is damaged or missing: its header is not that"):
        Features(folder)[0]


@pytest.mark.parametrize("what", ["pickle", "text"])
def test_nothing_is_unpickled(what, folder, tmp_path):
    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    content = pickle.dumps(Runs()) if what == "pickle" else b"{}"
    path = files_of(folder, 0)
    path.write_bytes(content)
    told_again(folder, 0, files=[{"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or missing"):
        Features(folder)[0]
    assert not (tmp_path / "ran").exists()


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    path = files_of(folder, 1)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or missing: it is not a regular file"):
        Features(folder)[4]
    path.unlink()
    (tmp_path / "elsewhere").rename(path)
    top = path.parents[len(path.relative_to(folder).parts) - 2]
    top.rename(tmp_path / "folder")
    top.symlink_to(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"is damaged or missing: .* is not a folder"):
        Features(folder)[4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": ["a.png"]}, "its images are none of the shard"),
        ({"positions": [0, 2, 1]}, "its images are none of the shard"),
        ({"positions": [0, 1, 3]}, "its images are none of the shard"),
        ({"positions": [0, 1, True]}, "of another shard"),
        ({"shard": 1}, "of another shard"),
        ({"fingerprint": "x"}, "of another configuration"),
        ({"files": [{"sha256": 3, "bytes": 1}]}, "its names are none"),
        ({"files": []}, "it has 0 files of 1"),
        ({"names": [[], [], []]}, "its names are none"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_a_record_that_cannot_be_is_named(change, words, folders, tmp_path):
    folder = shutil.copytree(folders["safetensors"], tmp_path / "copy")
    told_again(folder, 0, **change)
    with pytest.raises(ValueError, match=rf"000000\.json is .*{words}"):
        Features(folder)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "pickle"}, "another format"),
        ({"version": 2}, "another version"),
        ({"shards": []}, "another format"),
        ({"layout": {}}, "arrays"),
        ({"layout": {"arrays": [{"name": "../x", "shape": [1], "dtype": "float32"}], "images": 8, "shard": 3}}, "none"),
    ],
)
def test_an_index_that_cannot_be_is_named(change, words, folders, tmp_path):
    folder = shutil.copytree(folders["safetensors"], tmp_path / "copy")
    index = {k: v for k, v in json.loads((folder / "features.json").read_text()).items() if k != "sha256"} | change
    (folder / "features.json").write_text(json.dumps({**index, "sha256": sha256_of_json(index)}))
    with pytest.raises(ValueError, match=rf"features\.json is damaged: .*{words}"):
        Features(folder)


def test_an_edited_record_or_index_is_named(folders, tmp_path):
    folder = shutil.copytree(folders["safetensors"], tmp_path / "copy")
    for name in ("records/000000.json", "features.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"shard": 0', '"shard": 1').replace('"images": 8', '"images": 9'))
        with pytest.raises(ValueError, match=rf"{os.path.basename(name)} is damaged: its checksum"):
            Features(folder)[0]
        (folder / name).write_text(text)
    assert len(Features(folder)) == 8


def test_what_is_no_folder_of_features(tmp_path):
    with pytest.raises(TypeError, match="`folder` must be a path, got int"):
        Features(3)
    with pytest.raises(ValueError, match=f"holds no features: {_records.INDEX} is missing"):
        Features(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        Features(tmp_path / "file")
