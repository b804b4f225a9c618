"""What a script hands over to the commands, and the command line that all stages share."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from common.blocks import ACTIVATIONS
from common.guidance import CLASSES
from common.run.datasets import DATASETS, HELD_OUT_IMAGES, TRAINING_IMAGES
from common.run.device import DTYPES
from common.run.errors import UsageError
from common.run.pictures import SAMPLERS
from common.training import TrainingOptions

MAX_SAMPLES = 100_000
PRECISIONS = ("auto", *DTYPES)

OptionGroup = argparse._ActionsContainer  # a parser, or one of its groups
AddOption = Callable[[OptionGroup], object]


@dataclass(frozen=True)
class Stage:
    """What a script of the chapter hands over.

    Args:
        file: the script; its name without .py is the stage's name.
        description: its docstring, for --help.
        build_model: makes the model from the values of the model options. A ValueError becomes a usage error.
        model_options: functions that add an option of the model each, with a default. A checkpoint carries its value.
        training_options: the same for fields of TrainingOptions that not every stage has as an option.
        epochs: default of --epochs.
    """

    file: str
    description: str | None
    build_model: Callable[[argparse.Namespace], nn.Module]
    model_options: Sequence[AddOption] = ()
    training_options: Sequence[AddOption] = ()
    epochs: int = TrainingOptions.epochs

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @property
    def weights(self) -> Path:
        """Where the weights that come with the project are."""
        return Path(self.file).resolve().parent / "assets" / "weights" / f"{self.name}.pt"


# Types of options: each turns a word of the command line into a value, or says what is wrong with it


def _number(word: str, kind: Callable[[str], Any], accept: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(word)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"must be {expected}, got {word!r}")
    return value


def whole_number(low: int, high: int = 10**9, multiple_of: int = 1) -> Callable[[str], int]:
    """A type of option: a whole number from `low` to `high`, both of them multiples of `multiple_of`."""
    kind = "a whole number" if multiple_of == 1 else f"a multiple of {multiple_of},"
    accept = range(low, high + 1, multiple_of).__contains__
    return partial(_number, kind=int, accept=accept, expected=f"{kind} from {low} to {high}")


positive_float = partial(_number, kind=float, accept=lambda value: 0 < value < math.inf, expected="a positive number")
seed = whole_number(0, 2**63 - 1)


def path(word: str) -> Path:
    """A file or a folder; ~ is the home folder also where the shell leaves it."""
    if not word:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(os.path.expanduser(word))  # which leaves the ~ of an unknown user, as a shell does


def dataset(word: str) -> str:
    """The name of a data set, or the absolute path of one's own."""
    return word if word in DATASETS else os.path.abspath(path(word))


def _url(word: str) -> str:
    if not word.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must start with http:// or https://, got {word!r}")
    return word


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a UsageError, which `cli.main` turns into one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and adds its default to each option whose help does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.help and "default:" in action.help else super()._get_help_string(action)


