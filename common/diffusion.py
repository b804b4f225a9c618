"""The theory on one page: noise goes in, the network predicts it, noise goes out (DDPM, arXiv:2006.11239).

Images are float32 (B, C, H, W), clean ones in [-1, 1]. A time step `t` is an int64 tensor (B,) with 0 <= t < steps.
Numbers of equations are the paper's; docs/theory.md explains them.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

NoisePredictor = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W) and t (B,) -> the noise in x_t, like x_t


class NoiseSchedule(nn.Module):
    """How much noise each time step adds, and what follows from it in closed form.

    Steps are counted from 0, in the paper from 1: our t is its t - 1. `x0` is always the clean image, as in the paper;
    x_t at t = 0 has been noised once, and x_{t-1} at t = 0 is the clean image. All constants are computed in float64
    and kept in float32.

    Args:
        steps: T, the number of noising steps.
        beta_start, beta_end: variance of the noise that the first and the last step add, linear between.
        beta: if given, the variances of all steps, float64 (steps,), in place of the line.
    """

    beta: Tensor  # variance of the noise that step t adds
    alpha: Tensor  # 1 - beta
    alpha_bar: Tensor  # product of alpha[0..t]: the share of the image's variance left in x_t
    image_scale: Tensor  # sqrt(alpha_bar)
    noise_scale: Tensor  # sqrt(1 - alpha_bar), the noise's standard deviation in x_t

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, beta: Tensor | None = None):
        super().__init__()
        if beta is None:
            beta = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        self.steps = len(beta)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        alpha_bar_prev = _previous(alpha_bar)
        self._exact_alpha_bar = alpha_bar  # float64, on the CPU, because not every device has float64
        constants = {
            "beta": beta,
            "alpha": alpha,
            "alpha_bar": alpha_bar,
            # Computed here, not from the rounded alpha_bar: 1 - alpha_bar would be off by up to 0.03 % at t = 0.
            "image_scale": alpha_bar.sqrt(),
            "noise_scale": (1 - alpha_bar).sqrt(),
            "posterior_x0_scale": beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            "posterior_xt_scale": (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar),
            "posterior_variance": beta * (1 - alpha_bar_prev) / (1 - alpha_bar),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    def strided(self, times: Sequence[int]) -> "NoiseSchedule":
        """The same noising process in fewer, larger steps: step i of it has the alpha_bar of step `times[i]` here.

        `times` must ascend. The new alpha is the quotient of neighbouring alpha_bar (Improved DDPM, arXiv:2102.09672,
        section 4).
        """
        alpha_bar = self._exact_alpha_bar[list(times)]
        return NoiseSchedule(beta=1 - alpha_bar / _previous(alpha_bar)).to(self.beta.device)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t drawn from q(x_t | x0) in one go (eq. 4), with the standard normal `noise` (B, C, H, W)."""
        return self._at("image_scale", t) * x0 + self._at("noise_scale", t) * noise

    def estimate_x0(self, xt: Tensor, t: Tensor, pred_noise: Tensor) -> Tensor:
        """The x0 which the predicted noise implies: `add_noise` solved for x0 (eq. 15). Not clipped."""
        return (xt - self._at("noise_scale", t) * pred_noise) / self._at("image_scale", t)

    def implied_noise(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise that leads from x0 to x_t: `add_noise` solved for the noise."""
        return (xt - self._at("image_scale", t) * x0) / self._at("noise_scale", t)

    def posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x0) (eqs. 6, 7), the latter 0 at t = 0."""
        mean = self._at("posterior_x0_scale", t) * x0 + self._at("posterior_xt_scale", t) * xt
        return mean, self._at("posterior_variance", t)

    def _at(self, constant: str, t: Tensor) -> Tensor:
        """A constant at each image's time step, (B,) -> (B, 1, 1, 1), to be multiplied with images."""
        return self.get_buffer(constant)[t][:, None, None, None]


def _previous(alpha_bar: Tensor) -> Tensor:
    """alpha_bar of the step before each, which is 1 before the first."""
    return torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


def diffusion_loss(model: NoisePredictor, schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """DDPM's simple loss (eq. 14): the squared error of the predicted noise, averaged over each image, (B,)."""
    xt = schedule.add_noise(x0, t, noise)
    pred_noise = model(xt, t)
    return (pred_noise - noise).square().mean(dim=(1, 2, 3))


# Samplers: each yields the images after every step, from noise to picture


def clipped_x0(model: NoisePredictor, schedule: NoiseSchedule, xt: Tensor, t: Tensor) -> Tensor:
    """The model's estimate of the clean images, clipped to the range that images have."""
    return schedule.estimate_x0(xt, t, model(xt, t)).clamp(-1, 1)


@torch.no_grad()
def ddpm(
    model: NoisePredictor, schedule: NoiseSchedule, xt: Tensor, generator: torch.Generator, steps: int | None = None
) -> Iterator[Tensor]:
    """Walks back with fresh noise in every step but the last (Algorithm 2 of DDPM, arXiv:2006.11239).

    The mean is the posterior's for the estimated x0 (eq. 7). That equals the formula in the algorithm, but lets x0 be
    clipped first, as in the paper's code. Of the paper's two choices for the variance, this is the posterior's.

    In fewer steps than the schedule has, it is the same walk on the strided schedule: DDIM's eq. 12 with the sigma of
    its eq. 16 and eta = 1 (arXiv:2010.02502). The model is still told the time steps of the full schedule.

    Args:
        xt: standard normal noise (B, C, H, W).
        generator: where each step's noise comes from, on the device of `xt`.
        steps: how many of the schedule's time steps to visit, 1 to `schedule.steps`; by default all of them.

    Yields:
        `steps` states (B, C, H, W); the last is the image in [-1, 1].
    """
    times = time_steps(schedule.steps, schedule.steps if steps is None else steps)
    walk = schedule.strided(times)
    for i in reversed(range(len(times))):  # step i of the walk is times[i] to the model
        t = torch.full((len(xt),), times[i], device=xt.device)
        x0 = clipped_x0(model, schedule, xt, t)
        mean, variance = walk.posterior(x0, xt, torch.full_like(t, i))
        noise = torch.randn(xt.shape, generator=generator, device=xt.device)
        xt = mean + variance.sqrt() * noise  # the variance is 0 at i = 0
        yield xt


@torch.no_grad()
def ddim(model: NoisePredictor, schedule: NoiseSchedule, xt: Tensor, steps: int) -> Iterator[Tensor]:
    """Walks back without fresh noise (DDIM, arXiv:2010.02502, eq. 12, sigma = 0); yields the state after every step."""
    times = time_steps(schedule.steps, steps)
    for i in reversed(range(len(times))):
        t = torch.full((len(xt),), times[i], device=xt.device)
        x0 = clipped_x0(model, schedule, xt, t)
        noise = schedule.implied_noise(x0, xt, t)  # computed anew: what the model predicted no longer fits a clipped x0
        xt = schedule.add_noise(x0, torch.full_like(t, times[i - 1]), noise) if i > 0 else x0
        yield xt


def time_steps(schedule_steps: int, steps: int) -> list[int]:
    """The time steps that a sampler visits, evenly spaced up to the last: (1000, 4) -> [249, 499, 749, 999].

    This is "trailing" in Table 2 of arXiv:2305.08891: sampling starts where the training's noise is strongest.
    """
    if not 1 <= steps <= schedule_steps:
        raise ValueError(f"steps: must be from 1 to {schedule_steps}, got {steps}")
    return [round(schedule_steps * (1 - i / steps)) - 1 for i in reversed(range(steps))]
