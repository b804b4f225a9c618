"""What people's reports have broken: work that is lost, shells, launchers. Each test is named after the promise."""

import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.run import checkpoint, distributed
from common.run.datasets import load_images
from common.run.errors import UsageError, UserError
from common.run.folder import one_at_a_time
from common.run.loop import train
from common.run.trainer import Run
from tests import tiny_run
from tests.conftest import PATIENCE, ROOT, STAGES, another_user, fails, mind_signals, run_stage, wait_for_checkpoint

A = STAGES[0]
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # as most people run Python


@pytest.fixture
def short(tmp_path: Path, shapes_dir: Path) -> tuple[object, ...]:
    """Options of a run of stage A in `tmp_path`/run."""
    data = ("--dataset", "shapes", "--data-dir", shapes_dir, "--device", "cpu")
    return (*data, "--run-dir", tmp_path / "run", "--batch-size", 2, "--sample-every", 0)


@pytest.fixture
def kept_shapes(shapes_dir: Path, tmp_path: Path) -> Path:
    """A folder with the data set in it, named as `short` names the run folder."""
    load_images("shapes", shapes_dir)
    (tmp_path / "run").mkdir()
    return Path(shutil.copy(shapes_dir / "shapes.npz", tmp_path / "run")).parent


# Work that is lost


