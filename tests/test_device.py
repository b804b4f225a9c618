"""Compilation: the same numbers as without, and a warning instead of an error where it fails."""

import copy
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._dynamo.utils import counters

from common.blocks import PositionalEncoding, ResnetBlock
from common.run import checkpoint
from common.run.checkpoint import RunOptions
from common.run.cli import main
from common.run.device import (
    DTYPES,
    compile_model,
    compiles_training,
    pick_device,
    pick_precision,
)
from common.run.errors import UsageError
from common.run.options import Stage
from common.run.trainer import Run
from part_a_cifar import Model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler here")


@pytest.fixture(autouse=True)
def compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches on what conftest.py switches off, with nothing compiled yet."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    counters.clear()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) * t[:, None, None, None]


@needs_compiler
def test_compiled_model_computes_the_same_with_the_same_weights(capsys: pytest.CaptureFixture[str]) -> None:
    model = Small()
    plain = copy.deepcopy(model)
    compile_model(model, batch_size=4, training=True)
    assert "going on without" not in capsys.readouterr().err
    assert counters["stats"]["unique_graphs"] == 1
    assert model.conv.weight.grad is None
    x, t = torch.randn(4, 3, 32, 32), torch.arange(4)
    torch.testing.assert_close(model(x, t), plain(x, t))
    for conv in (model.conv, plain.conv):
        nn.init.ones_(conv.weight)
    torch.testing.assert_close(model(x, t), plain(x, t))
    assert counters["stats"]["unique_graphs"] == 1
    assert list(model.state_dict()) == ["conv.weight", "conv.bias"]


def test_without_a_compiler_the_model_runs_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    model = Small()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        compile_model(model, batch_size=4)
        x, t = torch.randn(4, 3, 32, 32), torch.arange(4)
        assert torch.equal(model(x, t), copy.deepcopy(model)(x, t))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "going on without compilation" in warnings[0]


