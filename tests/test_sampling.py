"""Both samplers, against diffusers step by step and with denoisers whose samples are known."""

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.diffusion import NoisePredictor, NoiseSchedule, ddim, ddpm, time_steps
from common.run import test as command
from common.run.device import in_precision
from common.run.models import TrainedModel
from common.run.pictures import SAMPLERS, Film, sample_images, save_film, save_grid, save_trajectory
from tests.tiny_run import Tiny


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def last(states: Iterator[Tensor]) -> Tensor:
    *_, state = states
    return state


def weak_model(xt: Tensor, t: Tensor) -> Tensor:
    """A noise that the model of an untrained net might predict: x0 has to be clipped all the way."""
    return 0.9 * torch.tanh(xt) + 0.1 * torch.cos(t[:, None, None, None] / 100)


def test_ddpm_is_algorithm_2_to_the_last_bit(schedule: NoiseSchedule) -> None:
    """With as many steps as the schedule has, it visits each of them with the schedule's own constants."""
    xt = expected = noise(2, 3, 8, 8)
    generator = torch.Generator().manual_seed(1)
    states = list(ddpm(weak_model, schedule, xt, torch.Generator().manual_seed(1)))
    assert len(states) == 1000
    for step, state in zip(reversed(range(1000)), states):
        t = torch.tensor([step, step])
        x0 = schedule.estimate_x0(expected, t, weak_model(expected, t)).clamp(-1, 1)
        mean, variance = schedule.posterior(x0, expected, t)
        expected = mean + variance.sqrt() * torch.randn(expected.shape, generator=generator)
        assert torch.equal(state, expected)


