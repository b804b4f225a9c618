"""The data sets: CIFAR-10, downloaded and checked; shapes, drawn; one's own images."""

import http.client
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.run import distributed
from common.run.checkpoint import atomic_write
from common.run.errors import UserError, warn
from common.run.folder import one_at_a_time
from common.run.own_images import load_own_images
from common.run.shapes import draw_shapes

IMAGE_SHAPE = (3, 32, 32)
DATASETS = ("cifar10", "shapes")
TRAINING_IMAGES = 50_000  # of either of these
HELD_OUT_IMAGES = 10_000


def load_images(dataset: str, data_dir: Path, *, train: bool = True, data_url: str | None = None) -> Tensor:
    """The training images of a data set, or its held-out ones.

    Several processes must all call this: rank 0 reads the images and sends them to the others.

    Args:
        dataset: "cifar10", downloaded on first use and checked by its published MD5; "shapes", drawn on first use; or
            where one's own images are, see own_images.py.
        data_dir: the folder that keeps the data set; the inner one, cifar-10-batches-py, does too.
        data_url: another address of CIFAR-10's archive, http or https.

    Returns:
        uint8 (N, 3, 32, 32) in main memory.

    Raises:
        UserError: CIFAR-10 is not in `data_dir` and could not be downloaded, or one's own images cannot be used.
    """

    def load() -> Tensor:
        with one_at_a_time(data_dir) if dataset in DATASETS else nullcontext():
            if dataset == "cifar10":
                images = load_cifar10(data_dir, train, data_url).data.transpose(0, 3, 1, 2)
            elif dataset == "shapes":
                images = _load_shapes(data_dir)[slice(0, TRAINING_IMAGES) if train else slice(TRAINING_IMAGES, None)]
            else:
                images = load_own_images(dataset, train)
        return torch.from_numpy(np.ascontiguousarray(images))

    return distributed.on_first(load)


def load_cifar10(data_dir: Path, train: bool = True, data_url: str | None = None) -> Any:
    """CIFAR-10 as torchvision hands it out, with labels; arguments and errors are those of `load_images`."""
    from torchvision.datasets import CIFAR10  # here, for it takes a second, for which --help need not wait

    class Archive(CIFAR10):
        url = data_url or CIFAR10.url

    if data_dir.name == Archive.base_folder:
        data_dir = data_dir.parent
    try:
        return Archive(data_dir, train=train, download=True)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"--data-dir {data_dir}: no CIFAR-10 there, and getting it from {Archive.url} failed ({error}); "
            f"name another address of the archive with --data-url, put {Archive.filename} into {data_dir} by hand, "
            "or train on the data set that needs no download, with train --dataset shapes"
        ) from error


@cache  # training takes both parts of it, and to unpack it takes seconds
def _load_shapes(data_dir: Path) -> np.ndarray:
    path = data_dir / "shapes.npz"
    count = TRAINING_IMAGES + HELD_OUT_IMAGES
    with suppress(Exception):  # there is none, or it is damaged, in one of many ways
        images = np.load(path)["images"]
        if images.shape == (count, *IMAGE_SHAPE) and images.dtype == np.uint8:
            return images
    images = draw_shapes(count)
    try:
        with atomic_write(path) as file:
            np.savez_compressed(file, images=images)
    except UserError as error:
        warn(f"drawn, but not kept for the next time: {error}")
    return images
