"""The data sets' bytes, batches, flips and the way from bytes to numbers and back."""

import functools
import hashlib
import itertools
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from common.data import random_generator, random_hflip, shuffled_batches, to_float, to_uint8
from common.run.datasets import _load_shapes, load_images
from common.run.errors import UserError
from common.run.shapes import KINDS, draw_shapes
from tests.conftest import Attack


def digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_shapes_are_the_same_bytes_everywhere_and_kept_on_disk(shapes_dir: Path) -> None:
    train, held_out = load_images("shapes", shapes_dir), load_images("shapes", shapes_dir, train=False)
    for images, count in ((train, 50_000), (held_out, 10_000)):
        assert images.shape == (count, 3, 32, 32)
        assert images.dtype == torch.uint8
    assert digest(train) == "3b6613a90c443cf6f3d26c016d937e7896ee8c1f8d091a81e598f8dd2e5bd3b0"
    assert digest(held_out) == "35cd411d610225daa3f8a6f4087cb05f5840f6479d5df5ebc0260fa86b3886bd"
    kept = shapes_dir / "shapes.npz"
    written = kept.stat().st_mtime_ns
    _load_shapes.cache_clear()
    assert digest(load_images("shapes", shapes_dir)) == digest(train)
    assert kept.stat().st_mtime_ns == written


def test_shapes_differ_from_picture_to_picture_and_lie_on_a_white_ground() -> None:
    images = draw_shapes(1000)
    assert len(np.unique(images.reshape(1000, -1), axis=0)) == 1000
    share_of_ground = (images == 255).all(axis=1).mean(axis=(1, 2))
    assert 0.3 < share_of_ground.min() < share_of_ground.max() < 0.97
    assert len(KINDS) == 10


def test_damaged_shapes_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.run.datasets.TRAINING_IMAGES", 60)
    monkeypatch.setattr("common.run.datasets.HELD_OUT_IMAGES", 40)

    def load() -> Tensor:
        _load_shapes.cache_clear()
        return load_images("shapes", tmp_path)

    first = load()
    whole = (tmp_path / "shapes.npz").read_bytes()
    middle = len(whole) // 2
    directory = whole.rindex(b"PK\x01\x02")  # 10 bytes on is the compression method, 46 on the name
    flipped = [whole[:n] + bytes([whole[n] ^ 0xFF]) + whole[n + 1 :] for n in (0, directory + 10, directory + 46)]
    for damaged in (b"", b"no archive", whole[:middle], whole[:middle] + b"damage" + whole[middle + 6 :], *flipped):
        (tmp_path / "shapes.npz").write_bytes(damaged)
        assert torch.equal(load(), first)
        assert (tmp_path / "shapes.npz").read_bytes() == whole
    for foreign in (np.zeros(3), np.zeros((100, 3, 32, 32)), np.zeros((99, 3, 32, 32), dtype=np.uint8)):
        np.savez_compressed(tmp_path / "shapes.npz", images=foreign)
        assert torch.equal(load(), first)


def test_cifar10_is_the_published_one(cifar10_dir: Path) -> None:
    train, held_out = load_images("cifar10", cifar10_dir), load_images("cifar10", cifar10_dir, train=False)
    assert digest(train) == "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111"
    assert digest(held_out) == "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56"
    # The mean colour of the training images that every tutorial quotes, which fails if axes are mixed up.
    mean = train.float().mean(dim=(0, 2, 3)) / 255
    np.testing.assert_allclose(mean.numpy(), [0.4914, 0.4822, 0.4465], atol=1e-4)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a web server on this machine that serves the files of `tmp_path`."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_a_failed_download_says_what_can_be_done(tmp_path: Path, server: str) -> None:
    with pytest.raises(UserError) as error:
        load_images("cifar10", tmp_path / "data", data_url=f"{server}/nothing.tar.gz")
    for word in ("--data-url", "cifar-10-python.tar.gz", str(tmp_path / "data"), "--dataset shapes", server):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_an_archive_with_other_bytes_is_refused(tmp_path: Path, server: str) -> None:
    (tmp_path / "other.tar.gz").write_bytes(b"not CIFAR-10")
    with pytest.raises(UserError, match="--data-url"):
        load_images("cifar10", tmp_path / "data", data_url=f"{server}/other.tar.gz")


def test_code_in_the_data_set_is_refused_and_does_not_run(tmp_path: Path, server: str) -> None:
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Attack(tmp_path / "victim")))
    for train in (True, False):
        with pytest.raises(UserError, match="--data-dir"):
            load_images("cifar10", tmp_path / "data", train=train, data_url=f"{server}/nothing.tar.gz")
    assert not (tmp_path / "victim").exists()
    pickle.loads((folder / "data_batch_1").read_bytes())  # the attack is a real one
    assert (tmp_path / "victim").exists()


