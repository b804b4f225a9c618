"""Own images: what is read of them, what is held out, what is refused, and single images to keep."""

import json
import math
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.diffusion import NoiseSchedule
from common.likelihood import held_out_draws, loss_by_quarter
from common.run import checkpoint
from common.run.datasets import load_images
from common.run.errors import UserError
from common.run.evaluate import measure_losses, repeated
from common.run.own_images import _read_place, read_image
from common.run.trainer import Run
from tests.conftest import fails, run_stage

A = "part_a_cifar"


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> None:
    _read_place.cache_clear()


def random_array(count: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """230 images of 32 x 32, all different."""
    return random_array(230)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    """The same images as PNGs, in three folders."""
    top = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(pixels):
        path = top / f"kind {number // 100}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return top


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("array") / "pictures.npy"
    np.save(path, pixels)
    return path


def load(place: Path) -> tuple[Tensor, Tensor]:
    """Training images and held-out ones."""
    return load_images(str(place), Path("no data")), load_images(str(place), Path("no data"), train=False)


def rows(images: Any) -> set[bytes]:
    return {np.ascontiguousarray(image).tobytes() for image in images}


# What is read


def test_folder_and_array_of_the_same_images_are_the_same_data_set(folder: Path, array: Path, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "pictures.npz", anything=np.load(array))
    loaded = [load(place) for place in (folder, array, tmp_path / "pictures.npz")]
    for train, held_out in loaded:
        assert (train.shape, held_out.shape) == ((130, 3, 32, 32), (100, 3, 32, 32))
        assert train.dtype == held_out.dtype == torch.uint8
        assert torch.equal(train, loaded[0][0])
        assert torch.equal(held_out, loaded[0][1])
    assert not Path("no data").exists()


@pytest.mark.parametrize(("count", "held_out"), [(200, 100), (999, 100), (1009, 100), (2345, 234)])
def test_one_in_ten_is_held_out_and_at_least_a_hundred(tmp_path: Path, count: int, held_out: int) -> None:
    pixels = random_array(count)
    np.save(tmp_path / "a.npy", pixels)
    parts = load(tmp_path / "a.npy")
    assert [len(part) for part in parts] == [count - held_out, held_out]
    together = rows(torch.cat(parts).permute(0, 2, 3, 1).numpy())
    assert together == rows(pixels)
    assert len(together) == count


def test_held_out_images_come_from_everywhere_in_any_order(tmp_path: Path) -> None:
    """Also the first few of them, which is all that some numbers are measured on."""
    pixels = np.empty((2000, 32, 32, 3), np.uint8)
    pixels[:] = (np.arange(2000) // 200)[:, None, None, None]  # ten classes, one after the other
    np.save(tmp_path / "a.npy", pixels)
    for part in load(tmp_path / "a.npy"):
        assert torch.bincount(part[:200, 0, 0, 0].int(), minlength=10).min() >= 8


def test_pictures_of_32_pixels_are_taken_as_they_are(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    assert (read_image(str(tmp_path / "a.png")) == pixels[0].transpose(2, 0, 1)).all()


def test_the_middle_square_is_resized_smoothly(tmp_path: Path) -> None:
    wide = np.zeros((64, 200, 3), np.uint8)
    wide[:, 68:132] = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None]  # a ramp in the middle, else black
    for image, axis in ((wide, 2), (wide.transpose(1, 0, 2), 1)):
        Image.fromarray(image).save(tmp_path / "a.png")
        ramp = np.moveaxis(read_image(str(tmp_path / "a.png")), axis, -1)[0, 0]
        assert abs(ramp[2:-2].astype(int) - (np.linspace(2, 253, 32).round()[2:-2])).max() <= 2
    checks = np.indices((256, 256)).sum(axis=0) % 2 * 255  # finer than 32 pixels can show: grey, not black or white
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "a.png")
    assert abs(read_image(str(tmp_path / "a.png")).astype(int) - 127.5).max() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_upright_as_its_camera_says(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32] = (255, 0, 0)
    upright[:32, 32:] = (0, 255, 0)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose, what the camera did
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    seen = read_image(str(tmp_path / "a.jpg")).astype(int)
    assert abs(seen[:, 8, 8] - (255, 0, 0)).max() < 10
    assert abs(seen[:, 8, 24] - (0, 255, 0)).max() < 10
    assert seen[:, 24].max() < 10


COLOUR = (200, 30, 90)
GREY = 84  # how bright that colour is


def plain(mode: str, *colour: int) -> Image.Image:
    return Image.new(mode, (40, 50), colour if len(colour) > 1 else colour[0])


@pytest.mark.parametrize(
    ("image", "name", "seen"),
    [
        (plain("RGB", *COLOUR), "a.jpg", COLOUR),
        (plain("RGB", *COLOUR), "a.webp", COLOUR),
        (plain("RGB", *COLOUR), "a.bmp", COLOUR),
        (plain("RGB", *COLOUR).convert("CMYK"), "a.tif", COLOUR),
        (plain("RGB", *COLOUR).convert("YCbCr"), "a.tif", COLOUR),
        (plain("RGB", *COLOUR).quantize(4), "a.gif", COLOUR),
        (plain("RGB", *COLOUR).quantize(4), "a.png", COLOUR),
        (plain("L", GREY), "a.png", 3 * (GREY,)),
        (plain("1", 1), "a.png", (255, 255, 255)),
        (plain("RGBA", *COLOUR, 255), "a.png", COLOUR),
        (plain("RGBA", 0, 0, 0, 0), "a.png", (255, 255, 255)),
        (plain("RGBA", 0, 0, 0, 51), "a.png", (204, 204, 204)),
        (plain("LA", 0, 0), "a.png", (255, 255, 255)),
        (Image.fromarray(np.full((40, 50), 257 * GREY, np.uint16)), "a.png", 3 * (GREY,)),
        (Image.fromarray(np.full((40, 50), 257 * GREY, np.uint16)), "a.tif", 3 * (GREY,)),
        (Image.fromarray(np.full((40, 50), 257 * GREY, np.int32)), "a.tif", 3 * (GREY,)),
        (plain("RGB", *COLOUR).resize((1, 1)), "a.png", COLOUR),
        (plain("RGB", *COLOUR).resize((3000, 2)), "a.png", COLOUR),
    ],
    ids=lambda value: f"{value.mode}{value.size[0]}" if isinstance(value, Image.Image) else str(value),
)
def test_every_kind_of_picture_becomes_colours_on_white(
    image: Image.Image, name: str, seen: tuple[int, int, int], tmp_path: Path
) -> None:
    image.save(tmp_path / name)
    assert abs(read_image(str(tmp_path / name)).astype(int) - np.reshape(seen, (3, 1, 1))).max() <= 6


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path: Path) -> None:
    plain("P", 0).save(tmp_path / "a.png", transparency=0)
    assert read_image(str(tmp_path / "a.png")).min() == 255


