"""The command line: every documented command, what a run leaves behind, and one line for every mistake."""

import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from common.run import checkpoint
from common.run.errors import UsageError
from common.run.options import Stage, make_parser, parse
from common.training import Trainer
from tests.conftest import STAGES, fails, run_stage

A, B, C, D, E, F, G = STAGES

COMMANDS = """
part_a_cifar.py train
part_a_cifar.py train --batch-size 128 --lr 1e-3 --epochs 80
part_a_cifar.py test
part_b_cifar_more_channels.py train
part_b_cifar_more_channels.py train --batch-size 128 --lr 1e-3 --epochs 120 --model-channels 32
part_b_cifar_more_channels.py test --model-channels 32
part_c_cifar_silu.py train
part_c_cifar_silu.py train --batch-size 128 --lr 1e-3 --epochs 120 --model-channels 32 --activation silu
part_c_cifar_silu.py test --model-channels 32 --activation silu
part_d_cifar_arch.py train
part_d_cifar_arch.py train --batch-size 128 --lr 1e-3 --epochs 120 --model-channels 32 --activation silu
part_d_cifar_arch.py test --model-channels 32 --activation silu
part_e_cifar_deeper.py train
part_e_cifar_deeper.py train --batch-size 128 --lr 1e-3 --epochs 120 --model-channels 32 --activation silu --num-res-blocks 2 --channel-mult 2 2 2 1
part_e_cifar_deeper.py test --model-channels 32 --activation silu --num-res-blocks 2 --channel-mult 2 2 2 1
part_f_cifar_hflips.py train --hflip
part_f_cifar_hflips.py train --batch-size 128 --lr 1e-3 --epochs 120 --model-channels 32 --activation silu --num-res-blocks 2 --channel-mult 2 2 2 1 --hflip
part_f_cifar_hflips.py test --model-channels 32 --activation silu --num-res-blocks 2 --channel-mult 2 2 2 1 --hflip
part_g_cifar.py train
part_g_cifar.py train --batch-size 128 --lr 1e-3 --epochs 10
part_g_cifar.py test
"""  # noqa: E501


