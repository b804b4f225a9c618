"""The scripts in benchmarks/ that need no data set and no patience."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import train_chapter
from benchmarks.throughput import flops_per_image
from common.run import checkpoint
from common.run.checkpoint import RunOptions
from common.run.errors import UserError
from common.run.loop import train
from common.run.pictures import save_grid
from common.run.trainer import Run
from part_a_cifar import Model
from tests.conftest import ROOT
from tests.tiny_run import Tiny


@pytest.fixture
def campaign(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Makes the commands of a campaign short: `train` trains a tiny network on a few images of noise, `test` and `eval`
    leave what they would. Returns the list of those called."""
    calls: list[list[str]] = []

    def run(command: list[str], deadline: float | None = None) -> int:
        name, what, words = Path(command[1]).stem, command[2], command[3:]
        calls.append([name, what, *words])
        if what == "train":
            folder, epochs = Path(words[words.index("--run-dir") + 1]), int(words[words.index("--epochs") + 1])
            trainer = Run(name, {}, Tiny(), RunOptions(epochs=epochs, batch_size=50))
            if (folder / "checkpoint.pt").exists():
                trainer.restore(checkpoint.load(folder / "checkpoint.pt", name), folder / "checkpoint.pt")
            train(trainer, images, images[:2], folder, sample_every=0)
            save_grid(torch.zeros(64, 3, 32, 32, dtype=torch.uint8), folder / "samples" / f"epoch-{epochs:04d}.png")
        else:
            path = Path(words[words.index("--checkpoint") + 1])
            saved = checkpoint.load(path, name, ema_only=True)
            estimate = {"mean": 0.5, "standard_error": 0.25}
            numbers = {"checkpoint": str(path), "epochs": saved["progress"]["epoch"], "loss": estimate}
            numbers["bits_per_dim"] = {"total": estimate}
            if what == "eval":
                (path.parent / "eval.json").write_text(json.dumps(numbers))
            else:
                output = (
                    Path(words[words.index("--output") + 1]) if "--output" in words else path.parent / "samples.png"
                )
                count = int(words[words.index("--num-images") + 1]) if "--num-images" in words else 64
                grey = numbers["epochs"]  # tells which epoch's grid it is
                save_grid(torch.full((count, 3, 32, 32), grey, dtype=torch.uint8), output)
                if "--film" in words:
                    Path(words[words.index("--film") + 1]).write_bytes(b"a film")
        return 0

    monkeypatch.setattr(train_chapter, "run", run)
    return calls


def run_chapter(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["train_chapter.py", *map(str, words)])
    train_chapter.main()


