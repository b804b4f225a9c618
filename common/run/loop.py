"""A training that uses the machine, can be saved and goes on; the loop around it; what it leaves in the run folder."""

import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.data import random_generator, random_seed, shuffled_batches, to_uint8
from common.diffusion import diffusion_loss
from common.likelihood import HELD_OUT_BLOCK, held_out_draws
from common.run import checkpoint, distributed
from common.run.checkpoint import LOG_COLUMNS, Checkpoint, RunOptions, RunProgress
from common.run.datasets import check_images
from common.run.device import GraphedFunction, in_precision, noise_predictor
from common.run.errors import UserError, only_telling
from common.run.folder import plot_losses, write_log
from common.run.pictures import sample_images, save_grid
from common.training import Trainer

GRID_IMAGES = 64
GRID_STEPS = 50  # of the DDPM sampler: DDIM's fifty draw loud colours and grain while the model is young
LOG_HELD_OUT_IMAGES = 2000  # for the held-out loss of every epoch: 1.3 % of an epoch's work
CHECK_EVERY = 100  # steps between two looks at whether the run is still sound
PLOT_EVERY = 30.0  # seconds at least between two drawings of the loss curve


class Run(Trainer):
    """A Trainer that uses the machine, and all that has to be saved for it to go on.

    Of several processes, each has a Run. They draw the same numbers, take a share of each batch each, and add up their
    gradients, so that their weights stay the same.

    Args:
        stage: name of the script, for the checkpoint.
        model_options: the stage's model options, for the checkpoint.
        model: as for Trainer. Before the first step, `device.compile_model` may compile it.
        options: see RunOptions. The number of processes must divide the batch size.
        bf16: run the model under bfloat16 autocast.
    """

    options: RunOptions
    progress: RunProgress

    def __init__(
        self, stage: str, model_options: dict[str, Any], model: nn.Module, options: RunOptions, bf16: bool = False
    ):
        super().__init__(model, options, RunProgress())
        self.stage = stage
        self.model_options = model_options
        self.bf16 = bf16
        self.predict_noise = in_precision(distributed.parallel(model), bf16)
        self.predict_averaged = noise_predictor(self.ema.module, bf16)
        # These two are read rarely: each reading makes a GPU wait.
        self._loss_sum = torch.zeros((), device=self.device)
        self._first_bad_step = torch.full((), math.inf, device=self.device)
        if self.device.type == "cuda" and distributed.WORLD_SIZE == 1:
            self.optimizer.param_groups[0]["capturable"] = True
            # Adam warns of the first steps, which are not captured.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            self.update = GraphedFunction(self.update)  # type: ignore[method-assign, assignment]

    def step(self, images: Tensor, weight: Tensor) -> Tensor:
        """As Trainer.step; adds up the loss, and notes the first step at which it was not finite.

        What a model draws from the global generators, as dropout does, belongs to the step as our own draws do.
        """
        torch.manual_seed(random_seed(self.options.seed, f"global {distributed.RANK}", self.progress.step))
        loss = super().step(images, weight)
        self._loss_sum += loss * (weight > 0).sum()
        self._first_bad_step.clamp_(max=torch.where(loss.isfinite(), math.inf, self.progress.step + 1))
        return loss

    def update(self, x0: Tensor, t: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        """As Trainer.update, of this process's share of the batch. Returns nan if the gradient is not finite."""
        mine = distributed.share(len(x0))
        # DistributedDataParallel takes the mean of the gradients over the processes, where their sum is meant.
        loss = super().update(x0[mine], t[mine], noise[mine], weight[mine] * distributed.WORLD_SIZE)
        loss = distributed.sum_over_ranks(loss / distributed.WORLD_SIZE)
        gradient_norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return torch.where(gradient_norm.isfinite(), loss, math.nan)

    def check(self) -> None:
        """Makes sure that all losses, gradients and weights so far were finite numbers. Waits for a GPU.

        Raises:
            UserError: one was not, so the weights are worth nothing.
        """
        first_bad_step, what = self._first_bad_step.item(), "the loss or the gradient has"
        largest = nn.utils.get_total_norm([*self.model.parameters(), *self.ema.module.parameters()], norm_type=math.inf)
        if first_bad_step == math.inf and not largest.isfinite():
            first_bad_step, what = self.progress.step, "the weights have"
        if first_bad_step < math.inf:
            raise UserError(
                f"{what} not been finite since step {first_bad_step:.0f}, with --lr {self.options.lr:g}; what was "
                "saved before is kept; try a lower --lr, or --precision fp32"
            )

    def mean_loss(self) -> float:
        """Mean loss of the images seen in the epoch under way."""
        return self._loss_sum.item() / self.progress.seen

    @torch.no_grad()
    def held_out_loss(self, draws: list[tuple[Tensor, Tensor, Tensor]]) -> float:
        """Mean loss of the averaged weights.

        Args:
            draws: x0, t and noise, block by block; with several processes, each has blocks of its own.
        """
        total = torch.zeros(2, device=self.device)
        for x0, t, noise in draws:
            loss = diffusion_loss(self.predict_averaged, self.schedule, x0, t, noise)
            total += torch.stack([loss.sum(), loss.new_tensor(len(loss))])
        loss_sum, count = distributed.sum_over_ranks(total).tolist()
        return loss_sum / count

    def log_epoch(self, num_images: int, held_out_loss: float) -> None:
        """Adds the row of the epoch that is complete to the log, and makes ready for the next one."""
        progress = self.progress
        losses = (round(self._loss_sum.item() / num_images, 6), round(held_out_loss, 6))
        speed = (round(num_images / progress.seconds, 1), round(progress.seconds, 2))
        progress.log.append(dict(zip(LOG_COLUMNS, (progress.epoch, progress.step, *losses, *speed))))
        progress.seconds = 0.0
        self._loss_sum.zero_()

    def checkpoint(self) -> Checkpoint:
        """All that `restore` needs, and the stage's model options, from which the model can be built again."""
        self.progress.loss_sum = self._loss_sum.item()
        moments = self.optimizer.state_dict()["state"]
        return {
            "format": checkpoint.FORMAT,
            "stage": self.stage,
            "model_options": self.model_options,
            "training_options": asdict(self.options),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": {n: moments.get(n) for n, _ in enumerate(self.model.parameters())},
        }

    def restore(self, saved: Checkpoint, path: Path) -> None:
        """Goes back to where `checkpoint` was called, with this Run's own options.

        Args:
            path: where `saved` was read from.

        Raises:
            UserError: `saved` does not fit.
        """
        self.progress = RunProgress(**saved["progress"])
        self._loss_sum.fill_(self.progress.loss_sum)
        checkpoint.load_weights(self.model, saved["model"], path)
        checkpoint.load_weights(self.ema.module, saved["ema"], path)
        moments = saved["optimizer"]
        with checkpoint.reading(path):
            for n, parameter in enumerate(self.model.parameters()):
                if moments[n] and any(moments[n][m].shape != parameter.shape for m in ("exp_avg", "exp_avg_sq")):
                    raise ValueError(f"the optimizer's state of parameter {n} has another shape")
            state = {n: state for n, state in moments.items() if state is not None}
            param_groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": param_groups})


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
    """Trains until the epochs are done, `max_steps` are made or a signal asks to stop. Then the checkpoint is saved.

    Of several processes, rank 0 alone writes and shows progress.

    Args:
        run: fresh, or restored from a checkpoint.
        images: uint8 (N, 3, 32, 32), on the run's device.
        held_out: uint8 (M, 3, 32, 32), of which the first 2000 are measured after every epoch.
        run_dir: the run folder.
        max_steps: optimiser steps to stop after, counted from the start of the run.
        sample_every: epochs between two sample grids; 0 draws none.
        checkpoint_every: steps between two checkpoints; None saves one after every epoch.

    Returns:
        The signal that stopped it, SIGINT, SIGTERM or SIGHUP, or None.

    Raises:
        UserError: the loss or the gradient is not finite, or a file cannot be written.
    """
    check_images(images, "training images")
    check_images(held_out, "held-out images")
    progress = run.progress
    is_first = distributed.RANK == 0
    held_out = held_out[:LOG_HELD_OUT_IMAGES]
    blocks = range(0, len(held_out), HELD_OUT_BLOCK)[distributed.RANK :: distributed.WORLD_SIZE]
    draws = [held_out_draws(held_out, start, run.schedule) for start in blocks]
    plotted = -math.inf
    if is_first:
        _begin(run, images, run_dir, sample_every)

    with _stop_signals() as received, _progress_bar(run, len(images), max_steps) as bar:
        is_over = _is_over(run, max_steps, received)
        started = shown = time.perf_counter()
        for _ in () if is_over else run.steps(images):
            # Look: the bar, and now and then whether the numbers are sound.
            bar.update(progress.epoch * len(images) + progress.seen - bar.n)
            bar.set_description(f"epoch {progress.epoch + (progress.seen > 0)}/{run.options.epochs}", refresh=False)
            if not bar.disable and progress.seen and time.perf_counter() - shown > 1:
                bar.set_postfix(loss=f"{run.mean_loss():.4f}", refresh=False)
                shown = time.perf_counter()
            epoch_is_complete = progress.seen == 0
            is_over = _is_over(run, max_steps, received)
            is_due = progress.step % checkpoint_every == 0 if checkpoint_every else epoch_is_complete
            if is_over or is_due or epoch_is_complete or progress.step % CHECK_EVERY == 0:
                run.check()
            progress.seconds += time.perf_counter() - started

            # Save: what took time to compute comes before what only tells of it.
            if epoch_is_complete:
                run.log_epoch(len(images), run.held_out_loss(draws))
            if is_first and (is_over or is_due):
                checkpoint.save(run_dir / "checkpoint.pt", run.checkpoint())

            # Tell: the log, the curve, the pictures.
            if is_first and epoch_is_complete:
                with only_telling():
                    bar.write(_epoch_line(run), file=sys.stderr)
                with only_telling():
                    write_log(run_dir, progress.log)
            is_time_to_plot = epoch_is_complete and time.perf_counter() - plotted > PLOT_EVERY
            if is_first and progress.log and (is_over or is_time_to_plot):
                with only_telling():
                    _plot(run_dir, bar, is_first_time=plotted == -math.inf)
                plotted = time.perf_counter()
            if is_first and not received:
                with only_telling():
                    _save_sample_grid(run, _sample_grid_due(run, run_dir, sample_every))

            if is_over:
                break
            started = time.perf_counter()
    return received[0] if received else None


def _begin(run: Run, images: Tensor, run_dir: Path, sample_every: int) -> None:
    """Puts into the run folder what a new run begins with, or what an interruption has left out."""
    (run_dir / "samples").mkdir(parents=True, exist_ok=True)
    if run.progress.step == 0:
        _save_data_grid(run, images, run_dir)
    write_log(run_dir, run.progress.log)  # a folder that cannot be written to is told before any work
    grid = _sample_grid_due(run, run_dir, sample_every)
    with only_telling():
        _save_sample_grid(run, None if grid and grid.exists() else grid)


def _is_over(run: Run, max_steps: int | None, received: list[signal.Signals]) -> bool:
    """Whether the run has made its steps, or any process has received a signal: all of them stop together."""
    number = distributed.maximum(received[0] if received else 0)
    if number and not received:
        received.append(signal.Signals(number))
    has_made_its_steps = max_steps is not None and run.progress.step >= max_steps
    return has_made_its_steps or run.progress.epoch >= run.options.epochs or bool(number)


def _progress_bar(run: Run, num_images: int, max_steps: int | None) -> tqdm:
    total = run.options.epochs * num_images
    if max_steps is not None:
        total = min(total, max_steps * run.options.batch_size)
    hide = None if distributed.RANK == 0 and sys.stderr else True  # None: where stderr is no terminal
    seen = run.progress.epoch * num_images + run.progress.seen
    return tqdm(total=total, initial=seen, unit=" images", disable=hide)


def _plot(run_dir: Path, bar: tqdm, is_first_time: bool) -> None:
    if not plot_losses(run_dir) and is_first_time:
        bar.write("no loss.png, which takes matplotlib: python -m pip install matplotlib", sys.stderr)


def _epoch_line(run: Run) -> str:
    row = run.progress.log[-1]
    return (
        f"epoch {row['epoch']}/{run.options.epochs}: step {row['step']}, train loss {row['train_loss']:.4f}, "
        f"held-out loss {row['held_out_loss']:.4f}, {row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s"
    )


def _save_data_grid(run: Run, images: Tensor, run_dir: Path) -> None:
    """Writes training images as the model sees them."""
    batch, weight = next(shuffled_batches(images, GRID_IMAGES, run.options.seed, epoch=0))
    generator = random_generator(run.device, run.options.seed, "data grid", 0)
    save_grid(to_uint8(run.augment(batch[weight > 0], generator)).cpu(), run_dir / "samples" / "data.png")


def _sample_grid_due(run: Run, run_dir: Path, sample_every: int) -> Path | None:
    """Where to draw a grid now, if the epoch is complete and its turn has come."""
    progress = run.progress
    epoch_is_complete = progress.epoch > 0 and progress.seen == 0
    is_due = sample_every and (progress.epoch % sample_every == 0 or progress.epoch == run.options.epochs)
    return run_dir / "samples" / f"epoch-{progress.epoch:04d}.png" if epoch_is_complete and is_due else None


def _save_sample_grid(run: Run, path: Path | None) -> None:
    """Writes what the averaged weights draw, if a grid is due, from the same starting noise every time."""
    if path:
        model = noise_predictor(run.ema.module, run.bf16)
        save_grid(sample_images(model, run.schedule, GRID_IMAGES, steps=GRID_STEPS, seed=run.options.seed), path)


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Notes SIGINT, SIGTERM and SIGHUP in the list instead of dying of them; a second one acts as usual.

    Where SIGHUP is ignored, as by `nohup`, it stays so. Only the main thread can have handlers.
    """
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, previous[received[-1]])

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
