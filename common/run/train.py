"""The command `train`: begins a run, or goes on with one."""

import argparse
import shlex
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path

import torch

from common.likelihood import repeated
from common.run import checkpoint, distributed, loop
from common.run.checkpoint import Checkpoint, RunOptions
from common.run.datasets import DATASETS, check_dataset, load_images
from common.run.device import compile_model, compiles_training, pick_device, use_bf16
from common.run.errors import UsageError, UserError, counted, printable, say
from common.run.folder import RUN_FILES, is_run_folder, locked, remove_run
from common.run.models import build_model, choose_model_options, refuse_contradictions, shipped_weights
from common.run.options import Stage, flag
from common.run.trainer import Run

FIXED = ("dataset", "seed")  # training options that a run cannot change when it goes on


def train(stage: Stage, options: argparse.Namespace, typed: set[str]) -> int:
    """Trains a stage. Returns the exit status."""
    run_dir: Path = options.run_dir
    distributed.on_first(lambda: check_dataset(options.dataset))
    is_first = distributed.RANK == 0
    device = pick_device(options.device)
    with ExitStack() as held:
        distributed.on_first(lambda: _refuse_what_is_not_ours(stage, run_dir))
        distributed.on_first(lambda: held.enter_context(locked(run_dir)))
        run = _make_run(stage, options, typed, device)
        images, held_out = (
            load_images(run.options.dataset, options.data_dir, train=train, data_url=options.data_url).to(device)
            for train in (True, False)
        )
        if len(images) < run.options.batch_size:
            raise UsageError(
                f"argument --batch-size: {run.options.batch_size} is more than the {len(images)} training images of "
                f"{run.options.dataset}; give a smaller one"
            )
        if is_first:
            _announce(run, len(images), run_dir)
        if compiles_training(options.compile, device, run.bf16):
            compile_model(run.model, run.options.batch_size // distributed.WORLD_SIZE, run.bf16, training=True)
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
        is_finished = progress.epoch >= epochs
        verb = "draw pictures" if is_finished else "go on"
        say(f"{verb} with: {_next_command(stage, options, typed, is_finished)}")
    return 128 + received if received else 0


def _make_run(stage: Stage, options: argparse.Namespace, typed: set[str], device: torch.device) -> Run:
    """The run to train: the one in the run folder if --resume says so, or a new one."""
    path = options.run_dir / "checkpoint.pt"
    saved = distributed.on_first(lambda: _find_run(stage, options, path))
    source, weights = path, saved
    if options.pretrained and not saved:
        source = shipped_weights(stage)
        weights = distributed.on_first(lambda: checkpoint.load(source, stage.name, ema_only=True))
    model_options = choose_model_options(stage, options, typed, source, weights)
    run_options = _run_options(options, typed, path, saved)
    if run_options.batch_size % distributed.WORLD_SIZE:
        raise UsageError(
            f"argument --batch-size: {distributed.WORLD_SIZE} processes cannot share a batch of "
            f"{run_options.batch_size} equally; give a multiple of {distributed.WORLD_SIZE}"
        )
    torch.manual_seed(run_options.seed)
    model = build_model(stage, model_options, source if weights else None).to(device)
    if weights and not saved:
        checkpoint.load_weights(model, weights["ema"], source)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no parameter that can be trained")
    run = Run(stage.name, model_options, model, run_options, use_bf16(run_options.precision, device))
    if saved:
        run.restore(saved, path)
    return run


def _refuse_what_is_not_ours(stage: Stage, run_dir: Path) -> None:
    """Makes sure that a run in this folder replaces nothing but what an earlier run has left there."""
    present = [name for name in RUN_FILES if (run_dir / name).exists()]
    if not present or is_run_folder(run_dir):
        return
    if "checkpoint.pt" in present:  # without the rest of its run: it may have been copied there
        checkpoint.load(run_dir / "checkpoint.pt", stage.name)
    else:
        raise UsageError(
            f"--run-dir {run_dir}: there is no run, but {', '.join(present)}, which one would replace; "
            "name another folder"
        )


def _find_run(stage: Stage, options: argparse.Namespace, path: Path) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one and --resume is given."""
    if path.exists() and not options.resume and not options.overwrite:
        raise UsageError(
            f"--run-dir {options.run_dir}: there is a run already; continue it with --resume, "
            "discard it with --overwrite, or name another folder"
        )
    return checkpoint.load(path, stage.name) if path.exists() and options.resume else None


def _run_options(options: argparse.Namespace, typed: set[str], path: Path, saved: Checkpoint | None) -> RunOptions:
    """The training options: those of the checkpoint, if there is one, changed by what was typed."""
    asked = {f.name: getattr(options, f.name) for f in fields(RunOptions) if hasattr(options, f.name)}
    if saved is None:
        return RunOptions(**asked)
    changed = {name: asked[name] for name in typed & asked.keys()}
    fixed = {name: changed[name] for name in changed if name in FIXED}
    if not {asked["dataset"], saved["training_options"]["dataset"]} & {*DATASETS}:
        fixed.pop("dataset", None)  # one's own images may have moved
    refuse_contradictions(fixed, saved["training_options"], path)
    return replace(RunOptions(**saved["training_options"]), **changed)


def _announce(run: Run, num_images: int, run_dir: Path) -> None:
    precision = "bf16" if run.bf16 else "fp32"
    where = f"{run.device} in {precision}"
    if distributed.WORLD_SIZE > 1:
        where = f"{distributed.WORLD_SIZE} processes, each on {run.device.type} in {precision}"
    say(
        f"{run.stage}: {sum(p.numel() for p in run.model.parameters()):,} parameters; "
        f"{num_images:,} images of {printable(run.options.dataset)}; {where}; "
        f"{counted(run.options.epochs, 'epoch')}, {run.progress.epoch} done; {run_dir}"
    )


def _next_command(stage: Stage, options: argparse.Namespace, typed: set[str], is_finished: bool) -> str:
    """What to type after `train`: with those of the typed options that the checkpoint does not carry."""
    if distributed.WORLD_SIZE > 1 and not is_finished:
        return "the same torchrun command, and --resume"
    words = ["python", stage.script, *(["test"] if is_finished else ["train", "--resume"])]
    names = ["run_dir", "device"]
    if not is_finished:
        names += ["data_dir", "data_url", "compile", "sample_every", "checkpoint_every"]
    for name in names:
        value = getattr(options, name)
        if name in typed and isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif name in typed:
            words += [flag(name), str(value)]
    return shlex.join(words)
