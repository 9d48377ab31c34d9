import re
from dataclasses import replace

import pytest

from tdc_ray.cli.main import run_command
from tdc_ray.execution.machine import look_at_machine
from tdc_ray.execution.ray import cluster
from tdc_ray.runs import doctor
from tdc_ray.storage import object_store
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.probe import SHARED_FILE, probe_storage


def problems(checks) -> list[str]:
    return [f"{check.what} -> {check.remedy}" for check in checks if check.remedy is not None]


GOOD = replace(
    look_at_machine(), temp_free=10**11, shared_memory_free=10**10, max_open_files=2**20
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": {**GOOD.versions, "ray": "0.1"}}, "has ray 0.1 .* -> install the same"),
        ({"temp_free": 10**9}, "1.0 GB are free in .* -> make room"),
        ({"shared_memory_free": 10**6}, "1 MB are free in /dev/shm -> .*--shm-size"),
        ({"max_open_files": 256}, "a process may open 256 files -> raise the limit"),
        ({"missing_paths": ("/data/x",)}, "/data/x does not exist -> mount"),
    ],
)
def test_what_a_machine_lacks_is_told_with_its_remedy(changes, words):
    assert problems(doctor._checks_of("node", GOOD, GOOD)) == []
    (problem,) = problems(doctor._checks_of("node", replace(GOOD, **changes), GOOD))
    assert re.match(words, problem)


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")


def test_a_storage_that_does_all_is_left_as_it_was(storage):
    folder = f"{storage}/runs"
    assert probe_storage(folder) == {}
    place = resolve_path(folder)
    assert not [path for path in place.rglob("*") if path.is_file()]


def test_a_storage_that_another_node_does_not_see_is_told(storage):
    assert probe_storage(storage, "text").keys() == {"see what another node wrote"}
    doctor.write_text(resolve_path(storage) / SHARED_FILE, "text")
    assert probe_storage(storage, "text") == {}


def test_a_store_that_lets_all_create_a_file_is_told(bucket, monkeypatch):
    monkeypatch.setattr(
        object_store, "create", lambda path, content: object_store.write(path, content) is None
    )
    (problem,) = problems(doctor._storage_checks("here", probe_storage(bucket)))
    assert "create once: two drivers could hold" in problem
    assert "start one driver only" in problem


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    (problem,) = problems(doctor._storage_checks("here", probe_storage(f"{tmp_path}/file/runs")))
    assert "write: " in problem
    assert "permissions" in problem


@pytest.mark.ray
def test_the_command_looks_at_this_machine_its_ray_and_a_storage(
    ray_cluster, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(doctor, "LEAST_TEMP_BYTES", 0)
    monkeypatch.setattr(doctor, "OBJECT_STORE_BYTES", 0)
    monkeypatch.setattr(doctor, "LEAST_OPEN_FILES", 0)
    monkeypatch.setattr(doctor, "MOST_SECONDS_APART", 1e9)
    command = ["doctor", "--storage", str(tmp_path)]
    assert run_command(command) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert "Ray answers, with 1 node\n" in printed
    assert printed.count("storage: files are written") == 2
    assert "nothing is wrong" in printed
    assert list(tmp_path.iterdir()) == []
    assert run_command([*command, "--paths", "/no/such"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("/no/such does not exist") == 2
    assert "error: 2 of these" in printed.err


def test_a_ray_that_cannot_be_reached_is_a_problem_too(capsys):
    assert run_command(["doctor", "--address", "127.0.0.1:1"]) == 1
    (problem,) = re.findall(r"PROBLEM this machine: (.*)", capsys.readouterr().out)
    assert "127.0.0.1:1: " in problem  # nobody answers, or this process has joined another


def test_a_cluster_of_another_version_is_a_problem_too(monkeypatch, capsys):
    def init(**_):
        raise RuntimeError("Version mismatch: the cluster was started with Ray 0.1")

    for name, function in (("init", init), ("shutdown", bool), ("is_initialized", bool)):
        monkeypatch.setattr(cluster.ray, name, function)
    assert run_command(["doctor", "--address", "local"]) == 1
    assert "Ray cannot be used at local: Version mismatch" in capsys.readouterr().out
