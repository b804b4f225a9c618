"""Images as one uint8 tensor, shuffled batches of it, and the random numbers of a step."""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def shuffled_batches(
    images: Tensor, batch_size: int, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's batches, every image once, in an order that `seed` and `epoch` alone decide.

    Args:
        images: (N, ...), on the device that trains.
        start: how many images of that order have been used already, to go on in the middle.

    Yields:
        images (batch_size, ...) and the weight of each in the batch's mean loss, float32 (batch_size,), 1 in all. The
        last batch is padded with copies of its first image, of weight 0, so that all have one shape.
    """
    order = torch.randperm(len(images), generator=random_generator("cpu", seed, "order", epoch))
    for index in order[start:].to(images.device).split(batch_size):
        loss_weight = torch.full((batch_size,), 1 / len(index), device=images.device)
        loss_weight[len(index) :] = 0
        yield images[torch.cat([index, index[:1].expand(batch_size - len(index))])], loss_weight


def random_hflip(images: Tensor) -> Tensor:
    """Flips images (B, C, H, W) left-right with probability 1/2, each by a coin of its own."""
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
    """Seeds all that a model may draw from: torch's generators, as dropout does, numpy's and Python's own."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_seed(seed: int, purpose: str, index: int) -> int:
    """A seed that depends on nothing but the arguments."""
    entropy = [seed, int.from_bytes(purpose.encode(), "big"), index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
