"""Numbers for a trained model: its held-out loss, its bits per dimension, its Fréchet inception distance."""

import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.special import log_ndtr
from tqdm import tqdm

from common import distributed
from common.data import random_generator
from common.errors import UserError
from common.loss import HELD_OUT_BLOCK, diffusion_loss, held_out_draws
from common.sampling import NoisePredictor
from common.schedule import NoiseSchedule

LEVEL = 2 / 255  # from one level of 8-bit colour to the next, in images that go from -1 to 1


class Estimate(NamedTuple):
    """A mean, and how far it may be off."""

    mean: float
    standard_error: float


# The noise-prediction loss


def held_out_losses(model: NoisePredictor, schedule: NoiseSchedule, images: Tensor, seed: int = 0) -> Tensor:
    """The noise-prediction loss (eq. 14 of DDPM) of each image, at one time step each, with draws that never change.

    Args:
        images: uint8 (N, 3, 32, 32).
        seed: of the noise.

    Returns:
        float64 (N,); image i is measured at time step i modulo `schedule.steps`.
    """

    def losses_of_block(start: int, model: NoisePredictor) -> Tensor:
        x0, t, noise = held_out_draws(images, start, schedule, seed)
        return diffusion_loss(model, schedule, x0, t, noise)

    return _block_by_block("loss", model, len(images), 1, losses_of_block)


def stratified_mean(values: Tensor) -> Estimate:
    """The mean of values (R, S) of which each of the S columns, one a time step, holds R independent ones.

    That every time step is met equally often makes the mean surer than that of as many values at random time steps.
    """
    rounds, strata = values.shape
    variance_of_means = values.var(dim=0) / rounds  # of each column, (S,)
    return Estimate(values.mean().item(), variance_of_means.sum().sqrt().item() / strata)


def loss_by_quarter(losses: Tensor, steps: int) -> tuple[Estimate, list[Estimate]]:
    """Mean loss over all time steps, and over each quarter of their range.

    Args:
        losses: of `held_out_losses`, (N,), N a multiple of `steps`, at least twice that.
        steps: the schedule's, a multiple of 4.

    Raises:
        ValueError: N is none of those.
    """
    if len(losses) % steps or len(losses) < 2 * steps:
        raise ValueError(f"held-out images: must be a multiple of {steps}, at least {2 * steps}; got {len(losses)}")
    by_time = losses.view(-1, steps)
    return stratified_mean(by_time), [stratified_mean(quarter) for quarter in by_time.chunk(4, dim=1)]


# Bits per dimension


class Bound(NamedTuple):
    """The parts of the variational bound, in bits per dimension, one value an image."""

    prior: Tensor  # what the last time step still tells of the image
    kl: Tensor  # of the steps between, 999 of them
    decoder: Tensor  # of the last step, which ends in 8-bit colours

    def by_name(self) -> dict[str, Tensor]:
        """The parts, and their total."""
        return {"total": self.prior + self.kl + self.decoder, **self._asdict()}


@torch.no_grad()
def variational_bound(
    model: NoisePredictor, schedule: NoiseSchedule, images: Tensor, *, exact: bool = False, seed: int = 0
) -> Bound:
    """The bound on each image's negative log-likelihood (eq. 5 of DDPM) under what `sampling.ddpm` draws.

    The reverse steps are those of the sampler: x0 is clipped, the variance is the posterior's; that of the last step,
    where the posterior has none, is that of the step before.

    Args:
        model: predicts noise.
        images: uint8 (N, 3, 32, 32).
        exact: sum up all KL terms. Otherwise each image gets an unbiased estimate of the sum: one term, at a random
            time step, from each of the ranges 1, 2 to 3, 4 to 7, ... of time steps, times the length of the range.
        seed: of the noise and of those time steps.

    Returns:
        float64 (N,) each.
    """
    ranges = [(t, t + 1) for t in range(1, schedule.steps)] if exact else _doubling_ranges(schedule.steps)

    def bound_of_block(start: int, model: NoisePredictor) -> Tensor:
        x0, t, noise = held_out_draws(images, start, schedule, seed)
        generator = random_generator("cpu", seed, "bound", start)
        kl = torch.zeros(len(x0), dtype=torch.float64)
        for first, end in ranges:
            t = torch.randint(first, end, t.shape, generator=generator).to(x0.device)
            step_noise = torch.randn(x0.shape, generator=generator).to(x0.device)
            kl += (end - first) * kl_term(model, schedule, x0, t, step_noise)
        nats = torch.stack([prior_term(schedule, x0), kl, decoder_term(model, schedule, x0, noise)], dim=1)
        return nats / (x0[0].numel() * math.log(2))

    return Bound(*_block_by_block("bound", model, len(images), len(ranges) + 1, bound_of_block).unbind(1))


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """KL of q(x_T | x0) from the standard normal distribution, in nats, float64 (B,). x0: (B, C, H, W)."""
    last = schedule.alpha_bar[-1].cpu().double()  # in this order, for not every GPU has float64
    kl = (last * x0.cpu().double().square() - last - torch.log1p(-last)) / 2
    return kl.sum(dim=(1, 2, 3))


