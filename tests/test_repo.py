"""The repository itself: the README's files exist, nothing stands where it should not."""

import re
import subprocess
from pathlib import Path

import pytest

from tdc_ray.cli.parse import parse
from tdc_ray.models.transformers.table import TRANSFORMERS

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
PAGES = [line for line in LISTED.stdout.splitlines() if line.endswith(".md")]
PAGES = [page for page in PAGES if not page.startswith("experiments/results/")]


def anchor(heading: str) -> str:
    """A heading's name in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_heading_that_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"\b(?:experiments|cluster|tests|tdc_ray)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
            assert heading in map(anchor, headings), target


def test_every_path_that_the_packages_page_names_exists():
    package = ROOT / "tdc_ray"
    paths = re.findall(r"`((?:[a-z_0-9]+/)+(?:\w+\.py)?)`", (package / "README.md").read_text())
    assert len(set(paths)) > 40
    assert [path for path in paths if not (package / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_a_page_names_exists(page):
    config = parse(["run"]).config
    for flag in re.findall(r"`(--[a-z]+\.[a-z-]+)[ `]", (ROOT / page).read_text()):
        stage, name = flag.removeprefix("--").split(".")
        assert hasattr(getattr(config, stage), name.removeprefix("no-").replace("-", "_")), flag


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_class_of_transformers_is_one_file_and_its_row(name):
    sources = {path: path.read_text() for path in (ROOT / "tdc_ray").rglob("*.py")}
    (own,) = [path for path, text in sources.items() if f'"{name}"' in text]
    assert own.parent == ROOT / "tdc_ray/models/transformers"
    importing = [path for path, text in sources.items() if f"transformers.{own.stem} " in text]
    assert {path.name for path in importing} <= {"table.py", "config_file.py"}  # DiT's settings
    if name.startswith("Sana"):  # the fourth
        assert len(sources[own].splitlines()) <= 150


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 10_240
    assert set(re.findall(r"\]\(([\w./]+\.md)", text)) == set(PAGES) - {"README.md"}


def test_the_readmes_test_command_is_where_ci_looks_for_it():
    script = r"sed -n '/<!-- test command -->/{n;n;p}' README.md"
    command = subprocess.run(script, shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert command.strip().endswith(".venv/bin/pytest")
    assert script in (ROOT / ".ci" / "run").read_text()


def test_nothing_else_stands_at_the_top():
    tops = {line.split("/")[0] for line in LISTED.stdout.splitlines()}
    allowed = {"tdc_ray", "experiments", "cluster", "tests", "pyproject.toml", "README.md"}
    allowed |= {"LICENSE", "constraints.txt"}
    assert {top for top in tops if not top.startswith(".")} <= allowed


def test_every_experiment_says_its_command_and_its_paper_numbers():
    texts = {path: path.read_text() for path in ROOT.glob("experiments/*.py")}
    found = {path: text for path, text in texts.items() if '__name__ == "__main__"' in text}
    assert len(found) > 15
    for path, text in found.items():
        assert f"python experiments/{path.name} --smoke" in text
        assert "The paper" in text