# What is nasty


def bomb(path: Path) -> None:
    """A PNG that says it has 400 million pixels."""
    Image.new("1", (20_000, 20_000)).save(path)


def half(path: Path) -> None:
    Image.fromarray(random_array(1)[0]).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


NASTY: dict[
    str, tuple[Callable[[Path], object], str]
] = {  # how to make a file that is no picture, and what is said of it
    "bomb.png": (bomb, "exceeds limit"),
    "half.png": (half, "truncated"),
    "empty.jpg": (Path.touch, "not an image"),
    "notes.txt": (lambda path: path.write_text("these are my pictures"), "not an image"),
    "page.png": (lambda path: path.write_text("<html>404</html>"), "not an image"),
    "loop.png": (link_to_itself, "not a file"),
    "gone.png": (lambda path: path.symlink_to("nowhere.png"), "not a file"),
    "pipe.png": (os.mkfifo if hasattr(os, "mkfifo") else link_to_itself, "not a file"),
    "float.tif": (lambda path: Image.fromarray(np.ones((40, 40), np.float32)).save(path), "greys from 1.0 to 1.0"),
    os.fsdecode(b"caf\xe9\x1b[2J.jpg"): (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0junk"), "caf??[2J.jpg ("),
    "cut.tif": (lambda path: path.write_bytes(b"II*\0\x08\0\0\0\x05\0"), "cut.tif ("),
    "vector.eps": (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n"), "vector.eps ("),
}


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_what_cannot_be_read_is_named_and_left_out(
    name: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "own")
    make, reason = NASTY[name]
    make(tmp_path / "own" / name)
    train, held_out = load(tmp_path / "own")
    assert (len(train), len(held_out)) == (130, 100)
    error = capfd.readouterr().err
    assert error.startswith("warning: ")
    assert "left out 1 file: " in error
    assert reason in error
    assert error.count("\n") == 1
    assert error.strip().isprintable()


def test_many_that_cannot_be_read_are_summed_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "own")
    for number in range(1200):
        (tmp_path / "own" / f"{number:04}.txt").touch()
    assert len(load(tmp_path / "own")[0]) == 130
    error = capsys.readouterr().err
    assert "left out 1200 files: 0000.txt (not an image), 0001.txt" in error
    assert "and 1,195 more" in error
    assert len(error) < 1000


def test_hidden_files_and_links_in_circles_change_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    for hidden in (".DS_Store", "._001.png", ".cache/thumbnail.png"):
        (own / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "kind 0" / "001.png", own / hidden)
    (own / "kind 1" / "up").symlink_to(own)
    (own / "kind 2" / "itself").symlink_to("itself")
    (tmp_path / "link").symlink_to(own)
    for place in (own, tmp_path / "link"):
        assert [len(part) for part in load(place)] == [130, 100]
    assert "itself (not a file)" in capsys.readouterr().err


def test_a_linked_folder_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for kind in folder.iterdir():
        (tmp_path / "own" / kind.name).symlink_to(kind)
    assert torch.equal(load(tmp_path / "own")[1], load(folder)[1])


@pytest.mark.parametrize(
    ("contents", "name", "reason"),
    [
        (np.zeros((300, 28, 28), np.uint8), "a.npy", "must be uint8 (N, 32, 32, 3), colours from 0 to 255, got uint8"),
        (np.zeros((300, 32, 32, 3), np.float32), "a.npy", "got float32 (300, 32, 32, 3)"),
        (np.zeros((300, 3, 32, 32), np.uint8), "a.npz", "got uint8 (300, 3, 32, 32)"),
        (np.zeros((), np.uint8), "a.npy", "got uint8 ()"),
        (np.zeros((199, 32, 32, 3), np.uint8), "a.npy", "199 images there; at least 200 are needed"),
        (np.zeros((0, 32, 32, 3), np.uint8), "a.npy", "0 images there"),
        (np.array([{}]), "a.npy", "not an array that numpy.save wrote"),
        (b"", "a.npy", "not an array"),
        (b"PK\x03\x04junk", "a.npz", "not an array"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 32, 32, 3), }"
         + 31 * b" " + b"\n", "a.npy", "not an array"),
    ],
)  # fmt: skip
def test_an_array_that_does_not_fit_is_refused_in_one_line(
    contents: Any, name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        np.savez(path, contents) if name == "a.npz" else np.save(path, contents, allow_pickle=True)
    error = fails(capsys, 1, A, "train", "--dataset", path, "--run-dir", tmp_path / "run")
    assert reason in error
    assert str(path) in error
    assert "allow_pickle" not in error


def test_several_arrays_in_a_file_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", pixels, pixels)
    with pytest.raises(UserError, match="it holds 2 arrays, not one"):
        load(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("notes.txt", "not an array")
    with pytest.raises(UserError, match="it holds no array"):
        load(tmp_path / "b.npz")


def test_a_run_folder_among_the_images_adds_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    short = ("--dataset", own, "--device", "cpu", "--batch-size", 2, "--max-steps", 1, "--sample-every", 0)
    assert "--run-dir" in fails(capsys, 2, A, "train", *short, "--run-dir", own)
    assert run_stage(A, "train", *short, "--run-dir", own / "run") == 0
    assert (own / "run" / "samples" / "data.png").exists()
    _read_place.cache_clear()
    assert [len(part) for part in load(own)] == [130, 100]


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("place", ["mnist", "pictures.zip", "no\nwhere", os.fsdecode(b"caf\xe9")])
def test_a_place_without_images_is_refused_before_anything_is_made(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures.zip").write_bytes(b"PK")
    assert "argument --dataset: neither a folder nor" in fails(capsys, 2, A, command, "--dataset", place)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures.zip"]


def test_an_empty_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    run = ["--run-dir", tmp_path / "run"]
    assert "0 images there" in fails(capsys, 1, A, "train", "--dataset", tmp_path / "empty", *run)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(("batch_size", "images"), [(128, 77 * 130), (10_001, 77 * 130), (10_011, 78 * 130)])
def test_few_images_are_repeated_so_that_an_epoch_is_no_shorter_than_10_000_or_a_batch(
    batch_size: int, images: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    monkeypatch.setattr("common.run.loop.train", lambda run, images, *arguments, **options: given.append(images))
    words = ("--dataset", folder, "--batch-size", batch_size, "--run-dir", tmp_path, "--no-compile")
    assert run_stage(A, "train", *words) == 0
    different, counts = given[0].unique(dim=0, return_counts=True)
    assert (len(given[0]), len(different)) == (images, 130)
    assert set(counts.tolist()) == {images // 130}


# A run on them


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A run whose data set was named from within the folder above it."""
    run_dir = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(folder.parent)
    try:
        words = ("--dataset", folder.name, "--batch-size", 8, "--max-steps", 2, "--run-dir", run_dir)
        assert run_stage(A, "train", *words) == 0
    finally:
        os.chdir(before)
    return run_dir


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


def saved_dataset(run_dir: Path) -> str:
    return checkpoint.load(run_dir / "checkpoint.pt", A)["training_options"]["dataset"]


def test_a_run_goes_on_and_is_measured_from_another_folder(
    copy: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert saved_dataset(copy) == str(folder)
    assert run_stage(A, "train", "--resume", "--max-steps", 3, "--run-dir", copy) == 0
    assert run_stage(A, "eval", "--num-images", 500, "--run-dir", copy) == 0
    report = json.loads((copy / "eval.json").read_text())
    assert report["dataset"] == str(folder)
    assert (report["loss"]["images"], report["bits_per_dim"]["images"]) == (100, 100)
    assert not (tmp_path / "data").exists()


def test_images_that_have_moved_are_named_anew(
    copy: Path, array: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved: dict[str, Any] = dict(checkpoint.load(copy / "checkpoint.pt", A))
    saved["training_options"]["dataset"] = gone = str(tmp_path / "gone")
    torch.save(saved, copy / "checkpoint.pt")
    for command in ("train --resume", "eval"):
        error = fails(capsys, 2, A, *command.split(), "--run-dir", copy)
        assert f"argument --dataset: neither a folder nor an .npy or .npz file: {gone}" in error
    sampling = ("--steps", 1, "--num-images", 1)
    assert run_stage(A, "test", "--run-dir", copy, *sampling) == 0  # which takes no images
    assert run_stage(A, "train", "--resume", "--max-steps", 3, "--run-dir", copy, "--dataset", array) == 0
    assert saved_dataset(copy) == str(array)


@pytest.mark.parametrize("name", ["cifar10", "shapes"])
def test_own_images_do_not_become_another_data_set(
    name: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, 2, A, "train", "--resume", "--run-dir", run_dir, "--dataset", name)
    assert f"argument --dataset: {name} contradicts" in error


@pytest.mark.skipif(sys.platform != "linux", reason="not every file system takes such a name")
def test_a_folder_may_have_any_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also that of a drawn data set, or one that is no UTF-8."""
    monkeypatch.chdir(tmp_path)
    for place, name in (("./shapes", "shapes"), (os.fsdecode(b"caf\xe9 \x1b[2J"),) * 2):
        shutil.copytree(folder, name)
        words = ("--run-dir", f"run of {name}", "--batch-size", 2)
        assert run_stage(A, "train", "--dataset", place, *words, "--max-steps", 1) == 0
        assert saved_dataset(Path(f"run of {name}")) == str(tmp_path / name)
        assert run_stage(A, "train", "--resume", *words, "--max-steps", 2) == 0
    assert capsys.readouterr().out.count("130 images of ") == 4


def test_seeds_choose_the_first_weights_but_not_what_is_held_out(
    array: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, weights = [], []

    def note(run: Run, images: Tensor, held_out: Tensor, *_: Any, **__: Any) -> None:
        seen.append(held_out)
        weights.append(run.model.get_parameter("conv_in.weight"))

    monkeypatch.setattr("common.run.loop.train", note)
    for seed in (0, 1):
        words = ("--dataset", array, "--run-dir", tmp_path / str(seed), "--seed", seed)
        assert run_stage(A, "train", *words) == 0
    assert torch.equal(*seen)
    assert not torch.equal(*weights)
    assert len(seen[0]) == 2000  # the hundred, twenty times each


# Held-out numbers, whatever the number of images


@pytest.mark.parametrize("count", [2000, 3000, 10_000])
def test_a_whole_number_of_rounds_is_measured_as_it_is(count: int) -> None:
    images = torch.arange(count)
    assert torch.equal(repeated(images, 1000), images)
    losses = torch.rand(count)
    assert loss_by_quarter(losses, 1000) == loss_by_quarter(losses, 1000, count)


@pytest.mark.parametrize("count", [100, 125, 128, 333, 1000, 1999, 2001, 4321])
def test_every_image_meets_time_steps_from_everywhere(count: int) -> None:
    numbers = repeated(torch.arange(count), 1000)
    assert len(numbers) % 1000 == 0
    assert len(numbers) >= max(2000, count)
    assert numbers[:count].tolist() == list(range(count))
    times_used = numbers.bincount(minlength=count)
    assert times_used.max() - times_used.min() <= 1 + len(numbers) // math.lcm(count, 1000)
    by_time = numbers.view(-1, 1000)
    assert (by_time.sort(dim=0).values.diff(dim=0) > 0).all()  # no time step meets an image twice
    if count <= 500:
        t = torch.arange(len(numbers)) % 1000
        for image in (0, count - 1):
            assert (t[numbers == image] // 500).unique().tolist() == [0, 1]


def test_few_images_give_an_unbiased_loss_with_an_honest_error() -> None:
    """The means of many draws of 100 images scatter no more than their standard errors say, and not far less."""
    generator = torch.Generator().manual_seed(0)
    by_time = 1 / (1 + torch.arange(1000) / 50)
    estimates = []
    for _ in range(300):
        busy = torch.rand(100, generator=generator) + 0.5  # how hard an image is, at all time steps
        noise = 1 + 0.05 * torch.randn(2000, generator=generator)
        estimates.append(loss_by_quarter(repeated(busy, 1000) * by_time.repeat(2) * noise, 1000, 100)[0])
    means = torch.tensor([estimate.mean for estimate in estimates])
    claimed = torch.tensor([estimate.standard_error for estimate in estimates]).mean().item()
    assert means.mean().item() == pytest.approx(by_time.mean().item(), abs=4 * claimed / math.sqrt(300))
    assert 0.9 * means.std().item() < claimed < 3 * means.std().item()


def test_each_measurement_has_noise_of_its_own() -> None:
    images = repeated(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), 1000)
    noise = torch.cat([held_out_draws(images, start, NoiseSchedule())[2] for start in (0, 250, 1000)])
    assert len(noise[:, 0, 0, 0].unique()) == 750
    losses = measure_losses(lambda xt, t: xt, NoiseSchedule(), images)
    assert losses.shape == (2000,)


# Single images


def test_single_images_are_those_of_the_grid(run_dir: Path, tmp_path: Path) -> None:
    words = ("--run-dir", run_dir, "--num-images", 5, "--steps", 2, "--output", tmp_path / "grid.png")
    (tmp_path / "single").mkdir()  # empty, and so taken
    assert run_stage(A, "test", *words, "--save-images", tmp_path / "single") == 0
    single = sorted((tmp_path / "single").iterdir())
    assert [path.name for path in single] == [f"{number:04}.png" for number in range(5)]
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    for number, path in enumerate(single):
        image = np.asarray(Image.open(path))
        row, column = divmod(number, 3)
        assert (grid[2 + 34 * row :, 2 + 34 * column :][:32, :32] == image).all()
        assert (read_image(str(path)) == image.transpose(2, 0, 1)).all()  # so they can be trained on


def test_what_lies_in_a_folder_of_single_images_stays(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.run.test.draw", lambda *_: pytest.fail("drawn"))
    for name in ("0000.png", "letter.txt"):
        folder = tmp_path / name.replace(".", " ")
        folder.mkdir()
        (folder / name).write_text("mine")
        for place in (folder, folder / name):
            error = fails(capsys, 2, A, "test", "--run-dir", run_dir, "--save-images", place)
            assert re.search(rf"argument --save-images: {re.escape(str(place))} .*name a new folder", error)
        assert (folder / name).read_text() == "mine"
    file = tmp_path / "letter txt" / "letter.txt"
    assert str(file) in fails(capsys, 1, A, "test", "--run-dir", run_dir, "--save-images", file / "new")


# Advice


def test_eval_gives_no_advice_that_it_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run-dir", tmp_path / "run", "--data-dir", tmp_path / "data", "--data-url", "http://127.0.0.1:9/no"]
    error = fails(capsys, 1, A, "eval", "--pretrained", *words)
    assert "or train on the data set that needs no download, with train --dataset shapes" in error
    assert str(words[-1]) in error
