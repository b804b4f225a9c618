"""The training loop: the same weights however often it is cut, honest means, averaged weights, the run folder."""

import csv
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.diffusion import NoiseSchedule, diffusion_loss
from common.likelihood import held_out_draws
from common.run import checkpoint
from common.run.checkpoint import RunOptions
from common.run.errors import UserError
from common.run.evaluate import measure_losses
from common.run.loop import train
from common.run.trainer import Run
from common.training import AveragedWeights, Trainer, TrainingOptions
from tests import tiny_run
from tests.conftest import STAGES, needs_bf16

PATTERN = {"epochs": 3, "batch_size": 16}  # of 50 images: 3 steps an epoch, 9 in all


def make_trainer(stage: str = "part_a_cifar", precision: str = "fp32", **options: Any) -> Run:
    training_options = RunOptions(**{**PATTERN, **options})
    torch.manual_seed(training_options.seed)
    return Run(stage, {}, importlib.import_module(stage).Model(), training_options, precision)


def assert_same(one: Any, other: Any) -> None:
    """Two checkpoints, or parts of them, are equal to the last bit, but for how long things took."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "images_per_second"}:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same(a, b)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def read_log(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a run that nothing interrupted and that drew no pictures."""
    images, run_dir = tiny_run.make_images(), tmp_path_factory.mktemp("uncut")
    train(tiny_run.make_trainer(epochs=3), images, images, run_dir, sample_every=0)
    return dict(checkpoint.load(run_dir / "checkpoint.pt", tiny_run.STAGE))


def test_the_optimiser_is_adam_with_its_defaults(images: Tensor) -> None:
    trainer = tiny_run.make_trainer()
    plain = tiny_run.make_trainer().model
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for _ in zip(range(3), trainer.steps(images)):
        for weight, theirs in zip(plain.parameters(), trainer.model.parameters()):
            weight.grad = theirs.grad
        adam.step()
        for weight, theirs in zip(plain.parameters(), trainer.model.parameters()):
            torch.testing.assert_close(weight, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cuts", [[1], [1, 2, 3, 4, 5, 6, 7, 8], [9]])
def test_resumed_run_equals_the_uncut_one_bit_for_bit(
    images: Tensor, tmp_path: Path, uncut: dict[str, Any], cuts: list[int]
) -> None:
    for max_steps in [*cuts, None]:
        torch.manual_seed(max_steps or 99)  # as another process would start out
        trainer = tiny_run.make_trainer(epochs=3)
        if (tmp_path / "checkpoint.pt").exists():
            trainer.restore(checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE), tmp_path / "checkpoint.pt")
        train(trainer, images, images, tmp_path, max_steps=max_steps, sample_every=0)
        assert trainer.progress.step == (max_steps or 9)
    assert_same(dict(checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)), uncut)
    assert [row["epoch"] for row in read_log(tmp_path)] == ["1", "2", "3"]


def test_a_run_that_has_made_its_steps_makes_no_more(images: Tensor, tmp_path: Path, uncut: dict[str, Any]) -> None:
    trainer = tiny_run.make_trainer(epochs=3)
    train(trainer, images, images, tmp_path, max_steps=4, sample_every=0)
    for max_steps in (4, 3, 1):
        train(trainer, images, images, tmp_path, max_steps=max_steps, sample_every=0)
        assert trainer.progress.step == 4
    train(trainer, images, images, tmp_path, max_steps=100, sample_every=0)
    assert_same(dict(checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)), uncut)


def test_pictures_during_training_change_nothing_in_the_weights(
    images: Tensor, tmp_path: Path, uncut: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.run.report.GRID_IMAGES", 4)
    train(tiny_run.make_trainer(epochs=3), images, images, tmp_path, sample_every=2)
    assert_same(dict(checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)), uncut)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "data.png", "epoch-0002.png", "epoch-0003.png",
    ]  # fmt: skip
    assert Image.open(tmp_path / "samples" / "epoch-0003.png").size == (70, 70)


