"""README.md: every command of its runs, every link leads somewhere, every snippet and every quotation is true."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.train_chapter import results_table
from common.data import to_float
from common.diffusion import NoiseSchedule, diffusion_loss
from common.run import checkpoint
from common.run.datasets import load_images
from common.run.options import Stage
from common.run.shapes import draw_shapes
from tests.conftest import ROOT, STAGES, run_stage

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
LINES = [
    line.split("#")[0].strip().removesuffix("&&") for kind, block in BLOCKS if not kind for line in block.splitlines()
]
# A block of code that comes after a paragraph with a link to a script is from there; others are to be run.
BEFORE_CODE = [README[: match.start()].split("\n\n")[-2] for match in re.finditer(r"^```(python|diff)\n", README, re.M)]
CODE = [block for kind, block in BLOCKS if kind in ("python", "diff")]
CODE_WITH_SOURCES = [(re.findall(r"\]\(([\w/]+\.py)\)", text), code) for text, code in zip(BEFORE_CODE, CODE)]
COMMANDS = [line.strip() for line in LINES if re.match(r"python part_|torchrun ", line)]

SHORT = {
    "train": "--dataset shapes --max-steps 1 --batch-size 2",
    "test": "--num-images 2 --sampler ddim --steps 2",
    "eval": "--num-images 2",
}


def test_readme_has_commands() -> None:
    assert len(COMMANDS) >= 8
    assert {command.split()[2] for command in COMMANDS if command.startswith("python")} == set(SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands; the commands leave their runs there."""
    return tmp_path_factory.mktemp("reader")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_word_for_word(
    command: str, folder: Path, shapes_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a reader would, with a suffix that makes it short; torchrun's without torchrun."""
    monkeypatch.chdir(folder)
    words = shlex.split(command)
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    name, arguments = words[script].removesuffix(".py"), words[script + 1 :]
    suffix = SHORT[arguments[0]].split()
    if arguments[0] != "test":
        suffix += ["--data-dir", str(shapes_dir)]
    if arguments[0] == "train":
        suffix += ["--overwrite"]
    if arguments[0] == "eval":
        monkeypatch.setattr("common.run.evaluate.load_images", lambda *a, **more: load_images(*a, **more)[:2000])
    assert run_stage(name, *arguments, *suffix) == 0


@pytest.mark.parametrize("snippet", [code for sources, code in CODE_WITH_SOURCES if not sources])
def test_every_snippet_runs(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


def stripped(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize(("sources", "code"), [pair for pair in CODE_WITH_SOURCES if pair[0]])
def test_every_quotation_is_what_the_file_says(sources: list[str], code: str) -> None:
    """Line by line, less the indentation; of a diff, the lines taken away and those put there."""
    if code[0] in "+-":
        assert len(sources) == 2
        parts = [[line[1:] for line in code.splitlines() if line[0] == sign] for sign in "-+"]
    else:
        sources, parts = sources[-1:], [code.splitlines()]
    for source, lines in zip(sources, parts):
        assert lines
        assert stripped("\n".join(lines)) in stripped((ROOT / source).read_text()), source


def test_the_results_are_those_that_were_measured() -> None:
    assert results_table(ROOT / "assets") in README


@pytest.mark.parametrize("name", STAGES)
def test_the_weights_of_every_stage_have_learned_to_guess_noise(name: str) -> None:
    """Even that in pictures of another kind than they were trained on; untrained, the loss is 1."""
    stage: Stage = importlib.import_module(name).stage
    assert stage.weights.stat().st_size < 5e6
    saved = checkpoint.load(stage.weights, name, ema_only=True)
    report = json.loads((ROOT / "assets" / "logs" / f"{name}-{saved['progress']['epoch']:04d}.json").read_text())
    assert (saved["progress"]["epoch"], saved["progress"]["step"]) == (report["epochs"], report["steps"])
    model = stage.build_model(argparse.Namespace(**saved["model_options"])).eval()
    model.load_state_dict(saved["ema"])
    x0 = to_float(torch.from_numpy(draw_shapes(20)))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x0.shape, generator=generator)
    with torch.no_grad():
        loss = diffusion_loss(model, NoiseSchedule(), x0, torch.arange(0, 1000, 50), noise)
    assert loss.mean() < 0.15


def test_every_link_leads_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)
    }
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'(?:src|href)="([^"]+)"', README)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_every_file_of_the_package_is_in_the_layout() -> None:
    for path in (ROOT / "common").rglob("[a-z]*.py"):
        assert f"`{path.relative_to(ROOT)}`" in README