def test_a_model_that_cannot_be_compiled_keeps_the_buffers_that_it_had(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it puts others in their place: those of a CUDA graph are gone once it fails."""

    class Counting(Small):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.count = self.count + 1
            raise RuntimeError("overwritten by a subsequent run")

    model = Counting()
    before = model.count
    compile_model(model, batch_size=4)
    assert model.count is before
    assert model.count == 0
    assert "going on without compilation" in capsys.readouterr().err


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = PositionalEncoding(8, 1000)
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.block = ResnetBlock(8, 8, 8)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv_out(self.block(self.conv_in(x), self.embed(t)))


@needs_compiler
def test_a_compiled_run_that_goes_on_ends_as_the_uncut_one(
    tmp_path: Path, shapes_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first compiles, the others find what it has compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    stage = Stage(str(tmp_path / "part_h.py"), "Part H.", lambda args: OneBlock())

    def train(folder: str, *options: str) -> None:
        torch._dynamo.reset()
        counters.clear()
        words = ["--dataset", "shapes", "--data-dir", str(shapes_dir), "--run-dir", str(tmp_path / folder), *options]
        with pytest.raises(SystemExit) as stopped:
            main(stage, ["train", "--compile", "--batch-size", "8", "--device", "cpu", *words])
        error = capsys.readouterr().err
        assert stopped.value.code == 0, error
        assert "going on without" not in error
        assert counters["stats"]["unique_graphs"] == 1

    train("cut", "--max-steps", "2")
    train("cut", "--max-steps", "5", "--resume")
    train("uncut", "--max-steps", "5")
    cut, uncut = (checkpoint.load(tmp_path / name / "checkpoint.pt", "part_h") for name in ("cut", "uncut"))
    for part in ("model", "ema"):
        assert all(torch.equal(cut[part][name], uncut[part][name]) for name in uncut[part])


def test_several_processes_cannot_share_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.run.distributed.WORLD_SIZE", 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match="several processes cannot share mps"):
        pick_device("mps")


@needs_gpu
@pytest.mark.parametrize("precision", DTYPES)
def test_compiled_steps_are_recorded_and_train_as_plain_ones_do(precision: str) -> None:
    torch.manual_seed(0)
    model = Model().cuda()
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, device="cuda")
    losses = []
    for compiled in (False, True):
        run = Run("part_a_cifar", {}, copy.deepcopy(model), RunOptions(epochs=20, batch_size=8), precision)
        if compiled:
            compile_model(run.model, 8, precision, training=True)
        losses.append(torch.stack([loss.clone() for loss in run.steps(images)]).mean().item())
        run.check()
        assert counters["stats"]["unique_graphs"] == compiled
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_a_device_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--device"):
        pick_device("cuda" if not torch.cuda.is_available() else "mps")


@pytest.mark.parametrize("fault", ["no kernel image is available for execution on the device", "driver too old"])
def test_a_gpu_that_this_pytorch_cannot_use_is_told_and_left_alone(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ones(*shape: object, **options: object) -> torch.Tensor:
        raise RuntimeError(f"CUDA error: {fault}\nmore lines")

    def is_available() -> bool:
        if fault == "driver too old":
            warnings.warn("driver too old", stacklevel=1)
        return fault != "driver too old"

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla V100")
    monkeypatch.setattr(torch, "ones", ones)
    assert pick_device("auto").type in ("cpu", "mps")
    warning = capsys.readouterr().err
    assert fault in warning
    assert warning.count("\n") == 1
    with pytest.raises(UsageError, match=f"argument --device: .*{fault}"):
        pick_device("cuda")


def test_a_gpu_whose_memory_is_full_is_no_reason_to_take_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*shape: object, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(RuntimeError, match="out of memory"):
        pick_device("auto")


def test_where_pytorch_refuses_to_compile_the_model_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: nn.Module, **options: object) -> None:
        raise RuntimeError("fatal error: Python.h: No such file or directory")

    monkeypatch.setattr(nn.Module, "compile", refuse)
    model = Small()
    compile_model(model, batch_size=4)
    assert model(torch.randn(4, 3, 32, 32), torch.arange(4)).shape == (4, 3, 32, 32)
    assert "install python3-dev" in capsys.readouterr().err


@pytest.mark.parametrize("amx", [False, True])
def test_training_is_compiled_as_chosen_or_where_that_pays(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    cpu, gpu, mps = map(torch.device, ("cpu", "cuda", "mps"))
    assert compiles_training(None, cpu, "bf16") == amx
    for precision in DTYPES:
        assert compiles_training(None, gpu, precision)
        assert not compiles_training(None, mps, precision)
        assert precision == "bf16" or not compiles_training(None, cpu, precision)
        for device in (cpu, gpu, mps):
            assert compiles_training(True, device, precision)
            assert not compiles_training(False, device, precision)


@pytest.mark.parametrize(("has", "best"), [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512_f", "fp32")])
def test_precision_is_what_is_asked_for_or_what_the_processor_has(
    has: str, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    cpu = torch.device("cpu")
    for precision in DTYPES:
        assert pick_precision(precision, cpu) == precision
    assert pick_precision("auto", cpu) == best


@pytest.mark.parametrize(
    ("gpu", "capability", "has_bf16", "precision"),
    [
        ("H100", (9, 0), True, "bf16"),
        ("A100", (8, 0), True, "bf16"),
        ("T4", (7, 5), False, "fp16"),
        ("V100", (7, 0), False, "fp16"),
        ("GeForce GTX 1660", (7, 5), False, "fp32"),  # numbered as if it had tensor cores
        ("P100", (6, 0), False, "fp32"),
    ],
)
def test_a_gpu_without_bf16_computes_in_fp16_if_it_has_tensor_cores(
    gpu: str, capability: tuple[int, int], has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    assert pick_precision("auto", torch.device("cuda")) == precision
    assert pick_precision("fp32", torch.device("cuda")) == "fp32"
