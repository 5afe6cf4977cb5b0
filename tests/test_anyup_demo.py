"""The training example of AnyUp: it lowers the loss on crops it has not seen, and its checkpoint loads."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("PIL", reason="the example reads photos")
transformers = pytest.importorskip("transformers")

from murf_fast.cli.demo import anyup as demo  # noqa: E402
from murf_fast.nn import AnyUp  # noqa: E402


def backbone():
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Dinov2Model(config).eval().requires_grad_(False)


def trained(steps, seed=0):
    model = demo.from_scratch(16)
    return model, list(demo.train(demo.Task(backbone(), 14, 4, seed), model, steps, 20, 2e-3))


def test_training_lowers_the_loss_on_held_out_crops():
    model, progress = trained(50)
    assert [step for step, _ in progress] == [0, 20, 40, 50]
    losses = [loss for _, loss in progress]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.96 * losses[0]
    # What moved is the model, not what it is measured on.
    again = demo.Task(backbone(), 14, 4)
    assert again.held_out_loss(demo.from_scratch(16)) == losses[0]
    assert again.held_out_loss(model) == pytest.approx(losses[-1])


def test_seeds_are_fixed():
    (first, losses), (second, again) = trained(2), trained(2)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert trained(2, seed=1)[1] != losses


def test_held_out_crops_share_no_pixel_with_training():
    task = demo.Task(backbone(), 14, 4)
    side = 2 * task.size
    for photo in task._photos:
        photo[:] = 0
        photo[:, :, -side:] = 1
    assert max(float(task._batch().max()) for _ in range(50)) == 0


def test_command_line(weights, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    given = ["--weights", str(weights), "--patches", "2"]

    def lines(*arguments):
        monkeypatch.setattr("sys.argv", ["anyup", *given, *arguments])
        demo.main()
        return capsys.readouterr().out.splitlines()

    def losses(printed):
        return [line.split(",")[0].rpartition(" ")[2] for line in printed if line.startswith("step")]

    printed = lines("--steps", "2", "--out", str(first))
    assert printed[0].startswith("backbone: Dinov2Model from --weights")
    assert printed[1].startswith("bilinear: loss on held-out crops")
    assert len(losses(printed)) == 2
    finetuned = lines("--steps", "1", "--start", str(first), "--out", str(second))
    assert losses(finetuned)[0] == losses(printed)[-1]
    one, other = (AnyUp.from_checkpoint(path) for path in (first, second))
    assert (one.qk_dim, other.qk_dim) == (128, 128)
    moved = [n for (n, p), q in zip(one.named_parameters(), other.parameters(), strict=True) if not torch.equal(p, q)]
    assert moved == [n for n, p in one.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("arguments", [["--steps", "-1"], ["--steps", "1000001"], ["--steps", "many"]])
def test_steps_are_checked(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["anyup", *arguments])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(("patches", "message"), [(1, "`patches` must be at least 2"), (9, "must be at most 8")])
def test_patches_are_checked(patches, message):
    with pytest.raises(ValueError, match=message):
        demo.Task(backbone(), 14, patches)
