"""The files of cluster/: they fit the schemas, agree with each other, and name what exists."""

import copy
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import tyro
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tdc_ray.cli.commands.run import RunCommand
from tdc_ray.cli.parse import parse

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT.parent / "shared" / "schemas"
README = (CLUSTER / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"registry.example.com/tdc-ray:{PROJECT['version']}"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def shared(kind: str) -> dict[str, Any]:
    (found,) = [part for part in documents("kuberay-shared.yaml") if part["kind"] == kind]
    return found


CLUSTER_SPEC = documents("kuberay-cluster.yaml")[0]["spec"]
JOB_SPEC = documents("kuberay-job.yaml")[0]["spec"]
AWS = documents("aws.yaml")[0]
HEAD = CLUSTER_SPEC["headGroupSpec"]["template"]["spec"]
(WORKERS,) = CLUSTER_SPEC["workerGroupSpecs"]
WORKER = WORKERS["template"]["spec"]
TENSORBOARD = shared("Deployment")["spec"]["template"]["spec"]
PODS = {"head": HEAD, "worker": WORKER, "tensorboard": TENSORBOARD}


# KubeRay


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    path = SCHEMAS / f"ray.io_v1_{kind}.json"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not part of the project: {path} does not exist")
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def check(document: object, by: dict[str, Any]) -> None:
    """Validate as ``jsonschema.validate`` does, but without checking the large schema first."""
    jsonschema.Draft202012Validator(by).validate(document)


KUBERAY = [("raycluster", "kuberay-cluster.yaml"), ("rayjob", "kuberay-job.yaml")]


@pytest.mark.parametrize(("kind", "name"), KUBERAY)
def test_kuberay_files_fit_its_schema(kind, name):
    (document,) = documents(name)
    assert document["apiVersion"] == "ray.io/v1"
    assert document["kind"].lower() == kind
    check(document, schema(kind))


@pytest.mark.parametrize(("kind", "name"), KUBERAY)
def test_the_schema_refuses_a_misspelt_key(kind, name):
    (document,) = documents(name)
    for path in (["spec"], ["spec", "rayClusterSpec" if kind == "rayjob" else "headGroupSpec"]):
        wrong = copy.deepcopy(document)
        part = wrong
        for key in path:
            part = part[key]
        part["enableAutoscalling"] = True
        with pytest.raises(jsonschema.ValidationError, match="enableAutoscalling"):
            check(wrong, schema(kind))


def test_kubernetes_own_objects_fit_what_kuberays_schema_says_of_them():
    head = schema("raycluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]
    volume = head["template"]["properties"]["spec"]["properties"]["volumes"]["items"]
    claim = volume["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]
    rules = schema("raycluster")["properties"]["spec"]["properties"]["networkPolicy"]["properties"]
    ingress = rules["head"]["properties"]["ingressRules"]
    check(shared("Deployment")["spec"]["template"], head["template"])
    check(shared("PersistentVolumeClaim")["spec"], claim["spec"])
    check(shared("Service")["spec"], head["headService"]["properties"]["spec"])
    check(shared("NetworkPolicy")["spec"]["ingress"], ingress)
    wrong = {**shared("Service")["spec"], "selectr": {}}
    with pytest.raises(jsonschema.ValidationError, match="selectr"):
        check(wrong, head["headService"]["properties"]["spec"])


def test_the_job_has_the_very_cluster_of_the_cluster_file():
    assert JOB_SPEC["rayClusterSpec"] == CLUSTER_SPEC
    assert JOB_SPEC["shutdownAfterJobFinishes"]
    assert JOB_SPEC["backoffLimit"] > 0


def test_the_token_stays_on_and_nothing_is_open_to_the_world():
    assert CLUSTER_SPEC["authOptions"] == {"mode": "token"}
    assert CLUSTER_SPEC["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert shared("Service")["spec"]["type"] == "ClusterIP"
    policy = shared("NetworkPolicy")["spec"]
    assert policy["podSelector"] == {}
    assert all(rule["from"] for rule in policy["ingress"])
    for path in CLUSTER.iterdir():
        for word in ("LoadBalancer", "NodePort", "hostNetwork", "hostPort"):
            assert word not in path.read_text(), path
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "slurm.sbatch").read_text()
    assert list(AWS["file_mounts"]) == ["/home/ubuntu/.ray/auth_token"]
    (start,) = [line for line in AWS["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "IpPermissions" not in AWS["provider"]["security_group"]


def test_only_the_head_has_the_key_and_takes_it_from_an_optional_secret():
    names = {name: {env["name"] for env in containers_env(pod)} for name, pod in PODS.items()}
    assert names == {
        "head": {"OPENAI_API_KEY", "OPENAI_BASE_URL"},
        "worker": set(),
        "tensorboard": set(),
    }
    for env in containers_env(HEAD):
        assert env["valueFrom"]["secretKeyRef"]["optional"]
        assert f"create secret generic {env['valueFrom']['secretKeyRef']['name']}" in README
    assert "runtimeEnvYAML" not in JOB_SPEC
    assert "--runtime-env" not in "".join(commands())


def containers_env(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [env for container in pod["containers"] for env in container.get("env", [])]


def test_workers_scale_tolerate_spot_nodes_and_hold_the_gpus():
    assert CLUSTER_SPEC["enableInTreeAutoscaling"]
    assert 0 < WORKERS["minReplicas"] <= WORKERS["replicas"] < WORKERS["maxReplicas"]
    tolerated = {toleration["key"] for toleration in WORKER["tolerations"]}
    assert tolerated >= {"nvidia.com/gpu", "cloud.google.com/gke-spot", "spot"}
    assert WORKER["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert CLUSTER_SPEC["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "tolerations" not in HEAD
    run = parse(shlex.split(JOB_SPEC["entrypoint"])[1:], checks_paths=False)
    assert isinstance(run, RunCommand)
    assert run.config.compute.num_base_workers <= WORKERS["minReplicas"]


@pytest.mark.parametrize("name", PODS)
def test_no_pod_runs_as_root_and_all_see_the_storage(name):
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"USER {pod['securityContext']['runAsUser']}:" in (CLUSTER / "Dockerfile").read_text()
    (container,) = pod["containers"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount["name"] == volume["name"]
    assert mount["mountPath"] == "/shared"
    claim = shared("PersistentVolumeClaim")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_tensorboards_service_finds_its_pod():
    service, deployment = shared("Service"), shared("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    (container,) = TENSORBOARD["containers"]
    (port,) = container["ports"]
    (exposed,) = service["spec"]["ports"]
    assert exposed["targetPort"] == port["name"]
    assert f"--port={port['containerPort']}" in container["command"]
    name = service["metadata"]["name"]
    assert f"port-forward service/{name} 6006:{exposed['port']}" in README


# Names that must agree


def test_image_ray_and_storage_have_one_name_everywhere():
    images = {container["image"] for pod in PODS.values() for container in pod["containers"]}
    assert images == {IMAGE} == {AWS["docker"]["image"]}
    for path in CLUSTER.iterdir():
        assert set(re.findall(r"registry\.example\.com/[\w./:-]+\w", path.read_text())) <= {IMAGE}
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert CLUSTER_SPEC["rayVersion"] == pinned[1]
    assert "--volume=/shared:/shared" in AWS["docker"]["run_options"]
    cluster = documents("kuberay-cluster.yaml")[0]["metadata"]["name"]
    assert f"service/{cluster}-head-svc" in README
    job = documents("kuberay-job.yaml")[0]["metadata"]["name"]
    assert f"kubectl delete rayjob {job}" in README


def test_no_key_or_token_stands_in_any_file():
    secret = re.compile(
        r"\bsk-[\w-]{8,}|\b(AKIA|ASIA)[A-Z0-9]{12,}|PRIVATE KEY|\bgh[pousr]_\w{20,}"
        r"|\b[0-9a-f]{32,}\b"
        r"|(?i:api_key|auth_token|password|secret_access_key)\s*[=:]\s*[\"']?[A-Za-z0-9+/_-]{8,}"
    )
    assert secret.search("OPENAI_API_KEY=abcdefgh1234")
    for path in [*CLUSTER.iterdir(), ROOT / ".rayignore", ROOT / ".dockerignore"]:
        assert not secret.search(path.read_text()), path


# The image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order: name and the rest of the line."""
    text = (CLUSTER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    parts = [line.split(maxsplit=1) for line in joined]
    return [(name, rest) for name, rest in parts]


def test_the_image_has_a_pinned_cuda_base_and_no_root():
    (base,) = [rest for name, rest in instructions() if name == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+(@sha256:\w{64})?", base)
    last = [rest for name, rest in instructions() if name == "USER"][-1]
    assert last == "1000:1000"
    (install,) = [rest for _, rest in instructions() if "-r requirements.txt" in rest]
    assert "-c constraints.txt" in install


def test_the_image_pins_what_the_constraints_leave_out_within_the_projects_bounds():
    text = (CLUSTER / "Dockerfile").read_text()
    pins = dict(re.findall(r" (\w+)==([\d.]+)", text))
    assert set(pins) == {"torch", "torchvision"}
    pinned = (ROOT / "constraints.txt").read_text()
    assert "\nboto3==" in pinned
    assert "\ns3fs==" in pinned
    bounds = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
    for name in ("torch", "torchvision"):
        assert Version(pins[name]) in bounds[name].specifier, name


def test_everything_that_the_image_copies_exists_and_is_let_into_the_context():
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in let_in
    copied = [
        source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in let_in, source


def test_the_images_default_cache_lies_on_the_storage():
    default = parse(["run"]).config.evaluate.cache_dir.replace("~", "/home/ubuntu")
    assert f"ln -s /shared/cache {default} " in (CLUSTER / "Dockerfile").read_text()
    assert ("ENV", "HOME=/home/ubuntu") in instructions()


def test_the_dockerfile_lists_the_projects_own_requirements():
    (install,) = [rest for _, rest in instructions() if "-r requirements.txt" in rest]
    script = re.search(r'python -c "(.*?)" > requirements', install)
    assert script
    command = [sys.executable, "-c", script[1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == PROJECT["dependencies"]


# AWS


def test_rays_own_validation_takes_the_aws_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(AWS)))
    with pytest.raises(jsonschema.ValidationError, match="max_wrkers"):
        validate_config(prepare_config({**copy.deepcopy(AWS), "max_wrkers": 1}))


def test_aws_has_an_on_demand_head_and_spot_workers_with_gpus():
    types = AWS["available_node_types"]
    head, workers = types[AWS["head_node_type"]], types["gpu"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert workers["resources"]["GPU"] == 1
    assert 0 < workers["min_workers"] <= workers["max_workers"] <= AWS["max_workers"]


def test_the_readmes_commands_fill_in_image_ami_and_file_system(tmp_path):
    (line,) = [line for line in commands() if line.startswith("sed -e")]
    names = {
        "IMAGE": "example.org/x:1",
        "ami": "ami-0123",
        "efs": "fs-0456",
        "HOME": str(tmp_path),
    }
    subprocess.run(line, shell=True, cwd=ROOT, env={**os.environ, **names}, check=True)
    text = (tmp_path / "tdc-aws.yaml").read_text()
    filled = yaml.safe_load(text)
    assert filled["docker"]["image"] == "example.org/x:1"
    for node_type in filled["available_node_types"].values():
        assert node_type["node_config"]["ImageId"] == "ami-0123"
    assert " fs-0456.efs.us-west-2.amazonaws.com:/ /shared" in text
    changed = text.replace("ami-0123", "ami-" + "0" * 17).replace("fs-0456", "fs-" + "0" * 17)
    assert changed.replace("example.org/x:1", IMAGE) == (CLUSTER / "aws.yaml").read_text()


# Slurm

SLURM_COMMANDS = {
    # Both "nodes" are this machine; a step is a process.
    "scontrol": "#!/bin/bash\nprintf 'one\\ntwo\\n'\n",
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
}


def test_the_slurm_script_parses():
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sbatch"], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", CLUSTER / "slurm.sbatch"], check=True)


def slurm(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run the Slurm script with stand-ins of Slurm's commands and a home of its own."""
    commands_dir = folder / "bin"
    commands_dir.mkdir()
    for name, text in SLURM_COMMANDS.items():
        (commands_dir / name).write_text(text)
        (commands_dir / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands_dir}:{os.environ['PATH']}",
        "HOME": str(folder),
        "VENV": sys.prefix,
        "OPENAI_API_KEY": "only-for-the-first-node",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "one,two",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    script = ["bash", str(CLUSTER / "slurm.sbatch"), *command]
    return subprocess.run(script, env=environment, capture_output=True, text=True, check=False)


def test_the_slurm_script_wants_a_command(tmp_path):
    done = slurm(tmp_path)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


ON_THE_CLUSTER = """
import os, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
class Worker:
    def look(self):
        return ray.get_runtime_context().get_node_id(), "OPENAI_API_KEY" in os.environ
workers = [Worker.options(scheduling_strategy="SPREAD").remote() for _ in range(2)]
nodes = dict(ray.get([worker.look.remote() for worker in workers]))
here = ray.get_runtime_context().get_node_id()
print("nodes", len(nodes), "key", [node == here for node, key in nodes.items() if key])
raise SystemExit(3)
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_slurm_script_runs_its_command_on_all_nodes_and_leaves_nothing(tmp_path):
    done = slurm(tmp_path, "python", "-c", ON_THE_CLUSTER)
    try:
        assert "nodes 2 key [True]" in done.stdout, done.stdout + done.stderr
        assert done.returncode == 3
        token = tmp_path / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        left = subprocess.run(
            ["pgrep", "-f", f"/tmp/ray-{os.getpid()}"], capture_output=True, text=True, check=False
        )
        assert not left.stdout
    finally:
        shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)


# The README


def blocks(language: str) -> list[str]:
    """The README's code blocks in one language; shell commands have none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands() -> Iterator[str]:
    """Every command line of the README, without its comment."""
    for block in blocks(""):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\s+#\s.*", "", line)


def test_every_tdc_ray_command_that_is_shown_parses():
    texts = [*commands(), JOB_SPEC["entrypoint"]]
    texts += (CLUSTER / "slurm.sbatch").read_text().splitlines()
    shown = [re.search(r"(?:^|-- |slurm\.sbatch )tdc-ray (.*)", text) for text in texts]
    shown += list(re.finditer(r"`tdc-ray (\w+ [^`]*)`", README))
    found = [match[1] for match in shown if match]
    assert len(found) >= 5
    for arguments in found:
        parse(shlex.split(arguments), checks_paths=False)


def test_every_setting_and_file_that_the_readme_names_exists():
    for flag in re.findall(r"`(--[a-z]+\.[a-z-]+)[ `]", README):
        stage, name = flag.removeprefix("--").split(".")
        assert hasattr(getattr(parse(["run"]).config, stage), name.replace("-", "_")), flag
    for name in re.findall(r"\b(?:cluster|experiments|tdc_ray)/[\w/-]*\.?\w+", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(
        r"^\| `([\w.-]+)` \| (?:for|the image|Kub|AWS|Slurm)", README, re.MULTILINE
    ):
        assert (CLUSTER / name).exists(), name


def test_every_experiment_of_the_readme_takes_its_flags(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from common import Flags

    shown = [line for line in commands() if "python experiments/" in line]
    assert shown
    for line in shown:
        path, *flags = shlex.split(line[line.index("experiments/") :])
        module = importlib.import_module(Path(path).stem)
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
        kinds = [kind for kind in kinds if issubclass(kind, Flags)]
        tyro.cli(max(kinds, key=lambda kind: len(kind.mro())), args=flags)


def ray_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """Find Ray's own command for a command line, and what is left of the line."""
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group):
        assert words[0] in command.commands, words[0]
        command, words = command.commands[words[0]], words[1:]
    return command, words


def test_every_ray_command_and_flag_that_is_shown_exists():
    started = [*AWS["head_start_ray_commands"], *AWS["worker_start_ray_commands"]]
    script = (CLUSTER / "slurm.sbatch").read_text().replace("\\\n", " ")
    started += re.sub(r"options=\((.*)\)", r"ray start \1", script).splitlines()
    found = 0
    for line in [*commands(), *started]:
        if line.startswith("#"):
            continue
        for part in re.findall(r"(?<![\w/-])ray ((?:[a-z-]+).*?)(?=;|&|>|'|$)", line):
            command, words = ray_command(part.split())
            options = {name for option in command.params for name in option.opts}
            words = words[: words.index("--")] if "--" in words else words
            for word in words:
                if word.startswith("--"):
                    assert word.split("=")[0] in options, f"ray {part}"
            found += 1
    assert found > 15


def test_the_sizing_table_is_what_its_program_prints():
    (program,) = blocks("python")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()
    assert len(rows) == 3
    for row in rows:
        assert row in README


# What `ray job submit --working-dir .` uploads


def upload(folder: Path, zipped: Path) -> set[str]:
    """Zip a folder as Ray does, using .rayignore alone; return the names in it."""
    from ray._private.runtime_env.packaging import _zip_files

    _zip_files(str(folder), [], str(zipped), include_gitignore=False)
    with zipfile.ZipFile(zipped) as file:
        return set(file.namelist())


def test_an_upload_is_small_and_holds_what_experiments_need(tmp_path):
    checkout = tmp_path / "checkout"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in done.stdout.splitlines():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    left_behind = [
        ".git/objects/pack/a.pack",
        ".venv/lib/torch.so",
        "runs/digits/base/state.pt",
        "runs/digits/run.log",
        "data/cifar-10-batches-py/data_batch_1",
        "tdc_ray/__pycache__/cli.pyc",
        "tdc_ray.egg-info/PKG-INFO",
        "mnist.npz",
        ".mypy_cache/a.json",
    ]
    for name in left_behind:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(os.urandom(300_000))
    names = upload(checkout, tmp_path / "upload.zip")
    assert not names & set(left_behind)
    assert names >= {"tdc_ray/cli/main.py", "tdc_ray/py.typed", "experiments/main_results.py"}
    assert names >= {"pyproject.toml", "constraints.txt"}
    assert (tmp_path / "upload.zip").stat().st_size < 3_000_000
