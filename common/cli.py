"""The commands and options that all stages share."""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from common import __version__, checkpoint, distributed, evaluation
from common.checkpoint import Checkpoint, atomic_write
from common.data import DATASETS, HELD_OUT_IMAGES, TRAINING_IMAGES, load_images
from common.device import compile_model, is_out_of_memory, keep_freed_memory, pick_device, use_bf16
from common.errors import UsageError, UserError
from common.loss import HELD_OUT_BLOCK
from common.run_folder import locked
from common.sampling import FILM_FORMATS, SAMPLERS, Film, noise_predictor, sample_images, save_grid
from common.schedule import NoiseSchedule
from common.training import Progress, Trainer, TrainingOptions, train

OptionGroup = argparse._ArgumentGroup

FIXED = ("dataset", "seed")  # training options that a run cannot change when it goes on
MOST_SAMPLES = 100_000
FILM_FRAMES = 50


@dataclass(frozen=True)
class Stage:
    """What a script of the chapter hands over.

    Args:
        file: the script; its name without .py is the stage's name.
        description: its docstring, for --help.
        add_options: adds the stage's own options, those of the model to the first group, those of the training to the
            second. A checkpoint carries their values.
        build_model: makes the model from the values of the model options. A ValueError becomes a usage error.
        epochs: default of --epochs.
    """

    file: str
    description: str | None
    add_options: Callable[[OptionGroup, OptionGroup], None]
    build_model: Callable[[argparse.Namespace], nn.Module]
    epochs: int = TrainingOptions.epochs

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @property
    def weights(self) -> Path:
        """Where the weights that come with the project are."""
        return Path(self.file).resolve().parent / "assets" / "weights" / f"{self.name}.pt"


