"""Trains the whole chapter, and makes from it every number and every picture that README.md shows.

    python benchmarks/train_chapter.py                               # every stage to its documented epochs
    python benchmarks/train_chapter.py --epochs 20 --minutes 600     # 20 epochs each; stops after ten hours
    python benchmarks/train_chapter.py --processes 8                 # eight processes a stage, by torchrun
    python benchmarks/train_chapter.py --from-assets                 # goes on from the weights in assets/weights
    python benchmarks/train_chapter.py --report                      # measures what is there; the tables and pictures

The stages take turns: each is trained up to one milestone before any is trained further, so that at any time all of
them can be compared. Ctrl-C, SIGTERM and --minutes stop it; the same command goes on from there. What each stage has
learned at a milestone, its averaged weights and its log, stays in RUNS/part_x/milestones/. Options that this script
does not know are handed on to `train`, for example --device cuda or --precision fp32.
"""

import argparse
import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    Figure = None  # type: ignore[assignment, misc]  # only --report draws

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.throughput import SCHEDULE_STEPS, STAGES, flops_per_image
from common.data import random_generator, to_float, to_uint8
from common.diffusion import NoiseSchedule
from common.guidance import CLASSES
from common.run import checkpoint
from common.run.errors import UserError, drop_what_nobody_takes, say
from common.run.folder import write_log
from common.run.loop import STOP_SIGNALS
from common.run.options import positive_float, whole_number
from common.run.shapes import draw_shapes

ROOT = Path(__file__).resolve().parent.parent
MILESTONES = (1, 5, 10, 20, 40, 60, 80, 100, 120)  # epochs after which the averaged weights are kept
GRIDS = {"F": "part-f-cifar-aug-output.png", "G": "part-h-cifar-attn-output.png"}  # the others have the script's name
IDEAS = dict(zip(STAGES, ("16 channels, ReLU", "32 channels", "SiLU", "all skips", "deeper", "flips", "attention")))
ROW = 6  # of the eight in a grid, counted from 0, to show: the one in which G draws most that can be named
LABELS = ("automobile", "horse")  # what every stage is asked for, sixteen of each
LABEL_ROW = 1  # of the four in such a grid to show, chosen likewise
SAMPLERS = (("ddim", 50), ("ddim", 400), ("ddpm", 50), ("ddpm", 1000))
TIMES = (0, 50, 100, 200, 300, 450, 600, 999)


# Training


def train(letters: list[str], options: argparse.Namespace, more: list[str]) -> None:
    """Trains the stages in turn, milestone by milestone.

    Raises:
        SystemExit: a stage could not be trained, or was told to stop.
    """
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    goals = {letter: options.epochs or importlib.import_module(STAGES[letter]).stage.epochs for letter in letters}
    for milestone in sorted({*MILESTONES, *goals.values()}):
        for letter in letters:
            run_dir = options.runs / STAGES[letter]
            if options.from_assets:
                begin_from_assets(letter, run_dir)
            if milestone > goals[letter]:
                continue
            if epochs_done(letter, run_dir) < milestone:
                say(f"part {letter}: training up to {milestone} epochs")
                words = ["--resume", "--epochs", str(milestone), "--sample-every", str(milestone)]
                words += ["--run-dir", str(run_dir), "--data-dir", str(options.data_dir)]
                words += [*(["--hflip"] if letter == "F" else []), *more]
                status = run(stage_command(letter, "train", words, options.processes), deadline)
                if status:
                    sys.exit(f"train_chapter.py: part {letter} ended with status {status}; the same command goes on")
                if epochs_done(letter, run_dir) < milestone:
                    return  # the minutes are over
            keep(letter, run_dir, milestone)


