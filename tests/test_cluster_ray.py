"""Banks by real workers of Ray on this machine: the files and scores of one process, whatever befalls the workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("ray", reason="needs ray: pip install 'murf-fast[ray]'")
pytest.importorskip("psutil")
pytest.importorskip("PIL.Image")

import psutil
import ray
from PIL import Image
from test_anomaly_detector import OPTIONS, images, model
from test_cli import invoke

from murf_fast.anomaly import MultiResolutionDetector, RayWorkers, _selection
from murf_fast.anomaly.shards import k_center

# Workers start in seconds each, and there are few cores: one cluster for all of them, whose workers are replaced.
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]
CORESET = {"index": "coreset", "coreset": 0.3}
KINDS = {
    "exact": {},
    "coreset": CORESET,
    "projected": {**CORESET, "projection": "linear"},
    "patchcore": {**CORESET, "rules": "patchcore"},
    "cells": {"index": "cells", "rules": "anomaly-dino"},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("images"), []
    for i, image in enumerate([*images(5), *images(3, seed=2, size=(24, 28))]):
        found.append(folder / f"{i}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(found[-1])
    return found


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with RayWorkers(workers=2, threads=1) as workers:
        yield workers
    ray.shutdown()


def detector(**options):
    return MultiResolutionDetector(model(), **OPTIONS, **options)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(paths, tmp_path_factory):
    """The folder of a fit in one process, of every kind."""
    top = tmp_path_factory.mktemp("undisturbed")
    for kind, options in KINDS.items():
        detector(**options).fit(iter(paths), folder=top / kind)
    return top


def workers():
    """The processes of this cluster's workers that are at home."""
    return [p for p in psutil.Process().children(recursive=True) if "ray::_Worker" in "".join(p.cmdline())]


def kill_one():
    victim = workers()[0]
    victim.send_signal(signal.SIGKILL)
    victim.wait(30)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_scores_are_those_of_one_process(kind, cluster, paths, undisturbed, tmp_path):
    """Also of images in memory, and of a bank of one process, whose parts the workers hold."""
    several = iter(paths) if kind == "exact" else list(map(_pixels, paths))
    detector(**KINDS[kind]).fit(several, folder=tmp_path / "bank", cluster=cluster)
    assert contents(tmp_path / "bank") == contents(undisturbed / kind)
    served = MultiResolutionDetector.load(undisturbed / kind, model(), cluster=cluster)
    alone = MultiResolutionDetector.load(undisturbed / kind, model())
    for image in images(2, seed=5):
        found, expected = served.score(image), alone.score(image)
        assert torch.equal(found.map, expected.map)
        assert found.score == expected.score
    with pytest.raises(ValueError, match="ranks or workers hold parts"):
        served.add(images(1))


def _pixels(path):
    import numpy as np

    return np.asarray(Image.open(path))


def test_a_worker_killed_while_it_encodes(cluster, paths, undisturbed, tmp_path):
    done = []

    def progress(count, _):
        done.append(count)
        if count == 2:
            kill_one()

    detector().fit(iter(paths), folder=tmp_path / "bank", batch=1, cluster=cluster, progress=progress)
    assert done == list(range(1, 9))
    alone = detector().fit(iter(paths), folder=tmp_path / "alone", batch=1)
    assert contents(tmp_path / "bank") == contents(tmp_path / "alone")
    assert alone.images_ == 8