def parse(stage: Stage, argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options' values, and of them those that the command line gives, by name."""
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    parser, commands = make_parser(stage)
    options = parser.parse_args(argv)
    for command in commands:  # what is not None without defaults was typed
        command.set_defaults(**dict.fromkeys(vars(options)))
    names = [name for name, value in vars(parser.parse_args(argv)).items() if value is not None]
    typed = {name: getattr(options, name) for name in names}
    return options, typed


def model_defaults(stage: Stage) -> dict[str, Any]:
    """The model options of a stage, by name, with their defaults."""
    parser = _Parser(add_help=False)
    for add_option in stage.model_options:
        add_option(parser)
    try:
        return vars(parser.parse_args([]))
    except UsageError as error:
        raise UsageError(f"model options: {error}; give each a default, for a checkpoint knows its own") from error


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return f"--{name.replace('_', '-')}"


def make_parser(stage: Stage) -> tuple[_Parser, list[argparse.ArgumentParser]]:
    parser = _Parser(prog=f"{stage.name}.py", description=stage.description, formatter_class=_HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,test,eval}")
    texts = {
        "train": "train the model",
        "test": "sample pictures from the trained model",
        "eval": "measure the trained model on held-out images",
    }
    train, test, evaluate = (commands.add_parser(n, help=texts[n], formatter_class=_HelpFormatter) for n in texts)
    for command in (train, test, evaluate):
        model = command.add_argument_group("model")
        training = command.add_argument_group("training" if command is train else "training (without effect here)")
        if command is train:
            _add_training_options(training, stage.epochs)
            _add_data_options(command.add_argument_group("data"))
            _add_run_options(command.add_argument_group("run"))
        elif command is test:
            _add_test_options(command.add_argument_group("pictures"))
        else:
            _add_data_options(command.add_argument_group("data"), default=None)
            _add_eval_options(command.add_argument_group("measures"))
        if command is not train:
            _add_sampling_options(command.add_argument_group("sampling"))
        _add_common_options(command.add_argument_group("common"), stage)
        if taken := model_defaults(stage).keys() & {"command", *vars(command.parse_args([]))}:
            raise UsageError(f"model options: every stage has {', '.join(taken)} already; choose another name")
        for add_option in stage.model_options:
            add_option(model)
        for add_option in stage.training_options:
            add_option(training)
    return parser, [train, test, evaluate]


def _add_training_options(group: OptionGroup, epochs: int) -> None:
    add, default, batch_size = group.add_argument, TrainingOptions(), whole_number(1, TRAINING_IMAGES)
    decay = partial(_number, kind=float, accept=lambda value: 0 <= value < 1, expected="from 0 to below 1")
    keep = "share that the averaged weights keep at each step, at most (less early on); 0: no averaging"
    together = "images per step, of all processes together"
    add("--epochs", type=whole_number(1), default=epochs, help="passes over the images; fewer than 10,000 are repeated")
    add("--batch-size", type=batch_size, default=default.batch_size, help=together)
    add("--lr", type=positive_float, default=default.lr, help="Adam's learning rate")
    add("--ema-decay", type=decay, default=default.ema_decay, help=keep)
    add("--seed", type=seed, default=default.seed, help="of weights, order, time steps, noise and flips")


def _add_data_options(group: OptionGroup, default: str | None = "cifar10") -> None:
    add, names = group.add_argument, f"{{{','.join(DATASETS)},PATH}}"
    own = "cifar10 is downloaded, shapes drawn, on first use; or your own images: a folder, or an .npy or .npz file"
    text = own if default else f"{own} (default: what the model was trained on)"
    add("--dataset", type=dataset, metavar=names, default=default, help=text)
    add("--data-dir", type=path, default=Path("data"), help="folder that keeps cifar10 and shapes")
    add("--data-url", type=_url, help="another address of cifar-10-python.tar.gz (default: the official one)")


def _add_run_options(group: OptionGroup) -> None:
    add, add_either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    saving = "steps between two checkpoints (default: one epoch, or more if that takes less than 10 seconds)"
    go_on = "continue the run in the run folder, if there is one; options given here replace its own"
    add("--max-steps", type=whole_number(1), help="optimiser steps to stop after, in all (default: no limit)")
    add("--sample-every", type=whole_number(0), default=10, help="epochs between two sample grids; 0: none")
    add("--checkpoint-every", type=whole_number(1), help=saving)
    add_either("--resume", action="store_true", help=go_on)
    add_either("--overwrite", action="store_true", help="discard the run in the run folder")


def _add_test_options(group: OptionGroup) -> None:
    add = group.add_argument
    film = "animated .webp or .gif to write: 64 of the images coming out of the noise (default: none)"
    strip = "PNG to write: 8 of the images at ten moments, from noise to picture (default: none)"
    single = "new or empty folder to write every image to, as a PNG of its own (default: none)"
    label = "class of CIFAR-10 to sample, guided by the classifier that comes with the project (default: any)"
    scale = partial(_number, kind=float, accept=lambda value: 0 < value <= 1e6, expected="above 0, at most 1000000")
    add("--num-images", type=whole_number(1, MAX_SAMPLES), default=64, help="images in the grid")
    add("--output", type=path, help="PNG to write (default: samples.png beside the checkpoint)")
    add("--film", type=path, metavar="PATH", help=film)
    add("--trajectory", type=path, metavar="PATH", help=strip)
    add("--save-images", type=path, metavar="DIR", help=single)
    add("--label", choices=CLASSES, help=label)
    add("--guidance-scale", type=scale, default=10.0, help="how strongly --label counts; 1: Bayes' rule")


def _add_eval_options(group: OptionGroup) -> None:
    add, images = group.add_argument, whole_number(2, HELD_OUT_IMAGES)
    bits = "held-out images whose bits per dimension are measured, at most; the loss is measured on all"
    exact = "sum up all 999 KL terms of the bound for each image, instead of estimating their sum from 10"
    fid = 'Frechet inception distance of N samples; requires "torchmetrics[image]" (default: not measured)'
    network = "whose features --fid compares: Inception's, or those of the classifier that comes with the project"
    add("--output", type=path, help="JSON file to write (default: eval.json beside the checkpoint)")
    add("--num-images", type=images, default=1000, help=bits)
    add("--exact", action="store_true", help=exact)
    add("--fid", type=whole_number(2, MAX_SAMPLES), metavar="N", help=fid)
    add("--fid-network", choices=("inception", "classifier"), default="inception", help=network)


def _add_sampling_options(group: OptionGroup) -> None:
    add, add_either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    steps = "time steps to visit, of 1000 (default: 1000 for ddpm, 50 for ddim)"
    weights = "averaged, or as the last step left them"
    shipped = "take the weights that come with the project; what is made of them goes to pretrained/ in the run folder"
    add("--seed", type=seed, default=0, help="of the noise")
    add("--sampler", choices=SAMPLERS, default="ddpm", help="with fresh noise in every step, or without")
    add("--steps", type=whole_number(1, SAMPLERS["ddpm"]), help=steps)
    add("--weights", choices=("ema", "raw"), default="ema", help=weights)
    add("--batch-size", type=whole_number(1, MAX_SAMPLES), default=256, help="images to draw at a time")
    add_either("--checkpoint", type=path, help="file to read (default: checkpoint.pt in the run folder)")
    add_either("--pretrained", action="store_true", help=shipped)


def _add_common_options(group: OptionGroup, stage: Stage) -> None:
    add, devices = group.add_argument, ("auto", "cpu", "cuda", "mps")
    precision = "auto: bf16 on CUDA GPUs and x86 CPUs that have it, fp16 on GPUs that have only that, else fp32"
    compiled = "compile the model, with a C++ compiler (default: in training, on cuda and, in bf16, on CPUs with AMX)"
    add("--run-dir", type=path, default=Path("runs") / stage.name, help="folder of the run")
    add("--device", choices=devices, default="auto", help="auto: the first of cuda, mps, cpu")
    add("--precision", choices=PRECISIONS, default="auto", help=precision)
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)


# Options that several stages share


def model_channels(group: OptionGroup) -> None:
    group.add_argument("--model-channels", type=whole_number(32, 1024, 32), default=32, help="width of the U-Net")


def activation(group: OptionGroup) -> None:
    group.add_argument("--activation", choices=ACTIVATIONS, default="silu", help="activation of the whole network")


def norm_groups(group: OptionGroup) -> None:
    text = "groups of every GroupNorm, 16 or 32 in the chapter (default: one for every four channels, 32 at most)"
    group.add_argument("--norm-groups", type=whole_number(1, 1024), help=text)


def num_res_blocks(group: OptionGroup) -> None:
    group.add_argument("--num-res-blocks", type=whole_number(1, 16), default=2, help="ResnetBlocks per level")


def channel_mult(group: OptionGroup) -> None:
    text, mult = "width of each level, in multiples of --model-channels", whole_number(1, 16)
    group.add_argument("--channel-mult", type=mult, nargs="+", default=[2, 2, 2, 1], help=text)


def hflip(group: OptionGroup, default: bool = False) -> None:
    text = "flip training images left-right with probability 1/2"
    group.add_argument("--hflip", action=argparse.BooleanOptionalAction, default=default, help=text)
