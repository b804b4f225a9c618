"""Faults injected for real: death at any moment, a full disk, a folder that may not be written to or vanishes."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.run import checkpoint
from common.run.errors import UserError
from common.run.folder import locked
from common.run.loop import train
from common.run.trainer import Run
from tests import tiny_run
from tests.conftest import PATIENCE, ROOT, another_user, fails, run_stage, wait_for_checkpoint
from tests.test_training import assert_same, read_log

A = "part_a_cifar"

processes = multiprocessing.get_context("forkserver")  # imports PyTorch once, not once for every process
processes.set_forkserver_preload(["tests.tiny_run", "torch._dynamo"])  # the second is what Adam imports


def start(*arguments: Any) -> Any:
    process = processes.Process(target=tiny_run.run, args=arguments, daemon=True)
    process.start()
    return process


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder of a tiny run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uncut")
    go_on_to_the_end(folder, request.param)
    return folder


def assert_same_run(folder: Path, uncut: Path) -> None:
    """Weights, averaged weights, optimiser, position and log are equal, but for how long things took."""
    one, other = (checkpoint.load(path / "checkpoint.pt", tiny_run.STAGE) for path in (folder, uncut))
    assert_same(dict(one), dict(other))
    rows, expected = read_log(folder), read_log(uncut)
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in expected]
    for row, expected_row in zip(rows, expected):
        for column in ("epoch", "step", "train_loss", "held_out_loss"):
            assert row[column] == expected_row[column]


def go_on_to_the_end(folder: Path, epochs: int) -> None:
    process = start(folder, epochs)
    process.join(PATIENCE)
    assert process.exitcode == 0


@pytest.mark.parametrize("uncut", [tiny_run.EPOCHS], indirect=True)
def test_killed_at_random_moments_a_run_ends_as_the_uncut_one(tmp_path: Path, uncut: Path) -> None:
    """At least twenty times, each time anew at random, in one of the steps after the run has gone on."""
    moments = random.Random(0)
    kills, steps = 0, set()
    while kills < 25:
        steps_made, other = processes.Pipe(duplex=False)
        process = start(tmp_path, tiny_run.EPOCHS, other)
        other.close()  # so that the end of the process is noticed
        with contextlib.suppress(EOFError):
            for _ in range(moments.randint(2, 6)):
                began = time.perf_counter()
                assert steps_made.poll(PATIENCE)
                steps_made.recv()
            time.sleep(moments.uniform(0, time.perf_counter() - began))
        process.kill()
        process.join(PATIENCE)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if (tmp_path / "checkpoint.pt").exists():
            steps.add(checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)["progress"]["step"])
    assert kills >= 20
    assert len(steps) >= 5  # it did get on between its deaths
    go_on_to_the_end(tmp_path, tiny_run.EPOCHS)
    assert_same_run(tmp_path, uncut)


@pytest.mark.parametrize("uncut", [8], indirect=True)
@pytest.mark.parametrize("name", ["checkpoint.pt", "log.csv"])
@pytest.mark.parametrize("function", ["open", "write", "fsync", "replace", "replaced"])
def test_killed_in_the_middle_of_a_write_a_run_ends_as_the_uncut_one(
    tmp_path: Path, uncut: Path, function: str, name: str
) -> None:
    for call in (1, 7):
        process = start(tmp_path, 8, None, (function, name, call))
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        if call == 7 or function == "replaced":
            before = tmp_path / "checkpoint.pt"
            assert name == "log.csv" or checkpoint.load(before, tiny_run.STAGE)["progress"]["step"] >= 1
    if function == "write":
        (left,) = tmp_path.glob(f".{name}.*.tmp")
        half, whole = (path.stat().st_size for path in (left, tmp_path / name))
        assert 0.3 * whole < half < 0.8 * whole
    go_on_to_the_end(tmp_path, 8)
    assert_same_run(tmp_path, uncut)


def test_a_script_killed_and_resumed_ends_as_one_never_cut(tmp_path: Path, shapes_dir: Path) -> None:
    options = "--dataset shapes --batch-size 8 --checkpoint-every 1 --resume --device cpu"
    words = ["train", *options.split(), "--data-dir", str(shapes_dir), "--run-dir"]
    for delay in (0, 0.3):
        command = [sys.executable, f"{A}.py", *words, str(tmp_path / "cut")]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, text=True)
        wait_for_checkpoint(tmp_path / "cut", process)
        time.sleep(delay)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    steps = checkpoint.load(tmp_path / "cut" / "checkpoint.pt", A)["progress"]["step"] + 2
    for folder in ("cut", "uncut"):
        assert run_stage(A, *words, tmp_path / folder, "--max-steps", steps) == 0
    cut, uncut = (checkpoint.load(tmp_path / folder / "checkpoint.pt", A) for folder in ("cut", "uncut"))
    assert cut["progress"]["step"] == steps
    assert_same(dict(cut), dict(uncut))


def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path):
        for option in ("--resume", "--overwrite"):
            assert run_stage(A, "train", option, "--run-dir", tmp_path) == 2
            assert f"--run-dir {tmp_path}: another process is training there" in capsys.readouterr().err
    with locked(tmp_path):  # the first has ended
        pass


# A write that fails


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system refuses the rest of a write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `folder`, which takes the rights to mount one."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes Linux and the rights of root")
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def tiny_run_until(step: int, run_dir: Path) -> bytes:
    """Trains up to that step, and returns the checkpoint's bytes."""
    train(
        tiny_run.make_trainer(), tiny_run.make_images(), tiny_run.make_images(), run_dir, max_steps=step, sample_every=0
    )
    return (run_dir / "checkpoint.pt").read_bytes()


