"""The provenance of results: versions, commit, machine."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("tdc-ray", "torch", "diffusers", "ray", "numpy", "clean-fid", "scipy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def commit() -> str | None:
    """Return the commit of the checkout the package runs from, marked if changed.

    None means that it runs from no checkout.
    """
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def machine() -> str:
    """Return system and processors, such as ``Linux x86_64, 2 x Intel(R) Xeon(R) Processor``."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processors = f"{len(names)} x {names[0]}" if names else platform.processor()
    return f"{platform.system()} {platform.machine()}, {processors}"
