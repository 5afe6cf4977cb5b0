"""The training example of FeatSharp: better than its neighbours on a photo it has not seen, and its weights load."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("PIL", reason="the example reads photos")
transformers = pytest.importorskip("transformers")

from murf_fast.cli.demo import featsharp as demo  # noqa: E402
from murf_fast.nn import FeatSharp  # noqa: E402


def backbone():
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Dinov2Model(config).eval().requires_grad_(False)


def task(patches, batches=2, seed=0):
    return demo.Task(backbone(), 14, patches, batches, seed)


def test_it_is_more_faithful_than_its_neighbours():
    progress = list(demo.train(task(6, 12), 40, 25))
    assert [p.step for p in progress] == [0, 25, 40]
    first, last = progress[0].fidelity, progress[-1].fidelity
    gains = {name: value - first[name] for name, value in last.items()}
    for other in ("bilinear", "JBU"):
        # In the beginning FeatSharp is its JBU: what it has before the others is learned.
        assert last["FeatSharp"] - last[other] > 0.01
        assert gains["FeatSharp"] > 2 * gains[other]


def test_seeds_are_fixed():
    first, again = ([p.fidelity for p in demo.train(task(4), 2, 1)] for _ in range(2))
    assert first == again
    assert first[0] != first[2]
    assert [p.fidelity for p in demo.train(task(4, seed=1), 2, 1)] != first


def test_photos_are_apart(monkeypatch):
    """Every pixel that is measured on is of one photo, every one that is learned from of the other."""
    black, white = torch.zeros(3, 120, 130), torch.ones(3, 140, 120)
    seen = []
    draw = demo.Task._crops
    monkeypatch.setattr(demo, "photos", lambda: [black, white])
    monkeypatch.setattr(demo.Task, "_crops", lambda self, photo: seen.append(draw(self, photo)) or seen[-1])
    monkeypatch.setattr(demo.PHIS, "fit", lambda features: [*features] and demo.PHIS(24))
    small = task(4, 3)
    assert [float(c.amin()) for c in seen] == [1.0] * 3 + [0.0] * demo.HELD_OUT
    assert [float(c.amax()) for c in seen] == [1.0] * 3 + [0.0] * demo.HELD_OUT
    assert len(small.learned) == 3


def test_command_line(weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "featsharp.pth"
    given = ["--weights", str(weights), "--patches", "4", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["featsharp", *given])
    demo.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("backbone: Dinov2Model from --weights")
    assert [line.partition(":")[0] for line in printed[1:]] == ["step    0", "step    1", "weights"]
    model = FeatSharp.from_checkpoint(out, transformers.Dinov2Model.from_pretrained(weights))
    assert model.factor == (2, 2)
    assert float(model.normalizer.alpha) != 1
    assert not any(key.startswith("encoder") for key in torch.load(out, weights_only=True))


@pytest.mark.parametrize("arguments", [["--steps", "-1"], ["--steps", "1000001"], ["--steps", "many"]])
def test_steps_are_checked(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["featsharp", *arguments])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(("patches", "message"), [(3, "`patches` must be at least 4"), (11, "must be at most 10")])
def test_patches_are_checked(patches, message):
    with pytest.raises(ValueError, match=message):
        demo.Task(backbone(), 14, patches)