@pytest.mark.parametrize("stage", STAGES)
def test_documented_commands_run(
    stage: str, tmp_path: Path, shapes_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a first step on two images of the batch of 128."""
    step = Trainer.gradient_step
    monkeypatch.setattr(Trainer, "gradient_step", lambda self, *batch: step(self, *(part[:2] for part in batch)))
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in COMMANDS.splitlines() if line.startswith(f"{stage}.py ")]
    assert [command[1] for command in commands] == ["train", "train", "test"]
    short, spelled_out = (vars(parse(importlib.import_module(stage).stage, words)[0]) for _, *words in commands[:2])
    assert spelled_out == {**short, "epochs": 10 if stage == G else short["epochs"]}
    suffix = ["--dataset", "shapes", "--data-dir", str(shapes_dir), "--max-steps", "1"]
    assert run_stage(stage, *commands[0][1:], *suffix) == 0
    assert run_stage(stage, *commands[2][1:], "--num-images", "4", "--sampler", "ddim", "--steps", "3") == 0
    folder = Path("runs") / stage
    assert str(folder / "samples.png") in capsys.readouterr().out
    assert Image.open(folder / "samples.png").size == (70, 70)
    saved = checkpoint.load(folder / "checkpoint.pt", stage)
    assert saved["progress"]["step"] == 1
    options = saved["training_options"]
    assert options["epochs"] == (80 if stage == A else 120)
    assert (options["dataset"], options["batch_size"], options["lr"]) == ("shapes", 128, 1e-3)
    assert options["hflip"] == (stage in (F, G))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path) -> Path:
    """A run of stage E, two steps old, that differs from the defaults in a few options."""
    folder = tmp_path_factory.mktemp("runs") / "e"
    status = run_stage(
        E, "train", "--dataset", "shapes", "--data-dir", shapes_dir, "--run-dir", folder, "--max-steps", 2,
        "--model-channels", 32, "--channel-mult", 1, 2, "--num-res-blocks", 1, "--batch-size", 4, "--lr", "3e-4",
        "--seed", 7, "--epochs", 5,
    )  # fmt: skip
    assert status == 0
    return folder


def test_a_resumed_run_keeps_its_precision_and_says_how_to_go_on(
    tmp_path: Path, shapes_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data-dir", shapes_dir, "--run-dir", tmp_path / "a run", "--checkpoint-every", 1, "--no-compile")
    new = ("--dataset", "shapes", "--batch-size", 2, "--precision", "bf16")
    assert run_stage(A, "train", *words, *new, "--max-steps", 1) == 0
    assert run_stage(A, "train", *words, "--resume", "--max-steps", 2) == 0
    output = capsys.readouterr().out
    assert output.count("cpu in bf16") == 2
    assert output.count("go on with: the same command, with --resume, without --overwrite and --max-steps") == 2


def test_run_folder_holds_what_is_promised(run_dir: Path) -> None:
    files = sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())
    assert [name for name in files if name != "samples.png"] == [
        ".run.lock", "checkpoint.pt", "log.csv", "samples/data.png",
    ]  # fmt: skip
    assert Image.open(run_dir / "samples" / "data.png").size == (274, 274)


def test_test_draws_64_images_without_any_model_option(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "grid.png"
    assert run_stage(E, "test", "--run-dir", run_dir, "--sampler", "ddim", "--steps", 2, "--output", output) == 0
    assert Image.open(output).size == (274, 274)
    assert Image.open(output).mode == "RGB"


def test_test_takes_ema_or_raw_weights_and_a_seed(run_dir: Path, tmp_path: Path) -> None:
    def draw(*options: str | int) -> bytes:
        path = tmp_path / "grid.png"
        common = ("--checkpoint", run_dir / "checkpoint.pt", "--num-images", 2, "--output", path)
        assert run_stage(E, "test", *common, "--sampler", "ddim", "--steps", 2, *options) == 0
        return path.read_bytes()

    assert draw() == draw("--weights", "ema", "--seed", 0)
    assert len({draw(), draw("--weights", "raw"), draw("--seed", 1), draw("--steps", 3)}) == 4


def test_ddpm_takes_a_thousand_steps_by_default(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []

    def ddpm(model: Any, schedule: Any, xt: torch.Tensor, generator: Any, steps: int) -> Any:
        drawn.append((schedule.steps, steps))
        yield xt

    monkeypatch.setattr("common.run.pictures.ddpm", ddpm)
    assert run_stage(E, "test", "--run-dir", run_dir, "--num-images", 1, "--output", tmp_path / "grid.png") == 0
    assert drawn == [(1000, 1000)]
    assert "1 image by ddpm in 1000 steps, ema weights" in capsys.readouterr().out


def test_film_and_trajectory_are_of_the_pictures_in_the_grid(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, film, trajectory = (tmp_path / name for name in ("grid.png", "film.webp", "trajectory.png"))
    options = ("--run-dir", run_dir, "--num-images", 9, "--sampler", "ddim", "--steps", 20)
    assert run_stage(E, "test", *options, "--output", grid, "--film", film, "--trajectory", trajectory) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(grid), str(film), str(trajectory)]
    assert Image.open(film).size == Image.open(grid).size
    final, strip = (np.asarray(Image.open(path)) for path in (grid, trajectory))
    assert strip.shape == (2 + 8 * 34, 2 + 10 * 34, 3)
    for row in range(8):
        drawn = final[2 + 34 * (row // 3) :, 2 + 34 * (row % 3) :][:32, :32]
        assert (strip[2 + 34 * row :, 2 + 34 * 9 :][:32, :32] == drawn).all()


@pytest.fixture
def pretrained(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stage E with the weights of `run_dir` for those that come with the project."""
    path = tmp_path / "weights" / f"{E}.pt"
    path.parent.mkdir()
    checkpoint.save_weights(path, checkpoint.load(run_dir / "checkpoint.pt", E))
    monkeypatch.setattr(Stage, "weights", path)
    monkeypatch.chdir(tmp_path)
    return path


def test_pretrained_weights_draw_what_the_checkpoint_draws(run_dir: Path, pretrained: Path) -> None:
    """Half precision on disk, full in use."""
    assert pretrained.stat().st_size < (run_dir / "checkpoint.pt").stat().st_size / 7
    options = ("--num-images", 2, "--sampler", "ddim", "--steps", 3)
    assert run_stage(E, "test", "--run-dir", run_dir, *options, "--output", "full.png") == 0
    assert run_stage(E, "test", "--pretrained", *options) == 0
    full, half = (np.asarray(Image.open(path)).astype(int) for path in ("full.png", f"runs/{E}/pretrained/samples.png"))
    assert abs(full - half).mean() < 1
    assert [path.name for path in pretrained.parent.iterdir()] == [pretrained.name]


@pytest.mark.parametrize("command", ["test", "eval"])
def test_pretrained_weights_that_are_not_there_are_an_error(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Stage, "weights", tmp_path / "none.pt")
    assert run_stage(E, command, "--pretrained", "--run-dir", tmp_path / "run") == 2
    assert "argument --pretrained: no weights come with" in capsys.readouterr().err
    assert not (tmp_path / "run" / "pretrained").exists()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("--weights raw", "--weights"),
        ("--model-channels 64", "--model-channels"),
        ("--checkpoint x.pt", "--checkpoint"),
    ],
)
@pytest.mark.usefixtures("pretrained")
def test_what_contradicts_pretrained_weights_is_refused(
    arguments: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, 2, E, "test", "--pretrained", *arguments.split())
    assert name in error


