"""Numbers for a trained model: its held-out loss by time step, and its bits per dimension.

Held-out images are measured in blocks, always with the same noise, so that two models are compared like with like. The
held-out loss is `diffusion.diffusion_loss` on `held_out_draws`; the command `eval` runs both measures block by block.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import log_ndtr

from common.data import random_generator, to_float
from common.diffusion import NoisePredictor, NoiseSchedule, clipped_x0

HELD_OUT_BLOCK = 250  # held-out images that go through the model at a time

LEVEL = 2 / 255  # from one level of 8-bit colour to the next, in images that go from -1 to 1


class Estimate(NamedTuple):
    """A mean, and how far it may be off."""

    mean: float
    standard_error: float


# The noise-prediction loss


def held_out_draws(images: Tensor, start: int, schedule: NoiseSchedule, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A block of held-out images, with time steps and noise that are always the same.

    Image i is noised to time step i modulo `schedule.steps`, so that every time step is met equally often. The noise
    is drawn on the CPU, so that all models, on all devices, are measured on the same one.

    Args:
        images: uint8 (N, C, H, W), all of them.
        start: number of the block's first image, a multiple of HELD_OUT_BLOCK.

    Returns:
        x0, float32 (B, C, H, W); t, int64 (B,); noise, like x0; on the schedule's device. B is HELD_OUT_BLOCK or less.
    """
    device = schedule.beta.device
    x0 = to_float(images[start : start + HELD_OUT_BLOCK].to(device))
    t = torch.arange(start, start + len(x0), device=device) % schedule.steps
    noise = torch.randn(x0.shape, generator=random_generator("cpu", seed, "held-out", start))
    return x0, t, noise.to(device)


def stratified_mean(values: Tensor) -> Estimate:
    """The mean of a table (R, S): one column for each time step, R independent measurements in each.

    Its standard error comes from the spread within columns alone, so it is smaller than with random time steps.
    """
    rounds, strata = values.shape
    variance_of_means = values.var(dim=0) / rounds  # of each column, (S,)
    return Estimate(values.mean().item(), variance_of_means.sum().sqrt().item() / strata)


def loss_by_quarter(losses: Tensor, steps: int, num_images: int | None = None) -> tuple[Estimate, list[Estimate]]:
    """Mean loss over all time steps, and over each quarter of their range.

    Args:
        losses: of `held_out_draws`, in their order, (N,), N a multiple of `steps`, at least twice that.
        num_images: how many of the images are different, by default all N. Measuring an image again tells little new,
            so the standard errors are as if each had been measured once: rather too large.
    """
    if len(losses) % steps or len(losses) < 2 * steps:
        raise ValueError(f"held-out images: must be a multiple of {steps}, at least {2 * steps}; got {len(losses)}")
    by_time = losses.view(-1, steps)
    error_scale = math.sqrt(len(losses) / (num_images or len(losses)))
    estimates = [stratified_mean(part) for part in (by_time, *by_time.chunk(4, dim=1))]
    loss, *quarters = [Estimate(mean, error * error_scale) for mean, error in estimates]
    return loss, quarters


def mean_over_images(values: Tensor) -> Estimate:
    """The mean of values (N,), one per image, with its standard error."""
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))


# Bits per dimension


class Bound(NamedTuple):
    """The parts of the variational bound, in bits per dimension, one value per image.

    It adds up what it costs to store x_T, then each step back from it, and at last the colours.
    """

    prior: Tensor  # what the noisiest time step still tells of the image
    kl: Tensor  # the sum of the KL terms of t = 1 to the noisiest step
    decoder: Tensor  # t = 0: -log p of the image in 8-bit colours

    def by_name(self) -> dict[str, Tensor]:
        """The parts, and their total."""
        return {"total": self.prior + self.kl + self.decoder, **self._asdict()}


