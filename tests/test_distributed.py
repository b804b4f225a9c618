"""Several processes: the same weights on all, those of a single process, and no hang when one of them ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.run import checkpoint
from common.run.checkpoint import Checkpoint
from tests.conftest import PATIENCE, ROOT, run_stage, wait_for_checkpoint
from tests.test_training import assert_same
from tests.train_ranks import train_rank

A = "part_a_cifar"
Results = tuple[dict[str, Tensor], list[dict[str, float]], Tensor, Tensor]  # weights, log, measures, shares in them


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


@contextmanager
def started(count: int, *command: object) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes that torchrun would start, without torchrun, which would end all when one has ended."""
    port = free_port()
    ranks = []
    for rank in range(count):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, "MASTER_ADDR": "localhost", **{name: str(value) for name, value in group.items()}}
        words = [sys.executable, *(str(word) for word in command)]
        ranks.append(
            subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        yield ranks
    finally:
        for rank_ in ranks:
            rank_.kill()
            rank_.communicate()


def run(count: int, *command: object) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each rank."""
    with started(count, *command) as ranks:
        outputs = [rank.communicate(timeout=PATIENCE) for rank in ranks]
        return [(rank.returncode, *output) for rank, output in zip(ranks, outputs)]


def run_stage_a(count: int, *words: object) -> None:
    """Of several processes, rank 0 alone writes to stdout; a single one needs no new Python."""
    if count == 1:
        assert run_stage(A, *words) == 0
        return
    for rank, (status, output, error) in enumerate(run(count, f"{A}.py", *words)):
        assert status == 0, error
        assert bool(output) == (rank == 0)
        assert "warning" not in error


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a single process leaves behind."""
    folder = tmp_path_factory.mktemp("one")
    train_rank(folder)
    return torch.load(folder / "rank0.pt")


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what three processes leave behind."""
    folder = tmp_path_factory.mktemp("three")
    for status, _, error in run(3, "-m", "tests.train_ranks", folder):
        assert status == 0, error
    return folder


def test_weights_are_the_same_on_every_rank_and_those_of_a_single_process(
    of_three: Path, of_one_process: Results
) -> None:
    expected, log, measures, _ = of_one_process
    (weights, log_0, *_), *others = results = [torch.load(of_three / f"rank{rank}.pt") for rank in range(3)]
    for other, *_ in others:
        assert largest_difference(other, weights) == 0
    assert largest_difference(weights, expected) < 2e-5  # after twelve steps of up to 1e-3
    for row, expected_row in zip(log_0, log, strict=True):
        assert (row["epoch"], row["step"]) == (expected_row["epoch"], expected_row["step"])
        for name in ("train_loss", "held_out_loss"):
            assert row[name] == pytest.approx(expected_row[name], rel=1e-4)
    for *_, measured, _ in results:
        assert torch.equal(measured, measures)
    names = {path.name for path in (of_three / "run").rglob("*.*")}
    assert names == {"checkpoint.pt", "log.csv", "data.png"}


def test_measuring_and_sampling_are_shared_out(of_three: Path, of_one_process: Results) -> None:
    shares = torch.stack([torch.load(of_three / f"rank{rank}.pt")[-1] for rank in range(3)])
    assert torch.equal(shares.sum(dim=0), of_one_process[-1])
    assert (shares > 0).all()


def test_gradients_that_overflow_fp16_on_one_rank_are_skipped_by_all(of_three: Path) -> None:
    first, last = (torch.load(of_three / f"overflow{rank}.pt") for rank in (0, 2))
    assert_same(first, last)
    assert first["scaler"]["scale"] == 2**15
    assert first["optimizer"][0]["step"] == 2


def test_a_checkpoint_of_two_processes_goes_on_with_three_or_one(tmp_path: Path, shapes_dir: Path) -> None:
    def train(count: int, folder: Path, max_steps: int) -> Checkpoint:
        common = ("--data-dir", shapes_dir, "--run-dir", folder, "--precision", "fp32", "--sample-every", 0)
        options = ("--dataset", "shapes", "--batch-size", 12, "--resume", "--max-steps", max_steps)
        run_stage_a(count, "train", *common, *options)
        return checkpoint.load(folder / "checkpoint.pt", A)

    begun = train(2, tmp_path / "two", 3)
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    three, one, uncut = (train(n, tmp_path / name, 6) for n, name in [(3, "three"), (1, "one"), (1, "uncut")])
    assert begun["progress"]["seen"] == 36
    for resumed in (three, one):
        assert resumed["progress"]["step"] == 6
        assert resumed["progress"]["loss_sum"] == pytest.approx(uncut["progress"]["loss_sum"], rel=1e-4)
        moved, apart = (
            sum((resumed["model"][name] - other["model"][name]).square().sum() for name in resumed["model"]) ** 0.5
            for other in (begun, uncut)
        )
        assert apart < 0.1 * moved  # Adam makes much of rounding errors of gradients near zero


LOAD = """
import hashlib, sys
from pathlib import Path
from common.run import distributed
from common.run.datasets import load_images
distributed.start()
place = sys.argv[1] if distributed.RANK == 0 else "not on this machine"
for train in (True, False):
    images = load_images(place, Path(sys.argv[2]), train=train)
    print(tuple(images.shape), hashlib.sha256(images.numpy().tobytes()).hexdigest())
distributed.stop()
"""


def test_own_images_are_read_once_and_are_the_same_on_every_rank(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (250, 32, 32, 3)).astype(np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    (status, first, error), *others = run(2, "-c", LOAD, tmp_path / "a.npy", tmp_path)
    assert (status, error) == (0, "")
    assert "(150, 3, 32, 32)" in first
    assert others == [(0, first, "")]


def test_torchrun_runs_a_stage(tmp_path: Path, shapes_dir: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [f"{A}.py", "train", "--dataset", "shapes", "--data-dir", str(shapes_dir), "--run-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--batch-size", "4", "--max-steps", "2"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert done.stdout.count("\n") == 3
    assert checkpoint.load(tmp_path / "checkpoint.pt", A)["progress"]["step"] == 2


def test_what_several_processes_cannot_do_is_refused_by_all(tmp_path: Path) -> None:
    for rank, (status, output, error) in enumerate(
        run(2, f"{A}.py", "train", "--run-dir", tmp_path, "--batch-size", 9)
    ):
        assert (status, output) == (2, ""), error
        assert f"rank {rank}: error: argument --batch-size" in error.splitlines()[-1]


def test_an_error_of_rank_0_ends_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    for rank, (status, _, error) in enumerate(run(2, f"{A}.py", "test", "--run-dir", tmp_path)):
        assert status == 1
        reason = "another process of this run has ended" if rank else str(tmp_path / "checkpoint.pt")
        assert f"rank {rank}: error: {reason}" in error.splitlines()[-1]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_dies_the_other_ends_with_an_error(tmp_path: Path, shapes_dir: Path, victim: int) -> None:
    common = ("--dataset", "shapes", "--data-dir", shapes_dir, "--run-dir", tmp_path, "--batch-size", 4)
    with started(2, f"{A}.py", "train", *common, "--checkpoint-every", 1) as ranks:
        assert ranks[0].stdout is not None
        assert "2 processes" in ranks[0].stdout.readline()
        wait_for_checkpoint(tmp_path, ranks[0])
        ranks[victim].kill()
        _, error = ranks[1 - victim].communicate(timeout=PATIENCE)
        assert ranks[1 - victim].returncode == 1
        assert f"rank {1 - victim}: error: another process" in error.splitlines()[-1]
        assert "Traceback" not in error


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path, shapes_dir: Path) -> None:
    common = ("--dataset", "shapes", "--data-dir", shapes_dir, "--run-dir", tmp_path, "--batch-size", 4)
    with started(2, f"{A}.py", "train", *common, "--checkpoint-every", 1) as ranks:
        wait_for_checkpoint(tmp_path, ranks[0])
        ranks[1].send_signal(signal.SIGTERM)
        for rank in ranks:
            assert rank.wait(timeout=PATIENCE) == 143


def test_pictures_are_the_same_however_many_processes_draw_them(tmp_path: Path, shapes_dir: Path) -> None:
    common = ("--dataset", "shapes", "--data-dir", shapes_dir, "--run-dir", tmp_path, "--batch-size", 4)
    assert run_stage(A, "train", *common, "--max-steps", 2) == 0
    pictures = []
    for count in (1, 3):
        output, strip = tmp_path / f"{count}.png", tmp_path / f"{count}-strip.png"
        options = ("--num-images", 9, "--batch-size", 2, "--sampler", "ddim", "--steps", 3)
        files = ("--output", output, "--trajectory", strip, "--save-images", tmp_path / f"{count} single")
        run_stage_a(count, "test", "--run-dir", tmp_path, *options, *files)
        single = sorted((tmp_path / f"{count} single").iterdir())
        pictures.append([path.read_bytes() for path in (output, strip, *single)])
        assert len(single) == 9
    assert pictures[0] == pictures[1]
