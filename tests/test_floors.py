"""The two floors: the lesson in common/ can be read by itself, and knows nothing of the machinery in common/run/."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LESSON = sorted((ROOT / "common").glob("[a-z]*.py"))
MACHINERY_WORDS = r"\branks?\b|CUDA graph|autocast|compile|torch\.distributed|\bsignals?\b|checkpoint|argparse|--\w"


def imported(path: Path, at_once: bool = False) -> set[str]:
    """The modules that a file imports, or of these the ones that it imports as soon as it is imported itself."""
    modules, tree = set(), ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            modules |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_the_lesson_is_six_files() -> None:
    assert {path.stem for path in LESSON} == {"diffusion", "blocks", "data", "training", "likelihood", "guidance"}


def test_what_runs_needs_five_packages() -> None:
    """And torchmetrics, which --fid alone requires and imports."""
    files = [*ROOT.glob("part_*.py"), *(ROOT / "common").rglob("*.py")]
    packages = {module.split(".")[0] for path in files for module in imported(path)} - sys.stdlib_module_names
    required = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert len(required) == 5
    assert not [path for path in files for module in imported(path, at_once=True) if "torchmetrics" in module]
    assert packages == {*required, "common", "torchmetrics"} - {"pillow"} | {"PIL"}


@pytest.mark.parametrize("path", LESSON, ids=lambda path: path.stem)
def test_the_lesson_knows_nothing_of_the_machinery(path: Path) -> None:
    assert not [module for module in imported(path) if module.startswith("common.run")]
    assert not re.findall(MACHINERY_WORDS + r"|part_[a-g]_", path.read_text())