def test_one_changed_byte_of_the_data_set_is_noticed(tmp_path: Path, server: str, cifar10_dir: Path) -> None:
    shutil.copytree(cifar10_dir / CIFAR10.base_folder, tmp_path / "data" / CIFAR10.base_folder)
    with open(tmp_path / "data" / CIFAR10.base_folder / "test_batch", "r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    for train in (True, False):
        with pytest.raises(UserError, match="--data-dir"):
            load_images("cifar10", tmp_path / "data", train=train, data_url=f"{server}/nothing.tar.gz")


def test_cifar10_comes_from_another_address(
    tmp_path: Path, server: str, cifar10_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published archive cannot be rebuilt bit for bit from its files, so its MD5, alone, is replaced."""
    archive = tmp_path / "mirror.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(cifar10_dir / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    downloaded = load_images("cifar10", tmp_path / "data", train=False, data_url=f"{server}/mirror.tar.gz")
    assert torch.equal(downloaded, load_images("cifar10", cifar10_dir, train=False))


@pytest.mark.parametrize("batch_size", [1, 4, 16, 50])
def test_an_epoch_is_full_batches_of_images_that_come_once(batch_size: int, images: Tensor) -> None:
    """Those that are left out are others in every epoch."""
    every = {image.numpy().tobytes() for image in images}
    left_out = []
    for epoch in range(3):
        batches = list(shuffled_batches(images, batch_size, seed=0, epoch=epoch))
        assert [len(batch) for batch in batches] == 50 // batch_size * [batch_size]
        seen = {image.numpy().tobytes() for batch in batches for image in batch}
        assert len(seen) == 50 // batch_size * batch_size
        assert seen <= every
        left_out.append(every - seen)
    assert all(a != b for a, b in itertools.pairwise(left_out)) or 50 % batch_size == 0


def in_order(images: Tensor, batch_size: int, epoch: int, seed: int = 0, start: int = 0) -> Tensor:
    """The images in the order of an epoch."""
    return torch.cat(list(shuffled_batches(images, batch_size, seed, epoch, start)))


def test_order_depends_on_seed_and_epoch_alone(images: Tensor) -> None:
    def order(seed: int, epoch: int) -> Tensor:
        torch.rand(3)  # whatever else draws
        return in_order(images, 16, epoch, seed)

    assert torch.equal(order(0, 0), order(0, 0))
    assert not torch.equal(order(0, 0), images)
    assert not torch.equal(order(0, 0), order(0, 1))
    assert not torch.equal(order(0, 0), order(1, 0))


def test_an_epoch_goes_on_in_the_middle(images: Tensor) -> None:
    whole, rest = in_order(images, 1, epoch=3), in_order(images, 5, epoch=3, start=16)
    assert torch.equal(rest, whole[16:46])


def test_an_epoch_whose_rest_does_not_fill_a_larger_batch_ends_with_one_all_the_same(images: Tensor) -> None:
    whole, rest = in_order(images, 1, epoch=3), in_order(images, 16, epoch=3, start=40)
    assert torch.equal(rest, whole[-16:])


def test_a_batch_larger_than_the_data_set_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size: must be at most the number of images, 50; got 51"):
        next(shuffled_batches(images, 51, seed=0, epoch=0))


def test_each_image_is_flipped_by_a_coin_of_its_own() -> None:
    images = torch.arange(32.0).expand(2000, 3, 32, 32)
    torch.manual_seed(0)
    flipped = random_hflip(images)
    is_flipped = flipped[:, 0, 0, 0] == 31
    assert torch.equal(flipped, torch.where(is_flipped[:, None, None, None], images.flip(3), images))
    assert 0.46 < is_flipped.float().mean() < 0.54  # 3.6 standard errors
    runs = (is_flipped[1:] != is_flipped[:-1]).float().mean()
    assert 0.46 < runs < 0.54  # neighbours do not depend on each other


def test_bytes_become_numbers_from_minus_1_to_1_and_come_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    numbers = to_float(levels)
    assert numbers.dtype == torch.float32
    assert (numbers.min(), numbers.max()) == (-1, 1)
    assert torch.equal(to_uint8(numbers), levels)
    assert torch.equal(to_uint8(numbers + 0.49 / 127.5)[:-1], levels[:-1])
    assert to_uint8(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


def test_generators_depend_on_every_argument() -> None:
    def draw(seed: int, purpose: str, index: int) -> float:
        return torch.rand((), generator=random_generator("cpu", seed, purpose, index)).item()

    draws = {draw(seed, purpose, index) for seed in (0, 1, 2**63 - 1) for purpose in ("a", "b") for index in (0, 1)}
    assert len(draws) == 12
    assert draw(0, "a", 0) == draw(0, "a", 0)
