"""Makes what lies in assets/ from the runs: weights, numbers, and the pictures that README.md shows.

    python benchmarks/make_assets.py --runs-dir runs

It prints README's table of results. A stage without a run, or whose run lacks what `python part_x.py test` and
`python part_x.py eval` leave there, keeps what is in assets/, and is left out of the pictures that compare stages if
there is nothing. The picture of a stage's progress takes a run with `train --sample-every 1`. The film is drawn by

    python part_g_cifar.py test --pretrained --num-images 16 --film assets/denoising.webp --output film.png
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.throughput import SCHEDULE_STEPS, STAGES, flops_per_image, new_model
from common import checkpoint
from common.data import random_generator, to_float, to_uint8
from common.errors import UserError
from common.schedule import NoiseSchedule
from common.shapes import draw_shapes

GRIDS = {
    "F": "part-f-cifar-aug-output.png",
    "G": "part-g-cifar-attn-output.png",
}
IDEAS = ("16 channels, ReLU", "32 channels", "SiLU", "all skips", "deeper", "flips", "attention")
GRID_SIZE = (274, 274)  # of 8 x 8 pictures of 32 x 32 pixels, with 2 pixels around each
ROW = (0, 0, 274, 36)  # the first eight pictures of such a grid
TIMES = (0, 50, 100, 200, 300, 450, 600, 999)


def grid_name(letter: str) -> str:
    return GRIDS.get(letter, f"{STAGES[letter].replace('_', '-')}-output.png")


def read_log(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def picture_rows(rows: list[tuple[str, Path]], path: Path) -> None:
    """One row of eight pictures, the first of a grid, for each (label, grid)."""
    figure = Figure(figsize=(8, 0.9 * len(rows)), dpi=120)
    room = {"left": 0.2, "right": 1, "bottom": 0, "top": 1, "hspace": 0}  # for the labels, on the left
    for axes, (label, grid) in zip(figure.subplots(len(rows), squeeze=False, gridspec_kw=room)[:, 0], rows):
        with Image.open(grid) as image:
            axes.imshow(image.crop(ROW).resize((3 * ROW[2], 3 * ROW[3]), Image.Resampling.NEAREST))
        axes.set(xticks=[], yticks=[], anchor="E")
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        for spine in axes.spines.values():
            spine.set_visible(False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path)
    print(path)


def weights_and_grid(letter: str, run_dir: Path, assets: Path) -> None:
    """What a run has learned, what it draws, and how it got there."""
    saved = checkpoint.load(run_dir / "checkpoint.pt", STAGES[letter])
    path = assets / "weights" / f"{STAGES[letter]}.pt"
    checkpoint.save_weights(path, saved)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, after {saved['progress']['epoch']} epochs")
    with Image.open(run_dir / "samples.png") as image:
        if image.size != GRID_SIZE:
            raise UserError(f"{run_dir / 'samples.png'}: not a grid of 64 pictures; draw it by `test` alone")
    shutil.copy(run_dir / "samples.png", assets / grid_name(letter))
    shutil.copy(run_dir / "log.csv", assets / "logs" / f"{STAGES[letter]}.csv")


def numbers(letter: str, run_dir: Path, assets: Path) -> None:
    """What `eval` has measured, less where on this machine it did."""
    path = run_dir / "eval.json"
    report = json.loads(path.read_text())
    measured = {"steps": report["steps"], "weights": report["weights"]}
    shown = checkpoint.load(assets / "weights" / f"{STAGES[letter]}.pt", STAGES[letter], ema_only=True)["progress"]
    if measured != {"steps": shown["step"], "weights": "ema"}:
        raise UserError(f"{path}: of {measured}, but the weights are averaged ones of step {shown['step']}; run `eval`")
    del report["checkpoint"]
    (assets / "logs" / f"{STAGES[letter]}.json").write_text(json.dumps(report, indent=2) + "\n")


def results_table(assets: Path) -> str:
    """README's table of results, a row for each stage, from what lies in assets/logs."""
    lines = [
        "| stage | idea | parameters | GFLOP per image | epochs | minutes | held-out loss | bits/dim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (letter, name), idea in zip(STAGES.items(), IDEAS):
        parameters = sum(p.numel() for p in new_model(letter).parameters())
        gflop = flops_per_image(letter, "sample") / SCHEDULE_STEPS / 1e9
        cells = [f"[{letter}]({name}.py)", idea, f"{parameters:,}", f"{gflop:.2f}"]
        path = assets / "logs" / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text())
            loss, bits = report["loss"], report["bits_per_dim"]["total"]
            minutes = sum(row["seconds"] for row in read_log(path.with_suffix(".csv"))) / 60
            cells += [str(report["epochs"]), f"{minutes:.0f}"]
            cells += [f"{loss['mean']:.4f} ± {loss['standard_error']:.4f}"]
            cells += [f"{bits['mean']:.2f} ± {bits['standard_error']:.2f}"]
        else:
            cells += ["not trained yet", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ladder(letters: list[str], assets: Path) -> None:
    """A row of pictures for each stage, from the same eight noises."""
    rows = [(f"{letter}  {IDEAS[list(STAGES).index(letter)]}", assets / grid_name(letter)) for letter in letters]
    picture_rows(rows, assets / "ladder.png")


def losses(letters: list[str], assets: Path) -> None:
    """Held-out loss against the epoch."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for letter in letters:
        rows = read_log(assets / "logs" / f"{STAGES[letter]}.csv")
        label = f"{letter}  {IDEAS[list(STAGES).index(letter)]}"
        axes.plot([row["epoch"] for row in rows], [row["held_out_loss"] for row in rows], ".-", label=label)
    axes.set(xlabel="epoch", ylabel="held-out loss of the averaged weights", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(ScalarFormatter())
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    save(figure, assets / "losses.png")


def progress(letter: str, run_dir: Path, assets: Path) -> None:
    """What one stage draws from the same noise, epoch after epoch, with its losses."""
    rows = []
    for row in read_log(run_dir / "log.csv"):
        grid = run_dir / "samples" / f"epoch-{int(row['epoch']):04d}.png"
        if grid.exists():
            rows.append((f"epoch {int(row['epoch'])}\nloss {row['held_out_loss']:.4f}", grid))
    if len(rows) > 1:
        picture_rows(rows, assets / "progress.png")


def forward_noising(assets: Path) -> None:
    """What the forward process makes of three drawn shapes; the columns are the time steps of TIMES."""
    x0 = to_float(torch.from_numpy(draw_shapes(3)))
    noise = torch.randn(x0.shape, generator=random_generator("cpu", 0, "forward noising", 0))
    schedule = NoiseSchedule()
    columns = [to_uint8(schedule.add_noise(x0, torch.full((3,), t), noise)) for t in TIMES]
    images = torch.stack(columns, dim=1).flatten(0, 1)  # (3 * times, 3, 32, 32), row by row
    figure = Figure(figsize=(8, 3.3), dpi=120, layout="constrained")
    for number, (axes, image) in enumerate(zip(figure.subplots(3, len(TIMES)).flat, images)):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set(xticks=[], yticks=[])
        if number < len(TIMES):
            axes.set_title(f"t = {TIMES[number]}", fontsize=9)
    save(figure, assets / "forward-noising.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder of the stages' run folders")
    parser.add_argument("--assets-dir", type=Path, default=Path("assets"), help="folder to write to")
    parser.add_argument("--progress-of", choices=STAGES, default="G", help="stage whose epochs progress.png shows")
    options = parser.parse_args()
    assets = options.assets_dir
    for folder in (assets / "weights", assets / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        for letter, name in STAGES.items():
            if (options.runs_dir / name / "samples.png").exists():
                weights_and_grid(letter, options.runs_dir / name, assets)
            if (options.runs_dir / name / "eval.json").exists():
                numbers(letter, options.runs_dir / name, assets)
        if (options.runs_dir / STAGES[options.progress_of] / "log.csv").exists():
            progress(options.progress_of, options.runs_dir / STAGES[options.progress_of], assets)
    except UserError as error:
        sys.exit(f"make_assets.py: error: {error}")
    letters = [letter for letter in STAGES if (assets / grid_name(letter)).exists()]
    if letters:
        ladder(letters, assets)
        losses(letters, assets)
    forward_noising(assets)
    print(results_table(assets))


if __name__ == "__main__":
    main()
