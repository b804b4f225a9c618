"""Images as one uint8 tensor, shuffled batches of it, and the random numbers of a step."""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def shuffled_batches(images: Tensor, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
    """One epoch's batches (batch_size, ...), in an order that `seed` and `epoch` alone decide.

    The last images of that order, too few for a batch, are left out: different ones in every epoch.

    Args:
        images: (N, ...), on the training device; N is at least `batch_size`.
        start: how many images of that order have been used already, to resume in mid-epoch. If the batch size has grown
            and too few are left for a batch, one batch repeats some.
    """
    if batch_size > len(images):
        raise ValueError(f"batch_size: must be at most the number of images, {len(images)}; got {batch_size}")
    order = torch.randperm(len(images), generator=random_generator("cpu", seed, "order", epoch))
    start = min(start, len(images) - batch_size)
    end = len(images) - (len(images) - start) % batch_size
    for index in order[start:end].to(images.device).split(batch_size):
        yield images[index]


def random_hflip(images: Tensor) -> Tensor:
    """Flips each of the images (B, C, H, W) left-right with probability 1/2, independently of the others."""
    coins = torch.rand(len(images), 1, 1, 1, device=images.device)
    return torch.where(coins < 0.5, images.flip(-1), images)


def to_float(images: Tensor) -> Tensor:
    """uint8 images, 0 to 255, as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float images in [-1, 1] as uint8, 0 to 255, rounded to the nearest; what lies outside is clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def random_generator(device: torch.device | str, seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator on `device` whose draws depend on nothing but the arguments."""
    return torch.Generator(device).manual_seed(random_seed(seed, purpose, index))


def seed_everything(seed: int) -> None:
    """Seeds every generator that a model may draw from: torch's (for dropout, say), numpy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_seed(seed: int, purpose: str, index: int) -> int:
    """A seed that depends on nothing but the arguments."""
    entropy = [seed, int.from_bytes(purpose.encode(), "big"), index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
