"""The two floors: the lesson in common/ can be read by itself, and knows nothing of the machinery in common/run/."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LESSON = sorted((ROOT / "common").glob("[a-z]*.py"))
MACHINERY_WORDS = r"\branks?\b|CUDA graph|autocast|compile|torch\.distributed|\bsignals?\b|checkpoint|argparse|--\w"


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_the_lesson_is_six_files() -> None:
    assert {path.stem for path in LESSON} == {"diffusion", "blocks", "data", "training", "likelihood", "guidance"}


def test_what_runs_needs_five_packages() -> None:
    """And torchmetrics, which --fid alone requires."""
    files = [*ROOT.glob("part_*.py"), *(ROOT / "common").rglob("*.py")]
    packages = {module.split(".")[0] for path in files for module in imported(path)} - sys.stdlib_module_names
    required = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert len(required) == 5
    assert packages == {*required, "common", "torchmetrics"} - {"pillow"} | {"PIL"}


@pytest.mark.parametrize("path", LESSON, ids=lambda path: path.stem)
def test_the_lesson_knows_nothing_of_the_machinery(path: Path) -> None:
    assert not [module for module in imported(path) if module.startswith("common.run")]
    assert not re.findall(MACHINERY_WORDS + r"|part_[a-g]_", path.read_text())