@pytest.mark.parametrize("seconds", [10.0, 0.0], ids=["before distances are kept", "after"])
def test_a_worker_killed_while_it_chooses(seconds, cluster, paths, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(k_center, "STEPS", 5)
    monkeypatch.setattr(_selection, "SECONDS", seconds)
    killed = []

    def progress(done, _):
        if done > 30 and not killed:
            killed.append(done)
            kill_one()

    detector(**CORESET).fit(iter(paths), folder=tmp_path / "bank", cluster=cluster, coreset_progress=progress)
    assert killed
    assert contents(tmp_path / "bank") == contents(undisturbed / "coreset")


def test_a_worker_killed_before_a_search(cluster, undisturbed):
    served = MultiResolutionDetector.load(undisturbed / "exact", model(), cluster=cluster)
    first, second = images(2, seed=5)
    served.score(first)
    kill_one()
    found = served.score(second)
    alone = MultiResolutionDetector.load(undisturbed / "exact", model()).score(second)
    assert torch.equal(found.map, alone.map)


def test_a_fit_goes_on_over_a_cluster_and_back(cluster, paths, undisturbed, tmp_path, monkeypatch):
    """What one process began workers end, and what these began it ends; images that are others are refused."""
    monkeypatch.setattr(k_center, "STEPS", 5)

    def stopping(after):
        def progress(done, _):
            if done >= after:
                raise KeyboardInterrupt

        return progress

    fit = {"folder": tmp_path / "bank", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        detector(**CORESET).fit(iter(paths), folder=tmp_path / "bank", progress=stopping(5))
    with pytest.raises(ValueError, match=r"the first \d of `images` are others"):
        detector(**CORESET).fit(iter(paths[::-1]), **fit, cluster=cluster)
    with pytest.raises(KeyboardInterrupt):
        detector(**CORESET).fit(iter(paths), **fit, cluster=cluster, coreset_progress=stopping(150))
    told = []
    detector(**CORESET).fit(iter(paths), **fit, coreset_progress=lambda done, _: told.append(done))
    assert told[:2] == [38, 76]  # of banks that are chosen
    assert told[2] >= 150
    assert contents(tmp_path / "bank") == contents(undisturbed / "coreset")


def test_an_image_that_every_worker_dies_of(cluster, paths, tmp_path):
    """Refused by its name after three of them; what is done stays."""
    width = 33
    Image.new("RGB", (width, 40)).save(tmp_path / "poison.png")

    def foreground(image):
        if image.shape[2] == width:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(image.shape[1:], dtype=torch.bool)

    several = [*paths[:2], tmp_path / "poison.png", *paths[2:]]
    with pytest.raises(ValueError, match=r"^3 workers of Ray died, one after another, when encoding .*poison\.png$"):
        detector(foreground=foreground).fit(iter(several), folder=tmp_path / "bank", batch=1, cluster=cluster)
    assert json.loads((tmp_path / "bank" / "unfinished.json").read_text())["images"] == 2
    with pytest.raises(ValueError, match="`foreground` over a cluster needs batch=1"):
        detector(foreground=foreground).fit(iter(paths), folder=tmp_path / "other", cluster=cluster)
    assert not (tmp_path / "other").exists()


def test_ctrl_c_of_the_command_and_a_second_fit(weights, tmp_path, monkeypatch):
    """The command is interrupted while its workers stand still, another fit is refused meanwhile, the same goes on."""
    folder, out = tmp_path / "images", tmp_path / "bank"
    folder.mkdir()
    for i, image in enumerate(images(30, size=(70, 84))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    options = ["--weights", weights, "--scales", "0.5,1", "--layers", "0 1", "--pixels", "0", "--batch", "1"]
    options += ["--index", "coreset", "--coreset", "0.05"]
    command = [sys.executable, "-m", "murf_fast", "anomaly", "fit", folder, *options]
    one = subprocess.run([*map(str, command), "--out", str(tmp_path / "one")], capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    command = [*map(str, command), "--out", str(out), "--ray", "--workers", "1", "--threads", "1"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    ) as process:
        while not (out / "unfinished.json").exists() and process.poll() is None:
            time.sleep(0.005)
        own = psutil.Process(process.pid).children(recursive=True)
        for worker in (p for p in own if "ray::_Worker" in "".join(p.cmdline())):
            worker.send_signal(signal.SIGSTOP)
        second = subprocess.run([*command, "--resume"], capture_output=True, text=True)
        assert second.returncode == 2
        assert "is written to by another fit" in " ".join(second.stderr.split())
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=120)
    assert process.returncode != 0, told
    assert "the same command with --resume goes on" in " ".join(told.split())
    assert not (out / "detector.json").exists()
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert contents(out) == contents(tmp_path / "one")
    scores = []
    for more in ((), ("--ray", "--workers", "2", "--threads", "1")):
        file = tmp_path / f"{len(more)}.csv"
        score = ["anomaly", "score", out, folder / "00.png", folder / "01.png", "--weights", weights, "--scores", file]
        found = subprocess.run(
            [sys.executable, "-m", "murf_fast", *map(str, score), *more], capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        scores.append(file.read_text())
    assert scores[0] == scores[1]


def test_ctrl_c_while_ray_starts(tmp_path, monkeypatch):
    """The command says what it waited for and ends at once, with the processes that Ray has begun to start."""
    Image.fromarray(images(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "0.png")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out, no_weights = tmp_path / "bank", tmp_path / "none"
    command = ["anomaly", "fit", tmp_path / "0.png", "--out", out, "--weights", no_weights, "--ray", "--threads", 1]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "murf_fast", *map(str, command), "--address", "local"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    ) as process:
        assert "Ray: joining the cluster of this machine, or starting one" in process.stdout.readline()
        started: list[psutil.Process] = []
        # Of those that Ray starts on a machine the raylet is late, and its agents are no children of this process.
        while not any("raylet" in p.name() for p in started) and process.poll() is None:
            time.sleep(0.01)
            started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=10)
    assert process.returncode == 130, told
    assert told.strip() == "murf-fast: interrupted while joining the cluster of this machine, or starting one"
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert not out.exists()


def test_options_of_the_cluster_are_refused_before_any_work(cluster, paths, undisturbed, tmp_path):
    """Before the weights are looked for, which are not there."""
    rest = ["--weights", tmp_path / "none", "--threads", 1]
    commands = {
        "fit": ["anomaly", "fit", *paths, "--out", tmp_path / "fit", *rest],
        "score": ["anomaly", "score", undisturbed / "exact", paths[0], "--out", tmp_path / "0.png", *rest],
        "extract": ["extract", paths[0].parent, "--out", tmp_path / "extract", *rest],
    }
    for name, command in commands.items():
        for given, words in (
            (["--ray", "--workers", 9], "the cluster has room for 2 workers of 1 CPU threads, not for 9"),
            (["--ray", "--workers", 1, "--threads", 3], "the cluster has room for 0 workers of 3 CPU threads"),
            (["--address", "127.0.0.1:1"], "Ray: no cluster answers at 127.0.0.1:1"),
            (["--address", "there"], "Ray: an address is auto or HOST:PORT, got there"),
            (["--ray", "--device", "tpu"], "--device must be cpu"),
        ):
            result = invoke(*command, *given)
            assert result.exit_code == 2, (name, result.output)
            assert words in " ".join(result.output.split()), (name, result.output)
    assert not (tmp_path / "fit").exists()
    assert not (tmp_path / "extract").exists()


def test_misuse_is_one_line(cluster, paths, tmp_path, undisturbed):
    with pytest.raises(ValueError, match="`cluster` needs a `folder`"):
        detector().fit(iter(paths), cluster=cluster)
    with pytest.raises(TypeError, match="`cluster` must be RayWorkers or None, got str"):
        detector().fit(iter(paths), folder=tmp_path / "bank", cluster="auto")
    with pytest.raises(ValueError, match=r"used within `with RayWorkers\(\.\.\.\) as cluster:`"):
        detector().fit(iter(paths), folder=tmp_path / "bank", cluster=RayWorkers())
    assert not (tmp_path / "bank").exists()
    with pytest.raises(ValueError, match="`group` and `cluster` exclude each other"):
        MultiResolutionDetector.load(undisturbed / "exact", model(), cluster=cluster, group=object())
    with (
        pytest.raises(ValueError, match="room for 2 workers of 1 CPU threads, not for 3"),
        RayWorkers(workers=3, threads=1),
    ):
        pass
    detector(index="ivf").fit(iter(paths[:2]), folder=tmp_path / "ivf", cluster=cluster, held_out=0)
    with pytest.raises(ValueError, match='banks with index="ivf" cannot be sharded'):
        MultiResolutionDetector.load(tmp_path / "ivf", model(), cluster=cluster)
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"broken\.png is not an image"):
        detector().fit(iter([*paths, tmp_path / "broken.png"]), folder=tmp_path / "bank", cluster=cluster)
