"""The engine of `murf-fast extract` in one process: what it stores, and what faults leave."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from extracting import (
    CRASHES,
    SIZES,
    WAITS,
    contents,
    make_images,
    make_tar,
    put_patched_decoder,
    recipe,
    run,
)

from murf_fast.data import Features, _records, extraction
from murf_fast.data._attempts import Attempts
from murf_fast.data._reading import BrokenImageError
from murf_fast.data._worker import Worker
from murf_fast.data.formats import FORMATS
from murf_fast.nn import DepthHead, SegmentationHead

pytestmark = pytest.mark.usefixtures("one_thread")
LIBRARIES = {"zarr": ("zarr", "3"), "parquet": ("pyarrow", None), "arrow": ("pyarrow", None)}


@pytest.fixture(params=FORMATS)
def form(request):
    """Every format whose library is here."""
    if request.param in LIBRARIES:
        pytest.importorskip(LIBRARIES[request.param][0], minversion=LIBRARIES[request.param][1])
    return request.param


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eight images: shards of 3, 3 and 2, batches of 2 and 1."""
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, 8)
    return folder


@pytest.fixture(scope="module")
def make(weights):
    """The model, made once: what runs it is not what is tested."""
    murf = recipe(weights)(torch.device("cpu"))
    return lambda device: murf


