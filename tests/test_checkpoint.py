"""Checkpoints are whole, refuse what is not theirs, and run nobody's code."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.run import checkpoint
from common.run.checkpoint import Checkpoint, RunOptions, atomic_write
from common.run.errors import UserError
from common.run.trainer import Run
from part_a_cifar import Model
from tests.conftest import Attack, run_stage


@pytest.fixture(scope="module")
def contents() -> Checkpoint:
    run = Run("part_a_cifar", {"model_channels": 32}, Model(), RunOptions(batch_size=2))
    next(run.steps(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)))
    return run.checkpoint()


def test_the_file_is_on_the_disk_before_it_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append(f"fsync of {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"contents")
    assert calls == ["fsync of 8 bytes", "replace"]


@pytest.mark.parametrize("change", [{"progress": {"speed": 1}}, {"scaler": {"a": object()}}, {"scaler": {"a": len}}])
def test_what_load_would_refuse_never_replaces_a_checkpoint(
    tmp_path: Path, contents: Checkpoint, change: dict[str, Any]
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, contents)
    before = path.read_bytes()
    with pytest.raises(UserError, match="could not be read again"):
        checkpoint.save(path, {**contents, **change})  # type: ignore[typeddict-item]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "part_b_cifar_more_channels"}, "part_b_cifar_more_channels.py, not of part_a_cifar.py"),
        ({"format": 1}, "format 1"),
        ({"optimizer": None}, "lacks optimizer"),
        ({"stage": None}, "not a checkpoint of this project"),
    ],
)
def test_foreign_checkpoints_are_refused(
    tmp_path: Path, contents: Checkpoint, change: dict[str, Any], message: str
) -> None:
    changed = {key: value for key, value in {**contents, **change}.items() if value is not None}
    path = tmp_path / "checkpoint.pt"
    torch.save(changed, path)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load(path, "part_a_cifar")
    assert str(path) in str(error.value)


def test_a_checkpoint_of_the_format_before_is_read(
    tmp_path: Path, contents: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not name what is new since, which has its default."""
    path = tmp_path / "checkpoint.pt"
    torch.save({**contents, "format": 2, "model_options": {}, "training_options": {}, "progress": {"epoch": 3}}, path)
    assert torch.equal(
        checkpoint.load(path, "part_a_cifar")["ema"]["conv_in.weight"], contents["ema"]["conv_in.weight"]
    )
    draw = ("--checkpoint", path, "--num-images", 1, "--steps", 1, "--output", tmp_path / "samples.png")
    assert run_stage("part_a_cifar", "test", *draw) == 0
    assert "after 3 epochs, 0 steps of training" in capsys.readouterr().out
    assert run_stage("part_a_cifar", "test", *draw, "--norm-groups", 16) == 2
    assert f"--norm-groups: 16 contradicts {path}, which was made with the default" in capsys.readouterr().err


def test_damaged_files_are_refused(tmp_path: Path, contents: Checkpoint) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, contents)
    whole = path.read_bytes()
    for damaged in (b"", b"no checkpoint", whole[: len(whole) // 2], whole[:-100], pickle.dumps([1, 2])):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            checkpoint.load(path, "part_a_cifar")
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_changed_bit_is_noticed(tmp_path: Path, contents: Checkpoint) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, contents)
    whole = path.read_bytes()
    weight = contents["ema"]["conv_in.weight"].numpy().tobytes()
    changed = bytearray(whole)
    changed[whole.index(weight) + 5] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match="checksums") as error:
        checkpoint.load(path, "part_a_cifar")
    assert str(path) in str(error.value)


@pytest.fixture(scope="module")
def small_file(contents: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few weights."""
    path = tmp_path_factory.mktemp("small") / "checkpoint.pt"
    few = {name: contents["model"][name] for name in ("conv_in.weight", "conv_in.bias")}
    torch.save({**contents, "model": few, "ema": few, "optimizer": {}}, path)
    return path


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_bytes_there_are_the_answer_is_a_checkpoint_or_one_line(
    tmp_path: Path, small_file: Path, data: st.DataObject
) -> None:
    """Random bytes, and a checkpoint of which a random part is replaced by random bytes."""
    whole = small_file.read_bytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    middle = data.draw(st.binary(max_size=200))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(whole[:start] + middle + whole[end:] if data.draw(st.booleans()) else middle)
    refusal = ""
    try:
        loaded = checkpoint.load(path, "part_a_cifar")
        assert loaded.keys() >= Checkpoint.__required_keys__
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert not refusal or refusal.startswith(str(path))


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path, contents: Checkpoint) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({**contents, "progress": Attack(tmp_path / "victim")}, path)
    with pytest.raises(UserError):
        checkpoint.load(path, "part_a_cifar")
    assert not (tmp_path / "victim").exists()
    torch.load(path, weights_only=False)  # the attack is a real one
    assert (tmp_path / "victim").exists()


def test_a_missing_checkpoint_says_how_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the script as it was typed."""
    monkeypatch.setattr(sys, "argv", ["../part_a_cifar.py"])
    assert run_stage("part_a_cifar", "test", "--run-dir", tmp_path) == 1
    error = capsys.readouterr().err
    assert f"no checkpoint there; make one with: python ../part_a_cifar.py train --run-dir {tmp_path}; or take" in error
    assert "--pretrained" in error
