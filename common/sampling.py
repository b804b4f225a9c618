"""DDPM and DDIM samplers as generators of states, and what is made of them: images and picture grids."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from common import distributed
from common.checkpoint import atomic_write
from common.data import IMAGE_SHAPE, random_generator, to_uint8
from common.device import GraphedFunction
from common.schedule import NoiseSchedule

NoisePredictor = Callable[[Tensor, Tensor], Tensor]

SAMPLERS = ("ddpm", "ddim")
FILM_FORMATS = {".webp": "WEBP", ".gif": "GIF"}


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


def default_steps(sampler: str, schedule_steps: int) -> int:
    """How many time steps a sampler visits unless told otherwise: all for ddpm, as in its paper, 50 for ddim."""
    return schedule_steps if sampler == "ddpm" else 50


def noise_predictor(model: nn.Module, bf16: bool = False) -> NoisePredictor:
    """The model as samplers call it: under bfloat16 autocast if so asked, as a CUDA graph on a GPU, float32 out."""

    def predict_noise(xt: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(xt.device.type, torch.bfloat16, enabled=bf16):
            return model(xt, t).float()

    return GraphedFunction(predict_noise)


def sample_images(
    model: nn.Module,
    schedule: NoiseSchedule,
    num_images: int,
    *,
    sampler: str = "ddpm",
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    bf16: bool = False,
    progress: bool = False,
    spread: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draws images, `batch_size` at a time. Leaves the global random numbers and the model's mode alone.

    Args:
        model: predicts noise; it and the schedule are on the same device.
        sampler: "ddpm" or "ddim".
        steps: how many time steps to visit, see `default_steps`.
        seed: the images depend on it, on `batch_size` and on the device.
        bf16: run the model under bfloat16 autocast.
        progress: show a bar on stderr, where that is a terminal.
        spread: share the batches out among all processes, which must all call this.
        watch: called with the number of steps made, from 0 on, and the state (B, 3, 32, 32) that the first batch is in.

    Returns:
        uint8 (num_images, 3, 32, 32) in main memory, the same whether spread or not.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: must be {' or '.join(SAMPLERS)}, got {sampler!r}")
    steps = default_steps(sampler, schedule.steps) if steps is None else steps
    device = schedule.beta.device
    predict_noise = noise_predictor(model, bf16)
    was_training = model.training
    model.eval()
    starts = range(0, num_images, batch_size)
    if spread:
        starts = starts[distributed.RANK :: distributed.WORLD_SIZE]
        progress = progress and distributed.RANK == 0
    chunks = {}
    total = sum(min(batch_size, num_images - start) for start in starts) * steps
    with tqdm(total=total, unit=" image steps", desc=sampler, disable=None if progress else True) as bar:
        for start in starts:
            generator = random_generator(device, seed, "sample", start)
            shape = (min(batch_size, num_images - start), *IMAGE_SHAPE)
            xt = torch.randn(shape, generator=generator, device=device)
            if sampler == "ddpm":
                states = ddpm(predict_noise, schedule, xt, generator, steps)
            else:
                states = ddim(predict_noise, schedule, xt, steps)
            if watch and start == 0:
                watch(0, xt)
            for step, xt in enumerate(states, 1):
                bar.update(len(xt))
                if watch and start == 0:
                    watch(step, xt)
            chunks[start] = to_uint8(xt).cpu()
    model.train(was_training)
    if spread:
        for others in distributed.gather(chunks):
            chunks |= others
    return torch.cat([chunks[start] for start in sorted(chunks)])


class Film:
    """Keeps some of the states that an image goes through, to be handed to `sample_images` to watch.

    Args:
        steps: how many the sampler makes.
        frames: how many states to keep, evenly spaced, the first noise and the finished image among them.
        num_images: how many images of the batch to keep.
    """

    def __init__(self, steps: int, frames: int, num_images: int):
        self.moments = {round(steps * i / (frames - 1)) for i in range(frames)}
        self.num_images = num_images
        self.frames: list[Tensor] = []  # uint8 (num_images, 3, 32, 32) each

    def __call__(self, step: int, xt: Tensor) -> None:
        if step in self.moments:
            self.frames.append(to_uint8(xt[: self.num_images]).cpu())

    def save_film(self, path: Path, seconds_per_frame: float = 0.08) -> None:
        """Writes an animated WebP or GIF, by the file's extension: the frames as grids, the last one held for long."""
        grids = [_grid(frame, math.ceil(math.sqrt(len(frame)))) for frame in self.frames]
        durations = [round(1000 * seconds_per_frame)] * (len(grids) - 1) + [2500]
        with atomic_write(path) as file:
            grids[0].save(
                file,
                format=FILM_FORMATS[path.suffix.lower()],
                save_all=True,
                append_images=grids[1:],
                duration=durations,
                loop=0,
                quality=60,  # of a WebP, of 100
            )

    def save_trajectory(self, path: Path) -> None:
        """Writes a PNG with a row for each image, which turns from noise into itself from left to right."""
        images = torch.stack(self.frames, dim=1).flatten(0, 1)  # (num_images * frames, 3, 32, 32)
        with atomic_write(path) as file:
            _grid(images, len(self.frames)).save(file, format="PNG")


def save_grid(images: Tensor, path: Path) -> None:
    """Writes uint8 images (N, 3, 32, 32) as one PNG, as square as it goes, two black pixels between them."""
    with atomic_write(path) as file:
        _grid(images, math.ceil(math.sqrt(len(images)))).save(file, format="PNG")


def _grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 images (N, 3, 32, 32) side by side, two black pixels between them."""
    from torchvision.utils import make_grid  # here, for it takes a second, for which --help need not wait

    return Image.fromarray(make_grid(images, nrow=columns, padding=2).permute(1, 2, 0).numpy())
