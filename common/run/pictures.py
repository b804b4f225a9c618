"""Images from a trained model, and what is made of them: picture grids, films, strips."""

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.data import random_generator, to_uint8
from common.diffusion import NoisePredictor, NoiseSchedule, ddim, ddpm
from common.run import distributed
from common.run.checkpoint import atomic_write
from common.run.datasets import IMAGE_SHAPE
from common.run.errors import UsageError

SAMPLERS = {"ddpm": 1000, "ddim": 50}  # and how many time steps each visits unless told otherwise
FILM_FORMATS = {".webp": "WEBP", ".gif": "GIF"}


def sample_images(
    predict_noise: NoisePredictor,
    schedule: NoiseSchedule,
    num_images: int,
    *,
    sampler: str = "ddpm",
    steps: int,
    seed: int = 0,
    batch_size: int = 256,
    spread: bool = False,
    watch: Callable[[int, int, Tensor], object] = lambda start, step, xt: None,
) -> Tensor:
    """Samples images, `batch_size` at a time. Leaves the global random numbers alone.

    Args:
        predict_noise: a model in eval mode, as `device.in_precision` calls it, say; on the schedule's device.
        sampler: one of SAMPLERS.
        steps: how many time steps to visit.
        seed: the images depend on it, on their number, on `batch_size` and on the device.
        spread: share the batches out among all processes, which must all call this.
        watch: called with the number of a batch's first image, the number of steps made, from 0 on, and the state
            (B, 3, 32, 32) that the batch is in.

    Returns:
        uint8 (num_images, 3, 32, 32) in main memory, the same whether spread or not.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: must be {' or '.join(SAMPLERS)}, got {sampler!r}")
    device = schedule.beta.device
    starts = range(0, num_images, batch_size)
    chunks = {}
    for start in starts[distributed.RANK :: distributed.WORLD_SIZE] if spread else starts:
        generator = random_generator(device, seed, "sample", start)
        shape = (min(batch_size, num_images - start), *IMAGE_SHAPE)
        xt = noise = torch.randn(shape, generator=generator, device=device)
        states = ddim(predict_noise, schedule, noise, steps)
        if sampler == "ddpm":
            states = ddpm(predict_noise, schedule, noise, generator, steps)
        for step, xt in enumerate(itertools.chain([noise], states)):
            watch(start, step, xt)
        chunks[start] = to_uint8(xt).cpu()
    return torch.cat([*(distributed.merged(chunks) if spread else chunks).values()])


class Film:
    """Keeps some of the states that images go through, to be handed to `sample_images` to watch.

    Args:
        steps: how many the sampler makes.
        frames: how many states to keep, evenly spaced, the first noise and the finished image among them.
        num_images: how many images to keep.
    """

    def __init__(self, steps: int, frames: int, num_images: int):
        self.moments = sorted({round(steps * i / (frames - 1)) for i in range(frames)})
        self.num_images = num_images
        self.states: dict[tuple[int, int], Tensor] = {}  # by step and number of the first image, uint8 (B, 3, 32, 32)

    def __call__(self, start: int, step: int, xt: Tensor) -> None:
        if step in self.moments and start < self.num_images:
            self.states[step, start] = to_uint8(xt[: self.num_images - start]).cpu()

    def frames(self) -> list[Tensor]:
        """uint8 (num_images, 3, 32, 32) for each moment; with several processes, all must call this."""
        states = distributed.merged(self.states)
        return [torch.cat([states[key] for key in states if key[0] == moment]) for moment in self.moments]


def save_film(frames: list[Tensor], path: Path) -> None:
    """Writes an animated WebP or GIF, by the file's extension: the frames as grids, the last one held for long."""
    grids = [_grid(frame, math.ceil(math.sqrt(len(frame)))) for frame in frames]
    durations = [80] * (len(grids) - 1) + [2500]  # milliseconds
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


def save_trajectory(frames: list[Tensor], path: Path) -> None:
    """Writes a PNG with a row for each image, which turns from noise into itself from left to right."""
    images = torch.stack(frames, dim=1).flatten(0, 1)  # (num_images * frames, 3, 32, 32)
    with atomic_write(path) as file:
        _grid(images, len(frames)).save(file, format="PNG")


def check_outputs(
    outputs: Mapping[str, Path | None], endings: Mapping[str, Sequence[str]], source: Path | None = None
) -> None:
    """Makes sure, before any work, that files can be written.

    Args:
        outputs: each file by the option that names it, or None.
        endings: what its name may end in, by option.
        source: the checkpoint, which none of them may replace.

    Raises:
        UsageError: one cannot, or two are the same.
    """
    given = {option: path for option, path in outputs.items() if path}
    for option, path in given.items():
        if path.suffix.lower() not in endings[option]:
            raise UsageError(f"argument {option}: the name must end in {' or '.join(endings[option])}, got {path}")
        if not path.parent.is_dir():
            raise UsageError(f"argument {option}: no such folder: {path.parent}")
        if source and os.path.realpath(path) == os.path.realpath(source):
            raise UsageError(f"argument {option}: {path} is the checkpoint itself; name another file")
        if path.is_dir():
            raise UsageError(f"argument {option}: {path} is a folder")
        if not _is_writable(path.parent):
            raise UsageError(f"argument {option}: {path.parent} may not be written to; name a file elsewhere")
        others = [
            other for other in given if other != option and os.path.realpath(given[other]) == os.path.realpath(path)
        ]
        if others:
            raise UsageError(f"argument {option}: {path} is that of {others[0]} too")


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def make_folder(folder: Path, outputs: Mapping[str, Path | None]) -> None:
    """Makes a folder for single images, before any work.

    Raises:
        UsageError: they would replace something there, or be replaced by what another option writes.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"argument --save-images: {folder} is there already; name a new folder, or an empty one")
    if folder.exists() and not _is_writable(folder):
        raise UsageError(f"argument --save-images: {folder} may not be written to; name another folder")
    for option, path in outputs.items():
        if path and os.path.realpath(folder) in (os.path.realpath(path), os.path.realpath(path.parent)):
            raise UsageError(f"argument --save-images: {folder} is the folder of {option} too; name another one")
    folder.mkdir(parents=True, exist_ok=True)


def save_images(images: Tensor, folder: Path) -> None:
    """Writes uint8 images (N, 3, 32, 32) as a PNG each: 0000.png, 0001.png and so on."""
    for number, image in enumerate(images):
        with atomic_write(folder / f"{number:04}.png") as file:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")


def save_grid(images: Tensor, path: Path) -> None:
    """Writes uint8 images (N, 3, 32, 32) as one PNG, as square as it goes, two black pixels between them."""
    with atomic_write(path) as file:
        _grid(images, math.ceil(math.sqrt(len(images)))).save(file, format="PNG")


def _grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 images (N, 3, 32, 32) side by side, two black pixels between them."""
    from torchvision.utils import make_grid  # here, for it takes a second, for which --help need not wait

    return Image.fromarray(make_grid(images, nrow=columns, padding=2).permute(1, 2, 0).numpy())
