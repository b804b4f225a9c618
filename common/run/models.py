"""A stage's model: from the options of the command line, from those of a checkpoint, or both where they agree."""

import argparse
import copy
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from common.run import checkpoint, distributed
from common.run.checkpoint import Checkpoint
from common.run.device import compile_model, pick_device, pick_precision
from common.run.errors import UsageError, UserError
from common.run.options import (
    Stage,
    check_saved_training_options,
    could_be_saved,
    flag,
    model_defaults,
    saved_model_options,
)

MAX_PARAMETERS = 10**9  # with gradients, Adam's moments and the average, these take 20 GB


def build_model(stage: Stage, model_options: dict[str, Any], path: Path | None = None) -> nn.Module:
    """Makes a stage's model, untrained.

    Args:
        path: the checkpoint that the options come from, if they do.

    Raises:
        UsageError: the options of the command line do not make one.
        UserError: those of the checkpoint do not.
    """
    try:
        return stage.build_model(argparse.Namespace(**copy.deepcopy(model_options)))
    except ValueError as error:
        if path:
            raise UserError(f"{path}: damaged: no model can be made with its options: {error}") from error
        name, _, reason = str(error).partition(": ")  # of an argument, which has the name of its option
        raise UsageError(f"argument {flag(name)}: {reason}" if name in model_options else str(error)) from error


def choose_model_options(
    stage: Stage, options: argparse.Namespace, typed: set[str], path: Path, saved: Checkpoint | None
) -> dict[str, Any]:
    """The stage's model options: those of the checkpoint, if there is one.

    Raises:
        UsageError: one that was typed contradicts it.
    """
    asked = {name: getattr(options, name) for name in model_defaults(stage)}
    if saved is None:
        for name, value in asked.items():
            if not (checkpoint.survives(value) and could_be_saved(stage, name, value)):
                raise UsageError(
                    f"argument {flag(name)}: a checkpoint cannot carry {value!r}; make it a number or a text"
                )
        return asked
    with checkpoint.reading(path):
        model_options = saved_model_options(stage, saved["model_options"])
        check_saved_training_options(stage, saved["training_options"])
    refuse_contradictions({name: asked[name] for name in typed & asked.keys()}, model_options, path)
    return model_options


def refuse_contradictions(asked: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Raises a UsageError that names the first option whose typed value is not the checkpoint's."""
    for name, value in asked.items():
        now, then = (" ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for v in (value, saved[name]))
        if now != then:
            then = "the default" if then is None else then
            raise UsageError(f"argument {flag(name)}: {now} contradicts {path}, which was made with {then}")


def shipped_weights(stage: Stage) -> Path:
    """The file of weights that comes with the project, for --pretrained."""
    if not stage.weights.exists():
        raise UsageError(f"argument --pretrained: no weights come with {stage.name}.py; train it, and leave this out")
    return stage.weights


def refuse_model_that_is_too_large(stage: Stage, options: argparse.Namespace) -> None:
    """Tells of wrong model options before any work, by building the model of tensors that take no memory.

    Raises:
        UsageError: the options make no model, or one that nobody means.
    """
    try:
        with torch.device("meta"):
            model = build_model(stage, {name: getattr(options, name) for name in model_defaults(stage)})
    except UsageError:
        raise
    except Exception:  # a stage that needs real tensors to be built is built of them later
        return
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MAX_PARAMETERS:
        raise UsageError(f"argument --model-channels: too many; they make {parameters:,} parameters")


class TrainedModel(NamedTuple):
    """A model from a checkpoint, ready for use."""

    path: Path
    folder: Path  # for what is made with it
    model: nn.Module
    device: torch.device
    precision: str  # one of device.DTYPES
    dataset: str
    epochs: int
    steps: int


def load_trained(stage: Stage, options: argparse.Namespace, typed: set[str], batch_size: int) -> TrainedModel:
    """The model that `test` and `eval` use; where it is to be compiled, for batches of that size."""
    path = shipped_weights(stage) if options.pretrained else options.checkpoint or options.run_dir / "checkpoint.pt"
    folder = options.run_dir / "pretrained" if options.pretrained else path.parent
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    averaged = options.weights == "ema"
    if options.pretrained and not averaged:
        raise UsageError("argument --weights: the weights that come with the project are averaged ones, got raw")
    if not path.exists():
        command = shlex.join(["python", stage.script, "train", "--run-dir", str(path.parent)])
        pretrained = (
            "; or take the weights that come with the project, with --pretrained" if stage.weights.exists() else ""
        )
        raise UserError(f"{path}: no checkpoint there; make one with: {command}{pretrained}")
    saved = distributed.on_first(lambda: checkpoint.load(path, stage.name, ema_only=averaged))
    if not options.output:
        distributed.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    model_options = choose_model_options(stage, options, typed, path, saved)
    model = build_model(stage, model_options, path).eval()
    checkpoint.load_weights(model, saved["ema"] if averaged else saved["model"], path)
    model.to(device)
    if options.compile:
        compile_model(model, batch_size, precision)
    dataset, progress = saved["training_options"]["dataset"], saved["progress"]
    return TrainedModel(path, folder, model, device, precision, dataset, progress["epoch"], progress["step"])
