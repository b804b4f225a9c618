"""The training loop: DDPM's simple loss, Adam, averaged weights, and what it leaves in the run folder."""

import copy
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from common import checkpoint, distributed
from common.checkpoint import Checkpoint
from common.data import random_generator, random_hflip, shuffled_batches, to_float, to_uint8
from common.device import GraphedFunction
from common.errors import UserError
from common.loss import HELD_OUT_BLOCK, diffusion_loss, held_out_draws
from common.run_folder import LOG_COLUMNS, plot_losses, write_log
from common.sampling import noise_predictor, sample_images, save_grid
from common.schedule import NoiseSchedule

GRID_IMAGES = 64
GRID_STEPS = 50  # of the DDPM sampler: DDIM's fifty draw loud colours and grain while the model is young
LOG_HELD_OUT_IMAGES = 2000  # for the held-out loss of every epoch: 1.3 % of an epoch's work
CHECK_EVERY = 100  # steps between two looks at whether the run is still sound
PLOT_EVERY = 30.0  # seconds at least between two drawings of the loss curve


@dataclass
class TrainingOptions:
    """What decides a run's weights, beside the model and the machine. A checkpoint carries it."""

    dataset: str = "cifar10"
    epochs: int = 120
    batch_size: int = 128
    lr: float = 1e-3
    ema_decay: float = 0.9999
    hflip: bool = False
    precision: str = "auto"  # or "fp32" or "bf16", see device.use_bf16
    seed: int = 0


@dataclass
class Progress:
    """How far a run has come. A checkpoint carries it."""

    step: int = 0  # optimiser steps made
    epoch: int = 0  # epochs completed
    seen: int = 0  # images already used in the epoch under way
    loss_sum: float = 0.0  # sum of those images' losses
    seconds: float = 0.0  # what those images took, without checkpoints and sample grids
    log: list[dict[str, Any]] = field(default_factory=list)  # the rows of log.csv, one per completed epoch


class AveragedWeights:
    """An exponential moving average of a model's weights, to be updated after every step.

    After n updates it decays by (1 + n) / (10 + n), `decay` at most: it spans about the last tenth of the run so far,
    so that the random start is soon forgotten and a run of one epoch profits too. Buffers are copied.

    torch's AveragedModel walks through all modules at every update, which takes milliseconds, and makes a GPU wait.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.updates = 0
        self._averaged = list(self.module.parameters())
        self._current = [parameter.detach() for parameter in model.parameters()]
        self._buffers = list(zip(self.module.buffers(), model.buffers()))

    def update(self) -> None:
        """Takes in the model's weights as they are now; the first time, it takes them over."""
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        get_ema_multi_avg_fn(decay)(self._averaged, self._current, n)
        for averaged, current in self._buffers:
            averaged.copy_(current)
        self.updates += 1


