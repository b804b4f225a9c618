"""The commands that all stages share: train, test and eval."""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from common import __version__, checkpoint, distributed, evaluation
from common.checkpoint import Checkpoint, atomic_write
from common.data import load_images
from common.device import (
    compile_model,
    compiles_training,
    is_out_of_memory,
    keep_freed_memory,
    pick_device,
    use_bf16,
)
from common.errors import UsageError, UserError
from common.loss import HELD_OUT_BLOCK
from common.options import Stage, flag, model_defaults, parse, saved_model_options
from common.run_folder import locked
from common.sampling import FILM_FORMATS, Film, default_steps, noise_predictor, sample_images, save_grid
from common.schedule import NoiseSchedule
from common.training import Progress, Trainer, TrainingOptions, train

FIXED = ("dataset", "seed")  # training options that a run cannot change when it goes on
FILM_FRAMES = 50
MAX_PARAMETERS = 10**9  # with gradients, Adam's moments and the average, these take 20 GB


def main(stage: Stage, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a stage's command line and exits: with 2 if the command line is wrong, with 1 if anything else is."""
    options, typed = parse(stage, argv)
    command = {"train": _train, "test": _test, "eval": _eval}[options.command]
    try:
        keep_freed_memory()
        with torch.device("meta"):  # whose tensors take no memory: wrong model options are told before any work
            model = _build_model(stage, {name: getattr(options, name) for name in model_defaults(stage)})
        parameters = sum(p.numel() for p in model.parameters())
        if parameters > MAX_PARAMETERS:
            raise UsageError(f"argument --model-channels: too many; they make {parameters:,} parameters")
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
        pretrained = distributed.on_first(lambda: checkpoint.load(_shipped_weights(stage), stage.name, ema_only=True))
    source = stage.weights if pretrained else path
    model_options = _model_options(stage, options, typed, source, pretrained or saved)
    training_options = _training_options(options, typed, path, saved)
    _check_batch_size(training_options.batch_size)
    bf16 = use_bf16(training_options.precision, device)
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
    trainer = Trainer(stage.name, model_options, model, training_options, bf16)
    if saved:
        with checkpoint.reading(path):
            trainer.restore(saved)
    is_first = distributed.RANK == 0
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
    if compiles_training(options.compile, device, bf16):
        compile_model(model, training_options.batch_size // distributed.WORLD_SIZE, bf16, training=True)
    if is_first and options.overwrite:
        _remove_run(options.run_dir)
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
    if is_first:
        print(
            f"{done}; {'draw pictures' if finished else 'go on'} with: {_next_command(stage, options, typed, finished)}"
        )
    return 128 + received if received else 0


def _next_command(stage: Stage, options: argparse.Namespace, typed: set[str], finished: bool) -> str:
    """What to type after `train`: with those of the typed options that the checkpoint does not carry."""
    if distributed.WORLD_SIZE > 1 and not finished:
        return "the same torchrun command, and --resume"
    words = ["python", f"{stage.name}.py", *(["test"] if finished else ["train", "--resume"])]
    names = ["run_dir", "device"]
    if not finished:
        names += ["data_dir", "data_url", "compile", "sample_every", "checkpoint_every"]
    for name in names:
        value = getattr(options, name)
        if name in typed and isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif name in typed:
            words += [flag(name), str(value)]
    return shlex.join(words)


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
    path = _shipped_weights(stage) if options.pretrained else options.checkpoint or options.run_dir / "checkpoint.pt"
    folder = options.run_dir / "pretrained" if options.pretrained else path.parent
    device = pick_device(options.device)
    bf16 = use_bf16(options.precision, device)
    averaged = options.weights == "ema"
    if options.pretrained and not averaged:
        raise UsageError("argument --weights: the weights that come with the project are averaged ones, got raw")
    saved = distributed.on_first(lambda: checkpoint.load(path, stage.name, ema_only=averaged))
    distributed.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    model = _build_model(stage, _model_options(stage, options, typed, path, saved)).eval()
    with checkpoint.reading(path):
        model.load_state_dict(saved["ema"] if averaged else saved["model"])
        progress = checkpoint.from_saved(Progress, saved["progress"])
        dataset = checkpoint.from_saved(TrainingOptions, saved["training_options"]).dataset
    model.to(device)
    if options.compile:
        compile_model(model, batch_size, bf16)
    return _Trained(path, folder, model, device, bf16, dataset, progress.epoch, progress.step)


def _shipped_weights(stage: Stage) -> Path:
    """The file of weights that comes with the project, for --pretrained."""
    if not stage.weights.exists():
        raise UsageError(f"argument --pretrained: no weights come with {stage.name}.py; train it, and leave this out")
    return stage.weights


def _check_output(option: str, path: Path | None, endings: list[str]) -> None:
    if path and path.suffix.lower() not in endings:
        raise UsageError(f"argument {option}: the name must end in {' or '.join(endings)}, got {path}")
    if path and not path.parent.is_dir():
        raise UsageError(f"argument {option}: no such folder: {path.parent}")


def _sampling_steps(options: argparse.Namespace) -> int:
    """How many time steps the sampler visits."""
    all_steps = NoiseSchedule().steps
    steps = options.steps or default_steps(options.sampler, all_steps)
    if steps > all_steps:
        raise UsageError(f"argument --steps: {all_steps} at most, got {steps}")
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
            f"--run-dir {options.run_dir}: there is a run already; continue it with --resume, "
            "discard it with --overwrite, or name another folder"
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
    asked = {name: getattr(options, name) for name in model_defaults(stage)}
    if saved is None:
        return asked
    with checkpoint.reading(path):
        model_options = saved_model_options(stage, saved["model_options"])
    _refuse_contradictions({name: asked[name] for name in typed & asked.keys()}, model_options, path)
    return model_options


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
            then = "the default" if then is None else then
            raise UsageError(f"argument {flag(name)}: {now} contradicts {path}, which was made with {then}")


def _build_model(stage: Stage, model_options: dict[str, Any]) -> nn.Module:
    try:
        return stage.build_model(argparse.Namespace(**model_options))
    except ValueError as error:
        name, _, reason = str(error).partition(
            ": "
        )  # a message that begins with an argument's name is about its option
        raise UsageError(f"argument {flag(name)}: {reason}" if name in model_options else str(error)) from error


def _remove_run(run_dir: Path) -> None:
    for name in ("checkpoint.pt", "log.csv", "loss.png", "samples.png", "eval.json"):
        (run_dir / name).unlink(missing_ok=True)
    if (run_dir / "samples").exists():
        shutil.rmtree(run_dir / "samples")