def begin_from_assets(letter: str, run_dir: Path) -> None:
    """Lets a run that is not there begin where the weights in assets/weights stop: with their log, and a new Adam.

    Their milestone comes along, with what was measured of it and its grid.

    Raises:
        UserError: the milestone is there already, but not what it came from.
    """
    path, name, assets = run_dir / "checkpoint.pt", STAGES[letter], ROOT / "assets"
    source = assets / "weights" / f"{name}.pt"
    if path.exists() or not source.exists():
        return
    saved = checkpoint.load(source, name, ema_only=True)
    weights = {name: weight.float() if weight.is_floating_point() else weight for name, weight in saved["ema"].items()}
    epoch = saved["progress"]["epoch"]
    folder = milestone_dir(run_dir, epoch)
    if folder.exists():
        raise UserError(f"{folder}: there is a milestone, but no {path.name} to go on from; move it away")
    folder.mkdir(parents=True)
    shutil.copy(source, folder / "checkpoint.pt")
    shutil.copy(assets / "logs" / f"{name}-{epoch:04d}.json", folder / "eval.json")
    shutil.copy(assets / "grids" / f"{name}-{epoch:04d}.png", folder / "samples.png")
    for label in LABELS:
        shutil.copy(assets / "grids" / label / f"{name}-{epoch:04d}.png", folder / f"{label}.png")
    checkpoint.save(path, {**saved, "model": weights, "ema": weights, "optimizer": dict.fromkeys(range(len(weights)))})


def epochs_done(letter: str, run_dir: Path) -> int:
    path = run_dir / "checkpoint.pt"
    return checkpoint.load(path, STAGES[letter])["progress"]["epoch"] if path.exists() else 0


def keep(letter: str, run_dir: Path, epoch: int) -> None:
    """Keeps the averaged weights, in half precision, and the log that goes with them, of a run that is there now."""
    path = milestone_dir(run_dir, epoch) / "checkpoint.pt"
    saved = checkpoint.load(run_dir / "checkpoint.pt", STAGES[letter])
    progress = saved["progress"]
    if (progress["epoch"], progress["seen"]) == (epoch, 0) and not path.exists():  # not a part of the next epoch
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save_weights(path, saved)
        say(f"{path}: kept")


def milestone_dir(run_dir: Path, epoch: int) -> Path:
    return run_dir / "milestones" / f"epoch-{epoch:04d}"


def stage_command(letter: str, command: str, words: list[str], processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / f"{STAGES[letter]}.py"), command, *words]


