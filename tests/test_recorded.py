"""What is recorded as a CUDA graph computes what the plain code computes, bit for bit; shown with a stand-in."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import part_g_cifar
from common.diffusion import NoiseSchedule
from common.run import device
from common.run.checkpoint import RunOptions
from common.run.device import GraphedFunction, autocast, in_precision, noise_predictor
from common.run.evaluate import measure_losses
from common.run.loop import train
from common.run.pictures import sample_images
from common.run.trainer import Run
from tests import fake_graph, tiny_run
from tests.conftest import needs_bf16
from tests.test_training import assert_same

STAGES: dict[str, Callable[[], nn.Module]] = {
    "part_g_cifar": partial(part_g_cifar.Model, num_res_blocks=1, channel_mult=(1, 1)),
    "tiny": tiny_run.Tiny,
}


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_graph.install(monkeypatch)


def recorded(run: Run) -> GraphedFunction:
    """Has a Run record its steps, as it does on a GPU."""
    graphed = GraphedFunction(run.gradient_step)
    run.gradient_step = graphed  # type: ignore[method-assign, assignment]
    return graphed


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        ("part_g_cifar", "fp32"),
        pytest.param("part_g_cifar", "bf16", marks=needs_bf16),
        ("tiny", "bf16"),
        ("tiny", "fp16"),  # which most CPUs convert from and to
    ],
)
def test_recorded_training_and_held_out_losses_are_the_plain_ones(stage: str, precision: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = STAGES[stage]()
    results = []
    for is_recorded in (False, True):
        run = Run(stage, {}, copy.deepcopy(model), RunOptions(epochs=2, batch_size=8, hflip=True), precision)
        if is_recorded:
            graphed = recorded(run)
        else:
            run.predict_averaged = in_precision(run.ema.module, precision)
        losses = [loss.clone() for loss in run.steps(images)]
        run.check()
        held_out = [measure_losses(run.predict_averaged, run.schedule, images[:10]).tolist() for _ in range(6)]
        results.append((torch.stack(losses), held_out, run.checkpoint()))
    plain, replayed = results
    assert torch.equal(plain[0], replayed[0])
    assert plain[1] == replayed[1]
    assert_same(dict(plain[2]), dict(replayed[2]))
    assert graphed.graph.replays == 12 - device.WARM_UP_CALLS  # type: ignore[union-attr]


def test_recorded_steps_skip_what_overflows_fp16_and_scale_gradients_as_plain_ones_do(images: Tensor) -> None:
    """From a scale that is too large and grows every three steps, so that it is for ever too large again."""
    results = []
    for is_recorded in (False, True):
        run = tiny_run.make_trainer("fp16", epochs=10)
        assert run.scaler
        run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**34, "growth_interval": 3})
        if is_recorded:
            recorded(run)
        scales = []
        for _ in run.steps(images):
            scales.append(run.scaler.get_scale())
        run.check()
        results.append((scales, run.checkpoint()))
    (scales, plain), (recorded_scales, replayed) = results
    assert recorded_scales == scales
    changes = [later / earlier for earlier, later in itertools.pairwise(scales)]
    assert set(changes[:10]) == {0.5}
    assert set(changes[20:]) == {0.5, 1.0, 2.0}
    assert plain["optimizer"][0]["step"] == len(scales) - changes.count(0.5) - 1
    assert_same(dict(plain), dict(replayed))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_sampling_draws_the_plain_images_also_in_a_smaller_last_batch(precision: str) -> None:
    model, schedule = tiny_run.Tiny(), NoiseSchedule()
    graphed = noise_predictor(model, precision)
    assert isinstance(graphed, GraphedFunction)
    with autocast(torch.device("cpu"), precision):  # as `test` does
        images = sample_images(graphed, schedule, 10, steps=7, batch_size=4)
    expected = sample_images(in_precision(model, precision), schedule, 10, steps=7, batch_size=4)
    assert graphed.graph.replays == 3 * 7 - device.WARM_UP_CALLS  # type: ignore[union-attr]
    assert (images.int() - expected.int()).abs().max() <= 1  # a convolution of 4 images adds up otherwise than of 2


def test_the_grids_of_a_training_are_recorded_once_and_are_the_plain_ones(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a recording for each, the thirty-first would share a stream, and its workspaces, with the training's."""
    monkeypatch.setattr("common.run.report.GRID_STEPS", 3)
    monkeypatch.setattr("common.run.report.GRID_IMAGES", 4)
    made: list[fake_graph.FakeGraph] = []

    def make() -> fake_graph.FakeGraph:
        made.append(fake_graph.FakeGraph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    for name in ("recorded", "plain"):
        monkeypatch.setattr(torch.Tensor, "is_cuda", name == "recorded")
        train(tiny_run.make_trainer(epochs=4), images, images, tmp_path / name, sample_every=1)
    assert len(made) == 2  # for the held-out losses, and for all grids
    recorded, plain = (sorted((tmp_path / name / "samples").glob("epoch-*")) for name in ("recorded", "plain"))
    assert [path.name for path in recorded] == [f"epoch-{n:04d}.png" for n in range(1, 5)]
    assert [path.read_bytes() for path in recorded] == [path.read_bytes() for path in plain]


@pytest.mark.parametrize("fault", ["item", "memory"])
def test_a_capture_that_fails_is_told_and_what_follows_is_computed(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def function(x: Tensor) -> Tensor:
        return x * (x.sum().item() if fault == "item" else 2)

    graphed = GraphedFunction(function)
    if fault == "memory":
        monkeypatch.setattr(torch.cuda, "graph", lambda *a, **b: (_ for _ in ()).throw(RuntimeError("out of memory")))
    for n in range(device.WARM_UP_CALLS):
        assert torch.equal(graphed(torch.full((2,), n)), function(torch.full((2,), n)))
    if fault == "memory":
        with pytest.raises(RuntimeError, match="out of memory"):
            graphed(torch.ones(2))
        return
    for n in range(3):
        assert torch.equal(graphed(torch.full((2,), n)), function(torch.full((2,), n)))
    assert capsys.readouterr().err.count("warning: going on without a CUDA graph") == 1


def test_the_stand_in_shows_a_number_that_was_baked_in() -> None:
    numbers = iter(range(100))
    graphed = GraphedFunction(lambda x: x + next(numbers))
    results = [graphed(torch.zeros(1)).item() for _ in range(8)]
    assert results == [0, 1, 2, 3, 3, 3, 3, 3]
