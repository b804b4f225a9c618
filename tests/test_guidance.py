"""Guidance asks for a class as Bayes' rule says, and the classifier that comes with the project knows the classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torchvision.datasets import CIFAR10

from benchmarks import train_classifier
from common.data import to_float
from common.diffusion import NoiseSchedule
from common.guidance import CLASSES, Classifier, guided
from common.run.models import load_classifier
from common.run.pictures import sample_images
from part_a_cifar import Model, stage
from tests.conftest import fails, run_stage

CPU = torch.device("cpu")


class TwoImages:
    """All in closed form where the data are two images, x and -x, equally often."""

    def __init__(self) -> None:
        self.schedule = NoiseSchedule()
        self.x = 0.05 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))

    def noise_in(self, xt: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        return self.schedule.implied_noise(x0.expand_as(xt), xt, t)

    def evidence(self, xt: Tensor, t: Tensor) -> Tensor:
        """log p(x | x_t) - log p(-x | x_t), (B,)."""
        alpha_bar = self.schedule.alpha_bar[t]
        return 2 * alpha_bar.sqrt() / (1 - alpha_bar) * (xt * self.x).sum(dim=(1, 2, 3))

    def predict_noise(self, xt: Tensor, t: Tensor) -> Tensor:
        """The best guess, of no class: the noise that the mean of both images, as likely as they are, implies."""
        return self.noise_in(xt, t, (self.evidence(xt, t) / 2).tanh()[:, None, None, None] * self.x)

    def classifier(self, xt: Tensor, t: Tensor) -> Tensor:
        evidence = self.evidence(xt, t)
        return torch.stack([logsigmoid(evidence), logsigmoid(-evidence)], dim=1)


def test_guidance_by_the_true_classifier_predicts_the_noise_of_its_class() -> None:
    two = TwoImages()
    generator = torch.Generator().manual_seed(1)
    t = torch.tensor([50, 200, 400, 600, 999])
    noise = torch.randn(5, 3, 32, 32, generator=generator)
    xt = two.schedule.add_noise(two.x.expand_as(noise), t, noise)
    for label, x0 in enumerate((two.x, -two.x)):
        predict_noise = guided(two.predict_noise, two.classifier, two.schedule, label, scale=1)
        with torch.no_grad():
            torch.testing.assert_close(predict_noise(xt, t), two.noise_in(xt, t, x0), rtol=1e-4, atol=1e-4)
    assert not xt.requires_grad


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_both_samplers_can_be_guided(sampler: str) -> None:
    two = TwoImages()
    for label, x0 in enumerate((two.x, -two.x)):
        predict_noise = guided(two.predict_noise, two.classifier, two.schedule, label, scale=1)
        images = sample_images(predict_noise, two.schedule, 4, sampler=sampler, steps=20)
        assert (to_float(images) - x0).abs().max() < 0.05


def test_the_classifier_predicts_log_probabilities() -> None:
    log_p = Classifier()(torch.randn(4, 3, 32, 32), torch.tensor([0, 10, 500, 999]))
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(4))
    assert log_p.shape == (4, len(CLASSES))


def test_the_classifier_that_comes_with_the_project_knows_the_classes(cifar10_dir: Path) -> None:
    data, schedule = CIFAR10(cifar10_dir, train=False), NoiseSchedule()
    assert tuple(data.classes) == CLASSES
    x0 = to_float(torch.from_numpy(data.data[:500]).permute(0, 3, 1, 2))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for step, at_least in ((0, 0.48), (300, 0.4), (600, 0.18)):
        t = torch.full((500,), step)
        guesses = load_classifier(CPU)(schedule.add_noise(x0, t, noise), t).argmax(dim=1)
        assert (guesses == torch.tensor(data.targets[:500])).float().mean() > at_least


@pytest.mark.parametrize("label", ["ship", "horse"])
def test_samples_show_the_class_that_is_asked_for(label: str) -> None:
    """To the classifier, at least; without guidance, few do."""
    model = Model().eval()
    model.load_state_dict(torch.load(stage.weights, weights_only=True)["ema"])
    classifier, schedule, number = load_classifier(CPU), NoiseSchedule(), CLASSES.index(label)
    found = []
    for predict_noise in (model, guided(model, classifier, schedule, number, scale=10)):
        images = to_float(sample_images(predict_noise, schedule, 16, steps=20))
        found.append((classifier(images, torch.zeros(16, dtype=torch.int64)).argmax(dim=1) == number).sum())
    assert found[0] <= 6
    assert found[1] >= 12


def test_test_draws_the_class_that_label_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def note(*arguments: Any) -> Any:
        asked.append((CLASSES[arguments[3]], arguments[4]))
        return guided(*arguments)

    monkeypatch.setattr("common.run.test.guided", note)
    words = ("test", "--pretrained", "--run-dir", tmp_path, "--steps", 3, "--num-images", 2, "--output")
    for name, more in (
        ("plain.png", []),
        ("ship.png", ["--label", "ship"]),
        ("horse.png", ["--label", "horse"]),
        ("weak.png", ["--label", "horse", "--guidance-scale", "1"]),
    ):
        assert run_stage("part_a_cifar", *words, tmp_path / name, *more) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'ship.png'}: 2 images of class ship by ddpm in 3 steps" in out
    assert f"{tmp_path / 'plain.png'}: 2 images by ddpm in 3 steps" in out
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 4
    assert asked == [("ship", 10), ("horse", 10), ("horse", 1)]


def test_what_cannot_be_asked_for_is_refused(
    tmp_path: Path, shapes_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dataset", "shapes", "--data-dir", shapes_dir, "--max-steps", 1, "--batch-size", 2)
    assert run_stage("part_a_cifar", "train", *words, "--run-dir", tmp_path) == 0
    for more, told in (
        (["--run-dir", tmp_path, "--label", "cat"], "classes of cifar10, and"),
        (["--pretrained", "--guidance-scale", "2"], "argument --guidance-scale: requires --label"),
        (["--pretrained", "--label", "zebra"], "invalid choice: 'zebra' (choose from"),
        (["--pretrained", "--label", "cat", "--guidance-scale", "0"], "must be above 0, at most 1000000, got '0'"),
    ):
        error = fails(capsys, 2, "part_a_cifar", "test", *more)
        assert told in error


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_damaged_classifier_ends_in_one_line(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "classifier.pt"
    torch.save({}, path) if content is None else path.write_bytes(content)
    monkeypatch.setattr("common.run.models.CLASSIFIER", path)
    words = ("test", "--pretrained", "--label", "cat", "--steps", 1, "--num-images", 1, "--run-dir", tmp_path)
    error = fails(capsys, 1, "part_a_cifar", *words)
    assert f"{path}: " in error
    assert not (tmp_path / "pretrained" / "samples.png").exists()


def test_the_classifier_can_be_trained_again(
    cifar10_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = train_classifier.load
    monkeypatch.setattr(train_classifier, "load", lambda *a, **b: tuple(part[:200] for part in loaded(*a, **b)))
    path = tmp_path / "classifier.pt"
    words = ["train_classifier.py", "--data-dir", str(cifar10_dir), "--output", str(path), "--steps", "30"]
    monkeypatch.setattr("sys.argv", words)
    train_classifier.main()
    assert capsys.readouterr().out.count("% of the test images recognised") == 7
    monkeypatch.setattr("common.run.models.CLASSIFIER", path)
    trained: nn.Module = load_classifier(CPU)
    images, labels = loaded(cifar10_dir, train=True, device=CPU)
    loss = nn.functional.nll_loss(trained(to_float(images[:200]), torch.zeros(200, dtype=torch.int64)), labels[:200])
    assert loss < 2.2  # 2.3 is a guess
