"""The loop around a run: steps, checks, checkpoints, signals."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch import Tensor

from common.run import checkpoint, distributed
from common.run.evaluate import measure_losses
from common.run.report import Reporter
from common.run.trainer import Run

LOG_HELD_OUT_IMAGES = 2000  # for the held-out loss of every epoch: 1.3 % of an epoch of CIFAR-10
CHECK_EVERY = 100  # steps between two looks at whether the run is sound, from the first step on
STOP_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAVE_EVERY = 10.0  # seconds at least between two checkpoints: on a fast GPU an epoch may take as long as saving does


def train(
    run: Run,
    images: Tensor,
    held_out: Tensor,
    run_dir: Path,
    *,
    max_steps: int | None = None,
    sample_every: int = 10,
    checkpoint_every: int | None = None,
) -> signal.Signals | None:
    """Trains until the epochs are done, the run has made `max_steps` or a signal asks to stop. Then it is saved.

    Of several processes, rank 0 alone writes and shows progress.

    Args:
        run: fresh, or restored from a checkpoint.
        images, held_out: uint8 (N, 3, 32, 32); of the second, the first 2000 are measured after every epoch.
        sample_every: epochs between two sample grids; 0 draws none.
        checkpoint_every: steps between two checkpoints; None saves one after every epoch, but not within SAVE_EVERY.
            After the first epoch there is always one.

    Returns:
        The signal that stopped it, SIGINT, SIGTERM or SIGHUP, or None.

    Raises:
        UserError: the run is not worth saving, see `Run.check`, or a file cannot be written.
    """
    progress = run.progress
    is_first = distributed.RANK == 0
    held_out = held_out[:LOG_HELD_OUT_IMAGES]
    reporter = Reporter(run, images, run_dir, sample_every, max_steps)
    if is_first:
        reporter.begin()

    with _stop_signals() as received, reporter.bar:
        is_over = _is_over(run, max_steps, received)
        started = saved = time.perf_counter()
        for _ in () if is_over else run.steps(images):
            epoch_is_complete = progress.seen == 0
            is_over = _is_over(run, max_steps, received)
            is_late = time.perf_counter() - saved >= SAVE_EVERY  # on rank 0, which alone saves
            is_due = epoch_is_complete and (is_late or reporter.is_grid_due())
            if checkpoint_every:
                is_due = progress.step % checkpoint_every == 0
            is_due |= epoch_is_complete and progress.epoch == 1  # before it is told: no run replaces a log of epochs
            if is_over or is_due or epoch_is_complete or progress.step % CHECK_EVERY == 1:
                run.check()
            progress.seconds += time.perf_counter() - started
            if epoch_is_complete:
                run.log_epoch(measure_losses(run.predict_averaged, run.schedule, held_out).mean().item())

            if is_first and (is_over or is_due):
                checkpoint.save(run_dir / "checkpoint.pt", run.checkpoint())
                saved = time.perf_counter()
            if is_first:  # after saving: what took time to compute comes before what only tells of it
                reporter.tell(in_haste=bool(received))

            if is_over:
                break
            started = time.perf_counter()
    return received[0] if received else None


def _is_over(run: Run, max_steps: int | None, received: list[signal.Signals]) -> bool:
    """Whether the run has made its steps, or any process has received a signal: all of them stop together."""
    number = distributed.maximum(received[0] if received else 0)
    if number and not received:
        received.append(signal.Signals(number))
    has_made_its_steps = max_steps is not None and run.progress.step >= max_steps
    return has_made_its_steps or run.progress.epoch >= run.options.epochs or bool(number)


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Notes SIGINT, SIGTERM and SIGHUP in the list instead of dying of them; a second one acts as usual.

    One that is ignored stays so, as SIGHUP is by `nohup`, and SIGINT by `&` in a script.
    """
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, previous[received[-1]])

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    previous = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    try:
        for number in previous:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