@pytest.fixture(scope="module")
def undisturbed(source, make, tmp_path_factory):
    """The files of a run that nothing befell."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(source, out, make)
    return contents(out)


def pixels_of(source, names):
    from murf_fast import _pillow

    return [torch.from_numpy(_pillow.read(source / name)).permute(2, 0, 1) for name in names]


def expected(murf, source, method=None):
    """What the model gives for the same batches, image by image."""
    found = []
    for names in (("000", "001"), ("002",), ("003", "004"), ("005",), ("006", "007")):
        found += (method or murf.features)(pixels_of(source, [f"{n}.png" for n in names]))
    return found


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_every_format_holds_what_the_model_gives(form, dtype, source, make, tmp_path):
    run(source, tmp_path / "out", make, form=form, dtype=dtype)
    data = Features(tmp_path / "out")
    assert (len(data), data.shapes) == (8, {"features": (48, 3, 2)})
    assert list(data.names()) == [f"{i:03}.png" for i in range(8)]
    for i, features in enumerate(expected(make(None), source)):
        kind = torch.float16 if dtype else torch.float32
        assert data.dtypes == {"features": kind}
        assert torch.equal(data[i]["features"], features.to(kind)), i
        assert data[i]["name"] == f"{i:03}.png"
    data.verify()


def test_libraries_read_the_files(form, source, make, tmp_path):
    out = tmp_path / "out"
    run(source, out, make, form=form)
    wanted = torch.stack(expected(make(None), source)[:3])
    if form == "zarr":
        import zarr

        found = zarr.open_group(out / "features.zarr", mode="r")["features"]
        assert (found.shape, found.chunks, found.shards) == ((8, 48, 3, 2), (1, 48, 3, 2), (3, 48, 3, 2))
        found = torch.from_numpy(found[:3])
    elif form == "safetensors":
        from safetensors.torch import load_file

        found = load_file(out / "data" / "000000.safetensors")["features"]
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = out / "data" / f"000000.{form}"
        table = pq.read_table(path) if form == "parquet" else pa.ipc.open_file(path).read_all()
        assert table.column("name").to_pylist() == ["000.png", "001.png", "002.png"]
        found = torch.from_numpy(np.array(table.column("features").combine_chunks().to_numpy_ndarray()))
    assert torch.equal(found, wanted)


def test_bfloat16_is_of_safetensors_alone(source, make, tmp_path):
    run(source, tmp_path / "out", make, dtype="bfloat16")
    features = expected(make(None), source)[7].to(torch.bfloat16)
    assert torch.equal(Features(tmp_path / "out")[-1]["features"], features)


def test_every_map_by_itself(source, make, tmp_path):
    run(source, tmp_path / "out", make, fuse="none")
    data = Features(tmp_path / "out")
    murf = make(None)
    for i, features in enumerate(expected(murf, source, murf.encode)):
        for s, (h, w) in enumerate(SIZES):
            assert torch.equal(data[i][f"map_{h}x{w}_layer1"], features.maps[s][0])
            assert torch.equal(data[i][f"cls_{h}x{w}_layer1"], features.cls[s][0])


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_heads(kind, source, weights, tmp_path):
    torch.manual_seed(1)
    head = SegmentationHead(48, 5) if kind == "segmentation" else DepthHead(48, 7, depth_range=(0.1, 9.0))
    torch.save(head.state_dict(), tmp_path / "head.pth")
    limits = None if kind == "segmentation" else (0.1, 9.0)
    made = recipe(weights, head=tmp_path / "head.pth", head_kind=kind, depth_range=limits)
    run(source, tmp_path / "out", made, grid=(10, 12))
    murf = made(torch.device("cpu"))
    name, method = ("labels", murf.segment) if kind == "segmentation" else ("depth", murf.depth)
    data = Features(tmp_path / "out")
    for i, result in enumerate(expected(murf, source, lambda images: method(images, (10, 12)))):
        assert result.shape == (10, 12)
        assert torch.equal(data[i][name], result)


def test_every_source_gives_the_same(source, make, undisturbed, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    files = sorted(source.glob("*.png"))
    (tmp_path / "list.txt").write_text("".join(f"{os.path.relpath(f, tmp_path)}\n\n" for f in files))
    (tmp_path / "tars").mkdir()
    for i, part in enumerate((files[:5], files[5:])):
        make_tar(tmp_path / "tars" / f"part-{i:02}.tar", part)
    data = [f.read_bytes() for f in files]
    pq.write_table(pa.table({"jpg": data, "id": list(range(8))}), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(pa.table({"image": [{"bytes": d, "path": "x"} for d in data], "b": data}), tmp_path / "b.parquet")
    wanted = [x["features"] for x in Features(_written(undisturbed, tmp_path / "undisturbed"))]
    sources = ("list.txt", "tars", "tars/part-{00..01}.tar", "tars/part-*.tar", "a.parquet", "b.parquet")
    for i, given in enumerate(sources):
        run(tmp_path / given, tmp_path / f"out{i}", make)
        found = list(Features(tmp_path / f"out{i}"))
        assert len(found) == 8
        assert all(torch.equal(f["features"], w) for f, w in zip(found, wanted, strict=True)), given
    assert found[4]["name"] == "b.parquet/000000004"
    assert next(iter(Features(tmp_path / "out1")))["name"] == "part-00.tar/000.png"


def _written(files, folder):
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


class Stop(BaseException):
    """As an interruption at any moment."""


@pytest.mark.parametrize("after", range(5))
def test_a_run_goes_on_where_one_stopped(after, source, make, undisturbed, tmp_path):
    out, left = tmp_path / "out", [after]

    def step(_):
        if not left[0]:
            raise Stop
        left[0] -= 1

    with pytest.raises(Stop):
        run(source, out, make, step=step)
    (out / "data").mkdir(exist_ok=True)
    (out / "data" / f"000001.safetensors.{'a' * 32}.part").write_bytes(b"cut")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert len(before) == (0, 0, 1, 1, 2)[after]
    with pytest.raises(ValueError, match="not finished"):
        Features(out)
    run(source, out, make)
    assert contents(out) == undisturbed
    assert {p: p.stat().st_mtime_ns for p in before} == before  # what was there is not written again


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_process_that_ends_leaves_whole_shards(by, make, weights, tmp_path, monkeypatch):
    images, out, gate = tmp_path / "images", tmp_path / "out", put_patched_decoder(tmp_path, monkeypatch)
    make_images(images, 8)
    (images / "005.png").write_bytes(WAITS + (images / "005.png").read_bytes())
    gate.touch()
    run(images, tmp_path / "undisturbed", make, batch=1, shard=1)
    gate.unlink()
    options = ["--weights", weights, "--sizes", "28,42x28", "--batch", "1", "--shard", "1", "--readers", "1"]
    command = list(map(str, [sys.executable, "-m", "murf_fast", "extract", images, "--out", out, *options]))
    with subprocess.Popen(
        [*command, "--threads", "1"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    ) as process:
        while not (out / "records" / "000001.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(by)
        gate.touch()  # what is being read is waited for
        told, _ = process.communicate()
    assert process.returncode == (130 if by == signal.SIGINT else -by), told
    assert by != signal.SIGINT or "the same command goes on" in " ".join(told.split())
    assert not (out / "features.json").exists()
    run(images, out, make, batch=1, shard=1)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_broken_images_are_listed_and_do_not_stop(source, make, tmp_path, monkeypatch):
    put_patched_decoder(tmp_path, monkeypatch)
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(source, images)
    (images / "001.png").write_bytes((source / "001.png").read_bytes()[:-40])
    (images / "002.png").write_text("no image at all")
    (images / "004.png").write_bytes(CRASHES)
    (images / "005.png").write_bytes(b"")
    # The shard of 006 and 007 holds none that can be read.
    for name in ("006.png", "007.png"):
        (images / name).write_bytes(CRASHES)
    records = run(images, out, make, readers=2)
    assert [len(r.failed) for r in records] == [2, 2, 2]
    told = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [t["image"] for t in told] == [f"{i:03}.png" for i in (1, 2, 4, 5, 6, 7)]
    words = ("damaged or cut", "not an image", "crashed the decoder (SIGSEGV)", "not an image", "SIGSEGV", "SIGSEGV")
    for line, word in zip(told, words, strict=True):
        assert word in line["reason"]
        assert line["image"] in line["reason"]
    data = Features(out)
    assert [x["name"] for x in data] == ["000.png", "003.png"]
    assert list(data.failed()) == [(t["image"], t["reason"]) for t in told]
    for i, name in enumerate(("000.png", "003.png")):
        assert torch.equal(data[i]["features"], make(None).features(pixels_of(source, [name]))[0])
    with pytest.raises(ValueError, match=r"--strict: 001\.png"):
        run(images, out, make, strict=True)
    with pytest.raises(BrokenImageError, match=r"--strict: 001\.png is damaged"):
        run(images, tmp_path / "strict", make, strict=True)


def test_zarr_keeps_a_row_for_every_image(source, make, tmp_path):
    zarr = pytest.importorskip("zarr", minversion="3")
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(source, images)
    (images / "001.png").write_text("no image at all")
    run(images, out, make, form="zarr")
    found = zarr.open_group(out / "features.zarr", mode="r")["features"][:]
    assert np.isnan(found).all(axis=(1, 2, 3)).tolist() == [i == 1 for i in range(8)]
    assert np.array_equal(found[2], Features(out)[1]["features"].numpy())


def test_what_half_precision_cannot_hold_is_a_failure(source, weights, tmp_path):
    murf = recipe(weights)(torch.device("cpu"))
    murf.encoder.family.final_norm.weight.data *= 1e5
    run(source, tmp_path / "out", lambda device: murf, dtype="float16")
    data = Features(tmp_path / "out")
    assert len(data) == 0
    assert {reason for _, reason in data.failed()} == {
        f"{i:03}.png: its features are not finite in float16" for i in range(8)
    }


def test_an_image_that_changes_during_the_run(source, make, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(source, images)

    def step(_):
        (images / "007.png").write_bytes(b"longer" + (source / "007.png").read_bytes())

    records = run(images, tmp_path / "out", make, step=step, shard=1, batch=1)
    assert "when the run began" in records[7].failed[0].reason


def test_two_runs_into_one_folder(source, make, undisturbed, tmp_path):
    refused = []

    def step(_):
        with pytest.raises(ValueError, match="another run is writing to") as caught:
            run(source, tmp_path / "out", make)
        refused.append(caught)

    run(source, tmp_path / "out", make, step=step)
    assert len(refused) == 5
    assert contents(tmp_path / "out") == undisturbed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", folder]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk(source, make, undisturbed, small_disk):
    filler, out = small_disk / "filler", small_disk / "out"

    def step(_):
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    with pytest.raises(OSError, match="No space left"):
        run(source, out, make, step=step)
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.rglob("*.part"))
    with pytest.raises(OSError, match=r"--out needs .* GB left"):
        run(source, out, make)
    filler.unlink()
    run(source, out, make)
    assert contents(out) == undisturbed


def test_another_configuration_is_refused_by_its_name(source, make, weights, undisturbed, tmp_path):
    out = _written(undisturbed, tmp_path / "out")
    images = tmp_path / "images"
    shutil.copytree(source, images)
    (images / "008.png").write_bytes((source / "000.png").read_bytes())
    for name, change in (
        ("--dtype", {"dtype": "float16"}),
        ("--format", {"form": "zarr"}),
        ("--batch", {"batch": 3}),
        ("--shard", {"shard": 4}),
        ("--fuse", {"fuse": "none"}),
        ("--grid", {"grid": (4, 4)}),
        ("SOURCE", {"source": images}),
        ("weights, sizes or layers", {"make": recipe(weights, layers=(0,))}),
    ):
        if name == "--format":
            pytest.importorskip("zarr")
        given = {"source": source, "make": make, **change}
        with pytest.raises(ValueError, match=f"another configuration: {name}"):
            run(given.pop("source"), out, given.pop("make"), **given)
    assert contents(out) == undisturbed
    run(source, out, make)
    assert contents(out) == undisturbed


def test_a_worker_with_other_weights_is_refused(source, make, weights, tmp_path):
    from murf_fast.data._worker import Task, Worker
    from murf_fast.data.layout import Array, Layout
    from murf_fast.data.settings import Options, model_fingerprint

    layout = Layout((Array("features", (48, 3, 2), "float32"),), 8, 3, "x")
    task = Task(tmp_path, layout, Options(), model_fingerprint(recipe(weights, layers=(0,))(torch.device("cpu"))), 1)
    with pytest.raises(ValueError, match="others in a worker"):
        Worker(task, make, torch.device("cpu"))


def test_a_damaged_record_is_named(source, make, undisturbed, tmp_path):
    out = _written(undisturbed, tmp_path / "out")
    path = out / "records" / "000001.json"
    told = json.loads(path.read_text())
    told["names"][0] = "another.png"
    path.write_text(json.dumps(told))
    with pytest.raises(
        ValueError, match=r"000001\.json is damaged: its checksum .*; remove .*000001\.json and the same"
    ):
        run(source, out, make)
    path.unlink()
    (out / "data" / "000000.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"000000\.safetensors is damaged or missing: .*; remove .*000000\.json and the"
    ):
        run(source, out, make)
    (out / "records" / "000000.json").unlink()
    run(source, out, make)
    assert contents(out) == undisturbed


def test_records_say_what_is_in_a_shard(undisturbed):
    told = json.loads(undisturbed["records/000002.json"])
    assert (told["shard"], told["names"], told["positions"]) == (2, ["006.png", "007.png"], [0, 1])
    assert told["files"][0]["bytes"] == len(undisturbed["data/000002.safetensors"])
    assert set(undisturbed) == {
        _records.SETTINGS,
        _records.INDEX,
        *(f"records/{i:06}.json" for i in range(3)),
        *(f"data/{i:06}.safetensors" for i in range(3)),
    }
    assert Path(_records.LOCK).name not in undisturbed


@pytest.fixture
def forked(monkeypatch):
    """Shards are worked on by processes that begin anew when one dies, as Ray's do; the number of deaths."""
    deaths = []

    def here(task, make, shards, machines, step):
        for shard in shards:
            while True:
                pid = os.fork()
                if pid == 0:
                    status = 1
                    try:
                        with Worker(task, make, machines.device) as worker:
                            worker.record(shard, Attempts(task.folder, shard.number))
                        status = 0
                    finally:
                        os._exit(status)
                _, status = os.waitpid(pid, 0)
                if not status:
                    break
                assert os.WTERMSIG(status) == signal.SIGKILL
                deaths.append(shard.number)
            yield _records.read_record(task.folder, shard.number, task.layout)

    monkeypatch.setattr(extraction, "_here", here)
    return deaths


