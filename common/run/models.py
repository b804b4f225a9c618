"""A stage's model: from the options of the command line, from those of a checkpoint, or both where they agree."""

import argparse
import copy
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from common.data import seed_everything
from common.guidance import Classifier
from common.run import checkpoint, distributed
from common.run.checkpoint import Checkpoint
from common.run.device import compile_model, pick_device, pick_precision
from common.run.errors import UsageError, UserError
from common.run.options import Stage, flag, model_defaults

CLASSIFIER = Path(__file__).resolve().parents[2] / "assets" / "weights" / "classifier.pt"


def build_model(stage: Stage, model_options: dict[str, Any], seed: int) -> nn.Module:
    """Makes a stage's model, untrained; the seed is that of all that is random in it.

    Raises:
        UsageError: these options do not make one.
    """
    seed_everything(seed)
    try:
        model = stage.build_model(argparse.Namespace(**copy.deepcopy(model_options)))
        for parameter in model.parameters():
            if torch.empty_like(parameter).stride() != parameter.stride():  # gaps in memory, which fused Adam overlooks
                parameter.data = parameter.data.contiguous()
        return model
    except ValueError as error:
        name, _, reason = str(error).partition(": ")  # of an argument, which has the name of its option
        if name in model_options:
            raise UsageError(f"argument {flag(name)}: {reason}") from error
        raise UsageError(f"model options ({', '.join(map(flag, model_options))}): {error}") from error


def new_model_options(stage: Stage, options: argparse.Namespace) -> dict[str, Any]:
    """The model options of the command line. Raises a UsageError if a checkpoint would not bring one back as it is."""
    asked = {name: getattr(options, name) for name in model_defaults(stage)}
    for name, value in asked.items():
        if not checkpoint.survives(value):
            raise UsageError(f"argument {flag(name)}: a checkpoint cannot carry {value!r}; make it a number or a text")
    return asked


def saved_model_options(stage: Stage, saved: Checkpoint, path: Path, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The model options of a checkpoint, which was read from `path`; one that it lacks, being older, has its default.

    Raises:
        UserError: its options are not this stage's.
        UsageError: one that was typed contradicts it.
    """
    defaults = model_defaults(stage)
    with checkpoint.reading(path):
        model_options = defaults | saved["model_options"]
        if model_options.keys() != defaults.keys():
            raise ValueError(f"there is no option {', '.join(model_options.keys() - defaults.keys())}")
    refuse_contradictions({n: value for n, value in typed.items() if n in defaults}, model_options, path)
    return model_options


def refuse_contradictions(asked: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Raises a UsageError that names the first option whose typed value is not the checkpoint's."""
    for name, value in asked.items():
        now, then = (" ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for v in (value, saved[name]))
        if now != then:
            then = "the default" if then is None else then
            raise UsageError(f"argument {flag(name)}: {now} contradicts {path}, which was made with {then}")


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


def load_trained(stage: Stage, options: argparse.Namespace, typed: Mapping[str, Any], batch_size: int) -> TrainedModel:
    """The model that `test` and `eval` use; where it is to be compiled, for batches of that size."""
    if options.pretrained and not stage.weights.exists():
        raise UsageError(f"argument --pretrained: no weights come with {stage.name}.py; train it, and leave this out")
    path = stage.weights if options.pretrained else options.checkpoint or options.run_dir / "checkpoint.pt"
    folder = options.run_dir / "pretrained" if options.pretrained else path.parent
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    averaged = options.weights == "ema"
    if options.pretrained and not averaged:
        raise UsageError("argument --weights: the weights that come with the project are averaged ones, got raw")
    if not path.exists():
        command = shlex.join(["python", sys.argv[0], "train", "--run-dir", str(path.parent)])
        hint = "; or take the weights that come with the project, with --pretrained" if stage.weights.exists() else ""
        raise UserError(f"{path}: no checkpoint there; make one with: {command}{hint}")
    saved = distributed.on_first(lambda: checkpoint.load(path, stage.name, ema_only=averaged))
    if not options.output:
        distributed.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    model_options = saved_model_options(stage, saved, path, typed)
    with checkpoint.reading(path):
        model = build_model(stage, model_options, saved["training_options"]["seed"]).eval()
    checkpoint.load_weights(model, saved["ema"] if averaged else saved["model"], path)
    model.to(device)
    if options.compile:
        compile_model(model, batch_size, precision)
    dataset, progress = saved["training_options"]["dataset"], saved["progress"]
    return TrainedModel(path, folder, model, device, precision, dataset, progress["epoch"], progress["step"])


def load_classifier(device: torch.device) -> Classifier:
    """The classifier that comes with the project. Raises a UserError if its file is damaged."""
    classifier = Classifier().requires_grad_(False).eval()
    with checkpoint.reading(CLASSIFIER):
        weights = torch.load(CLASSIFIER, map_location="cpu", weights_only=True)
    checkpoint.load_weights(classifier, weights, CLASSIFIER)
    return classifier.to(device)