def test_stages_take_turns_up_to_each_milestone_and_go_on_where_they_are(
    campaign: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--runs", tmp_path, "--stages", "A", "F", "--device", "cpu")
    run_chapter(monkeypatch, *words, "--epochs", 2)
    turns = [(name, words[words.index("--epochs") + 1], "--hflip" in words) for name, _, *words in campaign]
    a, f = "part_a_cifar", "part_f_cifar_hflips"
    assert turns == [(a, "1", False), (f, "1", True), (a, "2", False), (f, "2", True)]
    assert all(words[-2:] == ["--device", "cpu"] for words in campaign)
    campaign.clear()
    run_chapter(monkeypatch, *words, "--epochs", 2)
    assert campaign == []
    run_chapter(monkeypatch, *words, "--epochs", 5)
    assert len(campaign) == 2
    for name in (a, f):
        assert train_chapter.milestones(tmp_path / name) == [1, 2, 5]
        saved = checkpoint.load(tmp_path / name / "milestones" / "epoch-0002" / "checkpoint.pt", name, ema_only=True)
        assert len(saved["progress"]["log"]) == 2


def test_weights_that_an_interruption_left_out_are_kept_the_next_time(
    campaign: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--runs", tmp_path, "--stages", "A", "--epochs", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train_chapter, "keep", lambda *arguments: None)
        run_chapter(patch, *words)
    assert train_chapter.milestones(tmp_path / "part_a_cifar") == []
    run_chapter(monkeypatch, *words)
    assert len(campaign) == 1
    assert train_chapter.milestones(tmp_path / "part_a_cifar") == [1]


def test_a_campaign_can_go_on_from_the_weights_that_come_with_the_project(tmp_path: Path, images: Tensor) -> None:
    path = tmp_path / "run" / "checkpoint.pt"
    train_chapter.begin_from_assets("A", path.parent)
    saved = checkpoint.load(path, "part_a_cifar")
    (epoch,) = train_chapter.milestones(path.parent)
    assert epoch == saved["progress"]["epoch"]
    train_chapter.keep("A", path.parent, epoch)  # changes nothing
    kept = train_chapter.milestone_dir(path.parent, epoch)
    milestone = f"part_a_cifar-{epoch:04}"
    for mine, published in (
        ("checkpoint.pt", "weights/part_a_cifar.pt"),
        ("eval.json", f"logs/{milestone}.json"),
        ("samples.png", f"grids/{milestone}.png"),
        ("horse.png", f"grids/horse/{milestone}.png"),
    ):
        assert (kept / mine).read_bytes() == (ROOT / "assets" / published).read_bytes()
    shutil.rmtree(kept)
    for seen in (128, 0):  # what a run has learned of its next epoch is not this epoch's
        assert not kept.exists()
        checkpoint.save(path, {**saved, "progress": {**saved["progress"], "seen": seen}})
        train_chapter.keep("A", path.parent, epoch)
    assert kept.exists()
    options = RunOptions(**{**saved["training_options"], "batch_size": len(images), "epochs": 1000})
    run = Run("part_a_cifar", {}, Model(), options)
    run.restore(saved, path)
    assert run.progress.epoch == len(run.progress.log) >= 5
    next(run.steps(images))
    checkpoint.save(path, run.checkpoint())
    before = path.read_bytes()
    train_chapter.begin_from_assets("A", path.parent)  # there is a run now
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(kept))}: there is a milestone, but no checkpoint.pt"):
        train_chapter.begin_from_assets("A", path.parent)


def test_the_report_fills_assets_from_the_runs(
    campaign: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_chapter, "ROOT", tmp_path)
    words = ("--runs", tmp_path / "runs", "--data-dir", tmp_path)
    run_chapter(monkeypatch, *words, "--epochs", 1)
    run_chapter(monkeypatch, *words, "--epochs", 2, "--stages", "A", "G")
    campaign.clear()
    run_chapter(monkeypatch, *words, "--report")
    # `test`, plain and for two classes, and `eval` of every stage after one epoch, of A and G after two; G's four ways
    # to sample, one with a film, and its ten classes
    assert len(campaign) == 4 * (7 + 2) + 4 + 10
    table = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert table[0] == "| after 1 epochs | GFLOP per image | held-out loss ± 0.2500 | bits/dim ± 0.25 |"
    assert table[1] == "| [A](part_a_cifar.py) 16 channels, ReLU | 0.30 | 0.5000 | 0.50 |"
    assert [row[3] for row in table[1:]] == [*"ABCDEFG", "A", "G"]
    assert all(") after 2 epochs | " in row for row in table[-2:])
    assets = tmp_path / "assets"
    for name, epoch in (("part-a-cifar-output", 1), ("part-h-cifar-attn-output", 1), ("furthest", 2)):
        with Image.open(assets / f"{name}.png") as grid:
            assert grid.size == (548, 548)
            assert grid.getextrema() == ((0, epoch),) * 3  # the lines between the pictures are black
    for stage in ("part_a_cifar", "part_g_cifar"):
        saved = checkpoint.load(assets / "weights" / f"{stage}.pt", stage, ema_only=True)
        assert saved["progress"]["epoch"] == 2
        assert len((assets / "logs" / f"{stage}.csv").read_text().splitlines()) == 3
    assert (assets / "denoising.webp").read_bytes() == b"a film"
    for name in ("samplers", "classes", "losses", "forward-noising"):
        with Image.open(assets / f"{name}.png") as image:
            image.load()
    for name, rows in (("ladder", 7 + 2), ("progress", 2)):  # all after one epoch, A and G after two; G after each
        with Image.open(assets / f"{name}.png") as image:
            assert image.size == (960, 108 * rows)
    assert str(tmp_path) not in (assets / "logs" / "part_a_cifar-0001.json").read_text()
    campaign.clear()
    run_chapter(monkeypatch, *words, "--report")
    assert campaign == []

    shutil.rmtree(tmp_path / "runs")  # what is published stays comparable without the runs
    capsys.readouterr()
    run_chapter(monkeypatch, *words, "--report", "--stages", "A")
    told = capsys.readouterr().out.splitlines()
    assert f"part A: no milestone in {tmp_path / 'runs' / 'part_a_cifar'}; what assets/ has of it stays" in told
    assert campaign == []
    assert [row for row in told if row.startswith("| ")] == table
    run_chapter(monkeypatch, *words, "--from-assets", "--epochs", 3, "--stages", "D")
    assert train_chapter.milestones(tmp_path / "runs" / "part_d_cifar_arch") == [1, 3]
    run_chapter(monkeypatch, *words, "--report", "--stages", "D")
    with Image.open(assets / "ladder.png") as image:
        assert image.size == (960, 108 * (7 + 3))  # and D after three
    assert len(campaign) == 5  # D trains, is tested three times and measured