@pytest.mark.parametrize(
    ("deadly", "failed", "deaths"),
    [
        ({3}, {3: "2 workers died of it"}, 4),  # of its batch, then of itself
        ({3, 4}, {3: "2 workers died of it", 4: "2 workers died of it"}, 6),
        ({6, 7}, {6: "2 workers died of it", 7: "2 workers died of it"}, 6),
    ],
)
def test_images_that_workers_die_of(source, make, forked, tmp_path, deadly, failed, deaths):
    """They are broken after a few deaths; all others have the features of batches without them."""
    pixels = [p.flatten()[:64] for p in pixels_of(source, [f"{i:03}.png" for i in sorted(deadly)])]

    def dies(murf, given):
        if any(torch.equal(p.flatten()[:64], d) for p in given for d in pixels):
            os.kill(os.getpid(), signal.SIGKILL)

    records = run(source, tmp_path / "out", lambda device: _Watched(make(device), dies))
    found = {f.image: f.reason for r in records for f in r.failed}
    assert found == {f"{i:03}.png": f"{i:03}.png: {reason}" for i, reason in failed.items()}
    assert len(forked) == deaths
    features = Features(tmp_path / "out")
    assert len(features) == 8 - len(deadly)
    for first in range(0, 8, 3):
        for batch in ([first, first + 1], [first + 2]):
            left = [i for i in batch if i < 8 and i not in deadly]
            names = [f"{i:03}.png" for i in left]
            expected = make(None).features(pixels_of(source, names)) if left else []
            rows = [f for f in features if f["name"] in names]
            for row, one in zip(rows, expected, strict=True):
                assert torch.equal(row["features"], one)


