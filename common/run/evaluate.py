"""The command `eval`: the numbers of a trained model on held-out images, and its Fréchet inception distance."""

import argparse
import json
import math
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.data import to_float
from common.diffusion import NoisePredictor, NoiseSchedule, diffusion_loss
from common.likelihood import (
    HELD_OUT_BLOCK,
    Bound,
    held_out_draws,
    loss_by_quarter,
    mean_over_images,
    variational_bound,
)
from common.run import distributed
from common.run.checkpoint import atomic_write
from common.run.datasets import DATASETS, load_images
from common.run.device import in_precision
from common.run.errors import UsageError, UserError, counted, printable, say
from common.run.models import load_classifier, load_trained
from common.run.options import Stage
from common.run.own_images import check_place
from common.run.pictures import SAMPLERS, check_outputs
from common.run.test import draw

ENDINGS = {"--output": [".json"]}
INCEPTION = 2048  # torchmetrics' name for the 2048 features of Inception's last pooling layer

Report = dict[str, Any]


def evaluate(stage: Stage, options: argparse.Namespace, typed: Mapping[str, Any]) -> int:
    """Measures what a stage has learned. Returns the exit status."""
    steps = options.steps or SAMPLERS[options.sampler]
    if "fid_network" in typed and not options.fid:
        raise UsageError("argument --fid-network: requires --fid")
    if options.dataset not in (None, *DATASETS):
        distributed.on_first(lambda: check_place(options.dataset))
    check_outputs({"--output": options.output}, ENDINGS)
    trained = load_trained(stage, options, typed, HELD_OUT_BLOCK)
    output = options.output or trained.folder / "eval.json"
    check_outputs({"--output": output}, ENDINGS, trained.path)
    network = ClassifierFeatures(trained.device) if options.fid_network == "classifier" else INCEPTION
    fid_metric = new_fid(trained.device, network) if options.fid else None  # now, for it may be missing
    dataset = options.dataset or trained.dataset
    data = partial(load_images, dataset, options.data_dir, data_url=options.data_url)
    held_out = data(train=False)
    report: Report = {
        "stage": stage.name,
        "checkpoint": str(trained.path),
        "weights": options.weights,
        "epochs": trained.epochs,
        "steps": trained.steps,
        "dataset": dataset,
        "seed": options.seed,
        "device": str(trained.device),
        "precision": trained.precision,
        "torch": torch.__version__,
    }
    schedule = NoiseSchedule().to(trained.device)
    model = in_precision(trained.model, trained.precision)
    losses = measure_losses(model, schedule, repeated(held_out, schedule.steps), options.seed)
    loss, quarters = loss_by_quarter(losses, schedule.steps, len(held_out))
    report["loss"] = {**loss._asdict(), "quarters": [q._asdict() for q in quarters], "images": len(held_out)}
    images = held_out[: options.num_images]
    bound = measure_bound(model, schedule, images, exact=options.exact, seed=options.seed)
    report["bits_per_dim"] = {name: mean_over_images(bits)._asdict() for name, bits in bound.by_name().items()}
    report["bits_per_dim"] |= {"exact": options.exact, "images": len(images)}
    if fid_metric:
        samples, real = draw(trained, options, options.fid, steps), data(train=True)
        report["fid"] = {
            "value": fid(fid_metric, samples, real) if distributed.RANK == 0 else None,
            "network": options.fid_network,
            "samples": len(samples),
            "sampler": options.sampler,
            "sampling_steps": steps,
        }
    if distributed.RANK == 0:
        say(_table(report))
        with atomic_write(output) as file:
            file.write(json.dumps(report, indent=2).encode() + b"\n")
        say(f"{output}: the same and more")
    return 0


def _table(report: Report) -> str:
    loss, bits = report["loss"], report["bits_per_dim"]
    rows = [(f"loss ({loss['images']:,} images)", loss)]
    rows += [(f"loss, quarter {number} of the time steps", part) for number, part in enumerate(loss["quarters"], 1)]
    rows += [(f"bits/dim ({bits['images']:,} images)", bits["total"])]
    rows += [(f"bits/dim, {name}", bits[name]) for name in ("prior", "kl", "decoder")]
    lines = [
        f"{report['stage']}: {report['weights']} weights after {counted(report['epochs'], 'epoch')}, "
        f"{counted(report['steps'], 'step')} of training; "
        + printable("{dataset}; {device} in {precision}; seed {seed}".format(**report)),
        "| | mean | standard error |",
        "|---|---|---|",
        *(f"| {name} | {estimate['mean']:.5f} | {estimate['standard_error']:.5f} |" for name, estimate in rows),
    ]
    if "fid" in report:
        distance = report["fid"]
        name = {"inception": "FID", "classifier": "Fréchet classifier distance"}[distance["network"]]
        lines.append(f"| {name} ({distance['samples']:,} samples) | {distance['value']:.3f} | |")
    return "\n".join(lines)


