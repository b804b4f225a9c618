"""The command `train`: begins a run, or goes on with one."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from common.run import checkpoint, distributed, loop
from common.run.checkpoint import Checkpoint, RunOptions
from common.run.datasets import DATASETS, load_images
from common.run.device import compile_model, compiles_training, pick_device, pick_precision
from common.run.errors import UsageError, UserError, counted, printable, say
from common.run.evaluate import repeated
from common.run.folder import MARK, RUN_FILES, locked, remove_run
from common.run.models import build_model, new_model_options, refuse_contradictions, saved_model_options
from common.run.options import Stage
from common.run.own_images import check_place
from common.run.trainer import Run

SHORTEST_EPOCH = 10_000  # images, repeated if they are fewer: measuring and drawing after each epoch takes its time
FIXED = ("dataset", "seed")  # training options that a run cannot change when it goes on


def train(stage: Stage, options: argparse.Namespace, typed: Mapping[str, Any]) -> int:
    """Trains a stage. Returns the exit status."""
    run_dir: Path = options.run_dir
    if not (options.resume and (run_dir / "checkpoint.pt").exists()):  # wrong options are told before any work
        build_model(stage, new_model_options(stage, options), options.seed)
    if options.dataset not in DATASETS:
        distributed.on_first(lambda: check_place(options.dataset))
        if os.path.realpath(run_dir) == os.path.realpath(options.dataset):
            raise UsageError(f"argument --run-dir: {run_dir} is the folder of the images; name another one")
    is_first = distributed.RANK == 0
    device = pick_device(options.device)
    with ExitStack() as held:
        saved = distributed.on_first(lambda: _take_run_folder(stage, options, held))
        run = _make_run(stage, options, typed, saved, device)
        images, held_out = (
            load_images(run.options.dataset, options.data_dir, train=train, data_url=options.data_url).to(device)
            for train in (True, False)
        )
        if is_first:
            _announce(run, len(images), run_dir)
        images = images.repeat(math.ceil(max(SHORTEST_EPOCH, run.options.batch_size) / len(images)), 1, 1, 1)
        if compiles_training(options.compile, device, run.precision):
            compile_model(run.model, run.options.batch_size // distributed.WORLD_SIZE, run.precision, training=True)
        if is_first and options.overwrite:
            remove_run(run_dir)
        received = loop.train(
            run,
            images,
            repeated(held_out, run.schedule.steps),
            run_dir,
            max_steps=options.max_steps,
            sample_every=options.sample_every,
            checkpoint_every=options.checkpoint_every,
        )
    if is_first:
        progress, epochs = run.progress, run.options.epochs
        under_way = f", train loss {run.mean_loss():.4f} in the epoch under way" if progress.seen else ""
        steps = counted(progress.step, "step")
        say(f"{run_dir / 'checkpoint.pt'}: {progress.epoch} of {counted(epochs, 'epoch')} done, {steps}{under_way}")
        if progress.epoch < epochs:
            say("go on with: the same command, with --resume, without --overwrite and --max-steps")
        else:
            words = ["python", sys.argv[0], "test", "--run-dir", str(run_dir)]
            say(f"draw pictures with: {shlex.join(words)}")
    return 128 + received if received else 0


def _take_run_folder(stage: Stage, options: argparse.Namespace, held: ExitStack) -> Checkpoint | None:
    """Locks the run folder until `held` is left. Returns the checkpoint to go on from, if --resume finds one."""
    run_dir, path = options.run_dir, options.run_dir / "checkpoint.pt"
    present = [name for name in RUN_FILES if (run_dir / name).exists()]
    if present and not (run_dir / MARK).exists():
        if not path.exists():
            raise UsageError(
                f"--run-dir {run_dir}: there is no run, but {', '.join(present)}, which one would replace; "
                "name another folder"
            )
        checkpoint.load(path, stage.name)  # without the rest of its run: it may have been copied there
    held.enter_context(locked(run_dir))
    log = run_dir / "log.csv"
    tells_of_epochs = log.is_file() and log.read_bytes().count(b"\n") > 1  # of hours, maybe
    if not options.overwrite and (not options.resume if path.exists() else tells_of_epochs):
        how = "continue it with --resume" if path.exists() else "its checkpoint is missing"
        raise UsageError(
            f"--run-dir {run_dir}: there is a run already; {how}, discard it with --overwrite, or name another folder"
        )
    return checkpoint.load(path, stage.name) if path.exists() and options.resume else None


def _make_run(
    stage: Stage, options: argparse.Namespace, typed: Mapping[str, Any], saved: Checkpoint | None, device: torch.device
) -> Run:
    """The run to train: the saved one, or a new one."""
    path = options.run_dir / "checkpoint.pt"
    model_options = saved_model_options(stage, saved, path, typed) if saved else new_model_options(stage, options)
    run_options = _run_options(options, typed, path, saved)
    if run_options.batch_size % distributed.WORLD_SIZE:
        raise UsageError(
            f"argument --batch-size: {distributed.WORLD_SIZE} processes cannot share a batch of "
            f"{run_options.batch_size} equally; give a multiple of {distributed.WORLD_SIZE}"
        )
    with checkpoint.reading(path) if saved else nullcontext():
        model = build_model(stage, model_options, run_options.seed)
    model.to(device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no parameter that can be trained")
    run = Run(stage.name, model_options, model, run_options, pick_precision(run_options.precision, device))
    if saved:
        run.restore(saved, path)
    else:
        checkpoint.pack(path, run.checkpoint())  # better told now than after the first epoch
    return run


def _run_options(
    options: argparse.Namespace, typed: Mapping[str, Any], path: Path, saved: Checkpoint | None
) -> RunOptions:
    """The training options: those of the checkpoint, if there is one, changed by what was typed."""
    names = [field.name for field in fields(RunOptions)]
    if saved is None:
        return RunOptions(**{name: getattr(options, name) for name in names if hasattr(options, name)})
    changed = {name: typed[name] for name in names if name in typed}
    fixed = {name: changed[name] for name in FIXED if name in changed}
    if not {options.dataset, saved["training_options"]["dataset"]} & {*DATASETS}:
        fixed.pop("dataset", None)  # one's own images may have moved
    refuse_contradictions(fixed, saved["training_options"], path)
    return replace(RunOptions(**saved["training_options"]), **changed)


def _announce(run: Run, num_images: int, run_dir: Path) -> None:
    where = f"{run.device} in {run.precision}"
    if distributed.WORLD_SIZE > 1:
        where = f"{distributed.WORLD_SIZE} processes, each on {run.device.type} in {run.precision}"
    say(
        f"{run.stage}: {sum(p.numel() for p in run.model.parameters()):,} parameters; "
        f"{num_images:,} images of {printable(run.options.dataset)}; {where}; "
        f"{counted(run.options.epochs, 'epoch')}, {run.progress.epoch} done; {run_dir}"
    )
