"""A run of a tiny network that the tests kill: what it does in a process of its own, and how it is made to die."""

import builtins
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.run import checkpoint
from common.run.checkpoint import RunOptions
from common.run.folder import locked
from common.run.loop import train
from common.run.trainer import Run

STAGE = "tiny"
EPOCHS = 60  # of three steps and three checkpoints each


class Tiny(nn.Module):
    """Predicts noise, badly and fast."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x * (1 + t[:, None, None, None] / 1000))


def make_images() -> Tensor:
    return torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_trainer(precision: str = "fp32", **options: Any) -> Run:
    torch.manual_seed(0)
    run_options = RunOptions(**{"epochs": EPOCHS, "batch_size": 16, "hflip": True, **options})
    return Run(STAGE, {}, Tiny(), run_options, precision)


def run(run_dir: Path, epochs: int = EPOCHS, steps_made: Any = None, death: tuple[str, str, int] | None = None) -> None:
    """Begins the run, or goes on with it, to its end.

    Args:
        steps_made: a connection that is told of every step.
        death: the moment to die at: a function ("open", "write", "fsync", "replace" or "replaced"), the file that it
            works on, and at which of its calls.
    """
    sys.stderr = builtins.open(os.devnull, "w")  # noqa: SIM115
    tqdm.set_lock(threading.RLock())  # its own one is a semaphore, which death would leak
    torch.set_num_threads(1)
    if death:
        _die_at(*death)
    with locked(run_dir):
        trainer = make_trainer(epochs=epochs)
        path = run_dir / "checkpoint.pt"
        if path.exists():
            trainer.restore(checkpoint.load(path, STAGE), path)
        gradient_step = trainer.gradient_step

        def step_and_note(*arguments: Tensor) -> Tensor:
            loss = gradient_step(*arguments)
            if steps_made:
                steps_made.send("a step")
            return loss

        trainer.gradient_step = step_and_note  # type: ignore[method-assign, assignment]
        train(trainer, make_images(), make_images(), run_dir, sample_every=0, checkpoint_every=1)


def _die_at(function: str, name: str, call: int) -> None:
    calls = 0

    def die(where: str, path: Any) -> None:
        nonlocal calls
        calls += where == function and name in str(path)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    class Half:
        """A file of which half is written before death."""

        def __init__(self, file: Any):
            self.file = file

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.file, attribute)

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, contents: Any) -> None:
            half = len(contents) // 2
            self.file.write(contents[:half])
            self.file.flush()
            die("write", self.file.name)
            self.file.write(contents[half:])

    fsync, replace = os.fsync, os.replace
    opened: list[Any] = []

    def open_(path: Any, *arguments: Any) -> Any:
        file = builtins.open(path, *arguments)  # noqa: SIM115
        opened[:] = [path]
        die("open", path)
        return Half(file)

    def fsync_(descriptor: Any) -> None:
        die("fsync", opened[0])
        fsync(descriptor)

    def replace_(source: Any, target: Any) -> None:
        die("replace", target)
        replace(source, target)
        die("replaced", target)

    checkpoint.open = open_  # type: ignore[attr-defined]
    os.fsync, os.replace = fsync_, replace_  # type: ignore[assignment]