def test_a_batch_that_workers_die_of_though_no_image_is_to_blame(source, make, forked, tmp_path):
    """As where two images together take too much memory."""

    def dies(murf, given):
        if len(given) == 2 and torch.equal(given[0].flatten()[:64], first):
            os.kill(os.getpid(), signal.SIGKILL)

    (first,) = (p.flatten()[:64] for p in pixels_of(source, ["003.png"]))
    records = run(source, tmp_path / "out", lambda device: _Watched(make(device), dies))
    reasons = [f.reason for r in records for f in r.failed]
    assert reasons == [f"00{i}.png: 3 workers died of its batch, and of none of its images" for i in (3, 4)]
    assert len(forked) == 3


class _Watched:
    """A model that calls a function before it makes features."""

    def __init__(self, murf, before):
        self._murf, self._before = murf, before

    def __getattr__(self, name):
        return getattr(self._murf, name)

    def features(self, pixels, grid=None):
        self._before(self._murf, pixels)
        return self._murf.features(pixels, grid)


def test_damage_that_keeps_the_length_is_seen_on_request(source, make, tmp_path):
    out = tmp_path / "out"
    run(source, out, make)
    (out / "features.json").unlink()
    path = out / "data" / "000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"000001\.safetensors is damaged.*checksum.*remove .*000001\.json and the same"
    ):
        run(source, out, make, verify=True)
    run(source, out, make)  # by lengths alone it is whole
    with pytest.raises(ValueError, match=r"000001\.safetensors is damaged"):
        Features(out).verify()