class Trainer:
    """A model that learns to predict noise, and all that has to be saved for it to go on learning.

    Of several processes, each has a Trainer. They draw the same numbers, take a share of each batch each, and add up
    their gradients, so that their weights stay the same.

    Args:
        stage: name of the script, for the checkpoint.
        model_options: the stage's model options, for the checkpoint.
        model: maps x_t (B, 3, 32, 32) and t (B,) to the noise in x_t; trained on the device where it lies. Before the
            first step, `device.compile_model` may compile it.
        options: see TrainingOptions. The number of processes must divide the batch size.
        bf16: run the model under bfloat16 autocast.
    """

    def __init__(
        self,
        stage: str,
        model_options: dict[str, Any],
        model: nn.Module,
        options: TrainingOptions,
        bf16: bool = False,
    ):
        self.stage = stage
        self.model_options = model_options
        self.model = model
        self.options = options
        self.bf16 = bf16
        self.device = next(model.parameters()).device
        self.schedule = NoiseSchedule().to(self.device)
        on_gpu = self.device.type == "cuda"
        captures = on_gpu and distributed.WORLD_SIZE == 1
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True, capturable=captures)
        # Adam warns of the first steps, which are not captured.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        self.ema = AveragedWeights(model, options.ema_decay)
        self.progress = Progress()
        # These two are read rarely: each reading makes a GPU wait.
        self._loss_sum = torch.zeros((), device=self.device)
        self._first_bad_step = torch.full((), math.inf, device=self.device)

        self.forward: nn.Module = model
        self.update: Callable[..., tuple[Tensor, Tensor]] = self._update
        if distributed.WORLD_SIZE > 1:
            self.forward = DistributedDataParallel(model, device_ids=[self.device] if on_gpu else None)
            self.forward.broadcast_buffers = False  # they are constants; no argument, for PyTorch 2.13 renamed that
            # It warns of compiled kernels of 1x1, whose gradients have other strides, which mean the same for them.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        elif captures:
            self.update = GraphedFunction(self._update)
        self.averaged = noise_predictor(self.ema.module.eval(), bf16)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 images (B, 3, 32, 32) as the model sees them: float32 in [-1, 1], flipped by chance if so asked."""
        x0 = to_float(images)
        return random_hflip(x0, generator) if self.options.hflip else x0

    def step(self, images: Tensor) -> None:
        """One round of Algorithm 1 of DDPM on uint8 images (B, 3, 32, 32), fewer at the end of an epoch."""
        missing = self.options.batch_size - len(images)
        weight = images.new_ones(len(images), dtype=torch.float32) / len(images)
        if missing:  # a batch is always whole, for the compiler's sake: what fills it up weighs nothing
            weight = torch.cat([weight, weight.new_zeros(missing)])
            images = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])

        generator = random_generator(self.device, self.options.seed, "step", self.progress.step)
        x0 = self.augment(images, generator)
        t = torch.randint(self.schedule.steps, (len(x0),), generator=generator, device=self.device)
        noise = torch.randn(x0.shape, generator=generator, device=self.device)

        mine = distributed.share(len(x0))
        loss, gradient_norm = self.update(x0[mine], t[mine], noise[mine], weight[mine])
        self.ema.update()

        count = len(images) - missing
        loss = distributed.sum_over_ranks(loss)
        self._loss_sum += loss * count
        self.progress.step += 1
        self.progress.seen += count
        is_sound = torch.isfinite(loss + gradient_norm)
        self._first_bad_step.clamp_(max=torch.where(is_sound, math.inf, self.progress.step))

    def _update(self, x0: Tensor, t: Tensor, noise: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimiser. Returns this process's part of the batch's loss, and the gradient's norm."""
        loss = (diffusion_loss(self.forward, self.schedule, x0, t, noise, self.bf16) * weight).sum()
        self.optimizer.zero_grad()
        (loss * distributed.WORLD_SIZE).backward()  # DistributedDataParallel takes the mean over the processes
        gradient_norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        return loss.detach(), gradient_norm

    def check(self) -> None:
        """Makes sure that every loss and every gradient so far was a finite number.

        Raises:
            UserError: one was not, so the weights are worth nothing.
        """
        first_bad_step = self._first_bad_step.item()
        if first_bad_step < math.inf:
            raise UserError(
                f"the loss or the gradient has not been finite since step {first_bad_step:.0f}, with --lr "
                f"{self.options.lr:g}; the last checkpoint is kept; try a lower --lr, or --precision fp32"
            )

    def mean_loss(self) -> float:
        """Mean loss of the images seen in the epoch under way."""
        return self._loss_sum.item() / self.progress.seen

    @torch.no_grad()
    def held_out_loss(self, draws: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
        """Mean loss of the averaged weights.

        Args:
            draws: x0, t and noise, block by block; with several processes, each has blocks of its own.
        """
        total = torch.zeros(2, device=self.device)
        for x0, t, noise in draws:
            loss = diffusion_loss(self.averaged, self.schedule, x0, t, noise)
            total += torch.stack([loss.sum(), loss.new_tensor(len(loss))])
        loss_sum, count = distributed.sum_over_ranks(total).tolist()
        return loss_sum / count

    def finish_epoch(self, loss: float, held_out_loss: float, seconds: float) -> None:
        """Adds the epoch's row to the log, and makes ready for the next epoch."""
        progress = self.progress
        progress.epoch += 1
        losses = (round(loss, 6), round(held_out_loss, 6))
        row = (progress.epoch, progress.step, *losses, round(progress.seen / seconds, 1), round(seconds, 2))
        progress.log.append(dict(zip(LOG_COLUMNS, row)))
        progress.seen, progress.seconds = 0, 0.0
        self._loss_sum.zero_()

    def checkpoint(self) -> Checkpoint:
        """All that `restore` needs, and the stage's model options, from which the model can be built again."""
        self.progress.loss_sum = self._loss_sum.item()
        return {
            "format": checkpoint.FORMAT,
            "stage": self.stage,
            "model_options": self.model_options,
            "training_options": asdict(self.options),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
        }

    def restore(self, saved: Checkpoint) -> None:
        """Goes back to where `checkpoint` was called, with this Trainer's own options.

        Raises:
            RuntimeError, ValueError, LookupError, TypeError, AttributeError: `saved` does not fit.
        """
        self.progress = checkpoint.from_saved(Progress, saved["progress"])
        self._loss_sum.fill_(self.progress.loss_sum)
        self.model.load_state_dict(saved["model"])
        self.ema.module.load_state_dict(saved["ema"])
        self.ema.updates = self.progress.step
        for number, parameter in enumerate(self.model.parameters()):
            if any(saved["optimizer"][number][name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError(f"the optimizer's state of parameter {number} has another shape")
        param_groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": param_groups})


def train(
    trainer: Trainer,
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
        trainer: fresh, or restored from a checkpoint.
        images: uint8 (N, 3, 32, 32), on the trainer's device.
        held_out: uint8 (M, 3, 32, 32), of which the first 2000 are measured after every epoch.
        run_dir: the run folder.
        max_steps: optimiser steps to stop after, counted from the start of the run.
        sample_every: epochs between two sample grids; 0 draws none.
        checkpoint_every: steps between two checkpoints; None saves one after every epoch.

    Returns:
        The signal that stopped it, SIGINT or SIGTERM, or None.

    Raises:
        UserError: the loss or the gradient is not finite, or a file cannot be written.
    """
    options, progress = trainer.options, trainer.progress
    is_first = distributed.RANK == 0
    held_out = held_out[:LOG_HELD_OUT_IMAGES]
    blocks = range(0, len(held_out), HELD_OUT_BLOCK)[distributed.RANK :: distributed.WORLD_SIZE]
    draws = [held_out_draws(held_out, start, trainer.schedule) for start in blocks]

    def save() -> None:
        trainer.check()
        if is_first:
            checkpoint.save(run_dir / "checkpoint.pt", trainer.checkpoint())

    if is_first:
        (run_dir / "samples").mkdir(parents=True, exist_ok=True)
        if progress.step == 0:
            _save_data_grid(trainer, images, run_dir)
        write_log(run_dir, progress.log)
        path = _sample_grid_due(trainer, run_dir, sample_every)
        if path and not path.exists():  # the run was cut before it was drawn
            _save_sample_grid(trainer, path)

    total = options.epochs * len(images)
    if max_steps is not None:
        total = min(total, max_steps * options.batch_size)
    seen = progress.epoch * len(images) + progress.seen
    hide_bar = None if is_first else True  # None: where stderr is no terminal
    plotted = -math.inf
    with _stop_signals() as received, tqdm(total=total, initial=seen, unit=" images", disable=hide_bar) as bar:

        def done() -> bool:
            number = distributed.maximum(received[0] if received else 0)  # of a signal to any rank: all stop together
            if number and not received:
                received.append(signal.Signals(number))
            enough = max_steps is not None and progress.step >= max_steps
            return enough or progress.epoch >= options.epochs or bool(number)

        stop = done()
        while not stop:
            bar.set_description(f"epoch {progress.epoch + 1}/{options.epochs}", refresh=False)
            shown = time.perf_counter()
            started = shown - progress.seconds
            for batch in shuffled_batches(images, options.batch_size, options.seed, progress.epoch, progress.seen):
                trainer.step(batch)
                progress.seconds = time.perf_counter() - started
                bar.update(len(batch))
                if not bar.disable and time.perf_counter() - shown > 1:
                    bar.set_postfix(loss=f"{trainer.mean_loss():.4f}", refresh=False)
                    shown = time.perf_counter()
                if progress.step % CHECK_EVERY == 0:
                    trainer.check()
                if done():
                    break
                if checkpoint_every and progress.step % checkpoint_every == 0 and progress.seen < len(images):
                    trainer.check()  # waits for the GPU, whose work is not part of the pause
                    paused = time.perf_counter()
                    save()
                    started += time.perf_counter() - paused

            if progress.seen == len(images):
                loss = trainer.mean_loss()  # waits for the GPU, so the time that follows is true
                seconds = time.perf_counter() - started
                trainer.check()
                trainer.finish_epoch(loss, trainer.held_out_loss(draws), seconds)
                if is_first:
                    write_log(run_dir, progress.log)
                    bar.write(_epoch_line(progress, options), file=sys.stderr)
            stop = done()
            if stop or not checkpoint_every or progress.step % checkpoint_every == 0:
                save()
            if is_first:  # pictures come last: a checkpoint that is due is on the disk by now
                if progress.log and (stop or time.perf_counter() - plotted > PLOT_EVERY):
                    if not plot_losses(run_dir) and plotted == -math.inf:
                        bar.write("no loss.png, which takes matplotlib: python -m pip install matplotlib", sys.stderr)
                    plotted = time.perf_counter()
                path = _sample_grid_due(trainer, run_dir, sample_every)
                if path and not received:
                    _save_sample_grid(trainer, path)
    return received[0] if received else None


def _epoch_line(progress: Progress, options: TrainingOptions) -> str:
    row = progress.log[-1]
    return (
        f"epoch {row['epoch']}/{options.epochs}: step {row['step']}, train loss {row['train_loss']:.4f}, "
        f"held-out loss {row['held_out_loss']:.4f}, {row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s"
    )


def _save_data_grid(trainer: Trainer, images: Tensor, run_dir: Path) -> None:
    """Writes training images as the model sees them."""
    batch = next(shuffled_batches(images, GRID_IMAGES, trainer.options.seed, epoch=0))
    generator = random_generator(trainer.device, trainer.options.seed, "data grid", 0)
    save_grid(to_uint8(trainer.augment(batch, generator)).cpu(), run_dir / "samples" / "data.png")


def _sample_grid_due(trainer: Trainer, run_dir: Path, sample_every: int) -> Path | None:
    """Where to draw a grid now, if the epoch is complete and its turn has come."""
    progress = trainer.progress
    epoch_is_complete = progress.epoch > 0 and progress.seen == 0
    is_due = sample_every and (progress.epoch % sample_every == 0 or progress.epoch == trainer.options.epochs)
    return run_dir / "samples" / f"epoch-{progress.epoch:04d}.png" if epoch_is_complete and is_due else None


def _save_sample_grid(trainer: Trainer, path: Path) -> None:
    """Writes what the averaged weights draw, from the same starting noise every time."""
    images = sample_images(
        trainer.ema.module,
        trainer.schedule,
        GRID_IMAGES,
        steps=GRID_STEPS,
        seed=trainer.options.seed,
        bf16=trainer.bf16,
    )
    save_grid(images, path)


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Notes SIGINT and SIGTERM in the list instead of dying of them; a second one acts as usual."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, previous[received[-1]])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
