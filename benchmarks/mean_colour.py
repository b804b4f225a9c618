"""How much of the held-out loss is an error of the mean colour, for the weights in assets/weights.

    python benchmarks/mean_colour.py --stages A --data-dir data

The mean over an image's pixels is 3 of its 3,072 numbers. The noise's mean over 32 x 32 pixels has a variance of
1 / 1024, so a network that answers 0 for it has an error of about that. The last column has the exact number.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.throughput import STAGES, new_model
from common import checkpoint
from common.data import load_images
from common.errors import UserError
from common.loss import HELD_OUT_BLOCK, held_out_draws
from common.schedule import NoiseSchedule

ASSETS = Path(__file__).resolve().parent.parent / "assets"
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
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["A"])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that keeps CIFAR-10")
    options = parser.parse_args()
    try:
        images = load_images("cifar10", options.data_dir, train=False)
        print("| stage | time steps | loss | of the mean colour | share | guessed as 0 |")
        print("|---|---|---|---|---|---|")
        for letter in options.stages:
            name = STAGES[letter]
            model = new_model(letter).eval()
            model.load_state_dict(checkpoint.load(ASSETS / "weights" / f"{name}.pt", name, ema_only=True)["ema"])
            for number, (loss, part, nothing) in enumerate(errors_by_range(model, images).tolist()):
                steps = f"{number * 1000 // RANGES} to {(number + 1) * 1000 // RANGES - 1}"
                print(f"| {letter} | {steps} | {loss:.5f} | {part:.5f} | {part / loss:.0%} | {nothing:.5f} |")
    except UserError as error:
        sys.exit(f"mean_colour.py: error: {error}")


if __name__ == "__main__":
    main()
