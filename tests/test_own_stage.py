"""A stage of one's own keeps the promises too, whatever its model is made of."""

import argparse
import random
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.diffusion import NoiseSchedule
from common.run import checkpoint, evaluate
from common.run.cli import main
from common.run.device import in_precision
from common.run.options import OptionGroup, Stage
from common.run.pictures import sample_images
from tests.test_training import assert_same
from tests.tiny_run import Tiny, make_images

Run = Callable[..., int]


class Unusual(nn.Module):
    """Dropout; parameters that are never used, frozen, of other types, infinite or empty; buffers with -inf, or that
    are replaced at every step; a number read while it is built."""

    mask: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.index = nn.Parameter(torch.arange(3), requires_grad=False)
        self.infinite = nn.Parameter(torch.tensor([0.0, -torch.inf]), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0))
        self.wide = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.width = int(torch.full((), 8).item())
        self.net = nn.Sequential(nn.Conv2d(3, self.width, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + 1
        return self.net(x * self.frozen) * torch.softmax(self.mask, dim=0)[0] + self.wide.float()


@pytest.fixture
def run(tmp_path: Path, shapes_dir: Path) -> Callable[[Stage, str], Run]:
    """Runs a command of a stage in a folder of that name."""

    def run_in(stage: Stage, folder: str) -> Run:
        def command(*words: object) -> int:
            data = ["--data-dir", str(shapes_dir)] if words[0] != "test" else []
            with pytest.raises(SystemExit) as exit_:
                main(stage, [*map(str, words), *data, "--run-dir", str(tmp_path / folder), "--device", "cpu"])
            return int(exit_.value.code or 0)

        return command

    return run_in


def add_option(group: OptionGroup) -> None:
    group.add_argument("--tempo", type=int, default=1)


def test_a_training_to_its_end_says_what_comes_next_and_leaves_grids_of_the_averaged_weights(
    tmp_path: Path,
    run: Callable[[Stage, str], Run],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.run.report.GRID_IMAGES", 4)
    monkeypatch.setattr(sys, "argv", ["part_h.py"])
    np.save(tmp_path / "own.npy", np.random.RandomState(0).randint(0, 256, (250, 32, 32, 3)).astype(np.uint8))
    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: Tiny())
    short = ("--dataset", tmp_path / "own.npy", "--batch-size", 5000, "--epochs", 2, "--precision", "fp32")
    for resume in ((), ("--resume",)):
        assert run(stage, "run")("train", *short, "--sample-every", 1, *resume) == 0
        output = capsys.readouterr().out
        assert "checkpoint.pt: 2 of 2 epochs done, 4 steps" in output
        assert f"draw pictures with: python part_h.py test --run-dir {tmp_path / 'run'}" in output
    samples = tmp_path / "run" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["data.png", "epoch-0001.png", "epoch-0002.png"]
    model = Tiny()
    model.load_state_dict(checkpoint.load(tmp_path / "run" / "checkpoint.pt", "part_h")["ema"])
    drawn = sample_images(model, NoiseSchedule(), 4, steps=50, seed=0)
    grid = torch.from_numpy(np.array(Image.open(samples / "epoch-0002.png")))
    assert torch.equal(grid[2:, 2:].unfold(0, 32, 34).unfold(1, 32, 34).reshape(4, 3, 32, 32), drawn)


class Gradientless(Tiny):
    """Parameters that are frozen, or never used."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))
        self.net[0].requires_grad_(False)


def test_a_model_is_trained_sampled_and_measured_in_fp16(
    tmp_path: Path,
    run: Callable[[Stage, str], Run],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "load_images", lambda *arguments, **options: make_images().repeat(50, 1, 1, 1)[:2000])
    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: Gradientless())
    fp16 = ("--precision", "fp16")
    for max_steps in (2, 4):
        assert run(stage, "run")("train", "--dataset", "shapes", "--resume", "--max-steps", max_steps, *fp16) == 0
    assert run(stage, "run")("test", "--steps", 2, "--num-images", 2, *fp16) == 0
    assert run(stage, "run")("eval", "--num-images", 2, *fp16) == 0
    assert "cpu in fp16" in capsys.readouterr().out
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt", "part_h")
    assert saved["scaler"]["_growth_tracker"] == 4


@pytest.mark.parametrize(
    "answer", [lambda x: x[:, :1], lambda x: (x,), lambda x: None, lambda x: x.mean(), lambda x: x.long()]
)
def test_a_model_that_returns_no_noise_is_told_in_one_line(
    answer: Callable[[Tensor], Any],
    tmp_path: Path,
    run: Callable[[Stage, str], Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Wrong(Tiny):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            return answer(super().forward(x, t))

    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: Wrong())
    assert run(stage, "run")("train", "--dataset", "shapes", "--max-steps", 1, "--batch-size", 2) == 1
    error = capsys.readouterr().err
    assert "error: the model must return noise like its images" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("model", [nn.Identity(), Tiny().requires_grad_(False)])
def test_a_model_without_anything_to_train_is_told_in_one_line(
    model: nn.Module, tmp_path: Path, run: Callable[[Stage, str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: model)
    assert run(stage, "run")("train", "--dataset", "shapes", "--max-steps", 1) == 1
    error = capsys.readouterr().err
    assert "error: the model has no parameter that can be trained" in error
    assert error.count("\n") == 1


def test_what_build_model_does_to_its_options_stays_there(tmp_path: Path, run: Callable[[Stage, str], Run]) -> None:
    def build_model(args: argparse.Namespace) -> nn.Module:
        args.sizes.append(1)
        return Tiny()

    def sizes(group: OptionGroup) -> None:
        group.add_argument("--sizes", type=int, nargs="+", default=(2, 2))

    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", build_model, [sizes])
    options = ("--dataset", "shapes", "--batch-size", 4, "--sizes", 3)
    for max_steps in (1, 2, 3):
        assert run(stage, "run")("train", *options, "--resume", "--max-steps", max_steps) == 0


def test_a_default_that_is_a_tuple_is_the_list_that_is_typed(tmp_path: Path, run: Callable[[Stage, str], Run]) -> None:
    def sizes(group: OptionGroup) -> None:
        group.add_argument("--sizes", type=int, nargs="+", default=(2, 2))

    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: Tiny(), [sizes])
    assert run(stage, "run")("train", "--dataset", "shapes", "--batch-size", 4, "--max-steps", 1) == 0
    assert run(stage, "run")("test", "--sizes", 2, 2, "--steps", 1, "--num-images", 1) == 0


def test_options_of_any_kind_come_back_from_the_checkpoint(
    tmp_path: Path, run: Callable[[Stage, str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags, names with an underscore, lists, and options without a default."""

    def add_options(group: OptionGroup) -> None:
        group.add_argument("--wide", action="store_true")
        group.add_argument("--gated", action=argparse.BooleanOptionalAction, default=True)
        group.add_argument("--num_heads", type=int, default=1)
        group.add_argument("--dropout", type=float)
        group.add_argument("--sizes", type=int, nargs="*", default=[])
        group.add_argument("-d", "--deeper", action="count", default=0)
        group.add_argument("--causal", action="store_const", const="causal", default="full")
        group.add_argument("--percent", type=lambda word: int(word) / 100, default=1.0)
        group.add_argument("--extra", type=int, action="append", default=[7])

    built: list[dict[str, Any]] = []

    def build_model(args: argparse.Namespace) -> nn.Module:
        built.append(vars(args))
        return Tiny()

    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", build_model, [add_options])
    options = shlex.split(
        "--wide --no-gated --num_heads 2 --dropout 0.1 --sizes 3 4 -dd --causal --percent 5 --extra 1"
    )
    asked = {"wide": True, "gated": False, "num_heads": 2, "dropout": 0.1, "sizes": [3, 4], "deeper": 2}
    asked |= {"causal": "causal", "percent": 0.05, "extra": [7, 1]}
    command = run(stage, "run")
    assert command("train", *options, "--dataset", "shapes", "--batch-size", 4, "--max-steps", 1) == 0
    assert command("train", "--resume", "--max-steps", 2) == 0
    assert built[-1] == asked
    assert command("test", "--steps", 1, "--num-images", 1, *options) == 0
    assert built[-1] == asked
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt", "part_h")["progress"]["step"] == 2
    assert command("test", "--gated") == 2
    assert "argument --gated: True contradicts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": Path, "default": Path("a.csv")}, ()),  # torch.load refuses it
        ({"default": lambda: 0}, ()),
        ({"default": torch.ones(())}, ()),
        ({"type": argparse.FileType()}, ("--table", __file__)),
    ],
)
def test_an_option_that_a_checkpoint_cannot_carry_is_told_before_training(
    settings: dict[str, Any],
    words: tuple[str, ...],
    tmp_path: Path,
    run: Callable[[Stage, str], Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def add_options(group: OptionGroup) -> None:
        group.add_argument("--table", **settings)

    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: Tiny(), [add_options])
    assert run(stage, "run")("train", "--dataset", "shapes", *words) == 2
    assert "argument --table: a checkpoint cannot carry" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_weights_that_are_not_finite_never_replace_good_ones(
    tmp_path: Path, run: Callable[[Stage, str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of the step that made them is finite, and so is its gradient."""
    command = run(Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: Tiny()), "run")
    assert command("train", "--dataset", "shapes", "--batch-size", 4, "--max-steps", 2) == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert command("train", "--resume", "--lr", "1e39", "--max-steps", 3) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "at step 3, the loss, the weights or Adam's moments are no longer finite, with --lr 1e+39" in error
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (("--lr",), {"type": float}, "every stage has lr already"),
        (("--init",), {"dest": "weights"}, "every stage has weights already"),
        (("--rate",), {"dest": "command"}, "every stage has command already"),
        (("--width",), {"required": True}, "required: --width; give each a default"),
        (("width",), {}, "required: width; give each a default"),
    ],
)
def test_an_option_that_cannot_be_one_of_the_model_is_told_in_one_line(
    names: tuple[str, ...],
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    run: Callable[[Stage, str], Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def add_option(group: OptionGroup) -> None:
        group.add_argument(*names, **settings)

    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: Tiny(), [add_option])
    words = ("--width", "3") if names == ("--width",) else ("3",) if names == ("width",) else ()
    assert run(stage, "run")("train", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


class Special(Tiny):
    """A Tiny with a part of its own, which a subclass adds."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(self.part(x), t)

    def part(self, x: Tensor) -> Tensor:
        return x


class Random(Special):
    """Asks Python and numpy for random numbers."""

    def part(self, x: Tensor) -> Tensor:
        return x * (1 + random.random() + np.random.rand())


class BatchNorm(Special):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def part(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Features(Special):
    """Fixed features that are random, and in no state dict; a weight that numpy has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.randn(3, 1, 1)
        self.weight = nn.Parameter(torch.tensor(np.random.rand()))

    def part(self, x: Tensor) -> Tensor:
        return x * self.features * self.weight


class Codebook(Special):
    """A frozen weight that the model changes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(()), requires_grad=False)

    def part(self, x: Tensor) -> Tensor:
        if self.training:
            self.codes.add_(1)
        return x * self.codes


class Cache(Special):
    """A table made at first use, in no state dict; the buffers after it are others' all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def part(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.full((), 7.0), persistent=False)
        return self.norm(x) + self.table


class InPlace(Special):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x *= 2
        t += 1
        return super().forward(x, t)


class Gaps(Special):
    """A weight that does not lie densely in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.ones(3, 64)[:, ::2])

    def part(self, x: Tensor) -> Tensor:
        return x * self.wide[None, :, :, None]


class NoGaps(Gaps):
    """The same weight, dense."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.ones(3, 32))


def make(model: type[nn.Module], args: argparse.Namespace) -> nn.Module:
    return model()


def test_a_weight_with_gaps_in_memory_is_trained_as_a_dense_one(
    tmp_path: Path, run: Callable[[Stage, str], Run]
) -> None:
    weights = []
    for model in (Gaps, NoGaps):
        stage = Stage(str(tmp_path / "part_h.py"), "Part H.", partial(make, model))
        assert run(stage, model.__name__)("train", "--dataset", "shapes", "--batch-size", 4, "--max-steps", 3) == 0
        weights.append(checkpoint.load(tmp_path / model.__name__ / "checkpoint.pt", "part_h")["model"]["wide"])
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], torch.ones(3, 32))


def test_a_model_may_change_what_it_is_given() -> None:
    x, t = torch.ones(2, 3, 32, 32), torch.arange(2)
    in_precision(InPlace())(x, t)
    assert torch.equal(x, torch.ones(2, 3, 32, 32))
    assert torch.equal(t, torch.arange(2))


@pytest.mark.parametrize("model", [Unusual, Random, BatchNorm, Features, Codebook, Cache, InPlace, Gaps])
@pytest.mark.parametrize("compile", [(), ("--compile",)])
def test_a_run_of_any_model_goes_on_as_the_uncut_one_and_draws_what_it_learned(
    model: type[nn.Module], compile: tuple[str, ...], tmp_path: Path, run: Callable[[Stage, str], Run]
) -> None:
    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: model())
    short = ("--dataset", "shapes", "--batch-size", 4, "--resume", *compile)
    pictures = set()
    for folder, cuts in (("uncut", [3]), ("cut", [1, 3])):
        for max_steps in cuts:
            for start_out in (torch.manual_seed, np.random.seed, random.seed):  # as another process would
                start_out(max_steps)
            assert run(stage, folder)("train", *short, "--max-steps", max_steps) == 0
        assert run(stage, folder)("test", "--steps", 2, "--num-images", 2) == 0
        pictures.add((tmp_path / folder / "samples.png").read_bytes())
    cut, uncut = (checkpoint.load(tmp_path / folder / "checkpoint.pt", "part_h") for folder in ("cut", "uncut"))
    assert_same(dict(cut), dict(uncut))
    assert len(pictures) == 1
    assert {
        int(state[name])
        for state in (cut["model"], cut["ema"])
        for name in ("codes", "norm.num_batches_tracked")
        if name in state
    } <= {3}


class Object(Special):
    def get_extra_state(self) -> object:
        return object()

    def set_extra_state(self, state: object) -> None:
        pass


class Lambda(Object):
    def get_extra_state(self) -> object:
        return lambda: None


class Late(Special):
    def part(self, x: Tensor) -> Tensor:
        self.register_buffer("seen", torch.ones(1))
        return x


class Gone(Special):
    seen: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(1))

    def part(self, x: Tensor) -> Tensor:
        self.seen = None
        return x


@pytest.mark.parametrize("compile", ["--no-compile", "--compile"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Object, "a checkpoint of this run could not be read again"),
        (Lambda, "a checkpoint of this run could not be read again"),
        (Late, "the model has gained or lost seen"),
        (Gone, "the model has gained or lost seen"),
    ],
)
def test_what_no_checkpoint_can_carry_is_told_before_the_second_step(
    model: type[nn.Module],
    message: str,
    compile: str,
    tmp_path: Path,
    run: Callable[[Stage, str], Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: model())
    assert run(stage, "run")("train", "--dataset", "shapes", "--batch-size", 4, compile) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("part_h.py: error: ")
    assert message in error


def test_what_an_own_stage_keeps_between_two_models_stays_usable(
    tmp_path: Path, run: Callable[[Stage, str], Run]
) -> None:
    """Also where model options are typed, and the model is therefore built more than once."""
    table: list[Tensor] = []

    class Cached(Special):
        def __init__(self) -> None:
            super().__init__()
            table[1:] = []
            if not table:
                table.append(torch.ones(3, 1, 1))

        def part(self, x: Tensor) -> Tensor:
            return x * table[0]

    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: Cached(), [add_option])
    assert run(stage, "run")("train", "--tempo", 2, "--dataset", "shapes", "--batch-size", 4, "--max-steps", 1) == 0
