"""README.md, docs/ and benchmarks/README.md: every command runs, every link leads somewhere, every snippet and every
quotation is true."""

import argparse
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import part_g_cifar
from benchmarks.train_chapter import results_table
from common.data import to_float
from common.diffusion import NoiseSchedule, diffusion_loss
from common.run import checkpoint
from common.run.options import Stage
from common.run.shapes import draw_shapes
from tests.conftest import ROOT, STAGES, run_stage
from tests.test_cli import COMMANDS as CHAPTER

README = (ROOT / "README.md").read_text()
PAGES = {  # what they say, by their path
    path.relative_to(ROOT): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md")
}


def code_blocks(text: str) -> list[tuple[str, str, str]]:
    """Of each block of code: its language, what is in it, and the paragraph before."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(block[1], block[2], text[: block.start()].split("\n\n")[-2]) for block in found]


BLOCKS = [block for text in PAGES.values() for block in code_blocks(text)]
LINES = [  # a backslash at the end of a line continues it
    " ".join(line.split("#")[0].split())
    for kind, block, _ in BLOCKS
    if not kind
    for line in block.replace("\\\n", " ").splitlines()
]
# A block of code that comes after a paragraph with a link to a script is from there; others are to be run.
CODE_WITH_SOURCES = [
    (re.findall(r"\]\((?:\.\./)?([\w/]+\.py)\)", before), code)
    for kind, code, before in BLOCKS
    if kind in ("python", "diff")
]
COMMANDS = list(dict.fromkeys(line for line in LINES if re.match(r"python part_|torchrun ", line)))
OTHERS = {  # what else is in the blocks of code, and is tested elsewhere, by hand or by running these tests
    "python3 -m venv .venv && . .venv/bin/activate",
    "python -m pip install -r requirements.txt",
    "python -m pip install -r requirements-dev.txt && python -m pytest",
    "cp part_g_cifar.py part_h_my_idea.py",
}
SHORT = {
    "train": "--dataset shapes --max-steps 1 --batch-size 2",
    "test": "--num-images 2 --sampler ddim --steps 2",
    "eval": "--num-images 2",
}


def test_every_line_to_copy_is_known() -> None:
    assert {command.split()[2] for command in COMMANDS if command.startswith("python")} == set(SHORT)
    assert {*filter(None, LINES)} - {*COMMANDS} == OTHERS


def test_the_readme_has_the_chapters_commands_word_for_word() -> None:
    in_readme = " ".join(README.replace("\\\n", " ").split())
    for command in CHAPTER.strip().splitlines():
        assert f"python {command}" in COMMANDS
        assert f"python {command}" in in_readme


def test_the_readme_can_be_read_to_the_end() -> None:
    assert len(README.split()) <= 2700


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands; the commands leave their runs there."""
    return tmp_path_factory.mktemp("reader")


ELSEWHERE = {f"python {line}" for line in CHAPTER.splitlines() if line and not line.startswith("part_a")}  # in test_cli


@pytest.mark.usefixtures("short_eval")
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
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
    if "--fid" in arguments:
        suffix += ["--fid", "2", "--steps", "2", "--dataset", "shapes"]
    if arguments[0] == "train" and "--resume" not in arguments:
        suffix += ["--overwrite"]
    if "--model-channels" in arguments:
        suffix += ["--model-channels", "32"]  # for the checkpoint of the paper's network takes a while
    assert run_stage(name, *arguments, *suffix) == 0


@pytest.mark.parametrize("snippet", [code for sources, code in CODE_WITH_SOURCES if not sources])
def test_every_snippet_runs(
    snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    if "cifar10" in snippet:
        (tmp_path / "data").symlink_to(request.getfixturevalue("cifar10_dir"))
    log = tmp_path / "runs" / "part_a_cifar" / "log.csv"
    log.parent.mkdir(parents=True)
    shutil.copy(ROOT / "assets" / "logs" / "part_a_cifar.csv", log)
    monkeypatch.chdir(tmp_path)
    few_steps = re.sub(r"range\((1000|400|50)\)", "range(3)", snippet)  # of a sampler, or a training
    exec(compile(few_steps, "README.md", "exec"), {})


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
def test_a_script_says_what_to_expect_of_it(name: str) -> None:
    stage: Stage = importlib.import_module(name).stage
    expected = (
        r"([\d,]+) parameters; (\S+) minutes an epoch on 2 cores of a Xeon with AMX; "
        r"held-out loss (\S+) after (\d+) epochs\."
    )
    ((parameters, minutes, loss, epochs),) = re.findall(expected, stage.description or "")
    assert f"\n| {name[5].upper()} | {minutes} | " in PAGES[Path("docs/running.md")]
    numbers = json.loads((ROOT / "assets" / "logs" / f"{name}-{int(epochs):04d}.json").read_text())
    results = f"held-out loss {loss}, {numbers['bits_per_dim']['total']['mean']:.2f} bits/dim."
    assert f"**{parameters} parameters; after {epochs} epochs: {results}**" in README
    assert f"{numbers['loss']['mean']:.4f}" == loss


def test_the_documents_name_the_sizes_of_other_networks() -> None:
    with torch.device("meta"):
        paper = part_g_cifar.Model(model_channels=128, channel_mult=(1, 2, 2, 2))
        no_attention = part_g_cifar.Model(attention_resolutions=())
    for model, page in ((paper, "running"), (no_attention, "exercises")):
        assert f" {sum(p.numel() for p in model.parameters()):,} " in PAGES[Path(f"docs/{page}.md")]


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


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings, those in blocks of code left out."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = PAGES[page]
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text()), link


def test_every_page_is_linked_from_the_readme() -> None:
    for page in PAGES:
        assert page == Path("README.md") or f"]({page.as_posix()})" in README, page


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_formulas_stand_where_github_renders_them(page: Path) -> None:
    """As blocks of $$ on lines of their own; what looks like a formula elsewhere would be shown as it is typed."""
    parts = re.split(r"^\$\$$", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL), flags=re.M)
    assert len(parts) % 2 == 1
    for text in parts[::2]:
        assert not re.search(r"\$|\w_\{|\\[a-z]|\w_[t0θ]\b", re.sub(r"`[^`]*`", "", text))


def test_every_file_of_the_package_is_in_the_layout() -> None:
    """The lesson in README, the machinery in docs/running.md."""
    for path in (ROOT / "common").rglob("[a-z]*.py"):
        page = "docs/running.md" if path.parent.name == "run" else "README.md"
        assert f"`{path.relative_to(ROOT).as_posix()}`" in PAGES[Path(page)], path
