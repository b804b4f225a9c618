"""DDPM's simple loss, and the draws with which it is measured on held-out images."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.data import random_generator, to_float
from common.schedule import NoiseSchedule

HELD_OUT_BLOCK = 250  # held-out images that go through the model at a time


def diffusion_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    bf16: bool = False,
) -> Tensor:
    """DDPM's simple loss (eq. 14): how far the predicted noise is from the noise, squared, averaged over an image.

    Args:
        x0, noise: float32 (B, C, H, W).
        t: int64 (B,).
        bf16: run the model under bfloat16 autocast; noising and loss stay in float32.

    Returns:
        float32 (B,), one for each image.
    """
    xt = schedule.add_noise(x0, t, noise)
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
        pred_noise = model(xt, t)
    return (pred_noise.float() - noise).square().mean(dim=(1, 2, 3))


def held_out_draws(images: Tensor, start: int, schedule: NoiseSchedule, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The block of held-out images that begins at number `start`, with time steps and noise that are always the same.

    Image i is noised to time step i modulo `schedule.steps`, so that every time step is met equally often. The noise
    is drawn on the CPU, so that all models, on all devices, are measured on the same one.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        x0, float32 (B, C, H, W); t, int64 (B,); noise, like x0; on the schedule's device. B is HELD_OUT_BLOCK or less.
    """
    device = schedule.beta.device
    x0 = to_float(images[start : start + HELD_OUT_BLOCK].to(device))
    t = torch.arange(start, start + len(x0), device=device) % schedule.steps
    noise = torch.randn(x0.shape, generator=random_generator("cpu", seed, "held-out", start))
    return x0, t, noise.to(device)