def test_pictures_that_a_death_left_out_are_drawn_on_resuming(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run dies after its checkpoint, and before the grid."""
    monkeypatch.setattr("common.run.report.GRID_IMAGES", 4)
    train(tiny_run.make_trainer(epochs=3), images, images, tmp_path, max_steps=6, sample_every=2)
    grid = tmp_path / "samples" / "epoch-0002.png"
    drawn = grid.read_bytes()
    grid.unlink()
    trainer = tiny_run.make_trainer(epochs=3)
    trainer.restore(checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE), tmp_path / "checkpoint.pt")
    train(trainer, images, images, tmp_path, max_steps=6, sample_every=2)
    assert grid.read_bytes() == drawn


def test_a_picture_of_weights_that_are_gone_is_drawn_anew(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died between an epoch's picture and the next checkpoint draws the epoch again."""
    monkeypatch.setattr("common.run.report.GRID_IMAGES", 4)
    grid = tmp_path / "samples" / "epoch-0001.png"
    grid.parent.mkdir()
    grid.write_bytes(b"stale")
    train(tiny_run.make_trainer(epochs=3), images, images, tmp_path, max_steps=3, sample_every=1)
    assert Image.open(grid).size == (70, 70)


@pytest.mark.parametrize("option", [{}, {"seed": 1}, {"hflip": False}, {"lr": 2e-3}, {"batch_size": 15}])
def test_another_seed_or_option_gives_other_weights(images: Tensor, option: dict[str, Any]) -> None:
    weights = []
    for options in ({"hflip": True}, {"hflip": True, **option}):
        trainer = tiny_run.make_trainer(**options)
        for _ in zip(range(2), trainer.steps(images)):
            pass
        weights.append(trainer.model.state_dict()["net.0.weight"])
    assert torch.equal(*weights) == (not option)


def test_logged_loss_is_the_mean_over_images_whatever_the_batches(images: Tensor) -> None:
    """Against the mean of all squared errors at once, in float64, with weights that stand still."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 32, 32))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.weight.expand_as(x)

    trainer = Run("constant", {}, Constant(), RunOptions(lr=1e-30, batch_size=16))
    noises: list[Tensor] = []
    add_noise = trainer.schedule.add_noise

    def note(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        noises.append(noise.double())
        return add_noise(x0, t, noise)

    trainer.schedule.add_noise = note  # type: ignore[method-assign]
    for _, loss in zip(range(3), trainer.steps(images)):
        assert loss.item() == pytest.approx(noises[-1].square().mean().item(), rel=1e-6)
    assert (trainer.progress.epoch, trainer.progress.seen) == (1, 0)  # the batch size does not divide the 50 images
    trainer.progress.seconds = 3.0
    trainer.log_epoch(held_out_loss=0.0)
    expected = torch.cat(noises[:3]).square().mean().item()
    assert trainer.progress.log[0]["train_loss"] == pytest.approx(expected, abs=1e-6)
    assert trainer.progress.log[0]["images_per_second"] == 16


def test_loss_of_a_net_that_predicts_nothing_is_the_variance_of_the_noise() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 3, 32, 32, generator=generator)
    loss = diffusion_loss(Nothing(), NoiseSchedule(), torch.zeros_like(noise), torch.arange(64), noise)
    assert loss.shape == (64,)
    assert loss.mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / noise.numel()))


def test_every_time_step_is_drawn_equally_often() -> None:
    drawn: list[Tensor] = []

    class Note(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            drawn.append(t)
            return self.weight * x

    for _ in Trainer(Note(), TrainingOptions(epochs=100, batch_size=1000)).steps(torch.zeros(1000, 3, 1, 1)):
        pass
    times = torch.cat(drawn)
    assert (times.min(), times.max()) == (0, 999)
    quarters = torch.bincount(times // 250) / len(times)
    assert quarters.sub(0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / len(times))


def test_averaged_weights_are_the_ramped_mean() -> None:
    model = nn.Linear(1, 1, bias=False)
    for decay in (0.0, 0.5, 0.9999):
        ema = AveragedWeights(model, decay)
        averaged = next(ema.module.parameters())
        expected: float | None = None
        for n, value in enumerate(np.random.RandomState(0).random_sample(30)):
            nn.init.constant_(model.weight, value)
            ema.update(n)
            keep = min(decay, (1 + n) / (10 + n))
            expected = value if expected is None else keep * expected + (1 - keep) * value
        assert averaged.item() == pytest.approx(expected, rel=1e-5)


def test_averaging_copies_buffers_and_keeps_float32() -> None:
    model = nn.BatchNorm1d(2)
    ema = AveragedWeights(model, 0.9999)
    for n in range(3):
        model(torch.randn(8, 2))
        ema.update(n)
    assert model.running_mean is not None
    assert torch.equal(ema.module.get_buffer("running_mean"), model.running_mean)
    trainer = make_trainer(precision="bf16", batch_size=2)
    next(trainer.steps(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)))
    assert {p.dtype for p in trainer.ema.module.parameters()} == {torch.float32}


def test_averaging_turned_off_leaves_the_weights_themselves(images: Tensor, tmp_path: Path) -> None:
    train(tiny_run.make_trainer(ema_decay=0.0, epochs=1), images, images, tmp_path, sample_every=0)
    saved = checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)
    assert_same(dict(saved["ema"]), dict(saved["model"]))


@needs_bf16
@pytest.mark.parametrize("stage", [STAGES[0], STAGES[6]])
def test_bf16_autocast_learns_as_fp32_does(stage: str) -> None:
    """Sixty steps on one batch: the losses of both stay together and fall."""
    batch = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    means = []
    for precision in ("fp32", "bf16"):
        trainer = make_trainer(stage, precision, batch_size=8, epochs=60)
        losses = [loss.item() for loss in trainer.steps(batch)]
        first, last = np.mean(losses[:30]), np.mean(losses[30:])
        assert last < 0.9 * first
        means.append(last)
    assert means[1] == pytest.approx(means[0], rel=0.05)


@pytest.mark.parametrize(
    ("checkpoint_every", "save_every", "saved_steps"),
    [(None, 0, [3, 6, 9, 12]), (None, 60, [3, 12]), (None, None, [3, 9, 12]), (5, 60, [3, 5, 10, 12])],
)
def test_a_checkpoint_is_saved_after_every_epoch_but_not_more_often_than_so_many_seconds(
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_every: int | None,
    save_every: float | None,
    saved_steps: list[int],
) -> None:
    """With a clock that moves by six seconds an epoch. The first and the last are saved in any case."""
    run, saved = tiny_run.make_trainer(epochs=4), []
    if save_every is not None:  # instead of the ten seconds that the documents name
        monkeypatch.setattr("common.run.loop.SAVE_EVERY", save_every)
    monkeypatch.setattr("common.run.loop.time.perf_counter", lambda: 6.0 * (run.progress.step // 3))
    monkeypatch.setattr(checkpoint, "save", lambda path, contents: saved.append(contents["progress"]["step"]))
    train(run, images, images, tmp_path, sample_every=0, checkpoint_every=checkpoint_every)
    assert saved == saved_steps


# In 16 bits, with a tiny network: most CPUs compute in fp32 and convert


def test_16_bits_learn_as_fp32_does(images: Tensor) -> None:
    """After two hundred steps the held-out loss is the same within the noise: another seed changes more."""
    held_out = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    losses = []
    for precision in ("fp32", "fp16", "bf16"):
        run = tiny_run.make_trainer(precision, epochs=67)
        for _ in run.steps(images):
            pass
        run.check()
        losses.append(measure_losses(run.predict_averaged, run.schedule, held_out).mean().item())
    assert losses[0] < 0.5
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.002)


def test_gradients_too_small_for_fp16_are_scaled() -> None:
    """In fp16 itself, the smallest number of which is 6e-8, most of these would be 0."""
    gradients = []
    for precision in ("fp32", "fp16"):
        run = tiny_run.make_trainer(precision)
        assert isinstance(run.model, tiny_run.Tiny)
        for parameter in run.model.net[2].parameters():  # it predicts 0: gradients go with the noise
            nn.init.zeros_(parameter)
        run.gradient_step(torch.randn(16, 3, 32, 32), torch.arange(16), 1e-4 * torch.randn(16, 3, 32, 32))
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
        torch.manual_seed(0)
    assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()


@pytest.mark.parametrize("cuts", [[1], [2, 3], [6, 8]])
def test_a_run_in_fp16_resumes_bit_for_bit_with_the_scale_of_its_gradients(
    images: Tensor, tmp_path: Path, cuts: list[int]
) -> None:
    """The scale is too large at first, then grows every other step."""

    def run_until(folder: str, max_steps: int | None) -> dict[str, Any]:
        path = tmp_path / folder / "checkpoint.pt"
        run = tiny_run.make_trainer("fp16", epochs=4)
        assert run.scaler
        run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**24, "growth_interval": 2})
        if path.exists():
            run.restore(checkpoint.load(path, tiny_run.STAGE), path)
        train(run, images, images, path.parent, max_steps=max_steps, sample_every=0)
        return dict(checkpoint.load(path, tiny_run.STAGE))

    uncut = run_until("uncut", None)
    assert 0 < uncut["optimizer"][0]["step"] < 12
    for max_steps in [*cuts, None]:
        resumed = run_until("cut", max_steps)
    assert_same(resumed, uncut)


def test_a_run_continues_in_another_precision(images: Tensor, tmp_path: Path) -> None:
    """Only a checkpoint in fp16 has a scale; where there is none, scaling begins anew."""
    path = tmp_path / "checkpoint.pt"
    for max_steps, precision in enumerate(("fp32", "fp16", "bf16", "fp16"), 1):
        run = tiny_run.make_trainer(precision)
        if path.exists():
            run.restore(checkpoint.load(path, tiny_run.STAGE), path)
        train(run, images, images, tmp_path, max_steps=max_steps, sample_every=0)
        assert bool(checkpoint.load(path, tiny_run.STAGE)["scaler"]) == (precision == "fp16")


def test_a_damaged_scale_is_refused(tmp_path: Path) -> None:
    run = tiny_run.make_trainer("fp16")
    saved = run.checkpoint()
    saved["scaler"] = {"scale": 1.0}
    with pytest.raises(UserError, match="damaged"):
        run.restore(saved, tmp_path / "checkpoint.pt")


def test_log_has_a_row_per_epoch(images: Tensor, tmp_path: Path) -> None:
    train(tiny_run.make_trainer(epochs=3), images, images, tmp_path, sample_every=0)
    rows = read_log(tmp_path)
    assert list(rows[0]) == ["epoch", "step", "train_loss", "held_out_loss", "images_per_second", "seconds"]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6"), ("3", "9")]
    for row in rows:
        assert 0.1 < float(row["train_loss"]) < 2


def test_data_grid_shows_images_as_the_model_sees_them(tmp_path: Path) -> None:
    half = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    half[..., :16] = 255  # white on the left
    train(tiny_run.make_trainer(epochs=1, batch_size=64), half, half, tmp_path, sample_every=0)
    grid = np.asarray(Image.open(tmp_path / "samples" / "data.png"))
    corners = {int(grid[2 + 34 * row, 2 + 34 * column, 0]) for row in range(8) for column in range(8)}
    assert corners == {0, 255}


def test_held_out_loss_in_the_log_is_that_of_the_averaged_weights(images: Tensor, tmp_path: Path) -> None:
    """Computed here anew, image by image, from what the checkpoint holds."""
    train(tiny_run.make_trainer(epochs=3), images, images[:7], tmp_path, sample_every=0)
    saved = checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)
    model = tiny_run.Tiny()
    model.load_state_dict(saved["ema"])
    x0, t, noise = held_out_draws(images[:7], 0, NoiseSchedule())
    assert t.tolist() == list(range(7))
    with torch.no_grad():
        losses = [diffusion_loss(model, NoiseSchedule(), x0[i : i + 1], t[i : i + 1], noise[i : i + 1]) for i in t]
    assert float(read_log(tmp_path)[-1]["held_out_loss"]) == pytest.approx(torch.cat(losses).mean().item(), abs=2e-6)


def test_a_scale_that_has_doubled_many_times_comes_back(images: Tensor, tmp_path: Path) -> None:
    run = tiny_run.make_trainer("fp16")
    next(run.steps(images))
    assert run.scaler
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**40})
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, run.checkpoint())
    restored = tiny_run.make_trainer("fp16")
    restored.restore(checkpoint.load(path, tiny_run.STAGE), path)
    assert restored.scaler
    assert restored.scaler.get_scale() == 2.0**40