@torch.no_grad()
def variational_bound(
    model: NoisePredictor, schedule: NoiseSchedule, images: Tensor, start: int = 0, exact: bool = False, seed: int = 0
) -> Bound:
    """The bound on the negative log-likelihood (eq. 5 of DDPM) of a block of images, under `diffusion.ddpm`.

    The reverse steps are the sampler's: x0 clipped, the posterior's variance. At t = 0 that is 0, so the one of t = 1
    takes its place.

    Args:
        images, start: as of `held_out_draws`.
        exact: sum up all KL terms. Otherwise each image gets an unbiased estimate of the sum: one term, at a random
            time step, from each of the ranges 1, 2 to 3, 4 to 7, ... of time steps, times the length of the range.
        seed: of the noise and of those time steps.

    Returns:
        float64 (B,) each, B up to HELD_OUT_BLOCK.
    """
    x0, _, decoder_noise = held_out_draws(images, start, schedule, seed)
    generator = random_generator("cpu", seed, "bound", start)
    kl = torch.zeros(len(x0), dtype=torch.float64)
    for first, end in kl_ranges(schedule.steps, exact):
        t = torch.randint(first, end, (len(x0),), generator=generator).to(x0.device)
        step_noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        kl += (end - first) * kl_term(model, schedule, x0, t, step_noise)
    nats = prior_term(schedule, x0), kl, decoder_term(model, schedule, x0, decoder_noise)
    return Bound(*(part / (x0[0].numel() * math.log(2)) for part in nats))


def kl_ranges(steps: int, exact: bool) -> list[tuple[int, int]]:
    """The ranges of time steps, `end` excluded, from each of which `variational_bound` takes one KL term.

    They double in length, for the terms are largest and change fastest where t is small.
    """
    if exact:
        return [(t, t + 1) for t in range(1, steps)]
    starts = [2**k for k in range(steps.bit_length()) if 2**k < steps]
    return list(zip(starts, [*starts[1:], steps]))


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """KL of q(x_T | x0) from the standard normal distribution, in nats, float64 (B,). x0: (B, C, H, W).

    That of N(m, v) is (m^2 + v - 1 - log v) / 2.
    """
    alpha_bar = schedule.alpha_bar[-1].cpu().double()  # to the CPU first: not every GPU has float64
    kl = (alpha_bar * x0.cpu().double().square() - alpha_bar - torch.log1p(-alpha_bar)) / 2
    return kl.sum(dim=(1, 2, 3))


def kl_term(model: NoisePredictor, schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """KL of q(x_{t-1} | x_t, x0) from the model's p(x_{t-1} | x_t), same variance, in nats, float64 (B,); t >= 1."""
    xt = schedule.add_noise(x0, t, noise)
    mean, variance = schedule.posterior(x0, xt, t)
    model_mean, _ = schedule.posterior(clipped_x0(model, schedule, xt, t), xt, t)
    return ((mean - model_mean).square() / (2 * variance)).sum(dim=(1, 2, 3)).cpu().double()


def decoder_term(model: NoisePredictor, schedule: NoiseSchedule, x0: Tensor, noise: Tensor) -> Tensor:
    """-log p(x0 | x_t) at t = 0, p a normal distribution cut into 256 levels (DDPM's eq. 13), in nats, float64 (B,)."""
    t = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    xt = schedule.add_noise(x0, t, noise)
    _, variance = schedule.posterior(x0, xt, t + 1)  # at t = 0 it would be 0; the posterior's mean there is x0
    mean = clipped_x0(model, schedule, xt, t)
    x0, mean, deviation = (x.cpu().double() for x in (x0, mean, variance.sqrt()))
    lower = torch.where(x0 < -1 + LEVEL / 2, -math.inf, (x0 - LEVEL / 2 - mean) / deviation)
    upper = torch.where(x0 > 1 - LEVEL / 2, math.inf, (x0 + LEVEL / 2 - mean) / deviation)
    return -_log_normal_mass(lower, upper).sum(dim=(1, 2, 3))


def _log_normal_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """Log of the standard normal mass between two bounds, mirrored to where log_ndtr is accurate: below 0."""
    mirrored = lower > 0
    lower, upper = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    return log_ndtr(upper) + torch.log1p(-torch.exp(log_ndtr(lower) - log_ndtr(upper)))
