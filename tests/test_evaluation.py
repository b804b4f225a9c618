"""Held-out loss, bits per dimension and FID, against closed forms."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.data import to_float
from common.diffusion import NoiseSchedule
from common.likelihood import (
    Estimate,
    decoder_term,
    kl_term,
    loss_by_quarter,
    mean_over_images,
    prior_term,
    stratified_mean,
)
from common.run import evaluate
from common.run.datasets import load_images
from common.run.errors import UserError
from common.run.evaluate import measure_bound, measure_losses
from tests.conftest import fails, run_stage

A = "part_a_cifar"
CPU = torch.device("cpu")

SIGMA = 0.2  # of the Gaussian data, which stays within [-1, 1] up to five standard deviations


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule().double()


def gain(t: np.ndarray) -> np.ndarray:
    """E[x0 | x_t] = gain * x_t for Gaussian data, by Bayes' rule, from the formulas of the paper alone."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t]
    return np.sqrt(alpha_bar) * SIGMA**2 / (alpha_bar * SIGMA**2 + 1 - alpha_bar)


def ideal_denoiser(xt: Tensor, t: Tensor) -> Tensor:
    """The noise that the best guess of x0 implies."""
    times = t.numpy()
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[times]
    scale = (1 - np.sqrt(alpha_bar) * gain(times)) / np.sqrt(1 - alpha_bar)
    return torch.from_numpy(scale)[:, None, None, None] * xt


def expected_kl(second_moment: float) -> np.ndarray:
    """Nats per dimension of the KL terms 1 to 999 under the ideal denoiser, for data with that second moment."""
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    before = alpha_bar[:-1]
    beta, alpha_bar, k = beta[1:], alpha_bar[1:], gain(np.arange(1, 1000))
    variance = beta * (1 - before) / (1 - alpha_bar)
    x0_scale = np.sqrt(before) * beta / (1 - alpha_bar)
    squared_error = (1 - k * np.sqrt(alpha_bar)) ** 2 * second_moment + k**2 * (1 - alpha_bar)
    return x0_scale**2 * squared_error / (2 * variance)


def gaussian_images(count: int) -> Tensor:
    """uint8 (count, 3, 32, 32): Gaussian data in 256 levels."""
    x0 = SIGMA * torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@pytest.mark.parametrize("t", [1, 2, 5, 30, 200, 700, 999])
def test_kl_terms_are_those_of_gaussian_data(schedule: NoiseSchedule, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    x0, noise = torch.randn(2, 50, 3, 32, 32, generator=generator, dtype=torch.float64)
    kl = kl_term(ideal_denoiser, schedule, SIGMA * x0, torch.full((50,), t), noise) / 3072
    assert kl.dtype == torch.float64
    expected = expected_kl(SIGMA**2)[t - 1]
    assert kl.mean().item() == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / x0.numel()))


def test_prior_term_is_that_of_two_normal_distributions(schedule: NoiseSchedule) -> None:
    x0 = to_float(gaussian_images(3)).double()
    p = torch.distributions.Normal(0.0, 1.0)
    last = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    q = torch.distributions.Normal(math.sqrt(last) * x0, math.sqrt(1 - last))
    expected = torch.distributions.kl_divergence(q, p).sum(dim=(1, 2, 3))
    torch.testing.assert_close(prior_term(schedule, x0), expected, rtol=1e-5, atol=0)


def levels_as_images() -> Tensor:
    """float64 (256, 1, 1, 1): one image of one pixel for each level of colour."""
    return (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None, None, None]


@pytest.mark.parametrize("guess", [-1.5, -1.0, -0.4003, 0.01, 0.31, 1.0])
def test_the_decoder_shares_out_a_probability_of_one(schedule: NoiseSchedule, guess: float) -> None:
    """The 256 levels' probabilities, under one guess of x0, add up to 1."""

    def always_guess(xt: Tensor, t: Tensor) -> Tensor:
        return schedule.implied_noise(torch.full_like(xt, guess), xt, t)

    levels = levels_as_images()
    nats = decoder_term(always_guess, schedule, levels, torch.zeros_like(levels))
    assert nats.isfinite().all()
    assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-12)
    nearest = round((min(max(guess, -1), 1) + 1) * 127.5)
    assert nats.argmin() == nearest
    assert (nats[: nearest + 1].diff() < 0).all()
    assert (nats[nearest:].diff() > 0).all()


def decoder_mean() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """-log of a level's probability, from the error function, for levels x0 and noise (both of any shape)."""
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    deviation = math.sqrt(beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1]))
    erfc = np.vectorize(math.erfc)

    def nats(x0: np.ndarray, noise: np.ndarray) -> np.ndarray:
        mean = gain(np.array(0)) * (math.sqrt(alpha_bar[0]) * x0 + math.sqrt(1 - alpha_bar[0]) * noise)
        near, far = ((abs(x0 - mean) + step / 255) / deviation / math.sqrt(2) for step in (-1, 1))
        return -np.log((erfc(near) - erfc(far)) / 2)

    return nats