def go_on(run_dir: Path) -> None:
    trainer = tiny_run.make_trainer()
    trainer.restore(checkpoint.load(run_dir / "checkpoint.pt", tiny_run.STAGE), run_dir / "checkpoint.pt")
    train(trainer, tiny_run.make_images(), tiny_run.make_images(), run_dir, sample_every=0)


def test_a_full_disk_is_an_error_and_the_checkpoint_stays_whole(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 2**21):
        before = tiny_run_until(4, disk)
        log = (disk / "log.csv").read_bytes()
        with contextlib.suppress(OSError), open(disk / "filler", "wb") as file:
            while file.write(b"x" * 1024):
                file.flush()
        with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)) as error:
            go_on(disk)
        assert str(disk) in str(error.value)
        assert (disk / "checkpoint.pt").read_bytes() == before
        assert (disk / "log.csv").read_bytes() == log
        assert not list(disk.rglob("*.tmp"))
        (disk / "filler").unlink()
        go_on(disk)
        assert checkpoint.load(disk / "checkpoint.pt", tiny_run.STAGE)["progress"]["epoch"] == tiny_run.EPOCHS


def test_a_script_on_a_full_disk_ends_in_one_line(
    tmp_path: Path, shapes_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--dataset", "shapes", "--data-dir", shapes_dir, "--run-dir", tmp_path, "--batch-size", 2)
    assert run_stage(A, "train", *common, "--max-steps", 1) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    with file_size_limit(len(before) // 2):
        assert run_stage(A, "train", *common, "--max-steps", 2, "--resume") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'checkpoint.pt'}: not written ({os.strerror(errno.EFBIG)})" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_may_not_be_written_to_is_an_error(tmp_path: Path) -> None:
    before = tiny_run_until(4, tmp_path)
    tmp_path.chmod(0o555)
    with another_user(tmp_path), pytest.raises(UserError, match=os.strerror(errno.EACCES)) as error:
        go_on(tmp_path)
    tmp_path.chmod(0o755)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    error = fails(capsys, 1, A, "train", "--run-dir", tmp_path / "file" / "run")
    assert str(tmp_path / "file") in error


@pytest.mark.parametrize("fate", ["moved", "removed"])
def test_a_run_folder_that_vanishes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str) -> None:
    run_dir = tmp_path / "run"
    before = tiny_run_until(4, run_dir)
    trainer = tiny_run.make_trainer()
    trainer.restore(checkpoint.load(run_dir / "checkpoint.pt", tiny_run.STAGE), run_dir / "checkpoint.pt")
    gradient_step = trainer.gradient_step

    def step_then_vanish(*arguments: Tensor) -> Tensor:
        loss = gradient_step(*arguments)
        if trainer.progress.step == 4:  # this was the fifth
            if fate == "moved":
                run_dir.rename(tmp_path / "elsewhere")
            else:
                shutil.rmtree(run_dir)
        return loss

    monkeypatch.setattr(trainer, "gradient_step", step_then_vanish)
    with pytest.raises(UserError, match=os.strerror(errno.ENOENT)) as error:
        train(trainer, tiny_run.make_images(), tiny_run.make_images(), run_dir, sample_every=0)
    assert str(run_dir) in str(error.value)
    assert not run_dir.exists()
    if fate == "moved":
        assert (tmp_path / "elsewhere" / "checkpoint.pt").read_bytes() == before


