"""What a run shows of itself: the bar, a line now and then, log.csv, grids of samples."""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.data import random_seed, shuffled_batches, to_uint8
from common.run import distributed
from common.run.errors import only_telling, tell
from common.run.folder import write_log
from common.run.pictures import sample_images, save_grid
from common.run.trainer import Run

GRID_IMAGES = 64
GRID_STEPS = 50  # of the DDPM sampler: DDIM's fifty draw loud colours and grain while the model is young
LINE_EVERY = 60.0  # seconds between two lines within an epoch, where stderr is no terminal


class Reporter:
    """Shows how a run gets on. Nothing of it decides the weights, or ends a run that has begun.

    Args:
        images: the training images, uint8 (N, 3, 32, 32).
        run_dir: the run folder.
        sample_every: epochs between two grids of samples; 0 draws none.
        max_steps: optimiser steps after which the run will stop, if it is to.
    """

    def __init__(self, run: Run, images: Tensor, run_dir: Path, sample_every: int, max_steps: int | None):
        self.run = run
        self.images = images
        self.run_dir = run_dir
        self.sample_every = sample_every
        self.total = run.options.epochs * len(images)
        if max_steps is not None:
            epochs, steps = divmod(max_steps, len(images) // run.options.batch_size)
            self.total = min(self.total, epochs * len(images) + steps * run.options.batch_size)
        hide = distributed.hides_bars()
        self.bar = tqdm(total=self.total, initial=self._seen(), unit=" images", disable=hide)
        self.shown = time.perf_counter()

    def begin(self) -> None:
        """Puts into the run folder what a new run begins with, or what an interruption has left out.

        If it cannot be written to, that is found out here, before any work.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_log(self.run_dir / "log.csv", self.run.progress.log)
        with only_telling():
            (self.run_dir / "samples").mkdir(exist_ok=True)
            if self.run.progress.step == 0:
                self._save_data_grid()
            if self.run.progress.seen == 0:
                self._save_sample_grid(again=False)

    def tell(self, in_haste: bool) -> None:
        """Shows what has come of a step; in haste, without drawing samples."""
        epoch_is_complete = self.run.progress.seen == 0
        with only_telling():
            self._show()
        if epoch_is_complete:
            with only_telling(), tqdm.external_write_mode(file=sys.stderr):  # above the bar
                tell(self._epoch_line())
            with only_telling():
                write_log(self.run_dir / "log.csv", self.run.progress.log)
        if epoch_is_complete and not in_haste:
            with only_telling():
                self._save_sample_grid()

    def _seen(self) -> int:
        """Images seen so far, in all epochs."""
        return self.run.progress.epoch * len(self.images) + self.run.progress.seen

    def _show(self) -> None:
        """Moves the bar; where there is none, writes a line every minute."""
        progress, epochs = self.run.progress, self.run.options.epochs
        self.bar.update(self._seen() - self.bar.n)
        self.bar.set_description(f"epoch {progress.epoch + (progress.seen > 0)}/{epochs}", refresh=False)
        if not progress.seen or time.perf_counter() - self.shown < (LINE_EVERY if self.bar.disable else 1):
            return
        self.shown = time.perf_counter()
        loss, speed = self.run.mean_loss(), progress.seen / progress.seconds
        if self.bar.disable:
            left = tqdm.format_interval((self.total - self._seen()) / speed)
            line = f"{progress.seen:,} of {len(self.images):,} images, train loss {loss:.4f}, {speed:.0f} images/s"
            tell(f"epoch {progress.epoch + 1}/{epochs}: {line}, {left} left")
        else:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def _epoch_line(self) -> str:
        row = self.run.progress.log[-1]
        return (
            f"epoch {row['epoch']}/{self.run.options.epochs}: step {row['step']}, train loss {row['train_loss']:.4f}, "
            f"held-out loss {row['held_out_loss']:.4f}, {row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s"
        )

    def _save_data_grid(self) -> None:
        """Writes training images as the model sees them."""
        seed = self.run.options.seed
        batch = next(shuffled_batches(self.images, min(GRID_IMAGES, len(self.images)), seed, epoch=0))
        torch.manual_seed(random_seed(seed, "data grid", 0))
        save_grid(to_uint8(self.run.augment(batch)).cpu(), self.run_dir / "samples" / "data.png")

    def is_grid_due(self) -> bool:
        """Whether a grid of samples belongs to the epoch that is complete."""
        epoch, is_last = self.run.progress.epoch, self.run.progress.epoch == self.run.options.epochs
        return bool(epoch and self.sample_every and (epoch % self.sample_every == 0 or is_last))

    def _save_sample_grid(self, again: bool = True) -> None:
        """Writes what the averaged weights draw, if it is its turn, from the same starting noise every time."""
        run, epoch = self.run, self.run.progress.epoch
        path = self.run_dir / "samples" / f"epoch-{epoch:04d}.png"
        if self.is_grid_due() and (again or not path.exists()):
            images = sample_images(
                run.predict_averaged, run.schedule, GRID_IMAGES, steps=GRID_STEPS, seed=run.options.seed
            )
            save_grid(images, path)