def test_decoder_term_is_that_of_gaussian_data(schedule: NoiseSchedule) -> None:
    x0 = to_float(gaussian_images(2)).double()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = decoder_mean()(x0.numpy(), noise.numpy()).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(decoder_term(ideal_denoiser, schedule, x0, noise).numpy(), expected, rtol=1e-6)


def expected_bits(images: Tensor) -> dict[str, float]:
    """What the bound on these images is in expectation over the noise, in bits per dimension."""
    x0 = to_float(images).double()
    last = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    second_moment = x0.square().mean().item()
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    levels, counts = np.unique(x0.numpy(), return_counts=True)
    decoder = decoder_mean()(levels[:, None], nodes[None]) @ (weights / weights.sum())
    parts = {
        "prior": (last * second_moment - last - math.log1p(-last)) / 2,
        "kl": expected_kl(second_moment).sum(),
        "decoder": decoder @ counts / counts.sum(),
    }
    parts["total"] = sum(parts.values())
    return {name: nats / math.log(2) for name, nats in parts.items()}


def test_the_exact_bound_is_that_of_gaussian_data(schedule: NoiseSchedule) -> None:
    images = gaussian_images(4)
    bound = measure_bound(ideal_denoiser, schedule, images, exact=True)
    assert all(part.dtype == torch.float64 and part.shape == (4,) for part in bound)
    for name, expected in expected_bits(images).items():
        assert bound.by_name()[name].mean().item() == pytest.approx(expected, rel=5e-3)
    entropy = math.log2(SIGMA * 127.5 * math.sqrt(2 * math.pi * math.e))  # of the data, which no bound is below
    assert entropy < expected_bits(images)["total"]


def test_the_estimated_bound_is_unbiased_and_knows_its_error(schedule: NoiseSchedule) -> None:
    images = gaussian_images(600)
    expected = expected_bits(images)
    values = measure_bound(ideal_denoiser, schedule, images).by_name()
    for name in ("kl", "decoder", "total"):
        mean, error = mean_over_images(values[name])
        assert abs(mean - expected[name]) < 4 * error
        assert error < 0.01 * expected[name]


def test_a_worse_denoiser_has_a_larger_bound_and_a_larger_loss(schedule: NoiseSchedule) -> None:
    def worse(xt: Tensor, t: Tensor) -> Tensor:
        return 0.9 * ideal_denoiser(xt, t)

    images = gaussian_images(250)
    bounds = [measure_bound(model, schedule, images).by_name()["total"] for model in (ideal_denoiser, worse)]
    assert (bounds[1] > bounds[0]).all()
    assert measure_losses(worse, schedule, images).mean() > measure_losses(ideal_denoiser, schedule, images).mean()


def test_held_out_loss_is_that_of_gaussian_data(schedule: NoiseSchedule) -> None:
    """Of all time steps: Var[noise | x_t] = alpha_bar Var[x0 | x_t] / (1 - alpha_bar)."""
    images = gaussian_images(2000)
    loss, quarters = loss_by_quarter(measure_losses(ideal_denoiser, schedule, images), 1000)
    alpha_bar, k = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), gain(np.arange(1000))
    second_moment = to_float(images).double().square().mean().item()
    x0_error = (1 - k * np.sqrt(alpha_bar)) ** 2 * second_moment + k**2 * (1 - alpha_bar)
    by_time = alpha_bar * x0_error / (1 - alpha_bar)
    assert abs(loss.mean - by_time.mean()) < 4 * loss.standard_error
    for quarter, expected in zip(quarters, by_time.reshape(4, 250).mean(axis=1)):
        assert abs(quarter.mean - expected) < 4 * quarter.standard_error


@pytest.mark.parametrize("count", [0, 1000, 1999, 2500])
def test_a_number_of_images_that_meets_time_steps_unequally_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="multiple of 1000, at least 2000"):
        loss_by_quarter(torch.zeros(count), 1000)


def test_standard_errors_are_honest() -> None:
    """The means of many repetitions scatter as the standard errors say, whatever lies between the strata."""
    strata = torch.linspace(0, 10, 20)
    draws = strata + (1 + strata) * torch.randn(4000, 5, 20, generator=torch.Generator().manual_seed(0))
    for estimate in (stratified_mean, lambda draw: mean_over_images(draw[:, 3])):
        estimates: list[Estimate] = [estimate(draw) for draw in draws]
        scatter = torch.tensor([mean for mean, _ in estimates]).std().item()
        squared = torch.tensor([error for _, error in estimates]).square().mean().item()
        assert math.sqrt(squared) == pytest.approx(scatter, rel=0.05)


def test_two_models_are_measured_on_the_same_draws(schedule: NoiseSchedule) -> None:
    seen: list[Tensor] = []

    def note(xt: Tensor, t: Tensor) -> Tensor:
        seen.append(xt)
        return xt

    images = gaussian_images(300)
    for seed in (0, 0, 1):
        torch.rand(3)  # whatever else draws
        measure_losses(note, schedule, images, seed)
        measure_bound(note, schedule, images, seed=seed)
    once = len(seen) // 3
    assert all(torch.equal(a, b) for a, b in zip(seen[:once], seen[once : 2 * once]))
    assert not any(torch.equal(a, b) for a, b in zip(seen[:once], seen[2 * once :]))


