"""`murf-fast extract --ray` on real workers of this machine: the same bytes as one process, whatever befalls them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("ray", reason="needs ray: pip install 'murf-fast[ray]'")
pytest.importorskip("pandas", reason="needs what ray.data needs: pip install 'murf-fast[ray]'")
pytest.importorskip("psutil")

import psutil
import ray
from extracting import CRASHES, WAITS, contents, make_images, put_patched_decoder, recipe, run
from PIL import Image

from murf_fast.data import Features
from murf_fast.data._reading import BrokenImageError

# Workers start in seconds each, and there are few cores: one cluster and one run without Ray for all of them.
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]
IMAGES, SHARD = 24, 1


@pytest.fixture(scope="module")
def scene(tmp_path_factory, weights):
    """Images of which two are broken, one of them such that it takes its decoder down, a cluster of two processors
    that knows how, the files of a run in one process, and the file that an image waits for.
    """
    top = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as monkeypatch:
        gate = put_patched_decoder(top, monkeypatch)
        gate.touch()
        make_images(top / "images", IMAGES)
        (top / "images" / "005.png").write_bytes(CRASHES)
        (top / "images" / "011.png").write_text("no image")
        waits = top / "images" / "015.png"
        waits.write_bytes(WAITS + waits.read_bytes())
        make = recipe(weights)
        run(top / "images", top / "one", make, shard=SHARD)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield top / "images", make, contents(top / "one"), gate
        ray.shutdown()


def workers():
    """The processes of this cluster's actors that extract."""
    inside = psutil.Process().children(recursive=True)
    return [p for p in inside if "MapWorker" in "".join(p.cmdline()) or "_Actor" in "".join(p.cmdline())]


def test_a_killed_worker_loses_nothing(scene, tmp_path):
    """Two workers, a broken image, one that crashes the decoder, and a SIGKILL in the middle."""
    images, make, undisturbed, _ = scene
    killed = []

    def step(_):
        if not killed:
            killed.extend(workers()[:1])
            os.kill(killed[0].pid, signal.SIGKILL)

    records = run(images, tmp_path / "out", make, ray=True, shard=SHARD, step=step)
    assert killed
    assert contents(tmp_path / "out") == undisturbed
    assert [f.image for r in records for f in r.failed] == ["005.png", "011.png"]


def test_ctrl_c_and_a_second_run(scene, weights, tmp_path):
    """The command is interrupted while it uses the cluster, another run is refused meanwhile, the same goes on."""
    images, make, undisturbed, gate = scene
    out, options = tmp_path / "out", ["--sizes", "28,42x28", "--batch", "2", "--shard", SHARD, "--threads", "1"]
    options += ["--readers", "1", "--workers", "1", "--address", ray.get_runtime_context().gcs_address]
    command = [sys.executable, "-m", "murf_fast", "extract", images, "--out", out, "--weights", weights, *options]
    gate.unlink()  # an image in the middle waits
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    ) as process:
        while not (out / "extraction.json").exists() and process.poll() is None:
            time.sleep(0.01)
        with pytest.raises(ValueError, match="another run is writing to"):
            run(images, out, make, ray=True, shard=SHARD)
        while not list(out.glob("records/*.json")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        gate.touch()
        told, _ = process.communicate()
    assert process.returncode == 130, told
    assert "the same command goes on" in " ".join(told.split())
    before = {p: p.stat().st_mtime_ns for p in out.glob("data/*.safetensors")}
    assert before
    assert not (out / "features.json").exists()
    run(images, out, make, ray=True, workers=1, shard=SHARD)
    assert contents(out) == undisturbed
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_full_disk(scene, tmp_path):
    images, make, undisturbed, _ = scene
    disk, mount = tmp_path / "disk", shutil.which("mount")
    disk.mkdir()
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        filler, out = disk / "filler", disk / "out"

        def step(_):
            with filler.open("ab", buffering=0) as file:
                while disk_free(disk):
                    file.write(bytes(min(1 << 16, disk_free(disk))))

        with pytest.raises(OSError, match="No space left"):
            run(images, out, make, ray=True, workers=1, shard=SHARD, step=step)
        assert not (out / "features.json").exists()
        filler.unlink()
        run(images, out, make, ray=True, workers=1, shard=SHARD)
        assert contents(out) == undisturbed
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def disk_free(folder):
    return shutil.disk_usage(folder).free


def test_strict_stops_the_run(scene, tmp_path):
    images, make, *_ = scene
    with pytest.raises(BrokenImageError, match=r"--strict: 005\.png crashed the decoder"):
        run(images, tmp_path / "out", make, ray=True, workers=1, shard=SHARD, strict=True)


def test_a_worker_that_cannot_start_is_one_line(scene, tmp_path):
    images, make, *_ = scene

    def only_here(device):
        if os.getpid() != here:
            raise ValueError("--weights are not on this machine")
        return made

    here, made = os.getpid(), make(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^a worker of Ray: --weights are not on this machine$"):
        run(images, tmp_path / "out", only_here, ray=True, workers=1, shard=SHARD)
    with pytest.raises(ValueError, match=r"room for 2 workers of 1 CPU threads, not for 3"):
        run(images, tmp_path / "out", make, ray=True, workers=3, shard=SHARD)


def test_an_image_that_every_worker_dies_of(scene, tmp_path):
    """It ends in failed.jsonl, and all others are there."""
    images, make, *_ = scene
    size = (23, 41)
    shutil.copytree(images, tmp_path / "images")
    Image.new("RGB", size[::-1]).save(tmp_path / "images" / "010.png")

    def deadly(device):
        murf = make(device)
        features = murf.features

        def dies(pixels, grid=None):
            if any(tuple(p.shape[1:]) == size for p in pixels):
                os.kill(os.getpid(), signal.SIGKILL)
            return features(pixels, grid)

        murf.features = dies
        return murf

    run(tmp_path / "images", tmp_path / "out", deadly, ray=True, shard=2)
    lines = (tmp_path / "out" / "failed.jsonl").read_text().splitlines()
    told = {line["image"]: line["reason"] for line in map(json.loads, lines)}
    assert set(told) == {"005.png", "010.png", "011.png"}
    assert told["010.png"] == "010.png: 2 workers died of it"
    assert sum(1 for _ in Features(tmp_path / "out").names()) == IMAGES - 3
    assert not (tmp_path / "out" / "attempts").exists()