# Fréchet inception distance


class ClassifierFeatures(nn.Module):
    """What the classifier of `test --label` sees in uint8 images (B, 3, 32, 32): their features, (B, 256)."""

    num_features = 256

    def __init__(self, device: torch.device):
        super().__init__()
        self.classifier = load_classifier(device)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(to_float(images), torch.zeros_like(images[:, 0, 0, 0], dtype=torch.int64))


def new_fid(device: torch.device, feature: Any = INCEPTION) -> Any:
    """torchmetrics' FrechetInceptionDistance, with the weights of its network.

    Args:
        feature: INCEPTION, or a network that maps uint8 (B, 3, 32, 32) to features (B, D).

    Raises:
        UserError: it is not installed, or its weights are neither here nor to be had.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature, sync_on_compute=False)
    except ImportError as error:  # of torchmetrics, or of torch-fidelity, which it imports
        install = 'install it with: python -m pip install "torchmetrics[image]"'
        raise UserError(f"argument --fid: this requires the package torchmetrics[image]; {install}") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"argument --fid: the weights of the Inception network could not be fetched ({reason}); connect to the "
            "network, or put the file that torch-fidelity names into ~/.cache/torch/hub/checkpoints"
        ) from error
    return metric.to(device if device.type != "mps" else "cpu")  # mps has no float64


def fid(metric: Any, samples: Tensor, images: Tensor) -> float:
    """Fréchet inception distance (arXiv:1706.08500) of samples from images, uint8 (N, 3, 32, 32) each, N >= 2."""
    for pictures, real in ((images, True), (samples, False)):
        blocks = pictures.split(HELD_OUT_BLOCK)
        for block in tqdm(blocks, desc="features", unit=" blocks", disable=distributed.hides_bars()):
            metric.update(block.to(metric.device), real=real)
    return float(metric.compute())


# Block by block: what likelihood.py measures, of many images, by all processes together


def repeated(images: Tensor, steps: int) -> Tensor:
    """Held-out images (N, ...), repeated up to a multiple of `steps`, so that each time step is met equally often.

    It is the first multiple that is at least N and at least twice `steps`, so that each is met at least twice.
    """
    number = torch.arange(steps * max(2, math.ceil(len(images) / steps)))
    shift = number // math.lcm(len(images), steps)  # by one where an image would meet the same time step again
    return images[(number + shift) % len(images)]


def measure_losses(model: NoisePredictor, schedule: NoiseSchedule, images: Tensor, seed: int = 0) -> Tensor:
    """The noise-prediction loss (eq. 14 of DDPM) of each of `likelihood.held_out_draws`, float64 (N,)."""

    def losses_of_block(start: int) -> Tensor:
        return diffusion_loss(model, schedule, *held_out_draws(images, start, schedule, seed))

    return _block_by_block("loss", len(images), losses_of_block)


def measure_bound(
    model: NoisePredictor, schedule: NoiseSchedule, images: Tensor, *, exact: bool = False, seed: int = 0
) -> Bound:
    """`likelihood.variational_bound` of all blocks of the images, float64 (N,) each."""

    def bound_of_block(start: int) -> Tensor:
        return torch.stack(variational_bound(model, schedule, images, start, exact=exact, seed=seed), dim=1)

    return Bound(*_block_by_block("bound", len(images), bound_of_block).unbind(1))


@torch.no_grad()
def _block_by_block(description: str, num_images: int, values_of_block: Callable[[int], Tensor]) -> Tensor:
    """What the function returns for the number of each block's first image, joined together as float64 on the CPU.

    Several processes, which must all call this, share the blocks out.
    """
    starts = range(0, num_images, HELD_OUT_BLOCK)[distributed.RANK :: distributed.WORLD_SIZE]
    total = sum(min(HELD_OUT_BLOCK, num_images - start) for start in starts)
    values = {}
    with tqdm(total=total, desc=description, unit=" images", disable=distributed.hides_bars(), leave=None) as bar:
        for start in starts:
            values[start] = values_of_block(start).cpu().double()
            bar.update(len(values[start]))
    return torch.cat([*distributed.merged(values).values()])
