"""Trains the classifier of `test --label`, ten minutes on 2 cores, and prints its accuracy at seven noise levels.

python benchmarks/train_classifier.py    # writes assets/weights/classifier.pt
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.data import random_hflip, seed_everything, to_float
from common.diffusion import NoiseSchedule
from common.guidance import Classifier
from common.run.checkpoint import atomic_write
from common.run.datasets import load_cifar10
from common.run.device import autocast, keep_freed_memory, pick_device, pick_precision
from common.run.errors import UserError
from common.run.models import CLASSIFIER
from common.run.options import whole_number

BATCH_SIZE = 128


def load(data_dir: Path, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """CIFAR-10's images, uint8 (N, 3, 32, 32), and their classes, int64 (N,)."""
    data = load_cifar10(data_dir, train)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).to(device), torch.tensor(data.targets, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that keeps CIFAR-10")
    parser.add_argument("--output", type=Path, default=CLASSIFIER, help="file to write")
    parser.add_argument("--steps", type=whole_number(1), default=3000, help="of 128 images each (default: 3000)")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    keep_freed_memory()
    device = pick_device("auto")
    precision = pick_precision("auto", device).replace("fp16", "fp32")  # fp16 would need scaled gradients
    try:
        images, labels = load(options.data_dir, train=True, device=device)
    except UserError as error:
        sys.exit(f"train_classifier.py: error: {error}")
    seed_everything(0)
    classifier, schedule = Classifier().to(device), NoiseSchedule().to(device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3, fused=True)
    learning_rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in trange(options.steps):
        index = torch.randint(len(images), (BATCH_SIZE,), device=device)
        x0 = random_hflip(to_float(images[index]))
        t = torch.randint(schedule.steps, (BATCH_SIZE,), device=device)
        xt = schedule.add_noise(x0, t, torch.randn_like(x0))
        with autocast(device, precision):
            log_p = classifier(xt, t)
        loss = torch.nn.functional.nll_loss(log_p.float(), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()
    with atomic_write(options.output) as file:
        torch.save({name: weight.half() for name, weight in classifier.state_dict().items()}, file)

    images, labels = load(options.data_dir, train=False, device=device)
    x0 = to_float(images)
    for step in (0, 100, 200, 300, 450, 600, 800):
        t = torch.full((len(x0),), step, device=device)
        xt = schedule.add_noise(x0, t, torch.randn_like(x0))
        with torch.no_grad(), autocast(device, precision):
            guesses = torch.cat([classifier(*batch).argmax(dim=1) for batch in zip(xt.split(1000), t.split(1000))])
        print(f"t = {step}: {(guesses == labels).float().mean():.1%} of the test images recognised")
    print(options.output)


if __name__ == "__main__":
    main()