def main(stage: Stage, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a stage's command line and exits: with 2 if the command line is wrong, with 1 if anything else is."""
    options, typed = _parse(stage, argv)
    command = {"train": _train, "test": _test, "eval": _eval}[options.command]
    try:
        keep_freed_memory()
        with torch.device("meta"):  # whose tensors take no memory: wrong model options are told before any work
            _build_model(stage, {name: getattr(options, name) for name in _model_defaults(stage)})
        distributed.start()
        status = command(stage, options, typed)
        distributed.stop()
        sys.exit(status)
    except UserError as error:
        message, status = str(error), error.exit_status
    except OSError as error:  # a full disk, say, or a folder that may not be written to
        message, status = f"{error.filename or options.run_dir}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            message = "out of memory; try a smaller --batch-size, or a smaller model"
        elif distributed.is_lost_connection(error):
            message = "another process of this run has ended, or cannot be reached"
        else:
            raise
        status = 1
    who = f"rank {distributed.RANK}: " if distributed.WORLD_SIZE > 1 else ""
    print(f"{stage.name}.py: {who}error: {' '.join(message.split())}", file=sys.stderr)
    distributed.exit_after_error(status)


# The commands


def _train(stage: Stage, options: argparse.Namespace, typed: set[str]) -> int:
    device = pick_device(options.device)
    with ExitStack() as held:
        distributed.on_first(lambda: held.enter_context(locked(options.run_dir)))
        return _train_in_locked_folder(stage, options, typed, device)


def _train_in_locked_folder(stage: Stage, options: argparse.Namespace, typed: set[str], device: torch.device) -> int:
    path = options.run_dir / "checkpoint.pt"
    saved = distributed.on_first(lambda: _find_run(stage, options, path))
    pretrained = None
    if options.pretrained and not saved:
        pretrained = distributed.on_first(lambda: checkpoint.load(stage.weights, stage.name, weights_only=True))
    source = stage.weights if pretrained else path
    model_options = _model_options(stage, options, typed, source, pretrained or saved)
    training_options = _training_options(options, typed, path, saved)
    _check_batch_size(training_options.batch_size)
    bf16 = use_bf16(options.precision, device)
    compile = device.type == "cuda" if options.compile is None else options.compile
    torch.manual_seed(training_options.seed)
    model = _build_model(stage, model_options).to(device)
    if pretrained:
        with checkpoint.reading(source):
            model.load_state_dict(pretrained["ema"])
    with distributed.first_of_machine_first():
        images, held_out = (
            load_images(training_options.dataset, options.data_dir, train=train, data_url=options.data_url).to(device)
            for train in (True, False)
        )
    trainer = Trainer(stage.name, model_options, model, training_options, bf16, compile)
    if saved:
        with checkpoint.reading(path):
            trainer.restore(saved)
    is_first = distributed.RANK == 0
    if is_first and options.overwrite:
        _remove_run(options.run_dir)

    progress = trainer.progress
    where = f"{device} in {'bf16' if bf16 else 'fp32'}"
    if distributed.WORLD_SIZE > 1:
        where = f"{distributed.WORLD_SIZE} processes, each on {device.type} in {'bf16' if bf16 else 'fp32'}"
    if is_first:
        print(
            f"{stage.name}: {sum(p.numel() for p in model.parameters()):,} parameters; "
            f"{len(images):,} images of {training_options.dataset}; {where}; "
            f"{training_options.epochs} epochs, {progress.epoch} done; {options.run_dir}",
            flush=True,
        )
    received = train(
        trainer,
        images,
        held_out,
        options.run_dir,
        max_steps=options.max_steps,
        sample_every=options.sample_every,
        checkpoint_every=options.checkpoint_every,
    )
    done = f"{path}: {progress.epoch} of {training_options.epochs} epochs done, {progress.step} steps"
    if progress.seen:
        done += f", train loss {trainer.mean_loss():.4f} in the epoch under way"
    finished = progress.epoch >= training_options.epochs
    command = f"python {stage.name}.py {'test' if finished else 'train --resume'}"
    if "run_dir" in typed:
        command += f" --run-dir {options.run_dir}"
    if is_first:
        print(f"{done}; {'draw pictures' if finished else 'go on'} with: {command}")
    return 128 + received if received else 0


def _test(stage: Stage, options: argparse.Namespace, typed: set[str]) -> int:
    for name, endings in (("output", [".png"]), ("film", list(FILM_FORMATS)), ("trajectory", [".png"])):
        _check_output(f"--{name}", getattr(options, name), endings)
    steps = _sampling_steps(options)
    trained = _load_trained(stage, options, typed, min(options.batch_size, options.num_images))
    film, trajectory = Film(steps, FILM_FRAMES, 64), Film(steps, 10, 8)

    def watch(step: int, xt: Tensor) -> None:
        if options.film:
            film(step, xt)
        if options.trajectory:
            trajectory(step, xt)

    images = _draw(trained, options, options.num_images, steps, watch)
    if distributed.RANK == 0:
        output = options.output or trained.folder / "samples.png"
        save_grid(images, output)
        if options.film:
            film.save_film(options.film)
        if options.trajectory:
            trajectory.save_trajectory(options.trajectory)
        print(
            f"{output}: {len(images)} images by {options.sampler} in {steps} steps, {options.weights} weights "
            f"after {trained.epochs} epochs, {trained.steps} steps of training"
        )
    return 0


def _eval(stage: Stage, options: argparse.Namespace, typed: set[str]) -> int:
    sampling_steps = _sampling_steps(options)
    trained = _load_trained(stage, options, typed, HELD_OUT_BLOCK)
    fid_metric = evaluation.new_fid(trained.device) if options.fid else None  # now, for it may be missing
    data = partial(load_images, trained.dataset, options.data_dir, data_url=options.data_url)
    with distributed.first_of_machine_first():
        held_out = data(train=False)
    schedule = NoiseSchedule().to(trained.device)
    predict_noise = noise_predictor(trained.model, trained.bf16)
    report: dict[str, Any] = {
        "stage": stage.name,
        "checkpoint": str(trained.path),
        "weights": options.weights,
        "epochs": trained.epochs,
        "steps": trained.steps,
        "dataset": trained.dataset,
        "seed": options.seed,
        "device": str(trained.device),
        "precision": "bf16" if trained.bf16 else "fp32",
        "version": __version__,
        "torch": torch.__version__,
    }

    started = time.perf_counter()
    losses = evaluation.held_out_losses(predict_noise, schedule, held_out, options.seed)
    loss, quarters = evaluation.loss_by_quarter(losses, schedule.steps)
    report["loss"] = {
        **loss._asdict(),
        "quarters": [quarter._asdict() for quarter in quarters],
        "images": len(losses),
        "seconds": time.perf_counter() - started,
    }

    started = time.perf_counter()
    images = held_out[: options.num_images]
    bound = evaluation.variational_bound(predict_noise, schedule, images, exact=options.exact, seed=options.seed)
    report["bits_per_dim"] = {
        **{name: evaluation.mean_over_images(bits)._asdict() for name, bits in bound.by_name().items()},
        "exact": options.exact,
        "images": len(images),
        "seconds": time.perf_counter() - started,
    }

    if fid_metric:
        started = time.perf_counter()
        samples = _draw(trained, options, options.fid, sampling_steps)
        if distributed.RANK == 0:
            report["fid"] = {
                "value": evaluation.fid(fid_metric, samples, data(train=True)),
                "samples": len(samples),
                "sampler": options.sampler,
                "sampling_steps": sampling_steps,
                "seconds": time.perf_counter() - started,
            }
    if distributed.RANK == 0:
        output = trained.folder / "eval.json"
        with atomic_write(output) as file:
            file.write(json.dumps(report, indent=2).encode() + b"\n")
        _print_report(report)
        print(f"{output}: the same and more")
    return 0


def _print_report(report: dict[str, Any]) -> None:
    print(
        "{stage}: {weights} weights after {epochs} epochs, {steps} steps of training; {dataset}; {device} in "
        "{precision}; seed {seed}".format(**report)
    )
    loss, bits = report["loss"], report["bits_per_dim"]
    rows = [(f"loss ({loss['images']:,} images)", loss)]
    rows += [(f"loss, quarter {number} of the time steps", part) for number, part in enumerate(loss["quarters"], 1)]
    rows += [(f"bits/dim ({bits['images']:,} images)", bits["total"])]
    rows += [(f"bits/dim, {name}", bits[name]) for name in ("prior", "kl", "decoder")]
    print("| | mean | standard error |\n|---|---|---|")
    for name, estimate in rows:
        print(f"| {name} | {estimate['mean']:.5f} | {estimate['standard_error']:.5f} |")
    if "fid" in report:
        print(f"| FID ({report['fid']['samples']:,} samples) | {report['fid']['value']:.3f} | |")


class _Trained(NamedTuple):
    """A model from a checkpoint, ready for use."""

    path: Path
    folder: Path  # for what is made with it
    model: nn.Module
    device: torch.device
    bf16: bool
    dataset: str
    epochs: int
    steps: int


def _load_trained(stage: Stage, options: argparse.Namespace, typed: set[str], batch_size: int) -> _Trained:
    """The model that `test` and `eval` use; where it is to be compiled, for batches of that size."""
    path = stage.weights if options.pretrained else options.checkpoint or options.run_dir / "checkpoint.pt"
    folder = options.run_dir if options.pretrained else path.parent
    device = pick_device(options.device)
    bf16 = use_bf16(options.precision, device)
    averaged = options.weights == "ema"
    if options.pretrained and not averaged:
        raise UsageError("argument --weights: the weights that come with the project are averaged ones, got raw")
    saved = distributed.on_first(lambda: checkpoint.load(path, stage.name, weights_only=averaged))
    folder.mkdir(parents=True, exist_ok=True)
    model = _build_model(stage, _model_options(stage, options, typed, path, saved)).eval()
    with checkpoint.reading(path):
        model.load_state_dict(saved["ema"] if averaged else saved["model"])
        progress = checkpoint.from_saved(Progress, saved["progress"])
        dataset = checkpoint.from_saved(TrainingOptions, saved["training_options"]).dataset
    model.to(device)
    if options.compile:
        model = compile_model(model, batch_size, bf16)
    return _Trained(path, folder, model, device, bf16, dataset, progress.epoch, progress.step)


def _check_output(option: str, path: Path | None, endings: list[str]) -> None:
    if path and path.suffix.lower() not in endings:
        raise UsageError(f"argument {option}: the name must end in {' or '.join(endings)}, got {path}")
    if path and not path.parent.is_dir():
        raise UsageError(f"argument {option}: no such folder: {path.parent}")


def _sampling_steps(options: argparse.Namespace) -> int:
    """How many time steps the sampler visits."""
    all_steps = NoiseSchedule().steps
    steps = options.steps or (all_steps if options.sampler == "ddpm" else 50)
    if steps > all_steps:
        raise UsageError(f"argument --steps: {all_steps} at most, got {steps}")
    if options.sampler == "ddpm" and steps != all_steps:
        raise UsageError(f"argument --steps: ddpm takes {all_steps} steps, got {steps}; --sampler ddim takes fewer")
    return steps


def _draw(
    trained: _Trained,
    options: argparse.Namespace,
    num_images: int,
    steps: int,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images from the model, uint8 (num_images, 3, 32, 32), by all processes together."""
    return sample_images(
        trained.model,
        NoiseSchedule().to(trained.device),
        num_images,
        sampler=options.sampler,
        steps=steps,
        seed=options.seed,
        batch_size=options.batch_size,
        bf16=trained.bf16,
        progress=True,
        spread=True,
        watch=watch,
    )


def _find_run(stage: Stage, options: argparse.Namespace, path: Path) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one and --resume is given."""
    if path.exists() and not options.resume and not options.overwrite:
        raise UsageError(
            f"--run-dir {options.run_dir}: there is a run already; go on with it by --resume, "
            "throw it away by --overwrite, or name another folder"
        )
    return checkpoint.load(path, stage.name) if path.exists() and options.resume else None


def _check_batch_size(batch_size: int) -> None:
    if batch_size % distributed.WORLD_SIZE:
        raise UsageError(
            f"argument --batch-size: {distributed.WORLD_SIZE} processes cannot share a batch of {batch_size} equally; "
            f"give a multiple of {distributed.WORLD_SIZE}"
        )


def _model_options(
    stage: Stage, options: argparse.Namespace, typed: set[str], path: Path, saved: Checkpoint | None
) -> dict[str, Any]:
    """The stage's model options: those of the checkpoint, if there is one."""
    asked = {name: getattr(options, name) for name in _model_defaults(stage)}
    if saved is None:
        return asked
    with checkpoint.reading(path):
        _check_saved_model_options(stage, saved["model_options"])
    _refuse_contradictions({name: asked[name] for name in typed & asked.keys()}, saved["model_options"], path)
    return saved["model_options"]


def _training_options(
    options: argparse.Namespace, typed: set[str], path: Path, saved: Checkpoint | None
) -> TrainingOptions:
    """The training options: those of the checkpoint, if there is one, changed by what was typed."""
    asked = {f.name: getattr(options, f.name) for f in fields(TrainingOptions) if hasattr(options, f.name)}
    if saved is None:
        return TrainingOptions(**asked)
    with checkpoint.reading(path):
        before = checkpoint.from_saved(TrainingOptions, saved["training_options"])
    changed = {name: asked[name] for name in typed & asked.keys()}
    _refuse_contradictions({n: changed[n] for n in changed if n in FIXED}, saved["training_options"], path)
    return replace(before, **changed)


def _refuse_contradictions(asked: dict[str, Any], saved: dict[str, Any], path: Path) -> None:
    for name, value in asked.items():
        if value != saved[name]:
            now, then = (" ".join(map(str, v)) if isinstance(v, list) else v for v in (value, saved[name]))
            raise UsageError(
                f"argument --{name.replace('_', '-')}: {now} contradicts {path}, which was made with {then}"
            )


def _build_model(stage: Stage, model_options: dict[str, Any]) -> nn.Module:
    try:
        return stage.build_model(argparse.Namespace(**model_options))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _remove_run(run_dir: Path) -> None:
    for name in ("checkpoint.pt", "log.csv", "loss.png", "samples.png", "eval.json"):
        (run_dir / name).unlink(missing_ok=True)
    if (run_dir / "samples").exists():
        shutil.rmtree(run_dir / "samples")


# The command line


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _StrictParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and adds its default to each option whose help does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.help and "default:" in action.help else super()._get_help_string(action)


def _parse(stage: Stage, argv: Sequence[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """The options' values, and the names of the options that the command line gives."""
    parser, commands = _make_parser(stage)
    options = parser.parse_args(argv)
    for command in commands:  # what is not None without defaults was typed
        command.set_defaults(**dict.fromkeys(vars(options)))
    typed = {name for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return options, typed


def _model_parser(stage: Stage) -> _StrictParser:
    """Of the stage's model options alone."""
    model, training = _StrictParser(add_help=False, allow_abbrev=False), _StrictParser(add_help=False)
    stage.add_options(model.add_argument_group(), training.add_argument_group())
    return model


def _model_defaults(stage: Stage) -> dict[str, Any]:
    return vars(_model_parser(stage).parse_args([]))


def _check_saved_model_options(stage: Stage, saved: dict[str, Any]) -> None:
    """Makes sure that the options could have come from the command line, of which a checkpoint might know nothing.

    Raises:
        TypeError, ValueError, AttributeError: they could not.
    """
    words = []
    for name, value in saved.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    if vars(_model_parser(stage).parse_args(words)) != saved:
        raise ValueError(f"its model options are {saved}")


def _make_parser(stage: Stage) -> tuple[_Parser, list[argparse.ArgumentParser]]:
    parser = _Parser(prog=f"{stage.name}.py", description=stage.description, formatter_class=_HelpFormatter)
    versions = f"%(prog)s {__version__}, PyTorch {torch.__version__}"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,test,eval}")
    train, test, evaluate = (
        commands.add_parser(name, help=text, formatter_class=_HelpFormatter)
        for name, text in (
            ("train", "train the model"),
            ("test", "draw pictures from the trained model"),
            ("eval", "measure the trained model on held-out images"),
        )
    )
    for command in (train, test, evaluate):
        model = command.add_argument_group("model")
        training = command.add_argument_group("training")
        stage.add_options(model, training)
        if command is train:
            _add_training_options(training, stage)
            _add_data_options(command.add_argument_group("data"), choose=True)
            _add_run_options(command.add_argument_group("run"))
        else:
            if command is test:
                _add_test_options(command.add_argument_group("pictures"))
            else:
                _add_data_options(command.add_argument_group("data"))
                _add_eval_options(command.add_argument_group("measures"))
            _add_sampling_options(command.add_argument_group("sampling"))
        _add_common_options(command.add_argument_group("common"), stage)
    return parser, [train, test, evaluate]


def _add_training_options(group: OptionGroup, stage: Stage) -> None:
    new = TrainingOptions
    group.add_argument("--epochs", type=whole_number(1), default=stage.epochs, help="passes over the training images")
    group.add_argument(
        "--batch-size",
        type=whole_number(1, TRAINING_IMAGES),
        default=new.batch_size,
        help="images per optimiser step, of all processes together",
    )
    group.add_argument("--lr", type=positive_float, default=new.lr, help="Adam's learning rate")
    group.add_argument(
        "--ema-decay", type=_decay, default=new.ema_decay, help="of the averaged weights, ramped up to; 0: no averaging"
    )
    group.add_argument("--seed", type=seed, default=new.seed, help="of weights, order, time steps, noise and flips")


def _add_data_options(group: OptionGroup, choose: bool = False) -> None:
    if choose:
        group.add_argument(
            "--dataset", choices=DATASETS, default="cifar10", help="cifar10 is downloaded on first use, shapes is drawn"
        )
    group.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that keeps the data set")
    group.add_argument(
        "--data-url", type=_url, help="another address of cifar-10-python.tar.gz (default: the official one)"
    )


def _add_run_options(group: OptionGroup) -> None:
    group.add_argument(
        "--max-steps", type=whole_number(1), help="optimiser steps to stop after, in all (default: no limit)"
    )
    group.add_argument(
        "--sample-every", type=whole_number(0), default=10, help="epochs between two sample grids; 0: none"
    )
    group.add_argument(
        "--checkpoint-every", type=whole_number(1), help="steps between two checkpoints (default: one epoch)"
    )
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the run folder, if there is one, with its options but for those given",
    )
    exclusive.add_argument("--overwrite", action="store_true", help="throw away the run in the run folder")
    _add_pretrained_option(group, "begin a new run with the weights that come with the project, in assets/weights")


def _add_test_options(group: OptionGroup) -> None:
    group.add_argument("--num-images", type=whole_number(1, MOST_SAMPLES), default=64, help="images in the grid")
    group.add_argument("--output", type=Path, help="PNG to write (default: samples.png beside the checkpoint)")
    group.add_argument(
        "--film",
        type=Path,
        metavar="PATH",
        help="animated .webp or .gif to write: 64 of the images coming out of the noise (default: none)",
    )
    group.add_argument(
        "--trajectory",
        type=Path,
        metavar="PATH",
        help="PNG to write: 8 of the images at ten moments, from noise to picture (default: none)",
    )


def _add_eval_options(group: OptionGroup) -> None:
    group.add_argument(
        "--num-images",
        type=whole_number(2, HELD_OUT_IMAGES),
        default=1000,
        help="held-out images whose bits per dimension are measured; the loss is measured on all 10,000",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="sum up all 1000 terms of the bound for each image, instead of estimating the sum from 11",
    )
    group.add_argument(
        "--fid",
        type=whole_number(2, MOST_SAMPLES),
        metavar="N",
        help='Frechet inception distance of N samples from the training images; takes "torchmetrics[image]" '
        "(default: not measured)",
    )


def _add_sampling_options(group: OptionGroup) -> None:
    group.add_argument("--seed", type=seed, default=0, help="of the noise")
    group.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="ddpm takes every step, ddim a few")
    group.add_argument(
        "--steps", type=whole_number(1), help="time steps to visit (default: 1000 for ddpm, 50 for ddim)"
    )
    group.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="averaged, or as the last step left them"
    )
    group.add_argument("--batch-size", type=whole_number(1, MOST_SAMPLES), default=256, help="images to draw at a time")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", type=Path, help="file to take the model from (default: checkpoint.pt in the run folder)"
    )
    _add_pretrained_option(source, "take the model from the weights that come with the project, in assets/weights")


