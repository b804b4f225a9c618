"""The forward process and its posterior, against closed forms, Bayes' rule and diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from common.diffusion import NoiseSchedule

STEPS = [0, 1, 2, 10, 100, 500, 998, 999]


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule()


def exact() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    beta = np.array([1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)])
    return beta, 1 - beta, np.array([math.prod(1 - beta[: t + 1]) for t in range(1000)])


def test_constants_are_the_closed_forms_in_float32(schedule: NoiseSchedule) -> None:
    for name, value in zip(("beta", "alpha", "alpha_bar"), exact()):
        buffer = dict(schedule.named_buffers())[name]
        assert buffer.dtype == torch.float32
        np.testing.assert_allclose(buffer.numpy(), value, rtol=1e-7)


def test_constants_are_those_of_diffusers(schedule: NoiseSchedule) -> None:
    theirs = DDPMScheduler()
    torch.testing.assert_close(schedule.alpha_bar, theirs.alphas_cumprod, rtol=1e-4, atol=0)


def test_unclipped_x0_of_the_last_step_is_157_times_too_large(schedule: NoiseSchedule) -> None:
    x0 = schedule.estimate_x0(torch.ones(1, 1, 1, 1), torch.tensor([999]), torch.zeros(1, 1, 1, 1))
    assert x0.item() == pytest.approx(157.4, abs=0.1)


def test_add_noise_has_the_mean_and_the_variance_of_many_single_steps(schedule: NoiseSchedule) -> None:
    """Eq. 4 against eq. 2: x_t drawn at once is distributed as x_t drawn step by step."""
    generator = torch.Generator().manual_seed(0)
    n, last = 200_000, 300
    x0 = torch.full((n, 1, 1, 1), 0.7)
    xt = x0
    for beta in schedule.beta[: last + 1]:
        xt = (1 - beta).sqrt() * xt + beta.sqrt() * torch.randn(xt.shape, generator=generator)
    at_once = schedule.add_noise(x0, torch.full((n,), last), torch.randn(x0.shape, generator=generator))
    alpha_bar = exact()[2][last]
    for sample in (xt, at_once):
        assert sample.mean().item() == pytest.approx(0.7 * math.sqrt(alpha_bar), abs=5 / math.sqrt(n))
        assert sample.var().item() == pytest.approx(1 - alpha_bar, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("t", STEPS[1:])
def test_posterior_is_bayes_rule(schedule: NoiseSchedule, t: int) -> None:
    """q(x_{t-1} | x_t, x0) is the product of two Gaussians in x_{t-1}: their precisions add up (float64)."""
    beta, alpha, _ = (values[t] for values in exact())
    alpha_bar_prev = exact()[2][t - 1]
    x0, xt = 0.4, -1.3
    prior_precision, likelihood_precision = 1 / (1 - alpha_bar_prev), alpha / beta
    variance = 1 / (prior_precision + likelihood_precision)
    mean = variance * (prior_precision * math.sqrt(alpha_bar_prev) * x0 + likelihood_precision * xt / math.sqrt(alpha))
    got_mean, got_variance = schedule.posterior(
        torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), xt), torch.tensor([t])
    )
    assert got_mean.item() == pytest.approx(mean, rel=1e-6)
    assert got_variance.item() == pytest.approx(variance, rel=1e-6)


def test_posterior_at_step_0_is_x0_without_variance(schedule: NoiseSchedule) -> None:
    x0, xt = torch.full((1, 3, 2, 2), 0.25), torch.full((1, 3, 2, 2), 0.3)
    mean, variance = schedule.posterior(x0, xt, torch.tensor([0]))
    assert torch.equal(mean, x0)
    assert variance.item() == 0


@pytest.mark.parametrize("t", STEPS)
def test_estimate_x0_and_implied_noise_undo_add_noise(schedule: NoiseSchedule, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    x0, noise = torch.rand(2, 4, 3, 8, 8, generator=generator) * 2 - 1
    times = torch.full((4,), t)
    xt = schedule.add_noise(x0, times, noise)
    torch.testing.assert_close(schedule.estimate_x0(xt, times, noise), x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(schedule.implied_noise(x0, xt, times), noise, rtol=0, atol=1e-4)


def test_every_image_of_a_batch_gets_the_noise_of_its_own_step(schedule: NoiseSchedule) -> None:
    x0, noise = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    xt = schedule.add_noise(x0, torch.tensor([0, 500, 999]), noise)
    np.testing.assert_allclose(xt[:, 0, 0, 0].numpy() ** 2, exact()[2][[0, 500, 999]], rtol=1e-5)


def test_noising_and_posterior_stay_in_float32_under_autocast(schedule: NoiseSchedule) -> None:
    x0, noise = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    t = torch.tensor([0, 9])
    plain = schedule.add_noise(x0, t, noise), *schedule.posterior(x0, noise, t)
    with torch.autocast("cpu", torch.bfloat16):
        inside = schedule.add_noise(x0, t, noise), *schedule.posterior(x0, noise, t)
    for a, b in zip(plain, inside):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


def test_a_schedule_strided_by_one_is_the_schedule_to_the_last_bit(schedule: NoiseSchedule) -> None:
    ours, theirs = (dict(s.named_buffers()) for s in (schedule.strided(range(1000)), schedule))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_strided_schedule_adds_the_noise_of_the_steps_between(schedule: NoiseSchedule) -> None:
    beta, alpha, alpha_bar = exact()
    strided = schedule.strided([0, 10, 500, 999])
    assert strided.steps == 4
    np.testing.assert_allclose(strided.alpha_bar.numpy(), alpha_bar[[0, 10, 500, 999]], rtol=1e-6)
    np.testing.assert_allclose(strided.alpha.numpy()[2], math.prod(alpha[11:501]), rtol=1e-6)
    np.testing.assert_allclose(strided.beta.numpy()[0], beta[0], rtol=1e-6)


def test_the_posterior_of_a_strided_schedule_is_bayes_rule(schedule: NoiseSchedule) -> None:
    """q(x_s | x_t, x0), in float64: the product of q(x_s | x0) and, as a function of x_s, q(x_t | x_s)."""
    s, t, x0, xt = 100, 300, 0.4, -0.7
    _, alpha, alpha_bar = exact()
    jump = math.prod(alpha[s + 1 : t + 1])  # x_t = sqrt(jump) x_s + sqrt(1 - jump) noise
    precision = jump / (1 - jump) + 1 / (1 - alpha_bar[s])
    expected = (xt * math.sqrt(jump) / (1 - jump) + x0 * math.sqrt(alpha_bar[s]) / (1 - alpha_bar[s])) / precision
    one = torch.ones(1, 1, 1, 1)
    mean, variance = schedule.strided([s, t]).posterior(x0 * one, xt * one, torch.tensor([1]))
    assert mean.item() == pytest.approx(expected, rel=1e-5)
    assert variance.item() == pytest.approx(1 / precision, rel=1e-5)