def test_a_resumed_run_keeps_its_options_but_for_those_given(run_dir: Path, tmp_path: Path, shapes_dir: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes())
    before = checkpoint.load(folder / "checkpoint.pt", E)
    common = ("--data-dir", shapes_dir, "--run-dir", folder, "--max-steps", 3)
    assert run_stage(E, "train", "--resume", "--lr", "2e-4", "--model-channels", 32, *common) == 0
    after = checkpoint.load(folder / "checkpoint.pt", E)
    assert after["model_options"] == before["model_options"]
    assert after["training_options"] == {**before["training_options"], "lr": 2e-4}
    assert after["progress"]["step"] == 3


@pytest.mark.parametrize("command", ["test", "train --resume"])
@pytest.mark.parametrize(
    ("option", "now", "then"),
    [
        ("--model-channels 64", "64", "32"),
        ("--activation relu", "relu", "silu"),
        ("--num-res-blocks 2", "2", "1"),
        ("--channel-mult 2 2 2 1", "2 2 2 1", "1 2"),
    ],
)
def test_an_option_that_contradicts_the_checkpoint_is_refused(
    run_dir: Path, command: str, option: str, now: str, then: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run_dir / "checkpoint.pt").read_bytes()
    error = fails(capsys, 2, E, *command.split(), *option.split(), "--run-dir", run_dir)
    assert option.split()[0] in error
    assert f"{now} contradicts" in error
    assert f"with {then}" in error
    assert (run_dir / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("option", ["--seed 8", "--dataset cifar10"])
def test_a_resumed_run_keeps_its_seed_and_its_data_set(
    run_dir: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(E, "train", "--resume", *option.split(), "--run-dir", run_dir) == 2
    assert option.split()[0] in capsys.readouterr().err


def test_cifar10_trains(tmp_path: Path, cifar10_dir: Path) -> None:
    common = ("--data-dir", cifar10_dir, "--run-dir", tmp_path, "--batch-size", 8)
    assert run_stage(A, "train", "--max-steps", 1, *common) == 0
    assert np.asarray(Image.open(tmp_path / "samples" / "data.png")).std() > 30


def test_compiled_model_learns_what_the_plain_one_does(
    tmp_path: Path, shapes_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself is replaced by one that only notes that it was asked; names of the weights stay."""
    compiled: list[nn.Module] = []

    def note(model: nn.Module, **options: object) -> None:
        compiled.append(model)

    monkeypatch.setattr(nn.Module, "compile", note)
    common = ("--dataset", "shapes", "--data-dir", shapes_dir, "--batch-size", 2, "--max-steps", 2)
    assert run_stage(A, "train", *common, "--run-dir", tmp_path / "plain", "--no-compile") == 0
    assert not compiled
    assert run_stage(A, "train", *common, "--run-dir", tmp_path / "compiled", "--compile") == 0
    assert len(compiled) == 1
    plain, other = (checkpoint.load(tmp_path / name / "checkpoint.pt", A)["model"] for name in ("plain", "compiled"))
    assert all(torch.equal(plain[key], other[key]) for key in plain)
    assert run_stage(A, "test", "--compile", "--run-dir", tmp_path / "plain", "--num-images", 1, "--steps", 1) == 0
    assert len(compiled) == 2


MISTAKES = [
    (A, "paint", "paint"),
    (A, "train --epochs 0", "--epochs"),
    (A, "train --epochs 1.5", "--epochs"),
    (A, "train --batch-size -1", "--batch-size"),
    (A, "train --batch-size many", "--batch-size"),
    (A, "train --lr 0", "--lr"),
    (A, "train --lr nan", "--lr"),
    (A, "train --ema-decay 1", "--ema-decay"),
    (A, "train --ema-decay -0.1", "--ema-decay"),
    (A, "train --max-steps 0", "--max-steps"),
    (A, "train --sample-every -1", "--sample-every"),
    (A, "train --checkpoint-every 0", "--checkpoint-every"),
    (A, "train --seed -1", "--seed"),
    (A, "train --data-url file:///etc/passwd", "--data-url"),
    (A, "train --device abacus", "--device"),
    (A, "train --precision fp8", "--precision"),
    (A, "train --resume --overwrite", "--overwrite"),
    (A, "train --model-channels 32", "--model-channels"),
    (A, "train --hflip", "--hflip"),
    (A, "train --epochs 10000000000", "--epochs"),
    (A, "train --batch-size 50001", "--batch-size"),
    (A, "train --fid 100", "--fid"),
    (B, "train --model-channels 1056", "--model-channels"),
    (B, "train --model-channels 0", "--model-channels"),
    (B, "train --model-channels 48", "--model-channels: must be a multiple of 32"),
    (A, "train --norm-groups 0", "--norm-groups"),
    (A, "train --norm-groups 32", "--norm-groups: 16 channels cannot be split into 32 groups"),
    (A, "test --norm-groups few", "--norm-groups"),
    (G, "train --norm-groups 12", "--norm-groups"),
    (C, "train --activation tanh", "--activation"),
    (E, "train --num-res-blocks 0", "--num-res-blocks"),
    (E, "train --channel-mult", "--channel-mult"),
    (E, "train --channel-mult 2 0", "--channel-mult"),
    (E, "train --channel-mult 1 1 1 1 1 1 1", "--channel-mult"),
    (G, "train --attention-resolutions 7", "--attention-resolutions"),
    (E, "train --num-res-blocks 1000000", "--num-res-blocks"),
    (E, "train --channel-mult 17", "--channel-mult"),
    (A, "test --num-images 0", "--num-images"),
    (A, "test --num-images 1000000", "--num-images"),
    (A, "test --seed 1.5", "--seed"),
    (A, "test --seed 99999999999999999999", "--seed"),
    (A, "test --exact", "--exact"),
    (A, "test --steps 0", "--steps"),
    (A, "test --sampler ddpm --steps 1001", "--steps"),
    (A, "test --sampler euler", "--sampler"),
    (A, "test --weights best", "--weights"),
    (A, "test --batch-size 0", "--batch-size"),
    (A, "test --output grid.jpg", "--output"),
    (A, "test --output no/such/folder/grid.png", "--output"),
    (A, "test --film film.mp4", "--film"),
    (A, "test --trajectory strip.jpg", "--trajectory"),
    (A, "eval --num-images 1", "--num-images"),
    (A, "eval --num-images 10001", "--num-images"),
    (A, "eval --fid 1", "--fid"),
    (A, "eval --fid all", "--fid"),
    (A, "eval --fid-network classifier", "--fid-network"),
    (A, "eval --steps 1001", "--steps"),
    (A, "test --dataset shapes", "--dataset"),
    (A, "test --save-images", "--save-images"),
]


@pytest.mark.parametrize(("stage", "arguments", "name"), MISTAKES, ids=lambda value: str(value) or "nothing")
def test_a_mistake_ends_in_one_line_that_names_the_option(
    stage: str,
    arguments: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert name in fails(capsys, 2, stage, *arguments.split())
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_whatever_an_option_is_given_it_is_taken_or_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(STAGES))
    command = data.draw(st.sampled_from(["train", "test", "eval"]))
    parser = make_parser(importlib.import_module(name).stage)[1][["train", "test", "eval"].index(command)]
    options = [option for option in parser._option_string_actions if option.startswith("--") and option != "--help"]
    option = data.draw(st.sampled_from(options))
    value = data.draw(st.text() | st.integers().map(str) | st.floats().map(str))
    typed, refusal = set(), ""
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            typed = parse(importlib.import_module(name).stage, [command, f"{option}={value}"])[1].keys() - {"command"}
        except UsageError as usage_error:
            refusal = str(usage_error)
    assert option in refusal or typed == {option.removeprefix("--").replace("-", "_")}
    assert error.getvalue() == ""


@pytest.mark.parametrize("command", ["test", "train --resume"])
@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("ema", {"out.2.bias": None}, "out.2.bias"),
        ("ema", {"out.2.bias": torch.zeros(4)}, "out.2.bias"),
        ("ema", {"out.2.bias": torch.tensor([0, 0, torch.nan])}, "not finite"),
        ("ema", {"out.2.bias": "zeros"}, "out.2.bias"),
        ("ema", {"another": torch.zeros(3)}, "another"),
        ("model_options", {"model_channels": 33}, "dim must be even"),
        ("model_options", {"model_channels": 10**12}, "damaged"),
        ("model_options", {"channel_mult": None}, "input_blocks"),  # then its default, which the weights do not fit
        ("model_options", {"activation": "tanh"}, "tanh"),
        ("model_options", {"color": "red"}, "color"),
        ("model_options", {"channel_mult": 7 * [1]}, "6 levels"),
        ("training_options", {"speed": 1}, "speed"),
        ("progress", {"speed": 1}, "speed"),
    ],
)
def test_a_checkpoint_that_makes_no_sense_is_refused_in_one_line(
    run_dir: Path,
    tmp_path: Path,
    command: str,
    part: str,
    change: dict[str, Any],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    for module in ("train", "evaluate"):
        monkeypatch.setattr(f"common.run.{module}.load_images", lambda *arguments, **options: few)
    saved: dict[str, Any] = dict(checkpoint.load(run_dir / "checkpoint.pt", E))
    changed = {**saved[part], **change}
    saved[part] = {name: value for name, value in changed.items() if value is not None}
    torch.save(saved, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    error = fails(capsys, 1, E, *command.split(), "--run-dir", tmp_path)
    assert reason in error
    assert str(tmp_path / "checkpoint.pt") in error
    assert "\x1b" not in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_an_optimiser_state_of_another_shape_is_refused_before_anything_is_compiled(
    run_dir: Path, tmp_path: Path, shapes_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--compile", "--data-dir", shapes_dir, "--run-dir", tmp_path)
    saved = checkpoint.load(run_dir / "checkpoint.pt", E)
    changes: list[dict[int, Any]] = [{0: {**saved["optimizer"][0], "exp_avg": torch.zeros(3)}}, {0: {}}, {}]
    for change in changes:
        torch.save({**saved, "optimizer": change}, tmp_path / "checkpoint.pt")
        error = fails(capsys, 1, E, "train", "--resume", *common)
        assert str(tmp_path / "checkpoint.pt") in error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS ... out of memory")])
@pytest.mark.parametrize("moved", ["torch.nn.Module.to", "common.run.trainer._fitting_moments"])
def test_a_device_without_room_is_not_blamed_on_the_checkpoint(
    moved: str, error: Exception, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def to(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(moved, to)
    told = fails(capsys, 1, E, "train", "--resume", "--run-dir", run_dir)
    assert "out of memory; try a smaller --batch-size" in told
    assert "checkpoint" not in told


def test_a_foreign_checkpoint_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(A, "test", "--run-dir", run_dir) == 1
    assert E in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("command", ["train", "test", "eval"])
def test_help_lists_every_option_with_its_default(
    stage: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert run_stage(stage, command, "--help") == 0
    entries = re.split(r"\n(?=  -)", capsys.readouterr().out)[2:]  # after the usage and -h
    assert len(entries) >= 12
    for entry in entries:
        assert "default:" in entry, entry
    own = {A: [], B: ["--model-channels"], C: ["--activation"], E: ["--num-res-blocks", "--channel-mult"]}
    own |= {D: own[C], F: [*own[E], "--hflip"], G: [*own[E], "--hflip", "--attention-resolutions"]}
    for option in own[stage]:
        assert any(entry.startswith(f"  {option}") for entry in entries)


@pytest.mark.parametrize("stage", STAGES)
def test_each_script_tells_its_commands_and_its_size(stage: str) -> None:
    module = importlib.import_module(stage)
    assert module.__doc__ is not None
    for command in ("train", "test", "eval"):
        assert f"python {stage}.py {command}" in module.__doc__
    assert f"{sum(p.numel() for p in module.Model().parameters()):,} parameters" in module.__doc__
    assert sys.modules[stage].stage.name == stage


def test_without_a_command_a_script_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(A) == 0
    assert f"python {A}.py train" in capsys.readouterr().out
