"""The repository itself: the README's files exist, nothing stands where it should not."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("readme", ["README.md", "experiments/README.md"])
def test_every_file_that_a_readme_names_exists(readme):
    readme = (ROOT / readme).read_text()
    named = set(re.findall(r"\b(?:experiments|cluster|tests|tdc_ray)/[\w./-]*\w", readme))
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_readmes_test_command_is_where_ci_looks_for_it():
    script = r"sed -n '/<!-- test command -->/{n;n;p}' README.md"
    command = subprocess.run(script, shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert command.strip().endswith(".venv/bin/pytest")
    assert script in (ROOT / ".ci" / "run").read_text()


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    tops = {line.split("/")[0] for line in listed.splitlines()}
    allowed = {"tdc_ray", "experiments", "cluster", "tests", "pyproject.toml", "README.md"}
    allowed |= {"LICENSE", "constraints.txt"}
    assert {top for top in tops if not top.startswith(".")} <= allowed


def test_every_experiment_says_its_command_and_its_paper_numbers():
    for path in ROOT.glob("experiments/*.py"):
        if path.name not in ("common.py", "output.py", "stages.py"):
            text = path.read_text()
            assert f"python experiments/{path.name} --smoke" in text
            assert "The paper" in text
