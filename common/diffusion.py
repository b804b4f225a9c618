"""The theory on one page: noise goes in, the network guesses it, noise goes out (DDPM, arXiv:2006.11239).

Images are float32 (B, C, H, W), clean ones in [-1, 1]. A time step `t` is an int64 tensor (B,) with 0 <= t < steps.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

NoisePredictor = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W) and t (B,) -> the noise in x_t, like x_t


class NoiseSchedule(nn.Module):
    """How much noise each time step adds, and what follows from it in closed form.

    t = 0 is one noising step, so x_{-1} means the image itself. All constants are computed in float64 and kept in
    float32.

    Args:
        steps: T, the number of noising steps.
        beta_start, beta_end: variance of the noise that the first and the last step add, linear between.
    """

    beta: Tensor  # variance of the noise that step t adds
    alpha: Tensor  # 1 - beta
    alpha_bar: Tensor  # product of alpha[0..t]: the share of the image's variance left in x_t

    _image_scale: Tensor
    _noise_scale: Tensor
    _posterior_x0_scale: Tensor
    _posterior_xt_scale: Tensor
    _posterior_variance: Tensor

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        super().__init__()
        self._set_beta(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))

    def _set_beta(self, beta: Tensor) -> None:
        """Everything follows from beta, float64 (steps,)."""
        self.steps = len(beta)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        alpha_bar_prev = _shifted(alpha_bar)
        self._exact_alpha_bar = alpha_bar
        constants = {
            "beta": beta,
            "alpha": alpha,
            "alpha_bar": alpha_bar,
            # Derived ones are kept too: 1 - alpha_bar taken from the rounded alpha_bar is wrong by 0.03 % at t = 0.
            "_image_scale": alpha_bar.sqrt(),
            "_noise_scale": (1 - alpha_bar).sqrt(),
            "_posterior_x0_scale": beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            "_posterior_xt_scale": (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar),
            "_posterior_variance": beta * (1 - alpha_bar_prev) / (1 - alpha_bar),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    def strided(self, times: Sequence[int]) -> "NoiseSchedule":
        """The same process in fewer, larger steps: its step i leads as far as this one's step `times[i]`.

        So alpha_bar is that of these time steps, and beta follows from it: improved-diffusion (arXiv:2102.09672,
        section 4). All of a schedule's time steps give the schedule itself.

        Args:
            times: ascending, each from 0 to steps - 1.
        """
        alpha_bar = self._exact_alpha_bar[list(times)]
        strided = NoiseSchedule(len(times))
        strided._set_beta(1 - alpha_bar / _shifted(alpha_bar))
        return strided.to(self.beta.device)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t drawn from q(x_t | x0) in one go (eq. 4), with the standard normal `noise` (B, C, H, W)."""
        return _at(self._image_scale, t) * x0 + _at(self._noise_scale, t) * noise

    def estimate_x0(self, xt: Tensor, t: Tensor, pred_noise: Tensor) -> Tensor:
        """The x0 which that noise implies: `add_noise` solved for x0 (eq. 15). Not clipped."""
        return (xt - _at(self._noise_scale, t) * pred_noise) / _at(self._image_scale, t)

    def implied_noise(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise which that x0 implies: `add_noise` solved for the noise."""
        return (xt - _at(self._image_scale, t) * x0) / _at(self._noise_scale, t)

    def posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x0) (eqs. 6 and 7).

        The variance is 0 at t = 0, where x_{t-1} is x0 itself.
        """
        mean = _at(self._posterior_x0_scale, t) * x0 + _at(self._posterior_xt_scale, t) * xt
        return mean, _at(self._posterior_variance, t)


def _shifted(alpha_bar: Tensor) -> Tensor:
    """alpha_bar of the step before each, which is 1 before the first."""
    return torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


def _at(constants: Tensor, t: Tensor) -> Tensor:
    """The constants of each image's time step, (B,) -> (B, 1, 1, 1), to be multiplied with images."""
    return constants[t][:, None, None, None]


# The loss


def diffusion_loss(model: NoisePredictor, schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """DDPM's simple loss (eq. 14): how far the predicted noise is from the noise, squared, averaged over an image.

    Args:
        x0, noise: float32 (B, C, H, W).
        t: int64 (B,).

    Returns:
        float32 (B,), one for each image.
    """
    xt = schedule.add_noise(x0, t, noise)
    pred_noise = model(xt, t)
    return (pred_noise - noise).square().mean(dim=(1, 2, 3))


# The samplers: generators of the states that an image goes through, from noise to picture


@torch.no_grad()
def ddpm(
    model: NoisePredictor, schedule: NoiseSchedule, xt: Tensor, generator: torch.Generator, steps: int | None = None
) -> Iterator[Tensor]:
    """Walks back with fresh noise in every step (Algorithm 2 of DDPM, arXiv:2006.11239), x0 clipped to [-1, 1].

    In fewer steps than the schedule has, it is the same walk on the strided schedule: DDIM's eq. 12 with the sigma of
    its eq. 16 and eta = 1 (arXiv:2010.02502).

    Args:
        model: predicts the noise (B, C, H, W) in x_t from x_t and t (B,).
        xt: standard normal noise (B, C, H, W).
        generator: of the noise that each step adds.
        steps: how many of the schedule's time steps to visit, 1 to `schedule.steps`; by default all of them.

    Yields:
        `steps` states (B, C, H, W); the last is the image in [-1, 1].
    """
    times = time_steps(schedule.steps, schedule.steps if steps is None else steps)
    strided = schedule.strided(times)
    for i in reversed(range(len(times))):
        t = torch.full((len(xt),), times[i], device=xt.device)
        x0 = schedule.estimate_x0(xt, t, model(xt, t)).clamp(-1, 1)
        mean, variance = strided.posterior(x0, xt, torch.full_like(t, i))
        noise = torch.randn(xt.shape, generator=generator, device=xt.device)
        xt = mean + variance.sqrt() * noise  # the variance is 0 at i = 0
        yield xt


@torch.no_grad()
def ddim(model: NoisePredictor, schedule: NoiseSchedule, xt: Tensor, steps: int) -> Iterator[Tensor]:
    """Walks back without fresh noise (DDIM, arXiv:2010.02502, eq. 12 with sigma = 0), x0 clipped to [-1, 1].

    Args:
        model: predicts the noise (B, C, H, W) in x_t from x_t and t (B,).
        xt: standard normal noise (B, C, H, W).
        steps: how many of the schedule's time steps to visit, 1 to `schedule.steps`.

    Yields:
        `steps` states (B, C, H, W); the last is the image in [-1, 1].
    """
    times = time_steps(schedule.steps, steps)
    for i in reversed(range(len(times))):
        t = torch.full((len(xt),), times[i], device=xt.device)
        x0 = schedule.estimate_x0(xt, t, model(xt, t)).clamp(-1, 1)
        noise = schedule.implied_noise(x0, xt, t)  # of the clipped x0, not the model's own
        xt = schedule.add_noise(x0, torch.full_like(t, times[i - 1]), noise) if i > 0 else x0
        yield xt


def time_steps(schedule_steps: int, steps: int) -> list[int]:
    """The time steps that a sampler visits, in ascending order: evenly spaced, the last one is `schedule_steps` - 1.

    This is "trailing" in Table 2 of arXiv:2305.08891: sampling starts where the training's noise is strongest.
    """
    if not 1 <= steps <= schedule_steps:
        raise ValueError(f"steps: must be from 1 to {schedule_steps}, got {steps}")
    return [round(schedule_steps * (1 - i / steps)) - 1 for i in reversed(range(steps))]