# Numbers that are none


class Explode(torch.autograd.Function):
    """Gives back what it gets, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


def explode_at(trainer: Run, steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the gradients overflow in these steps, counted from 0."""
    forward = trainer.model.forward
    monkeypatch.setattr(
        trainer.model,
        "forward",
        lambda x, t: Explode.apply(forward(x, t)) if trainer.progress.step in steps else forward(x, t),
    )


@pytest.mark.parametrize("step", [4, 5, 6])
@pytest.mark.parametrize("checkpoint_every", [None, 1])
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, checkpoint_every: int | None
) -> None:
    """Also at the last step of an epoch, whose loss is still finite."""
    monkeypatch.setattr("common.run.loop.SAVE_EVERY", 0)
    trainer = tiny_run.make_trainer(lr=3e-3)
    explode_at(trainer, range(step - 1, step), monkeypatch)
    images = tiny_run.make_images()
    with pytest.raises(UserError, match=f"at step {step if checkpoint_every else 6}, .* with --lr 0.003"):
        train(trainer, images, images, tmp_path, sample_every=0, checkpoint_every=checkpoint_every)
    saved = checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)
    assert saved["progress"]["step"] == (step - 1 if checkpoint_every else 3)
    for weight in (*saved["model"].values(), *saved["ema"].values()):
        assert weight.isfinite().all()
    assert [row["epoch"] for row in read_log(tmp_path)] == ["1"]


def test_in_fp16_a_step_whose_gradient_overflows_is_skipped_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, images = tiny_run.make_trainer("fp16"), tiny_run.make_images()
    explode_at(trainer, range(4, 6), monkeypatch)
    train(trainer, images, images, tmp_path, max_steps=4, sample_every=0)
    before = checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)
    train(trainer, images, images, tmp_path, max_steps=6, sample_every=0)
    skipped = checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)
    for part in ("model", "optimizer"):
        assert_same(skipped[part], before[part])
    assert skipped["scaler"]["scale"] == before["scaler"]["scale"] / 4
    train(trainer, images, images, tmp_path, max_steps=7, sample_every=0)
    after = checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)
    assert after["optimizer"][0]["step"] == 5
    assert not any(torch.equal(after["model"][name], before["model"][name]) for name in before["model"])


def test_in_fp16_gradients_that_no_scale_makes_fit_end_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.run.loop.SAVE_EVERY", 0)
    trainer, images = tiny_run.make_trainer("fp16"), tiny_run.make_images()
    explode_at(trainer, range(4, 1000), monkeypatch)
    with pytest.raises(UserError, match="--precision fp32"):
        train(trainer, images, images, tmp_path, sample_every=0)
    assert trainer.progress.step < 30
    assert checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)["scaler"]["scale"] >= 1


@pytest.mark.parametrize("part", ["loss", "held-out loss"])
def test_in_fp16_a_loss_that_is_not_finite_stops_the_run(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values beyond 65,504, as a network computes them that is too wide for fp16."""
    trainer, images = tiny_run.make_trainer("fp16"), tiny_run.make_images()
    model = trainer.model if part == "loss" else trainer.ema.module
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, t: 1e7 * forward(x, t))
    message = "at step 1," if part == "loss" else "held-out loss is not finite"
    with pytest.raises(UserError, match=message):
        train(trainer, images, images, tmp_path, sample_every=0)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_stops_a_long_epoch_soon(tmp_path: Path) -> None:
    trainer = tiny_run.make_trainer(batch_size=2)
    images = tiny_run.make_images().repeat(20, 1, 1, 1)
    nn.init.constant_(next(trainer.model.parameters()), torch.nan)
    with pytest.raises(UserError, match="at step 1,"):
        train(trainer, images, images[:10], tmp_path, sample_every=0)
    assert trainer.progress.step == 1
    assert not (tmp_path / "checkpoint.pt").exists()
    trainer = tiny_run.make_trainer(batch_size=2)
    for _ in itertools.islice(trainer.steps(images), 10):
        pass
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="at step 101,"):
        train(trainer, images, images[:10], tmp_path, sample_every=0)
    assert trainer.progress.step == 101
    assert not (tmp_path / "checkpoint.pt").exists()
