"""The scripts in benchmarks/ that need no data set and no patience."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import make_assets
from benchmarks.mean_colour import errors_by_range
from benchmarks.throughput import flops_per_image
from common import checkpoint
from common.sampling import save_grid
from common.training import Trainer, TrainingOptions, train
from part_a_cifar import Model


@pytest.fixture
def runs_dir(tmp_path: Path, images: Tensor) -> Path:
    """A run of stage A of two epochs on a few images of noise, and what `test` and `eval` leave there."""
    run_dir = tmp_path / "runs" / "part_a_cifar"
    trainer = Trainer("part_a_cifar", {}, Model(), TrainingOptions(epochs=2, batch_size=22))
    train(trainer, images, images, run_dir, sample_every=0)
    pictures = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    for name in ("samples.png", "samples/epoch-0001.png", "samples/epoch-0002.png"):
        save_grid(pictures, run_dir / name)
    estimate = {"mean": 0.5, "standard_error": 0.25}
    report = {"checkpoint": str(run_dir), "epochs": 2, "steps": trainer.progress.step, "weights": "ema"}
    report |= {"loss": estimate, "bits_per_dim": {"total": estimate}}
    (run_dir / "eval.json").write_text(json.dumps(report))
    return run_dir.parent


def test_make_assets_makes_weights_pictures_and_the_table(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assets = tmp_path / "assets"
    arguments = ["--runs-dir", str(runs_dir), "--assets-dir", str(assets), "--progress-of", "A"]
    monkeypatch.setattr("sys.argv", ["make_assets.py", *arguments])
    make_assets.main()

    saved = checkpoint.load(assets / "weights" / "part_a_cifar.pt", "part_a_cifar", ema_only=True)
    Model().load_state_dict(saved["ema"])
    assert saved["progress"]["epoch"] == 2
    for name in ("part-a-cifar-output", "progress", "ladder", "losses", "forward-noising"):
        with Image.open(assets / f"{name}.png") as image:
            image.load()
    assert str(tmp_path) not in (assets / "logs" / "part_a_cifar.json").read_text()
    rows = capsys.readouterr().out.splitlines()[-7:]
    assert rows[0] == (
        "| [A](part_a_cifar.py) | 16 channels, ReLU | 559,331 | 0.30 | 2 | 0 | 0.5000 ± 0.2500 | 0.50 ± 0.25 |"
    )
    assert all("not trained yet" in row for row in rows[1:])


@pytest.mark.parametrize("file", ["samples.png", "eval.json"])
def test_make_assets_refuses_what_is_not_of_the_finished_run(
    file: str, runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runs_dir / "part_a_cifar" / file
    if file == "samples.png":
        save_grid(torch.zeros(16, 3, 32, 32, dtype=torch.uint8), path)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "steps": 1}))
    arguments = ["--runs-dir", str(runs_dir), "--assets-dir", str(tmp_path / "assets")]
    monkeypatch.setattr("sys.argv", ["make_assets.py", *arguments])
    with pytest.raises(SystemExit, match=file):
        make_assets.main()


@pytest.mark.parametrize(("what", "factor"), [("sample", 1000), ("train", 3)])
def test_flops_count_attention_in_full(what: str, factor: int) -> None:
    """Five blocks of 64 channels at 16 x 16 pixels, one of 32 at 4 x 4: 8 C x C products a pixel, then attention's."""
    pixels_and_channels = [(16 * 16, 64)] * 5 + [(4 * 4, 32)]
    attention = sum(2 * n * (8 * c * c) + 2 * (2 * n * n * c) for n, c in pixels_and_channels)
    assert flops_per_image("G", what) - flops_per_image("F", what) == factor * attention


def test_mean_colour_of_noise_is_a_1024th() -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

    loss, mean_colour, nothing = errors_by_range(Zero(), torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)).unbind(1)
    torch.testing.assert_close(loss, torch.ones(10), rtol=0.01, atol=0)
    torch.testing.assert_close(mean_colour, torch.full((10,), 1 / 1024), rtol=0.2, atol=0)
    torch.testing.assert_close(mean_colour, nothing)