# FID


class Colours(nn.Module):
    """Six features of an image in place of Inception's: the means and the deviations of its colours."""

    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() / 255
        return torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1)


def make_pictures(count: int, seed: int, brightness: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(brightness, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_fid_is_the_frechet_distance_of_two_normal_distributions() -> None:
    pytest.importorskip("torchmetrics")
    samples, images = make_pictures(300, 0, 200), make_pictures(700, 1, 256)
    value = evaluate.fid(evaluate.new_fid(CPU, Colours()), samples, images)
    a, b = (Colours()(pictures).double().numpy() for pictures in (samples, images))
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b))
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0))
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * roots.sum()
    assert value == pytest.approx(expected, rel=1e-4)


def test_the_classifier_tells_pictures_that_are_not_of_cifar10(cifar10_dir: Path) -> None:
    """Upside down they have the colours and the sharpness of real ones."""
    pytest.importorskip("torchmetrics")
    images = load_images("cifar10", cifar10_dir, train=False)
    metric = evaluate.new_fid(CPU, evaluate.ClassifierFeatures(CPU))
    real = evaluate.fid(metric, images[:1000], images[1000:4000])
    metric.reset()
    upside_down = evaluate.fid(metric, images[:1000].flip(2), images[1000:4000])
    assert 0 < real < 0.5 < upside_down


def test_fid_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(UserError, match=r'--fid.*pip install "torchmetrics\[image\]"'):
        evaluate.new_fid(CPU)


def test_fid_without_the_weights_says_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    def no_network(*arguments: object, **options: object) -> None:
        raise OSError("<urlopen error [Errno 101] Network is unreachable>")

    monkeypatch.setattr(fid, "FrechetInceptionDistance", no_network)
    with pytest.raises(UserError, match=r"--fid.*Network is unreachable.*torch/hub/checkpoints"):
        evaluate.new_fid(CPU)


# The command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    common = ("--dataset", "shapes", "--data-dir", shapes_dir, "--run-dir", folder)
    assert run_stage(A, "train", *common, "--batch-size", 4, "--max-steps", 3) == 0
    return folder


@pytest.mark.usefixtures("short_eval")
@pytest.mark.parametrize(("network", "name"), [("inception", "FID"), ("classifier", "Fréchet classifier distance")])
def test_eval_prints_a_table_and_leaves_its_numbers_in_the_run_folder(
    network: str,
    name: str,
    run_dir: Path,
    shapes_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(evaluate, "INCEPTION", Colours())
    fid_options = ("--fid", 5, "--fid-network", network, "--sampler", "ddim", "--steps", 2)
    options = ("--num-images", 6, "--seed", 4, *fid_options)
    capsys.readouterr()
    assert run_stage(A, "eval", "--data-dir", shapes_dir, "--run-dir", run_dir, *options) == 0
    output = capsys.readouterr().out
    report = json.loads((run_dir / "eval.json").read_text())
    assert {key: report[key] for key in ("stage", "weights", "epochs", "steps", "dataset", "seed")} == {
        "stage": A, "weights": "ema", "epochs": 0, "steps": 3, "dataset": "shapes", "seed": 4,
    }  # fmt: skip
    loss, bits, fid = report["loss"], report["bits_per_dim"], report["fid"]
    assert (loss["images"], bits["images"], bits["exact"]) == (40, 6, False)
    assert loss["mean"] == pytest.approx(np.mean([quarter["mean"] for quarter in loss["quarters"]]))
    parts = sum(bits[part]["mean"] for part in ("prior", "kl", "decoder"))
    assert bits["total"]["mean"] == pytest.approx(parts)
    assert (fid["network"], fid["samples"], fid["sampler"], fid["sampling_steps"]) == (network, 5, "ddim", 2)
    for number in (loss["mean"], loss["standard_error"], bits["total"]["mean"], bits["kl"]["standard_error"]):
        assert f"| {number:.5f} |" in output
    assert f"| {name} (5 samples) | {fid['value']:.3f} |" in output


@pytest.mark.usefixtures("short_eval")
def test_eval_measures_the_same_each_time(run_dir: Path, shapes_dir: Path) -> None:
    def measure(*options: str) -> dict[str, Any]:
        arguments = ("--data-dir", shapes_dir, "--run-dir", run_dir, "--num-images", "2", *options)
        assert run_stage(A, "eval", *arguments) == 0
        report = json.loads((run_dir / "eval.json").read_text())
        return {"loss": report["loss"]["mean"], "kl": report["bits_per_dim"]["kl"]["mean"]}

    first = measure()
    assert measure() == first
    for options, same in ((("--weights", "raw"), set()), (("--seed", "1"), set()), (("--exact",), {"loss"})):
        other = measure(*options)
        assert {name for name in first if other[name] == first[name]} == same


def test_fid_without_torch_fidelity_ends_in_one_line(
    run_dir: Path, shapes_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    error = fails(capsys, 1, A, "eval", "--data-dir", shapes_dir, "--run-dir", run_dir, "--fid", 10)
    assert "--fid: this requires the package torchmetrics[image]" in error