def kl_term(model: NoisePredictor, schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """KL of the posterior q(x_{t-1} | x_t, x0) from the model's p(x_{t-1} | x_t), which has the same variance.

    Args:
        x0, noise: (B, C, H, W).
        t: int64 (B,), 1 or more.

    Returns:
        nats, float64 (B,).
    """
    xt = schedule.add_noise(x0, t, noise)
    mean, variance = schedule.posterior(x0, xt, t)
    model_mean, _ = schedule.posterior(_clipped_x0(model, schedule, xt, t), xt, t)
    return ((mean - model_mean).square() / (2 * variance)).sum(dim=(1, 2, 3)).cpu().double()


def decoder_term(model: NoisePredictor, schedule: NoiseSchedule, x0: Tensor, noise: Tensor) -> Tensor:
    """-log p(x0 | x_t) at t = 0, where p is a normal distribution cut into 256 levels (eq. 13 of DDPM).

    Args:
        x0: (B, C, H, W), with the values k / 127.5 - 1.
        noise: (B, C, H, W).

    Returns:
        nats, float64 (B,).
    """
    t = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    xt = schedule.add_noise(x0, t, noise)
    _, variance = schedule.posterior(x0, xt, t + 1)
    mean = _clipped_x0(model, schedule, xt, t)
    x0, mean, deviation = (x.cpu().double() for x in (x0, mean, variance.sqrt()))
    lower = torch.where(x0 < -1 + LEVEL / 2, -math.inf, (x0 - LEVEL / 2 - mean) / deviation)
    upper = torch.where(x0 > 1 - LEVEL / 2, math.inf, (x0 + LEVEL / 2 - mean) / deviation)
    return -_log_normal_mass(lower, upper).sum(dim=(1, 2, 3))


def mean_over_images(values: Tensor) -> Estimate:
    """The mean of values (N,), one an image, with its standard error."""
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def _clipped_x0(model: NoisePredictor, schedule: NoiseSchedule, xt: Tensor, t: Tensor) -> Tensor:
    return schedule.estimate_x0(xt, t, model(xt, t)).clamp(-1, 1)


def _log_normal_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """Log of the standard normal mass between two bounds; not by subtracting numbers near 1."""
    mirrored = lower > 0
    lower, upper = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    return log_ndtr(upper) + torch.log1p(-torch.exp(log_ndtr(lower) - log_ndtr(upper)))


def _doubling_ranges(steps: int) -> list[tuple[int, int]]:
    starts = [2**k for k in range(steps.bit_length()) if 2**k < steps]
    return list(zip(starts, [*starts[1:], steps]))


# Fréchet inception distance


def new_fid(device: torch.device, feature: Any = 2048) -> Any:
    """torchmetrics' FrechetInceptionDistance, with the weights of its network.

    Args:
        feature: 2048, the network's last layer, or a network that maps uint8 (B, 3, 32, 32) to features (B, D).

    Raises:
        UserError: it is not installed, or its weights are neither here nor to be had.
    """
    install = 'install it with: python -m pip install "torchmetrics[image]"'
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise UserError(f"argument --fid: this takes the package torchmetrics; {install}") from error
    try:
        metric = FrechetInceptionDistance(feature, sync_on_compute=False)
    except ModuleNotFoundError as error:
        raise UserError(f"argument --fid: torchmetrics lacks the package torch-fidelity; {install}") from error
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
        for block in tqdm(pictures.split(HELD_OUT_BLOCK), desc="features", unit=" blocks", disable=None):
            metric.update(block.to(metric.device), real=real)
    return float(metric.compute())


def _block_by_block(
    description: str,
    model: NoisePredictor,
    num_images: int,
    passes: int,
    values_of_block: Callable[[int, NoisePredictor], Tensor],
) -> Tensor:
    """What the function returns for the number of each block's first image, joined together as float64 on the CPU.

    Several processes, which must all call this, share the blocks out. A bar shows how often the model was asked:
    `passes` times for each image.
    """
    starts = range(0, num_images, HELD_OUT_BLOCK)[distributed.RANK :: distributed.WORLD_SIZE]
    total = sum(min(HELD_OUT_BLOCK, num_images - start) for start in starts) * passes
    hide = None if distributed.RANK == 0 else True  # None: where stderr is no terminal
    with torch.no_grad(), tqdm(total=total, desc=description, unit=" images", disable=hide) as bar:

        def counted(xt: Tensor, t: Tensor) -> Tensor:
            bar.update(len(xt))
            return model(xt, t)

        values = {start: values_of_block(start, counted).cpu().double() for start in starts}
    for others in distributed.gather(values):
        values |= others
    return torch.cat([values[start] for start in sorted(values)])