@pytest.mark.parametrize("name", ["samples/photo.png", "log.csv", "eval.json", "samples.png"])
@pytest.mark.parametrize("option", ["--overwrite", "--resume", None])
def test_a_folder_with_files_of_others_is_refused_and_left_alone(
    name: str, option: str | None, tmp_path: Path, short: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    assert run_stage(A, "train", *short, "--max-steps", 1, *([option] if option else [])) == 2
    assert f"--run-dir {tmp_path / 'run'}: there is no run, but {Path(name).parts[0]}" in capsys.readouterr().err
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == [path]
    assert path.read_bytes() == b"mine"


def test_overwriting_deletes_the_files_of_the_run_by_their_names_alone(
    tmp_path: Path, short: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run_stage(A, "train", *short, "--max-steps", 2) == 0
    before = (run_dir / "checkpoint.pt").read_bytes()
    assert run_stage(A, "train", *short, "--max-steps", 1) == 2
    assert "--resume" in capsys.readouterr().err
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    for name in ("samples/photo.png", "samples/epoch-0001.txt", "notes.txt"):
        (run_dir / name).write_bytes(b"mine")
    for name in ("samples/epoch-0001.png", "eval.json"):
        (run_dir / name).write_bytes(b"the run's")
    assert run_stage(A, "train", *short, "--max-steps", 1, "--overwrite") == 0
    assert checkpoint.load(run_dir / "checkpoint.pt", A)["progress"]["step"] == 1
    for name in ("samples/photo.png", "samples/epoch-0001.txt", "notes.txt"):
        assert (run_dir / name).read_bytes() == b"mine"
    assert not (run_dir / "samples" / "epoch-0001.png").exists()
    assert not (run_dir / "eval.json").exists()


def test_overwriting_leaves_what_a_link_leads_to(tmp_path: Path, short: tuple[object, ...]) -> None:
    assert run_stage(A, "train", *short, "--max-steps", 1) == 0
    another = tmp_path / "another"
    (tmp_path / "run" / "samples").rename(another)
    (tmp_path / "run" / "samples").symlink_to(another)
    (another / "epoch-0001.png").write_bytes(b"another run's")
    assert run_stage(A, "train", *short, "--max-steps", 1, "--overwrite") == 0
    assert (another / "epoch-0001.png").read_bytes() == b"another run's"


def test_a_run_is_overwritten_no_sooner_than_another_is_saved(tmp_path: Path, short: tuple[object, ...]) -> None:
    assert run_stage(A, "train", *short, "--max-steps", 1) == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert run_stage(A, "train", *short, "--max-steps", 1, "--overwrite", "--lr", "1e39") == 1
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("option", [(), ("--resume",)])
def test_the_log_of_a_run_whose_checkpoint_was_moved_away_is_not_overwritten(
    option: tuple[str, ...], tmp_path: Path, short: tuple[object, ...]
) -> None:
    assert run_stage(A, "train", *short, "--max-steps", 1) == 0
    (tmp_path / "run" / "checkpoint.pt").rename(tmp_path / "kept.pt")
    log = tmp_path / "run" / "log.csv"
    log.write_text(log.read_text() + "1,391,0.1,0.1,1,1\n")
    before = log.read_text()
    assert run_stage(A, "train", *short, "--max-steps", 1, *option) == 2
    assert log.read_text() == before
    assert run_stage(A, "train", *short, "--max-steps", 1, "--overwrite") == 0


def test_a_data_folder_is_no_run_folder(
    kept_shapes: Path, short: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """One process waits for another there, too; what lies in it is no run's."""
    load_images("shapes", kept_shapes)
    (kept_shapes / "log.csv").write_text("mine")
    assert run_stage(A, "train", *short, "--overwrite", "--max-steps", 1) == 2
    assert "there is no run, but log.csv" in capsys.readouterr().err
    assert (kept_shapes / "log.csv").read_text() == "mine"


@pytest.mark.parametrize("name", [".run.lock", ".data.lock"])
def test_a_lock_leaves_the_file_as_it_is(
    name: str, kept_shapes: Path, tmp_path: Path, short: tuple[object, ...]
) -> None:
    (kept_shapes / name).symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("precious")
    assert run_stage(A, "train", *short, "--data-dir", kept_shapes, "--max-steps", 1) == 0
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("streams", [">/dev/full", "2>/dev/full", ">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_takes_nothing_costs_nothing(streams: str, tmp_path: Path, short: tuple[object, ...]) -> None:
    """A full disk behind stdout or stderr; or none of them at all, as with pythonw."""
    if "full" in streams and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def run(*words: object) -> subprocess.CompletedProcess[bytes]:
        line = shlex.join([sys.executable, f"{A}.py", *map(str, words)])
        return subprocess.run(
            f"{line} {streams}", shell=True, cwd=ROOT, env=BUFFERED, stdout=subprocess.PIPE, timeout=PATIENCE
        )

    assert run("train", *short, "--max-steps", 1).returncode == 0
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    if "2>" in streams:
        assert run("test", "--run-dir", tmp_path / "run", "--num-images", 2, "--steps", 2).returncode == 0
        assert (tmp_path / "run" / "samples.png").exists()
        refused = run("train", "--lr", "x")
        assert (refused.returncode, refused.stdout) == (2, b"")
    else:
        assert run("train", "--help").returncode == 0


def test_a_samples_folder_that_cannot_be_used_does_not_keep_a_run_from_going_on(
    tmp_path: Path, short: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(A, "train", *short, "--max-steps", 1) == 0
    shutil.rmtree(tmp_path / "run" / "samples")
    (tmp_path / "run" / "samples").symlink_to("nowhere")
    assert run_stage(A, "train", *short, "--max-steps", 2, "--resume") == 0
    assert "warning: going on without" in capsys.readouterr().err


def test_a_long_name_can_be_written(tmp_path: Path, short: tuple[object, ...]) -> None:
    assert run_stage(A, "train", *short, "--max-steps", 1) == 0
    output = tmp_path / ("a" * 246 + ".png")
    options = ("--num-images", 1, "--steps", 1, "--output", output)
    assert run_stage(A, "test", "--run-dir", tmp_path / "run", *options) == 0
    assert output.exists()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model_options", {"norm_groups": 7}),
        ("format", torch.zeros(3)),
        ("optimizer", {0: {"step": torch.ones(3), "exp_avg": torch.zeros(64, 64), "exp_avg_sq": torch.zeros(64, 64)}}),
    ],
)
def test_what_is_wrong_in_a_checkpoint_is_not_blamed_on_the_command_line(
    part: str, change: Any, tmp_path: Path, begun: Path, short: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(begun, tmp_path / "run")) / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved[part] = {**saved[part], **change} if isinstance(change, dict) else change
    torch.save(saved, path)
    fails(capsys, 1, A, "train", *short, "--max-steps", 2, "--resume", "--compile")  # and does not compile first


@pytest.mark.usefixtures("short_eval")
def test_eval_into_a_full_device_keeps_its_numbers(
    tmp_path: Path, short: tuple[object, ...], shapes_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert run_stage(A, "train", *short, "--max-steps", 1) == 0
    full = os.open("/dev/full", os.O_WRONLY)
    with monkeypatch.context() as patch, open(full, "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        measure = ("eval", "--run-dir", tmp_path / "run", "--data-dir", shapes_dir, "--num-images", 2)
        assert run_stage(A, *measure) == 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), full)  # closing it would fail
    assert (tmp_path / "run" / "eval.json").exists()


def test_where_stderr_is_no_terminal_a_line_tells_now_and_then_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.run.report.LINE_EVERY", 0)
    images = tiny_run.make_images()
    train(tiny_run.make_trainer(epochs=2), images, images, tmp_path, sample_every=0)
    line = r"^epoch (\d)/2: (\d+) of 50 images, train loss \d\.\d+, \d+ images/s, \d\d:\d\d left$"
    error = capsys.readouterr().err
    assert re.findall(line, error, re.MULTILINE) == [("1", "16"), ("1", "32"), ("2", "16"), ("2", "32")]
    line = r"^epoch (\d)/2: step (\d), train loss \d\.\d+, held-out loss \d\.\d+, \d+ images/s, \d+ s$"
    assert re.findall(line, error, re.MULTILINE) == [("1", "3"), ("2", "6")]


def test_on_a_terminal_a_bar_tells_the_loss_the_speed_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr, images = io.StringIO(), tiny_run.make_images()
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr("common.run.report.time.perf_counter", itertools.count().__next__)
    train(tiny_run.make_trainer(epochs=2), images, images, tmp_path, sample_every=0)
    assert re.search(r"epoch 2/2: .*\d+/100 \[\d\d:\d\d<.*images/s, loss=\d\.\d+\]", stderr.getvalue())
    assert stderr.getvalue().count("held-out loss") == 2


def test_without_stderr_what_it_would_tell_does_not_go_to_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tiny_run.make_images()
    monkeypatch.setattr(sys, "stderr", None)
    train(tiny_run.make_trainer(epochs=1), images, images, tmp_path, sample_every=0)
    assert capsys.readouterr().out == ""


def test_what_is_told_of_a_step_is_saved_by_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, done = tiny_run.make_images(), []
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: done.append("saved"))
    monkeypatch.setattr("common.run.loop.Reporter.tell", lambda *arguments, **options: done.append("told"))
    train(tiny_run.make_trainer(epochs=1), images, images, tmp_path, sample_every=0, checkpoint_every=1)
    assert done == 3 * ["saved", "told"]


def test_a_pipe_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "checkpoint.pt")
    assert run_stage(A, "test", "--run-dir", tmp_path) == 1
    assert "no checkpoint there" in capsys.readouterr().err


def test_what_a_process_waits_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with one_at_a_time(tmp_path):
        waiting = threading.Thread(target=lambda: one_at_a_time(tmp_path).__enter__(), daemon=True)
        waiting.start()
        told, deadline = "", time.monotonic() + PATIENCE
        while "waiting for another process" not in told and time.monotonic() < deadline:
            told += capsys.readouterr().err
            time.sleep(0.01)
        assert "waiting for another process" in told
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_current_folder_that_is_gone_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    error = fails(capsys, 1, A, "train", "--dataset", "pictures")
    assert "error: the current folder: No such file" in error


def test_a_checkpoint_of_another_program_is_not_overwritten(
    tmp_path: Path, short: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"weights": torch.zeros(3)}, tmp_path / "run" / "checkpoint.pt")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert run_stage(A, "train", *short, "--overwrite") == 1
    assert "not a checkpoint of this project" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("option", ["--run-dir", "--data-dir", "--output", "--checkpoint"])
def test_an_empty_path_is_an_error(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = "train" if option == "--data-dir" else "test"
    assert run_stage(A, command, option, "") == 2
    assert f"argument {option}: must not be empty" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: tuple[object, ...]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_stage(A, "train", *short, "--run-dir=~/run", "--max-steps", 1) == 0
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def fail(*arguments: Any, **options: Any) -> None:
    raise ValueError("no such backend")


@pytest.mark.parametrize("what", ["write_log", "save_grid", "sample_images"])
def test_what_only_tells_of_a_run_never_ends_it(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tiny_run.make_images()
    train(tiny_run.make_trainer(epochs=2), images, images, tmp_path, max_steps=1, sample_every=0)
    trainer = tiny_run.make_trainer(epochs=2)
    trainer.restore(checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE), tmp_path / "checkpoint.pt")
    if what == "write_log":
        (tmp_path / "log.csv").unlink()
        (tmp_path / "log.csv").mkdir()  # which no file can replace
        monkeypatch.setattr("common.run.report.Reporter.begin", lambda self: None)
    else:
        monkeypatch.setattr(f"common.run.report.{what}", fail)
    train(trainer, images, images, tmp_path, sample_every=1)
    assert checkpoint.load(tmp_path / "checkpoint.pt", tiny_run.STAGE)["progress"]["epoch"] == 2
    assert "warning: going on without: " in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_costs_nothing(stream: str, tmp_path: Path, short: tuple[object, ...]) -> None:
    """As `train | head -1`, or `train 2>&1 | head -1`."""
    words = [sys.executable, f"{A}.py", "train", *map(str, short), "--max-steps", "5", "--checkpoint-every", "1"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if stream == "stderr":
        streams["stderr"] = subprocess.STDOUT
    process = subprocess.Popen(words, cwd=ROOT, text=True, env=BUFFERED, **streams)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    if process.stderr:
        process.stderr.read()
    assert process.wait(120) == 0
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt", A)["progress"]["step"] == 5


@pytest.fixture
def signal_in_step_2(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    gradient_step = Run.gradient_step

    def step(self: Run, *batch: torch.Tensor) -> torch.Tensor:
        if self.progress.step == 1:
            os.kill(os.getpid(), request.param)
        return gradient_step(self, *batch)

    monkeypatch.setattr(Run, "gradient_step", step)
    before = signal.signal(request.param, signal.SIG_DFL)  # the tests may run by nohup
    yield request.param
    signal.signal(request.param, before)


@pytest.mark.parametrize("signal_in_step_2", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], indirect=True)
def test_a_signal_saves_at_the_end_of_the_step(
    signal_in_step_2: signal.Signals, tmp_path: Path, short: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(A, "train", *short, "--max-steps", 4) == 128 + signal_in_step_2
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt", A)["progress"]["step"] == 2
    assert "--resume" in capsys.readouterr().out
    assert run_stage(A, "train", *short, "--resume", "--max-steps", 3) == 0


@pytest.mark.parametrize("signal_in_step_2", [signal.SIGINT, signal.SIGHUP], indirect=True)
def test_a_signal_that_is_ignored_stays_so(
    signal_in_step_2: signal.Signals, tmp_path: Path, short: tuple[object, ...]
) -> None:
    """As `&` in a script leaves SIGINT, and nohup SIGHUP."""
    signal.signal(signal_in_step_2, signal.SIG_IGN)
    assert run_stage(A, "train", *short, "--max-steps", 4) == 0
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt", A)["progress"]["step"] == 4


def test_interrupted_under_tee_the_status_is_that_of_the_signal(tmp_path: Path, short: tuple[object, ...]) -> None:
    words = [sys.executable, f"{A}.py", "train", *map(str, short), "--checkpoint-every", "1"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=mind_signals)
    try:
        wait_for_checkpoint(tmp_path / "run", process)
        assert process.stdout is not None
        process.stdout.close()  # tee has died of the same Ctrl-C
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 128 + signal.SIGINT
    finally:
        process.kill()
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path) -> Path:
    """The folder of a run of one step, to be copied."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    data = ("--dataset", "shapes", "--data-dir", shapes_dir, "--device", "cpu", "--sample-every", 0)
    assert run_stage(A, "train", *data, "--run-dir", folder, "--batch-size", 2, "--max-steps", 1) == 0
    return folder


@pytest.fixture
def trained(tmp_path: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a checkpoint, and a model that must not be asked."""
    shutil.copytree(begun, tmp_path / "run")
    monkeypatch.setattr("common.run.test.sample_images", fail)
    monkeypatch.setattr("common.run.evaluate.measure_losses", fail)
    return tmp_path / "run"


@pytest.fixture
def as_another_user(trained: Path) -> Iterator[None]:
    """Whoever runs the test may not write to the run folder."""
    trained.chmod(0o555)
    with another_user(trained.parent):
        yield
    trained.chmod(0o755)


@pytest.mark.usefixtures("as_another_user")
@pytest.mark.parametrize("command", ["test", "eval"])
def test_results_that_cannot_be_written_are_told_before_any_work(
    command: str, trained: Path, shapes_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data-dir", shapes_dir) if command == "eval" else ()
    assert run_stage(A, command, "--run-dir", trained, *data) == 2
    assert f"argument --output: {trained} may not be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("test", "--output", "{0}/a.png", "--trajectory", "{0}/a.png"), "that of --trajectory too"),
        (("test", "--trajectory", "{0}/samples.png"), "that of --trajectory too"),
        (("test", "--output", "{0}/loop.png", "--trajectory", "{0}/loop.png"), "that of --trajectory too"),
        (("test", "--output", "{0}/folder.png"), "is a folder"),
        (("test", "--output", "{0}/new.png", "--save-images", "{0}/new.png"), "is the folder of --output too"),
        (("test", "--save-images", "{0}/samples.png"), "is the folder of --output too"),
        (("test", "--save-images", "{0}"), "is there already"),
        (("test", "--checkpoint", "{0}/c.png", "--output", "{0}/c.png"), "c.png is the checkpoint itself"),
        (("eval", "--output", "{0}/numbers.txt"), "--output: the name must end in .json"),
        (("eval", "--output", "{0}/nowhere/numbers.json"), "--output: no such folder"),
    ],
)
def test_misnamed_results_are_told_before_any_work(
    words: tuple[str, ...], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / "folder.png").mkdir()
    (trained / "loop.png").symlink_to("loop.png")
    shutil.copy(trained / "checkpoint.pt", trained / "c.png")
    assert run_stage(A, *(word.format(trained) for word in words), "--run-dir", trained) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# Launchers

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"WORLD_SIZE": "2"}, "RANK expected"),
        ({"WORLD_SIZE": "2", "RANK": "", "LOCAL_RANK": ""}, "RANK expected"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR expected"),
        ({name: LAUNCHED[name] for name in LAUNCHED if name != "MASTER_PORT"}, "MASTER_PORT expected"),
    ],
)
def test_what_another_program_has_left_in_the_environment_is_named(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        for variable in LAUNCHED:
            patch.delenv(variable, raising=False)
        for variable, value in environment.items():
            patch.setenv(variable, value)
        importlib.reload(distributed)  # it reads the environment when it is imported
        try:
            assert run_stage(A, "test") == UsageError.exit_status
            error = capsys.readouterr().err
            assert run_stage(A, "--help") == 0
        finally:
            patch.undo()
            importlib.reload(distributed)
    assert reason in error
    assert "start with torchrun, or unset WORLD_SIZE, which is 2" in error
    assert error.count("\n") == 1


# Data, models and samples of one's own


def test_the_inner_folder_of_cifar10_is_taken_too(cifar10_dir: Path) -> None:
    inner = cifar10_dir / "cifar-10-batches-py"
    assert torch.equal(load_images("cifar10", inner, train=False), load_images("cifar10", cifar10_dir, train=False))


def test_data_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.parent.mkdir()
    path.touch(0)
    with another_user(tmp_path), pytest.raises(UserError, match=f"Permission denied: .*{path}"):
        load_images("cifar10", tmp_path)


def test_a_data_folder_that_cannot_be_made_is_not_called_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    data = ("--data-dir", tmp_path / "file" / "data", "--data-url", "http://localhost:9/it")
    error = fails(capsys, 1, A, "train", *data, "--run-dir", tmp_path / "run")
    assert f"--data-dir {tmp_path / 'file' / 'data'}: no CIFAR-10 there" in error
    assert data[-1] in error


def test_several_first_uses_at_once_draw_a_data_set_once(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from common.run import datasets
datasets.TRAINING_IMAGES, datasets.HELD_OUT_IMAGES = 60, 40
draw = datasets.draw_shapes
def note(count):
    print("drawn")
    time.sleep(0.5)
    return draw(count)
datasets.draw_shapes = note
ready = Path(sys.argv[2])
(ready / str(os.getpid())).touch()
while len(os.listdir(ready)) < 4:
    time.sleep(0.01)
assert len(datasets.load_images("shapes", Path(sys.argv[1]))) == 60
"""
    (tmp_path / "ready").mkdir()
    words = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "ready")]
    started = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0, 0]
    assert "".join(outputs).count("drawn") == 1


def test_a_model_option_that_agrees_with_the_checkpoint_alone_is_taken(
    tmp_path: Path, short: tuple[object, ...]
) -> None:
    """Without the others, which the checkpoint has, it makes no model."""
    g = STAGES[6]
    deep = ("--channel-mult", 1, 1, 1, 1, 1, "--num-res-blocks", 1, "--attention-resolutions", 2)
    assert run_stage(g, "train", *short, *deep, "--max-steps", 1) == 0
    draw = ("test", "--run-dir", tmp_path / "run", "--num-images", 1, "--steps", 1, "--attention-resolutions")
    assert run_stage(g, *draw, 2) == 0
    assert run_stage(g, *draw, 4) == 2


def test_a_console_that_lacks_a_letter_is_no_reason_to_stop(tmp_path: Path) -> None:
    words = [sys.executable, f"{A}.py", "test", "--pretrained", "--steps", "1", "--num-images", "1"]
    words += ["--run-dir", str(tmp_path), "--output", str(tmp_path / "M\u00fcnchen.png")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "M\\xfcnchen.png: 1 image" in done.stdout
    assert "warning" not in done.stderr
