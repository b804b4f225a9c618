"""How much of the held-out loss is an error of the mean colour.

    python benchmarks/mean_colour.py                                         # of the weights of stage A in assets/
    python benchmarks/mean_colour.py --checkpoint runs/chapter/checkpoint.pt # of a run, here with --norm-groups 16

The mean over an image's pixels is 3 of its 3,072 numbers. The noise's mean over 32 x 32 pixels has a variance of
1 / 1024, so a network that answers 0 for it has an error of about that. The last column has the exact number.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.throughput import STAGES
from common.diffusion import NoiseSchedule
from common.likelihood import HELD_OUT_BLOCK, held_out_draws
from common.run import checkpoint
from common.run.datasets import load_images
from common.run.errors import UserError
from common.run.models import build_model, saved_model_options
from common.run.options import Stage

RANGES = 10  # of the time steps


@torch.no_grad()
def errors_by_range(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Three means of squares for each range of the time steps: (RANGES, 3).

    Of the error of the predicted noise, of the error of its mean over the pixels, and of the noise's own mean over the
    pixels, which is what the second would be if it were always guessed as 0.

    Args:
        model: predicts noise.
        images: uint8 (N, 3, 32, 32), N a multiple of 1000, so that each time step is met equally often.
    """
    schedule = NoiseSchedule()
    totals = torch.zeros(RANGES, 3)
    for start in range(0, len(images), HELD_OUT_BLOCK):
        x0, t, noise = held_out_draws(images, start, schedule)
        error = model(schedule.add_noise(x0, t, noise), t) - noise  # (B, 3, 32, 32)
        colours = [z.mean(dim=(2, 3)).square().mean(dim=1) for z in (error, noise)]
        squares = torch.stack([error.square().mean(dim=(1, 2, 3)), *colours], dim=1)
        totals.index_add_(0, t * RANGES // schedule.steps, squares)
    return totals * RANGES / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default="A")
    parser.add_argument("--checkpoint", type=Path, help="of that stage (default: the weights in assets/weights)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that keeps CIFAR-10")
    options = parser.parse_args()
    stage: Stage = importlib.import_module(STAGES[options.stage]).stage
    path = options.checkpoint or stage.weights
    try:
        saved = checkpoint.load(path, stage.name, ema_only=True)
        images = load_images("cifar10", options.data_dir, train=False)
        model = build_model(stage, saved_model_options(stage, saved, path, {}), seed=0).eval()
        model.load_state_dict(saved["ema"])
        errors = errors_by_range(model, images)
    except UserError as error:
        sys.exit(f"mean_colour.py: error: {error}")
    print(f"{path}, after {saved['progress']['epoch']} epochs; loss {errors[:, 0].mean():.5f}\n")
    print("| time steps | loss | of the mean colour | share | guessed as 0 |\n|---|---|---|---|---|")
    for number, (loss, part, nothing) in enumerate(errors.tolist()):
        steps = f"{number * 1000 // RANGES} to {(number + 1) * 1000 // RANGES - 1}"
        print(f"| {steps} | {loss:.5f} | {part:.5f} | {part / loss:.0%} | {nothing:.5f} |")


if __name__ == "__main__":
    main()
