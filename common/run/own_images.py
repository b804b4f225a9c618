"""One's own images: a folder of pictures, whatever their size and format, or an array."""

import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common.run import distributed
from common.run.errors import UsageError, UserError, counted, warn
from common.run.folder import MARK

SIZE = 32  # pixels, both ways
MIN_HELD_OUT = 100  # and at least as many to train on
ARRAYS = (".npy", ".npz")
NAMED_IN_WARNING = 5  # of the files that are left out


def check_place(place: str) -> None:
    """Raises a UsageError unless images can be looked for in a place."""
    if not os.path.isdir(place) and not (os.path.isfile(place) and Path(place).suffix.lower() in ARRAYS):
        raise UsageError(
            f"argument --dataset: neither a folder nor an .npy or .npz file: {place}; "
            "name the place of your images, or cifar10 or shapes"
        )


def load_own_images(place: str, train: bool) -> np.ndarray:
    """The images of a folder or an array that are trained on, or those that are held out.

    One in ten is held out, at least 100, by a shuffle that depends on nothing but the number of images.

    Args:
        place: a folder, see `read_image`, or an .npy or .npz file of one array, uint8 (N, 32, 32, 3).

    Returns:
        uint8 (M, 3, 32, 32), shuffled, so that the first few are a fair sample.

    Raises:
        UsageError, UserError: there are none, or too few, or the file holds something else.
    """
    images = _read_place(place)
    if len(images) < 2 * MIN_HELD_OUT:
        raise UserError(
            f"--dataset {place}: {counted(len(images), 'image')} there; at least {2 * MIN_HELD_OUT} are needed, "
            f"of which {MIN_HELD_OUT} are held out; add more"
        )
    order = np.random.RandomState(0).random_sample(len(images)).argsort(kind="stable")  # a stream that numpy has frozen
    num_held_out = max(MIN_HELD_OUT, len(images) // 10)
    return images[order[num_held_out:] if train else order[:num_held_out]]


@cache  # training takes both parts, and to read them takes long
def _read_place(place: str) -> np.ndarray:
    check_place(place)
    return _read_folder(place) if os.path.isdir(place) else _read_array(place)


def _read_array(path: str) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = [loaded] if isinstance(loaded, np.ndarray) else [*loaded.values()]  # of an .npy, of an .npz
        if len(arrays) != 1 or not isinstance(arrays[0], np.ndarray):
            raise ValueError(f"it holds {len(arrays)} arrays, not one" if len(arrays) != 1 else "it holds no array")
        images = arrays[0]
    except Exception as error:  # there is no end of what damaged bytes make a reader raise
        reason = "" if "pickle" in str(error) else f": {error}"[:200]  # numpy would advise to unpickle it
        raise UserError(f"--dataset {path}: not an array that numpy.save wrote, or a damaged one{reason}") from error
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise UserError(
            f"--dataset {path}: must be uint8 (N, {SIZE}, {SIZE}, 3), colours from 0 to 255, "
            f"got {images.dtype} {images.shape}; convert it first"
        )
    return images.transpose(0, 3, 1, 2)


def _read_folder(folder: str) -> np.ndarray:
    images, left_out = [], []
    paths = list(_find_files(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pictures that are read all the same
        for path in tqdm(paths, desc="reading images", unit=" images", delay=1, disable=distributed.hides_bars()):
            try:
                images.append(read_image(path))
            except Exception as error:  # there is no end of what damaged bytes make Pillow raise
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
                left_out.append(f"{os.path.relpath(path, folder)} ({reason[:100] or type(error).__name__})")
    if left_out:
        more = len(left_out) - NAMED_IN_WARNING
        names = [*left_out[:NAMED_IN_WARNING], *([f"and {more:,} more"] if more > 0 else [])]
        warn(f"--dataset {folder}: left out {counted(len(left_out), 'file')}: {', '.join(names)}")
    return np.stack(images) if images else np.empty((0, 3, SIZE, SIZE), np.uint8)


def _find_files(folder: str) -> Iterator[str]:
    """The files in a folder and those within it, in an order that their names decide; hidden ones are left out.

    Links are followed, but no folder is entered twice, and no run folder.
    """

    def tell(error: OSError) -> None:
        warn(f"left out {error.filename}: {error.strerror}")

    entered = set()
    for parent, folders, names in os.walk(folder, onerror=tell, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered or MARK in names:  # a run folder holds no images to train on
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def read_image(path: str) -> np.ndarray:
    """The middle of a picture, as large a square as there is, upright, in colour, on white where it is transparent.

    Returns:
        uint8 (3, 32, 32); of a picture of 32 x 32, its own pixels.

    Raises:
        OSError, ValueError and others: there is none, or it is damaged.
    """
    if not os.path.isfile(path):  # to open a pipe could wait forever
        raise OSError("not a file")
    with Image.open(path) as file:
        file.draft(None, (4 * SIZE, 4 * SIZE))  # a JPEG is decoded no larger than is of use
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    image = ImageOps.fit(image.convert("RGBA"), (SIZE, SIZE), Image.Resampling.LANCZOS)
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(on_white.convert("RGB")).transpose(2, 0, 1)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, which Pillow would clip at 255."""
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"greys from {grey.min()} to {grey.max()}, not of 8 or 16 bits")
    return Image.fromarray(np.rint(grey / 257).astype(np.uint8))