@pytest.mark.parametrize("steps", [1000, 500, 50, 10, 1])
def test_ddpm_is_that_of_diffusers_at_every_step(schedule: NoiseSchedule, steps: int) -> None:
    theirs = DDPMScheduler(variance_type="fixed_small", clip_sample=True, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    expected = noise(2, 3, 8, 8)
    states = list(ddpm(weak_model, schedule, expected, torch.Generator().manual_seed(1), steps))
    assert len(states) == steps
    for t, state in zip(theirs.timesteps.tolist(), states):
        expected = theirs.step(weak_model(expected, torch.tensor([t, t])), t, expected, generator=generator).prev_sample
        # Theirs takes 1 - alpha_bar from the rounded alpha_bar, which shows in the last steps.
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 10, 50, 250])
def test_ddpm_in_fewer_steps_is_ddim_of_diffusers_with_eta_1(schedule: NoiseSchedule, steps: int) -> None:
    theirs = DDIMScheduler(clip_sample=True, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    expected = noise(2, 3, 8, 8)
    states = list(ddpm(weak_model, schedule, expected, torch.Generator().manual_seed(1), steps))
    for t, state in zip(theirs.timesteps.tolist(), states):
        pred_noise = weak_model(expected, torch.tensor([t, t]))
        expected = theirs.step(
            pred_noise, t, expected, eta=1.0, use_clipped_model_output=True, generator=generator
        ).prev_sample
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
def test_ddim_is_that_of_diffusers_at_every_step(schedule: NoiseSchedule, steps: int) -> None:
    theirs = DDIMScheduler(clip_sample=True, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == time_steps(1000, steps)[::-1]
    expected = noise(2, 3, 8, 8)
    states = list(ddim(weak_model, schedule, expected, steps))
    assert len(states) == steps
    for t, state in zip(theirs.timesteps.tolist(), states):
        pred_noise = weak_model(expected, torch.tensor([t, t]))
        expected = theirs.step(pred_noise, t, expected, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 333, 999, 1000])
def test_time_steps_rise_to_the_last_one(steps: int) -> None:
    times = time_steps(1000, steps)
    assert len(times) == steps
    assert times[0] >= 0
    assert times[-1] == 999
    assert all(a < b for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_more_steps_than_there_are_or_none_are_refused(schedule: NoiseSchedule, steps: int) -> None:
    with pytest.raises(ValueError, match="1 to 1000"):
        time_steps(1000, steps)
    for sampler in ("ddpm", "ddim"):
        with pytest.raises(ValueError, match="1 to 1000"):
            sample_images(Untrained(), schedule, 1, sampler=sampler, steps=steps)


def test_an_unknown_sampler_is_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="must be ddpm or ddim, got 'DDPM'"):
        sample_images(Untrained(), schedule, 1, sampler="DDPM", steps=1)


def gaussian_denoiser(schedule: NoiseSchedule, mean: float, std: float) -> NoisePredictor:
    """The best noise predictor for images whose pixels are independent N(mean, std^2)."""

    def predict(xt: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar.double()[t][:, None, None, None]
        gain = std**2 * alpha_bar.sqrt() / (std**2 * alpha_bar + 1 - alpha_bar)
        x0 = mean + gain * (xt - alpha_bar.sqrt() * mean)
        return ((xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()).float()

    return predict


def gaussian_samples(sampler: str, steps: int, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation of what a sampler draws with that denoiser: every step is linear in x_t, so both
    follow from the papers' formulas step by step, in float64."""
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    times = [round(1000 * (1 - i / steps)) - 1 for i in range(steps)]
    drawn_mean, drawn_variance = 0.0, 1.0
    for i, t in enumerate(times):
        now, then = alpha_bar[t], alpha_bar[times[i + 1]] if i + 1 < steps else 1.0
        gain = std**2 * math.sqrt(now) / (std**2 * now + 1 - now)  # x0 = gain * xt + offset
        offset = mean * (1 - gain * math.sqrt(now))
        eta = 1 if sampler == "ddpm" else 0
        added = eta**2 * (1 - then) / (1 - now) * (1 - now / then)  # DDIM, eq. 16, squared
        xt_scale = math.sqrt((1 - then - added) / (1 - now))  # eq. 12
        x0_scale = math.sqrt(then) - xt_scale * math.sqrt(now)
        drawn_mean = (x0_scale * gain + xt_scale) * drawn_mean + x0_scale * offset
        drawn_variance = (x0_scale * gain + xt_scale) ** 2 * drawn_variance + added
    return drawn_mean, math.sqrt(drawn_variance)


@pytest.mark.parametrize(
    ("sampler", "steps", "error"),
    [("ddpm", 1000, 0.03), ("ddpm", 50, 0.25), ("ddim", 1000, 0.02), ("ddim", 50, 0.2)],
)
def test_ideal_denoiser_of_a_gaussian_draws_that_gaussian(
    schedule: NoiseSchedule, sampler: str, steps: int, error: float
) -> None:
    """Up to what the sampler's own steps cost, which is computed exactly: the variance of ddpm's steps takes the
    guessed image for certain, so in few steps its samples vary too little."""
    mean, std = 0.3, 0.15
    xt = noise(16, 3, 32, 32)
    model = gaussian_denoiser(schedule, mean, std)
    generator = torch.Generator().manual_seed(1)
    x0 = last(ddpm(model, schedule, xt, generator, steps) if sampler == "ddpm" else ddim(model, schedule, xt, steps))
    drawn_mean, drawn_std = gaussian_samples(sampler, steps, mean, std)
    assert drawn_mean == pytest.approx(mean, abs=0.001)
    assert drawn_std == pytest.approx(std, rel=error)
    assert x0.mean().item() == pytest.approx(drawn_mean, abs=4 * std / math.sqrt(x0.numel()))
    assert x0.std().item() == pytest.approx(drawn_std, rel=4 / math.sqrt(2 * x0.numel()))


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 1000), ("ddpm", 50), ("ddim", 50)])
def test_ideal_denoiser_of_four_images_draws_each_of_them_equally_often(
    schedule: NoiseSchedule, sampler: str, steps: int
) -> None:
    images = torch.where(noise(4, 3, 4, 4, seed=3) > 0, 0.9, -0.9)

    def model(xt: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar[t]
        distance = torch.cdist(xt.flatten(1), alpha_bar[0].sqrt() * images.flatten(1)) ** 2
        share = torch.softmax(-distance / (2 * (1 - alpha_bar[:, None])), dim=1)  # (B, 4)
        x0 = (share @ images.flatten(1)).view_as(xt)
        return schedule.implied_noise(x0, xt, t)

    xt = noise(1000, 3, 4, 4)
    generator = torch.Generator().manual_seed(1)
    x0 = last(ddpm(model, schedule, xt, generator, steps) if sampler == "ddpm" else ddim(model, schedule, xt, steps))
    distance, nearest = torch.cdist(x0.flatten(1), images.flatten(1)).min(dim=1)
    assert distance.median() < 0.02
    assert (distance < 0.1).float().mean() > 0.99
    for count in torch.bincount(nearest, minlength=4).tolist():
        assert 250 - 4 * 13.7 < count < 250 + 4 * 13.7  # four standard deviations of the binomial


def test_images_stay_in_range_however_weak_the_model(schedule: NoiseSchedule) -> None:
    for states in (
        ddpm(weak_model, schedule, noise(2, 3, 8, 8), torch.Generator().manual_seed(0)),
        ddpm(weak_model, schedule, noise(2, 3, 8, 8), torch.Generator().manual_seed(0), 50),
        ddim(weak_model, schedule, noise(2, 3, 8, 8), 50),
    ):
        x0 = last(states)
        assert -1 <= x0.min() <= x0.max() <= 1


class Untrained(nn.Module):
    """A net that is in the wrong mode when it is called in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.conv(x)


def test_a_sampler_takes_the_steps_of_its_paper_unless_told_otherwise(schedule: NoiseSchedule) -> None:
    assert {"ddpm": schedule.steps, "ddim": 50} == SAMPLERS


def draw(schedule: NoiseSchedule, num_images: int = 5, **options: object) -> Tensor:
    torch.manual_seed(0)
    model = Untrained().eval()
    return sample_images(model, schedule, num_images, **{"sampler": "ddim", "steps": 3, **options})  # type: ignore[arg-type]


def test_sample_images_are_bytes_and_depend_on_the_seed(schedule: NoiseSchedule) -> None:
    images = draw(schedule)
    assert images.shape == (5, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.equal(images, draw(schedule))
    assert not torch.equal(images, draw(schedule, seed=1))


@pytest.mark.parametrize("num_images", [1, 2, 3, 4, 5])
def test_images_are_drawn_in_chunks(schedule: NoiseSchedule, num_images: int) -> None:
    images = draw(schedule, num_images, batch_size=2)
    assert images.shape == (num_images, 3, 32, 32)
    assert len(torch.unique(images.flatten(1), dim=0)) == num_images
    assert torch.equal(images, draw(schedule, 5, batch_size=2)[:num_images])


def test_sampling_leaves_the_global_random_numbers_alone(schedule: NoiseSchedule) -> None:
    model = Untrained().eval()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for sampler in ("ddpm", "ddim"):
        sample_images(model, schedule, 1, sampler=sampler, steps=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_grid_holds_the_images_pixel_by_pixel(tmp_path: Path) -> None:
    images = torch.randint(1, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (274, 274, 3)
    rest = grid.copy()
    for i, image in enumerate(images):
        top, left = 2 + 34 * (i // 8), 2 + 34 * (i % 8)
        np.testing.assert_array_equal(grid[top : top + 32, left : left + 32], image.permute(1, 2, 0).numpy())
        rest[top : top + 32, left : left + 32] = 0
    assert not rest.any()  # black between the images


def test_a_film_goes_from_the_noise_to_the_image_over_evenly_spaced_moments() -> None:
    film = Film(steps=1000, frames=5, num_images=4)
    seen: list[int] = []

    class Note(nn.Module):
        def forward(self, xt: Tensor, t: Tensor) -> Tensor:
            seen.append(int(t[0]))
            return xt

    images = sample_images(Note(), NoiseSchedule(), 5, steps=1000, batch_size=3, watch=film)
    assert len(seen) == 2000  # two batches; the film cost no step
    assert film.moments == [0, 250, 500, 750, 1000]
    frames = film.frames()
    assert [frame.shape for frame in frames] == 5 * [(4, 3, 32, 32)]  # of both batches
    assert torch.equal(frames[-1], images[:4])
    assert frames[0].float().std() > 70  # noise, clipped to [-1, 1]


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_a_film_and_a_trajectory_are_written_as_they_are(tmp_path: Path, ending: str) -> None:
    """Six images that change from black to a ramp of grey, in four frames."""
    film = Film(steps=3, frames=4, num_images=6)
    ramp = torch.linspace(-1, 1, 32).expand(6, 3, 32, 32)
    for step in range(4):
        film(0, step, (ramp + 1) * step / 3 - 1)
    save_film(film.frames(), tmp_path / f"film.{ending}")
    with Image.open(tmp_path / f"film.{ending}") as image:
        assert image.n_frames == 4
        assert image.info["loop"] == 0
        for step in range(4):
            image.seek(step)
            shown = np.asarray(image.convert("RGB")).astype(int)
            assert shown.shape == (70, 104, 3)
            expected = np.linspace(0, 255 * step / 3, 32)
            assert abs(shown[2:34, 2:34, 0] - expected).max() < 25  # compressed with loss
    save_trajectory(film.frames(), tmp_path / "strip.png")
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (2 + 6 * 34, 2 + 4 * 34, 3)
    assert [strip[10, 33 + 34 * column, 0] for column in range(4)] == [0, 85, 170, 255]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (10, 4, 3), (65, 9, 8)])
def test_grid_is_as_square_as_it_goes(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    save_grid(torch.zeros(count, 3, 32, 32, dtype=torch.uint8), tmp_path / "grid.png")
    width, height = Image.open(tmp_path / "grid.png").size
    padding = 0 if count == 1 else 2
    assert (width, height) == (columns * (32 + padding) + padding, rows * (32 + padding) + padding)


class CountCasts(TorchDispatchMode):
    """Counts casts of these shapes to bfloat16."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape in self.shapes:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_all_steps_and_the_images_stay_as_they_are() -> None:
    model = Tiny().eval()
    trained = TrainedModel(Path(), Path(), model, torch.device("cpu"), "bf16", "shapes", 1, 1)
    options = argparse.Namespace(sampler="ddpm", seed=0, batch_size=2)
    with CountCasts({parameter.shape for parameter in model.parameters()}) as casts:
        images = command.draw(trained, options, 4, steps=5)
    assert casts.count == len(list(model.parameters()))
    predict_noise = in_precision(model, "bf16")
    assert torch.equal(images, sample_images(predict_noise, NoiseSchedule(), 4, steps=5, batch_size=2))
