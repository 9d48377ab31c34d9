"""What a fresh process imports: ``--help``, ``plan``, ``ls`` and ``status`` start at once."""

import json
import os
import pkgutil
import subprocess
import sys

import pytest

import tdc_ray

FRAMEWORKS = {"torch", "diffusers", "ray"}

LIST_PACKAGES = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def packages_after_importing(module: str) -> set[str]:
    command = [sys.executable, "-c", LIST_PACKAGES, module]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [
        "tdc_ray",
        "tdc_ray.diffusion.plan",
        "tdc_ray.diffusion.samplers",
        "tdc_ray.diffusion.scheduler_plan",
        "tdc_ray.diffusion.schedule",
        "tdc_ray.config.run",
        "tdc_ray.config.presets",
        "tdc_ray.pruning.memory",
        "tdc_ray.reporting.overview",
        "tdc_ray.reporting.workers",
        "tdc_ray.models.unet2d.architectures",
        "tdc_ray.cli.main",
    ],
)
def test_planning_and_looking_at_runs_import_no_framework(module):
    found = packages_after_importing(module)
    assert "tdc_ray" in found
    assert not found & FRAMEWORKS


def test_what_meets_an_interrupt_is_imported_before_all_else():
    assert not packages_after_importing("tdc_ray.cli.main") & {"ctypes", "logging", "pydantic"}


def test_sampling_from_a_finished_run_imports_no_ray():
    found = packages_after_importing("tdc_ray.diffusion.pipeline")
    assert {"torch", "diffusers"} <= found
    assert "ray" not in found


def imported(log: str) -> set[str]:
    """Return the packages that Python's log of imports names."""
    lines = [line for line in log.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in lines}


def test_the_plan_command_imports_no_framework(tmp_path):
    arguments = ["plan", "--preset", "cifar10", "--out-dir", str(tmp_path)]
    command = [sys.executable, "-X", "importtime", "-m", "tdc_ray", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert (tmp_path / "plan.json").exists()
    found = imported(done.stderr)
    assert {"tdc_ray", "numpy"} <= found
    assert not found & FRAMEWORKS


@pytest.mark.parametrize("flag", ["--data", "--base"])
def test_a_name_that_the_hub_has_not_is_refused_without_a_framework(tmp_path, flag):
    arguments = ["run", flag, "my/pictures", "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-X", "importtime", "-m", "tdc_ray", *arguments]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | nowhere
    )
    assert done.returncode == 1
    assert "my/pictures is neither a" in done.stderr.splitlines()[-1]
    assert not imported(done.stderr) & FRAMEWORKS


def test_the_packages_names_are_loaded_when_they_are_first_used():
    code = (
        "import sys, tdc_ray; assert {'load_base', '__version__'} <= set(dir(tdc_ray)); "
        "assert 'tdc_ray.config.presets' not in sys.modules; assert tdc_ray.__version__; "
        "assert tdc_ray.preset('cifar10').preset == 'cifar10'; "
        "assert 'tdc_ray.config.presets' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(set(tdc_ray.__all__) - {"run"}))  # run imports ray
def test_every_public_name_is_that_of_its_module(name):
    found = getattr(tdc_ray, name)
    assert found is getattr(sys.modules[found.__module__], name)


@pytest.mark.slow
def test_the_packages_names_are_what_they_were_after_they_are_used():
    code = (
        "import tdc_ray, types;"
        "first = {name: getattr(tdc_ray, name) for name in tdc_ray.__all__};"
        "import tdc_ray.cli.run, tdc_ray.runs.run, tdc_ray.cli.commands.run, tdc_ray.cli.main;"
        "assert all(getattr(tdc_ray, name) is first[name] for name in first);"
        "assert isinstance(tdc_ray.run, types.FunctionType)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_public_name_is_that_of_a_submodule():
    below = {module.name for module in pkgutil.iter_modules(tdc_ray.__path__)}
    assert {"cli", "runs"} <= below
    assert not below & set(tdc_ray.__all__)


def test_experts_are_made_in_process_without_ray():
    assert "ray" not in packages_after_importing("tdc_ray.cli.api.make")


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="'tdc_ray' has no attribute 'nothing'"):
        _ = tdc_ray.nothing