def run(command: list[str], deadline: float | None = None) -> int:
    """Runs a command; at the deadline, of `time.monotonic`, and when this process is told to stop, it is asked to end.

    In a session of its own: a signal to the whole process group, as `timeout` and a terminal send, would reach it
    twice, and a second one kills.

    Returns:
        Its exit status; 0 if it was the deadline.
    """
    with subprocess.Popen(command, start_new_session=True) as child:

        def stop(number: int, frame: FrameType | None) -> None:
            child.terminate()

        previous = {n: signal.signal(n, stop) for n in STOP_SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
        try:
            return child.wait(None if deadline is None else max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
            return 0
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


# What is made of it


def report(options: argparse.Namespace, assets: Path) -> None:
    """Fills assets/ from the stages' runs, makes all pictures anew from it, and prints README's table of results.

    Raises:
        UserError: the package that draws is missing.
    """
    if Figure is None:
        raise UserError("--report: this requires matplotlib; install it with: python -m pip install matplotlib")
    for name in ("weights", "logs", *(f"grids/{label}" for label in LABELS)):
        (assets / name).mkdir(parents=True, exist_ok=True)
    for letter in options.stages:
        run_dir = options.runs / STAGES[letter]
        folders = [milestone_dir(run_dir, epoch) for epoch in milestones(run_dir)]
        if not folders:
            say(f"part {letter}: no milestone in {run_dir}; what assets/ has of it stays")
        for folder in folders:
            measure(letter, folder, options.data_dir)
            publish(letter, folder, assets)
        if letter == "G" and folders:
            samplers(folders[-1], assets)
            classes(folders[-1], assets)
    stage_grids(assets)
    ladder(assets)
    progress(assets)
    losses(assets)
    forward_noising(assets)
    if (options.data_dir / CIFAR10.base_folder).exists():
        example_images(options.data_dir, assets)
    say(results_table(assets))


def milestones(run_dir: Path) -> list[int]:
    """The epochs whose weights are kept, in ascending order."""
    return sorted(int(path.parent.name.removeprefix("epoch-")) for path in run_dir.glob("milestones/*/checkpoint.pt"))


def measure(letter: str, folder: Path, data_dir: Path) -> None:
    """Draws the grids and measures the numbers of one milestone."""
    make(letter, folder / "samples.png", "test", [])
    for label in LABELS:
        path = folder / f"{label}.png"
        words = ["--label", label, "--steps", "100", "--num-images", "16", "--output", str(path)]
        make(letter, path, "test", words)
    make(letter, folder / "eval.json", "eval", ["--data-dir", str(data_dir)])


def make(letter: str, path: Path, command: str, words: list[str]) -> None:
    """Makes a file with the weights that are kept beside it, unless it is there."""
    if not path.exists():
        status = run(stage_command(letter, command, ["--checkpoint", str(path.parent / "checkpoint.pt"), *words]))
        if status:
            sys.exit(f"train_chapter.py: part {letter}'s {command} ended with status {status}")


def publish(letter: str, folder: Path, assets: Path) -> None:
    """Copies one milestone to assets/; called in ascending order, so that the furthest one's weights stay."""
    name = STAGES[letter]
    shutil.copy(folder / "checkpoint.pt", assets / "weights" / f"{name}.pt")
    saved = checkpoint.load(folder / "checkpoint.pt", name, ema_only=True)
    write_log(assets / "logs" / f"{name}.csv", saved["progress"]["log"])
    numbers = json.loads((folder / "eval.json").read_text())
    numbers.pop("checkpoint", None)  # where it was on this machine
    milestone = f"{name}-{numbers['epochs']:04d}"
    (assets / "logs" / f"{milestone}.json").write_text(json.dumps(numbers, indent=2) + "\n")
    shutil.copy(folder / "samples.png", assets / "grids" / f"{milestone}.png")
    for label in LABELS:
        shutil.copy(folder / f"{label}.png", assets / "grids" / label / f"{milestone}.png")


def read_log(assets: Path, letter: str) -> np.ndarray:
    return np.atleast_1d(np.genfromtxt(assets / "logs" / f"{STAGES[letter]}.csv", delimiter=",", names=True))


def read_numbers(assets: Path) -> dict[str, dict[int, Any]]:
    """What `eval` has measured: of each stage, by epoch."""
    return {
        letter: {int(path.stem[-4:]): json.loads(path.read_text()) for path in (assets / "logs").glob(f"{name}-*.json")}
        for letter, name in STAGES.items()
    }


def common_epoch(by_stage: dict[str, dict[int, Any]]) -> int:
    """The most epochs of which every stage has something; 0 if there are none."""
    return max(set.intersection(*({*by_epoch} for by_epoch in by_stage.values())), default=0)


def results_table(assets: Path) -> str:
    """README's table of results: a row for each stage after equally many epochs, then those that went further.

    Four columns fit the screen of a telephone; so the standard error, the largest of its column, stands in the title.
    """
    numbers = read_numbers(assets)
    common = common_epoch(numbers)
    rows = [(letter, common, IDEAS[letter]) for letter in STAGES if common]
    furthest = {letter: max(by_epoch, default=0) for letter, by_epoch in numbers.items()}
    rows += [(letter, epoch, f"after {epoch} epochs") for letter, epoch in furthest.items() if epoch > common]
    losses = [numbers[letter][epoch]["loss"] for letter, epoch, _ in rows]
    bits = [numbers[letter][epoch]["bits_per_dim"]["total"] for letter, epoch, _ in rows]
    errors = [max((n["standard_error"] for n in column), default=0) for column in (losses, bits)]
    lines = [
        f"| after {common} epochs | GFLOP per image | held-out loss ± {errors[0]:.4f} | bits/dim ± {errors[1]:.2f} |",
        "|---|---|---|---|",
    ]
    for (letter, _, what), loss, bit in zip(rows, losses, bits):
        gflop = flops_per_image(letter, "sample") / SCHEDULE_STEPS / 1e9
        lines.append(
            f"| [{letter}]({STAGES[letter]}.py) {what} | {gflop:.2f} | {loss['mean']:.4f} | {bit['mean']:.2f} |"
        )
    return "\n".join(lines)


# Pictures


def grids(assets: Path, letter: str) -> dict[int, Path]:
    """What one stage has drawn, by epoch, in ascending order; always from the same noise."""
    return {int(path.stem[-4:]): path for path in sorted((assets / "grids").glob(f"{STAGES[letter]}-*.png"))}


def stage_grids(assets: Path) -> None:
    """The grid of each stage after equally many epochs, and G's furthest, twice as large."""
    drawn = {letter: grids(assets, letter) for letter in STAGES}
    common = common_epoch(drawn)
    names = {letter: GRIDS.get(letter, f"{name.replace('_', '-')}-output.png") for letter, name in STAGES.items()}
    shown = {names[letter]: by_epoch.get(common) for letter, by_epoch in drawn.items()}
    shown["furthest.png"] = drawn["G"].get(max(drawn["G"], default=0))
    for name, path in shown.items():
        if path:
            with Image.open(path) as grid:
                grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(assets / name)


def ladder(assets: Path) -> None:
    """A row of pictures for each stage after equally many epochs, then for those that went further.

    Four of each of LABELS, always from the same noise.
    """
    drawn = {letter: grids(assets, letter) for letter in STAGES}
    common = common_epoch(drawn)
    rows = [(f"{letter}  {IDEAS[letter]}", drawn[letter][common]) for letter in STAGES if common]
    for letter, by_epoch in drawn.items():
        if max(by_epoch, default=0) > common:
            rows.append((f"{letter}  {max(by_epoch)} epochs", by_epoch[max(by_epoch)]))
    if rows:
        asked = [(text, [path.parent / label / path.name for label in LABELS]) for text, path in rows]
        picture_rows(asked, LABEL_ROW, assets / "ladder.png")


def samplers(folder: Path, assets: Path) -> None:
    """Sixteen pictures by G from the same start, with fresh noise in each step and without, in few steps and many.

    And how the noise becomes those by DDPM in fifty steps, as a film.
    """
    film = folder / "denoising.webp"
    words = ["--steps", "50", "--num-images", "16", "--film", str(film), "--output", str(folder / "ddpm-50.png")]
    make("G", film, "test", words)
    shutil.copy(film, assets)
    figure = Figure(figsize=(8, 8.4), dpi=100, layout="constrained")
    for axes, (sampler, steps) in zip(figure.subplots(2, 2).flat, SAMPLERS):
        path = folder / f"{sampler}-{steps}.png"
        words = ["--sampler", sampler, "--steps", str(steps), "--num-images", "16", "--output", str(path)]
        make("G", path, "test", words)
        with Image.open(path) as grid:
            axes.imshow(grid, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{sampler.upper()}, {steps} steps", fontsize=10)
    save(figure, assets / "samplers.png")


def classes(folder: Path, assets: Path) -> None:
    """Six pictures of each class by G, a column for each; every row starts from the same noise."""
    columns = []
    for label in CLASSES:
        path = folder / f"six-{label}.png"
        make("G", path, "test", ["--label", label, "--steps", "100", "--num-images", "6", "--output", str(path)])
        tiles = np.array(Image.open(path))[2:, 2:].reshape(2, 34, 3, 34, 3)[:, :32, :, :32]  # without the black lines
        columns.append(torch.from_numpy(tiles).permute(0, 2, 4, 1, 3).flatten(0, 1))  # (6, 3, 32, 32)
    image_table(torch.stack(columns, dim=1).flatten(0, 1), list(CLASSES), assets / "classes.png")


def progress(assets: Path) -> None:
    """What G draws from the same noise, milestone by milestone, with its losses."""
    if drawn := grids(assets, "G"):
        losses = {row["epoch"]: row["held_out_loss"] for row in read_log(assets, "G")}
        rows = [(f"epoch {e}\nloss {losses[e]:.4f}", [path]) for e, path in drawn.items() if e in losses]
        picture_rows(rows, ROW, assets / "progress.png")


def picture_rows(rows: list[tuple[str, list[Path]]], number: int, path: Path) -> None:
    """For each (label, grids) what is in row `number`, from 0, of the grids, side by side, three times as large."""
    figure = Figure(figsize=(8, 0.9 * len(rows)), dpi=120)
    room = {"left": 0.2, "right": 1, "bottom": 0, "top": 1, "hspace": 0}  # for the labels, on the left
    for axes, (label, paths) in zip(figure.subplots(len(rows), squeeze=False, gridspec_kw=room)[:, 0], rows):
        strips = [np.asarray(Image.open(grid))[34 * number : 34 * number + 36] for grid in paths]  # with black lines
        axes.imshow(np.concatenate(strips, axis=1).repeat(3, axis=0).repeat(3, axis=1))
        axes.set(xticks=[], yticks=[], anchor="E")
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        for spine in axes.spines.values():
            spine.set_visible(False)
    save(figure, path)


def losses(assets: Path) -> None:
    """Held-out loss against the epoch, from the third on: the steep fall before would press the rest together."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for letter in STAGES:
        if (assets / "logs" / f"{STAGES[letter]}.csv").exists():
            log = read_log(assets, letter)[2:]
            axes.plot(log["epoch"], log["held_out_loss"], ".-", label=f"{letter}  {IDEAS[letter]}")
    axes.set(xlabel="epoch", ylabel="held-out loss of the averaged weights")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, assets / "losses.png")


def forward_noising(assets: Path) -> None:
    """What the forward process makes of three drawn shapes; the columns are the time steps of TIMES."""
    x0 = to_float(torch.from_numpy(draw_shapes(3)))
    noise = torch.randn(x0.shape, generator=random_generator("cpu", 0, "forward noising", 0))
    schedule = NoiseSchedule()
    columns = [to_uint8(schedule.add_noise(x0, torch.full((3,), t), noise)) for t in TIMES]
    images = torch.stack(columns, dim=1).flatten(0, 1)  # (3 * times, 3, 32, 32), row by row
    image_table(images, [f"t = {t}" for t in TIMES], assets / "forward-noising.png")


def example_images(data_dir: Path, assets: Path) -> None:
    """Training images of CIFAR-10: the first six of each class, a column for each."""
    data = CIFAR10(data_dir)
    labels = torch.tensor(data.targets)
    columns = [torch.from_numpy(data.data)[labels == label][:6] for label in range(10)]  # (6, 32, 32, 3) each
    images = torch.stack(columns, dim=1).flatten(0, 1).permute(0, 3, 1, 2)
    image_table(images, data.classes, assets / "mnist-example-data.png")


def image_table(images: torch.Tensor, titles: list[str], path: Path) -> None:
    """uint8 images (rows * columns, 3, 32, 32) at twice their size or more, with a title over each column."""
    rows, columns = len(images) // len(titles), len(titles)
    figure = Figure(figsize=(0.98 * columns, 0.98 * rows + 0.25), dpi=100, layout="constrained")
    for number, (axes, image) in enumerate(zip(figure.subplots(rows, columns).flat, images)):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        if number < columns:
            axes.set_title(titles[number], fontsize=9)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    say(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--epochs", type=whole_number(1), help="of each stage (default: 80 for A, 120 for the others)")
    parser.add_argument("--minutes", type=positive_float, help="to stop after (default: no limit)")
    parser.add_argument("--processes", type=whole_number(1), default=1, help="that train a stage together (default: 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders (default: runs)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that keeps CIFAR-10")
    parser.add_argument("--from-assets", action="store_true", help="go on from assets/weights where there is no run")
    parser.add_argument("--report", action="store_true", help="train nothing; fill assets/ from the runs")
    options, more = parser.parse_known_args()
    try:
        if options.report:
            report(options, ROOT / "assets")
        else:
            train(options.stages, options, more)
    except UserError as error:
        sys.exit(f"train_chapter.py: error: {error}")
    finally:
        drop_what_nobody_takes()


if __name__ == "__main__":
    main()