def test_only_the_report_requires_matplotlib(tmp_path: Path) -> None:
    """Of an installation without requirements-dev.txt."""
    start = "import sys; sys.modules['matplotlib'] = None; from benchmarks.train_chapter import main; main()"
    words = ["--runs", str(tmp_path), "--stages", "A", "--epochs", "1", "--data-url", "nowhere"]
    for more, told in ((["--report"], "requires matplotlib"), ([], "argument --data-url: must start with http")):
        command = [sys.executable, "-c", start, *words, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="closes one end of a POSIX pipe")
def test_a_campaign_goes_on_when_nobody_reads_what_it_tells(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    words = ["--runs", str(tmp_path), "--stages", "A", "--epochs", "1", "--data-url", "nowhere"]
    command = [sys.executable, "benchmarks/train_chapter.py", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == 1
    assert "stdout takes no more" in done.stderr
    assert "argument --data-url: must start with http" in done.stderr  # `train` was reached
    assert "Traceback" not in done.stderr


SAVES_WHEN_TOLD = """
import pathlib, signal, sys, time
def save(number, frame):
    signal.signal(number, signal.SIG_DFL)
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path("ready").touch()
time.sleep(60)
"""


def test_at_the_deadline_the_stage_is_asked_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_chapter.run([sys.executable, "-c", SAVES_WHEN_TOLD], time.monotonic() + 3) == 0
    assert Path("saved").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_makes_the_stage_save(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    before = signal.getsignal(number)

    def interrupt() -> None:
        while not Path("ready").exists() or signal.getsignal(number) == before:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert train_chapter.run([sys.executable, "-c", SAVES_WHEN_TOLD]) == 128 + signal.SIGTERM
    assert Path("saved").exists()
    assert train_chapter.run([sys.executable, "-c", "raise SystemExit(3)"]) == 3


@pytest.mark.skipif(os.name == "nt", reason="signals a POSIX process group")
def test_a_signal_to_the_whole_group_makes_the_stage_save(tmp_path: Path) -> None:
    run = f"from benchmarks.train_chapter import run; run([sys.executable, '-c', {SAVES_WHEN_TOLD!r}])"
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); {run}"]
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True) as campaign:
        while not (tmp_path / "ready").exists():
            assert campaign.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)  # until `run` waits for it
        os.killpg(campaign.pid, signal.SIGTERM)
        campaign.wait(60)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("what", "factor"), [("sample", 1000), ("train", 3)])
def test_flops_count_attention_in_full(what: str, factor: int) -> None:
    """Five blocks of 64 channels at 16 x 16 pixels, one of 32 at 4 x 4: 8 C x C products a pixel, then attention's."""
    pixels_and_channels = [(16 * 16, 64)] * 5 + [(4 * 4, 32)]
    attention = sum(2 * n * (8 * c * c) + 2 * (2 * n * n * c) for n, c in pixels_and_channels)
    assert flops_per_image("G", what) - flops_per_image("F", what) == factor * attention
