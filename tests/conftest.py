"""One Ray cluster for the whole test run, and Hypothesis without clocks."""

import logging
import os
import subprocess
import sys
import uuid

# Ray reads these when it is imported, and so do the processes that tests start.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # SciPy's threads wait for each other on busy cores

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from rich.console import Console

from tdc_ray.config.presets import preset
from tdc_ray.config.run import RunConfig
from tdc_ray.storage.files import locked

clockless = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("tests", derandomize=True, **clockless)
# Tests of files take a fifth of them.
num_examples = 5 * int(os.environ.get("FUZZ_EXAMPLES", "10000"))
hypothesis.settings.register_profile("fuzz", max_examples=num_examples, **clockless)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--part K/N``: of the selected tests, the K-th of N parts."""
    parser.addoption("--part", metavar="K/N", help="run the K-th (of 0..N-1) of N parts")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the part of the selected tests that ``--part`` names."""
    if part := config.getoption("--part"):
        number, count = map(int, part.split("/"))
        # Neighbours stay together: tests of a file share what its fixtures take minutes to make.
        chosen = items[len(items) * number // count : len(items) * (number + 1) // count]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums have the same last bits in every test, whatever the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """What a command sets up for its own log ends with its test."""
    root, ours = logging.getLogger(), logging.getLogger("tdc_ray")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments can be imported."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))


@pytest.fixture(scope="session")
def common_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test run have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def cache_dir(common_dir: Path) -> Path:
    """Where trained classifiers are kept, for all tests."""
    return common_dir / "cache"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of 2 CPUs."""
    from tdc_ray.execution.ray.cluster import connected

    with connected(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def smoke_config(cache_dir: Path) -> RunConfig:
    """The digits-smoke preset, with its cache in a temporary place."""
    config = preset("digits-smoke")
    return replace(config, evaluate=replace(config.evaluate, cache_dir=str(cache_dir)))


@pytest.fixture(scope="session")
def finished_run(ray_cluster: None, smoke_config: RunConfig, common_dir: Path) -> Path:
    """The directory of a whole run of ``smoke_config`` that nothing cut: one for all processes."""
    from tdc_ray.cli.run import run

    folder = common_dir / "finished" / "run"
    with locked(common_dir / "finished.lock"):
        run(smoke_config, folder, Console(quiet=True))
    return folder


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3 server on loopback."""
    pipe = subprocess.PIPE
    script = Path(__file__).parent / "s3_server.py"
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.stdin.close()


@pytest.fixture
def bucket(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty bucket of the test's own; its mirror is empty too."""
    from fsspec.core import url_to_fs

    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "TDC_RAY_MIRROR": str(tmp_path / "node"),
    }.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://test-{uuid.uuid4().hex[:12]}"
    store, key = url_to_fs(uri)
    store.mkdir(key)
    return uri
