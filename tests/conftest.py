"""What several test files use."""

import importlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.diffusion import NoiseSchedule
from common.run.cli import main
from common.run.datasets import load_images
from common.run.device import pick_precision
from common.run.options import Stage
from tests.tiny_run import make_images

# What is promised bit for bit is promised for the CPU, and several processes need no GPU each there. test_device.py
# also tests a GPU, if it is told which: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_device.py
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# Compiling takes up to two minutes a network: what is about it, in test_device.py, switches it on.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

os.environ["no_proxy"] = "*"  # the servers of the tests are on this machine

if "PYTEST_XDIST_WORKER" in os.environ:  # test files run side by side: one core for each, and for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

needs_bf16 = pytest.mark.skipif(
    pick_precision("auto", torch.device("cpu")) != "bf16", reason="takes minutes without bf16 instructions"
)

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds, for what another process does

STAGES = [
    "part_a_cifar",
    "part_b_cifar_more_channels",
    "part_c_cifar_silu",
    "part_d_cifar_arch",
    "part_e_cifar_deeper",
    "part_f_cifar_hflips",
    "part_g_cifar",
]


def run_stage(name: str, *arguments: object) -> int:
    """Runs `python NAME.py ARGUMENTS` within this process and returns its exit status."""
    stage: Stage = importlib.import_module(name).stage
    with pytest.raises(SystemExit) as exit_:
        main(stage, [str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def fails(capsys: pytest.CaptureFixture[str], status: int, name: str, *arguments: object) -> str:
    """Runs a command that must end in this status, without a word on stdout; returns the one line on stderr."""
    capsys.readouterr()
    assert run_stage(name, *arguments) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def wait_for_checkpoint(run_dir: Path, process: subprocess.Popen[str]) -> None:
    """Waits until a process that has just been started saves a checkpoint: it trains, and minds signals."""
    path = run_dir / "checkpoint.pt"
    before = path.stat().st_mtime_ns if path.exists() else None
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def mind_signals() -> None:
    """For `preexec_fn`: signals act as usual, also where the tests run in the background of a script or by nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def another_user(folder: Path) -> Iterator[None]:
    """Root, who may read and write everything, becomes somebody who can reach the folder, which is a temporary one."""
    user = os.geteuid()
    if user == 0:
        for parent in (folder, *folder.parents):
            if Path(tempfile.gettempdir()) in parent.parents:
                parent.chmod(parent.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


class Attack:
    """What runs code when it is unpickled: it makes the file `victim`."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which `shapes` is drawn on first use."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder that holds the real CIFAR-10."""
    if "CIFAR10_DIR" not in os.environ:
        pytest.skip("the environment variable CIFAR10_DIR does not say where CIFAR-10 is")
    return Path(os.environ["CIFAR10_DIR"])


@pytest.fixture
def short_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval` measures 40 held-out images instead of 10,000, at 20 time steps instead of 1000."""

    def load(*arguments: Any, **options: Any) -> Tensor:
        return load_images(*arguments, **options)[:40]

    monkeypatch.setattr("common.run.evaluate.load_images", load)
    monkeypatch.setattr("common.run.evaluate.NoiseSchedule", partial(NoiseSchedule, 20))


@pytest.fixture
def images() -> Tensor:
    """50 images of noise: three batches of 16, and two left over."""
    return make_images()