def _add_pretrained_option(group: Any, help: str) -> None:
    group.add_argument("--pretrained", action="store_true", help=help)


def _add_common_options(group: OptionGroup, stage: Stage) -> None:
    group.add_argument("--run-dir", type=Path, default=Path("runs") / stage.name, help="folder of the run")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the first of cuda, mps, cpu"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 autocast where the processor multiplies in bfloat16",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the model, which needs a C++ compiler (default: when training on cuda)",
    )


# Types of options: they turn a word of the command line into a value or say what is wrong with it


def whole_number(low: int, high: int = 10**9) -> Callable[[str], int]:
    """A type of option: a whole number within these bounds."""
    return lambda word: _number(word, int, lambda value: low <= value <= high, f"a whole number from {low} to {high}")


def positive_float(word: str) -> float:
    """A finite number above 0."""
    return _number(word, float, lambda value: 0 < value < math.inf, "a positive number")


def multiple_of_32(word: str) -> int:
    """A number of channels that GroupNorm can split into 32 groups."""
    return _number(word, int, lambda value: value in range(32, 1025, 32), "a multiple of 32, from 32 to 1024")


def seed(word: str) -> int:
    """A seed of random numbers."""
    return _number(word, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def _decay(word: str) -> float:
    return _number(word, float, lambda value: 0 <= value < 1, "a number from 0 up to, but not including, 1")


def _url(word: str) -> str:
    if not word.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must start with http:// or https://, got {word!r}")
    return word


def _number(word: str, kind: Callable[[str], Any], accept: Callable[[Any], bool], description: str) -> Any:
    try:
        value = kind(word)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"must be {description}, got {word!r}")
    return value
