"""README.md: every command of its runs, every link leads somewhere, every snippet works."""

import re
import shlex
from pathlib import Path

import pytest

from common.data import load_images
from tests.conftest import ROOT, run_stage

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
LINES = [
    line.split("#")[0].strip().removesuffix("&&") for kind, block in BLOCKS if not kind for line in block.splitlines()
]
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
        monkeypatch.setattr("common.cli.load_images", lambda *words, **more: load_images(*words, **more)[:2000])
    assert run_stage(name, *arguments, *suffix) == 0


@pytest.mark.parametrize("snippet", [block for kind, block in BLOCKS if kind == "python"])
def test_every_snippet_runs(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


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
    for path in (ROOT / "common").glob("[a-z]*.py"):
        assert f"`common/{path.name}`" in README
