import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdc_ray.cli.commands.run import RunCommand
from tdc_ray.cli.flags import flags_of
from tdc_ray.cli.help import SHORT, short_help
from tdc_ray.cli.main import BROKEN_PIPE, run_command
from tdc_ray.cli.parse import _commands, parse
from tdc_ray.config.data import DataConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.run import default_run_dir
from tdc_ray.errors import ConfigError
from tdc_ray.models import winograd
from tdc_ray.models.winograd import convolution
from tdc_ray.storage.files import read_json
from tdc_ray.storage.run_dir import RunDir


def tdc_ray(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tdc_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_plan_prints_the_groups_and_writes_them(tmp_path, capsys):
    assert run_command(["plan", "--preset", "cifar10", "--out-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "0.8305 F = 6.76 G macs" in printed
    assert "the paper's mean of the experts, for k = 0.5 and N = 10: 6.56 G" in printed
    assert "training the base, one worker holds 1.05 GB (weights 210 MB, gradients" in printed
    plan = json.loads((tmp_path / "plan.json").read_text())
    sizes = [group["last"] - group["first"] + 1 for group in plan["groups"]]
    assert sizes == [4, 13, 35, 87, 164, 190, 160, 132, 114, 101]
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.size[0] > 400


def test_plan_says_which_groups_vanish_and_which_no_step_enters(tmp_path, capsys):
    arguments = ["plan", "--preset", "cifar10-cosine", "--out-dir", str(tmp_path)]
    assert run_command(arguments) == 0
    printed = capsys.readouterr().out
    assert "number 8 (from 0) is empty and vanishes" in printed
    assert "no sampling step enters group 6, 7, 8" in printed


def test_a_setting_is_a_flag_and_a_preset_gives_the_defaults(tmp_path, capsys):
    arguments = ["plan", "--preset=imagenet64", "--plan.num-groups", "4"]
    assert run_command([*arguments, "--out-dir", str(tmp_path)]) == 0
    assert "imagenet64: snr schedule, k = 0.5, N = 4, base 39.35 G" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--preset", "nothing"], ["--preset must be one of digits,", "got nothing"]),
        (["run", "--preset", "cifar"], ["got cifar: did you mean cifar10?"]),
        (["plan", "--plan.min-macs-share", "1.5"], ["plan.min_macs_share", "at most 1", "1.5"]),
        (["run", "--finetune.batch-size", "0"], ["finetune.batch_size", "at least 1", "0"]),
        (["run", "--preset", "mnist", "--dry-run"], ["mnist.npz does not exist", "--data.path"]),
        (
            ["run", "--preset", "ffhq256-ldm", "--data.path", ".", "--dry-run"],
            ["ldm-ffhq256", "needs a first stage", "--data.first-stage"],
        ),
        (["sample", "nowhere"], ["nowhere does not exist", "a run directory, or a folder of"]),
        (
            ["sample", "nowhere", "--winograd", "--precision", "bf16"],
            ["sample.precision must be fp32 with --winograd, got bf16"],
        ),
        (
            ["sample", "nowhere", "--offload", "--compile", "default"],
            ["sample.compile must be none with --offload or --winograd, got default"],
        ),
    ],
)
def test_bad_input_is_one_line_with_setting_rule_and_value(
    arguments, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 1
    printed = capsys.readouterr().err
    assert len(printed.strip().splitlines()) == 1
    for word in words:
        assert word in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (
            ["run", "--plan.min-macs-share", "1.5", "--sampler.eta", "2", "--compare.swaps"],
            ["plan.min_macs_share", "sampler.eta", "compare.swaps"],
        ),
        (["sample", "x", "--num-images", "0", "--batch-size", "0"], ["sample.num", "sample.ba"]),
        (
            ["prune", "x", "--out", "y", "--macs", "2", "--milliseconds", "0"],
            ["prune.ma", "prune.mi", "give"],
        ),
    ],
)
def test_wrong_settings_are_listed_together(arguments, names, capsys):
    assert run_command(arguments) == 1
    first, *others = capsys.readouterr().err.splitlines()
    assert first == f"error: {len(names)} errors in the settings:"
    for line, name in zip(others, names, strict=True):
        assert line.startswith(f"  {name}")


@pytest.mark.parametrize("below", ["", "/deeper"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--run-dir"],
        ["run", "--dry-run", "--run-dir"],
        ["run", "--store"],
        ["run", "--evaluate.cache-dir"],
        ["run", "--data.cache-dir"],
        ["sweep", "--vary", "k=0.5", "--storage"],
        ["plan", "--out-dir"],
        ["sample", ".", "--out-dir"],
        ["export", "."],
        ["report", ".", "--out"],
        ["schedule", ".", "--macs", "0.5", "--out"],
        ["score", ".", "--reference", "digits", "--out"],
        ["simulate", "--json"],
        ["train-autoencoder", "--out"],
        ["train-autoencoder", "--out", "x", "--data", "digits", "--data.cache-dir"],
    ],
)
def test_an_output_that_lies_in_a_file_is_refused_by_its_flag(
    tmp_path, capsys, monkeypatch, arguments, below
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    is_file_wanted = arguments[-1] == "--json" or arguments[0] == "score"
    place = f"file{below or '/out.json'}" if is_file_wanted else f"file{below}"
    assert run_command([*arguments, place]) == 1
    assert "file is a file: name a folder by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["simulate", "--json"], ["score", ".", "--reference", "digits", "--out"]]
)
def test_an_output_file_that_is_a_folder_is_refused(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert run_command([*arguments, "."]) == 1
    assert ". is a folder: name a file by --" in capsys.readouterr().err


LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["run", "--data", LONG], "--data"),
        (["run", "--run-dir", LONG], "--run-dir"),
        (["run", "--data.first-stage", LONG], "data.first_stage"),
        (["simulate", "--json", LONG], "--json"),
        (["status", LONG], ""),
    ],
)
def test_a_path_that_cannot_be_looked_for_is_refused(arguments, name, capsys):
    assert run_command(arguments) == 1
    said = f"{name} {LONG} cannot be looked for: File name too long.".strip()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["status"], ["run", "--run-dir"], ["ls"], ["sample", ".", "--prompts"]]
)
def test_the_home_of_nobody_is_refused(arguments, capsys):
    assert run_command([*arguments, "~nobody-here/run.txt"]) == 1
    assert "~nobody-here/run.txt cannot be looked for: Could not" in capsys.readouterr().err


def test_the_folder_of_a_run_that_names_none_is_looked_at(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / default_run_dir(preset("digits"))).touch()
    assert run_command(["run"]) == 1
    assert "is a file: name a folder by --run-dir" in capsys.readouterr().err


def test_a_finished_run_of_images_of_ones_own_needs_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "images/1.png")
    (tmp_path / "inception").touch()
    arguments = ["run", "--data", "images", "--evaluate.inception-path", "inception"]
    folder = parse(arguments).run_dir
    (tmp_path / "inception").unlink()
    with pytest.raises(ConfigError, match=r"evaluate\.inception_path inception does not exist"):
        parse(arguments)
    folder.mkdir(parents=True)
    RunDir(folder).results.touch()
    assert parse(arguments).run_dir == folder


def test_a_dry_run_writes_nothing_and_may_name_what_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    arguments = ["run", "--run-dir", str(tmp_path / "run"), "--store", str(tmp_path / "store")]
    parse([*arguments, "--dry-run"])
    with pytest.raises(ConfigError, match="cannot be written to: name another folder by --store"):
        parse(arguments)


def test_version_is_one_line(capsys):
    assert run_command(["--version"]) == 0
    assert re.fullmatch(r"tdc-ray \S.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["run", "--data.pth", "x"], "--data.path"),
        (["run", "--base.num-step", "3"], "--base.num-steps"),
        (["run", "--prune.metho", "llm"], "--prune.method"),
        (["run", "--num-groups", "3"], "--plan.num-groups"),
        (["run", "--lr", "3"], "did you mean --base.learning-rate or --finetune.learning-rate?"),
        (["run", "--finetune.lr=3"], "did you mean --finetune.learning-rate?"),
        (["run", "--train_data_dir", "x"], "did you mean --data?"),
        (["plan", "--output-dir", "x"], "did you mean --out-dir?"),
        (["sweep", "--vary", "k=1", "--max-concurent", "3"], "--max-concurrent"),
        (["prune", ".", "--out", "x", "--mac", "0.5"], "--macs"),
        (["sample", "x", "--num-image", "4"], "--num-images"),
        (["run", "--prune.method", "tailor"], "got tailor: did you mean taylor?"),
        (["sweep", "--vary", "k=1", "--log-to", "mlflow", "wandbb"], "did you mean wandb?"),
        (["run", "--imagesize", "32"], "no flag --imagesize: did you mean --data.image-size?"),
        (["run", "--hour", "2"], "there is no flag --hour: did you mean --hours?"),
        (["run", "--no-such"], "no flag --no-such. tdc-ray run --help-all lists all."),
        (["run", "images"], "takes flags alone, got images: did you mean --preset images?"),
        (["plan", "--seed", "1", "img"], "got img: did you mean --data img?"),
        (["run", "--dry-run", "img"], "got img: did you mean --data img?"),
        (["simulate", "-x"], "tdc-ray simulate takes flags alone, got -x."),
        (["--versoin"], "tdc-ray has no flag --versoin: did you mean --version?"),
        (["run", "--data", "--seed", "1"], "--data must be given a value, got nothing."),
        (["run", "--epochs"], "--epochs must be a number, got nothing."),
        (["run", "--dry-run", "--log-to"], "--log-to must be one of tensorboard, wandb, mlflow"),
        (["plan", "--model.architecture", "atuo"], "got atuo: did you mean auto?"),
        (["rum"], "there is no command rum: did you mean run?"),
        (["colour"], "there is no command colour. Commands: run, sweep, plan"),
        (["sweep", "--seeds", "1", "2"], "tdc-ray sweep needs --vary: tdc-ray sweep --help says"),
        (["prune", "--macs", "0.5"], "tdc-ray prune needs MODEL_DIR and --out"),
        (["export", "run"], "tdc-ray export needs OUT:"),
        (["schedule", "run"], "tdc-ray schedule needs --macs:"),
        (["sample", "--num-images", "4", "--verbose"], "tdc-ray sample needs RUN:"),
    ],
)
def test_what_is_misspelt_gets_the_right_word(tmp_path, arguments, right):
    done = tdc_ray(*arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)  # 2 is tyro's
    assert right in done.stderr
    assert "in tdc-ray" not in done.stderr  # flags of this command alone


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "sample"])
def test_a_scheduler_is_named_by_the_flag_that_errors_name(tmp_path, command):
    flags = ["--sampler.scheduler=ddim", "--sampler.spacing", "trailing"]
    done = tdc_ray(command, *([] if command == "run" else ["x"]), *flags, cwd=tmp_path)
    right = "did you mean DDIMScheduler?" if command == "run" else "x does not exist"
    assert right in done.stderr


@pytest.mark.parametrize("name", ["run", "sweep", "sample", "score", "train-autoencoder"])
def test_every_flag_is_known_by_its_name(name, capsys):
    with pytest.raises(SystemExit):
        run_command([name, "--help-all"])
    text = capsys.readouterr().out.replace("--no-", "--").replace(".no-", ".")
    listed = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)) - {"--help"}
    known = set(flags_of(_commands(preset("digits"))[name]))
    # A line that is cut ends within a flag.
    assert {one for one in listed if not any(two.startswith(one) for two in known)} == set()
    assert known <= listed


@pytest.mark.parametrize("name", list(SHORT))
def test_help_is_one_screen_of_flags_that_there_are(name, capsys):
    assert run_command([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    assert lines[-1] == f"All flags: tdc-ray {name} --help-all"
    with pytest.raises(SystemExit):
        run_command([name, "--help-all"])
    known = re.findall(r"--[^ ,]+", capsys.readouterr().out)
    named = {flag.split()[0] for flags in SHORT[name].values() for flag in flags}
    assert {flag for flag in named if flag.startswith("--")} <= set(known)


def test_the_help_of_a_run_has_some_twenty_flags():
    assert sum(map(len, SHORT["run"].values())) <= 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--hours", "two"], "--hours must be a number, got two."),
        (["run", "--hours", "inf"], "--hours must be a number, got inf."),
        (["run", "--hours=-1"], "--hours must be greater than 0, got -1.0."),
        (
            ["run", "--data", "digits", "--epochs", "0"],
            "--epochs must be greater than 0, got 0.0.",
        ),
        (["run", "--budget.hours", "-1"], "budget.hours must be greater than 0, got -1.0."),
        (["run", "--plan.num_groups=1e1"], "--plan.num-groups must be a whole number, got 1e1."),
        (
            ["sample", "x", "--num-images", "four"],
            "--num-images must be a whole number, got four.",
        ),
        (["simulate", "--workers", "8", "all"], "--workers must be a whole number, got all."),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_flag(arguments, message, capsys):
    assert run_command(arguments) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def test_help_writes_a_size_as_its_flag_takes_it():
    config = replace(preset("digits"), data=DataConfig(image_size=(16, 8)))
    assert "48x64 [16x8]" in str(short_help("run", RunCommand(config=config)))


def test_help_shows_the_defaults_of_the_preset_that_is_named(capsys):
    assert run_command(["run", "--preset", "cifar10", "-h"]) == 0
    assert re.search(r"--plan.num-groups N .*\[10\]", capsys.readouterr().out)


def test_a_refused_dry_run_prints_the_refusal_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits = ["--plan.schedule", "snr", "--plan.num-groups", "4", "--plan.min-macs-share", "0.01"]
    assert run_command(["run", "--dry-run", *limits]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "limit" in printed.err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_steps_that_begin_far_below_the_last_timestep_are_refused(
    tmp_path, capsys, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    steps = ["--sampler.sampler", "ddim", "--sampler.num-inference-steps", "600"]
    assert run_command([command, *steps]) == 1
    assert "must be 500 or 1000 for ddim, got 600" in capsys.readouterr().err
    if command == "plan":
        assert run_command([command, *steps, "--sampler.spacing", "trailing"]) == 0
        assert read_json(next(tmp_path.glob("**/plan.json")))["sampling_timesteps"][0] == 999


def test_a_temporary_folder_too_long_for_rays_sockets_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", f"/tmp/{'x' * 70}")
    for arguments in (["run", "--dry-run"], ["run"]):
        assert run_command([*arguments, "--run-dir", str(tmp_path / "run")]) == 1
        assert "set RAY_TMPDIR to a shorter one" in capsys.readouterr().err
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert run_command(["run", "--dry-run"]) == 0


def test_verbose_shows_where_an_error_came_from(tmp_path):
    done = tdc_ray("sample", "nowhere", "--verbose", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stdout + done.stderr


def test_dry_run_shows_settings_and_plan_and_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(["run", "--dry-run", "--verbose"]) == 0
    assert "num_groups=4" in capsys.readouterr().out
    assert run_command(["run", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(
        "settings: the preset digits (--verbose: all)\ndigits: measured schedule, k = 0.5"
    )
    assert run_command(["run", "--dry-run", "--seed", "3", "--model.dropout", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "settings: the preset digits, but (--verbose: all)\n  seed 0 -> 3\n" in printed
    assert "  model.dropout 0.0 -> 0.1\n" in printed
    assert "mean limit over the 20 sampling steps" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", [[], ["--preset", "digits-smoke"]])
def test_images_that_the_demos_shape_does_not_fit_are_refused(tmp_path, capsys, preset):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (24, 24)).save(tmp_path / name / "1.png")
    data = ["--data.source", "folder", "--data.path", str(tmp_path), "--data.labels-from-folders"]
    assert run_command(["run", *preset, *data, "--dry-run"]) == 1
    printed = capsys.readouterr().err
    assert f"error: the first image in {tmp_path} is 24x24 in colour" in printed
    assert "Set --data.image-size 24 --data.num-channels 3" in printed
    given = ["--data.image_size=8", "--data.num-channels", "1"]
    assert run_command(["run", *preset, *data, *given, "--dry-run"]) == 0


def test_a_file_is_no_run_directory(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run_command(["run", "--run-dir", str(tmp_path / "file")]) == 1
    assert "file is a file: name a folder by --run-dir" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a[bold]", "a [x] b", "[/] :smile:"])
def test_a_name_with_brackets_or_colons_is_printed_as_it_is(tmp_path, capsys, name):
    out = str(tmp_path / name.replace("/", ""))
    assert run_command(["plan", "--plan.num-groups", "2", "--out-dir", out]) == 0
    assert f"{out}/plan.json" in capsys.readouterr().out
    assert run_command(["status", f"{out}/none"]) == 1
    assert f"{out}/none does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["sweep", "--help"], ["--version"], ["plan"]])
def test_a_pipe_that_closes_early_ends_quietly(tmp_path, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tdc_ray", *arguments]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False
    )
    os.close(writer)
    assert done.returncode == BROKEN_PIPE
    assert done.stderr == ""


def test_output_that_is_closed_or_on_a_full_disk_is_no_traceback(tmp_path):
    closed = subprocess.run(["bash", "-c", f"{sys.executable} -m tdc_ray --version >&-"])
    assert closed.returncode == 0
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "tdc_ray", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("where", ["parse", "output"])
def test_ctrl_c_at_any_time_is_no_traceback(where):
    text = (
        f"import tdc_ray.cli.{where} as module, tdc_ray.cli.main as main, sys\n"
        "def interrupt(*_, **__): raise KeyboardInterrupt\n"
        f"module.{'parse' if where == 'parse' else 'configure_logging'} = interrupt\n"
        "sys.argv = ['tdc-ray', 'plan']\n"
        "main.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_help_names_every_command():
    printed = tdc_ray("--help").stdout
    for command in ("run", "plan", "sample"):
        assert f"• {command}" in printed


@pytest.mark.ray
def test_sample_writes_a_grid_and_an_npz_that_a_seed_decides(finished_run, tmp_path):
    for name in ("one", "two"):
        out = ["--out-dir", str(tmp_path / name), "--batch-size", "5" if name == "one" else "8"]
        arguments = ["sample", str(finished_run), "--num-images", "8", "--seed", "3", *out]
        assert run_command(arguments) == 0
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two"))
    assert one.dtype == np.uint8
    assert one.shape == (8, 8, 8, 1)
    assert np.abs(one.astype(int) - two).max() <= 1  # batches of other sizes, other last bits
    with Image.open(tmp_path / "one" / "samples.png") as grid:
        assert max(grid.size) >= 512
        assert grid.mode == "L"


@pytest.mark.ray
def test_sample_draws_by_another_scheduler_where_one_is_named(finished_run, tmp_path, capsys):
    euler = ["--scheduler", "EulerDiscreteScheduler", "--karras-sigmas"]
    images = {}
    for name, more in (("own", []), ("euler", euler), ("trailing", ["--spacing", "trailing"])):
        out = ["--out-dir", str(tmp_path / name), "--num-inference-steps", "5"]
        assert run_command(["sample", str(finished_run), "--num-images", "2", *out, *more]) == 0
        images[name] = np.load(tmp_path / name / "samples.npz")["arr_0"]
    for name in ("euler", "trailing"):
        assert np.abs(images[name].astype(int) - images["own"]).max() > 10
    flow = ["--scheduler", "FlowMatchHeunDiscreteScheduler"]
    assert run_command(["sample", str(finished_run), *flow]) == 1
    assert "flow matching" in capsys.readouterr().err


@pytest.mark.ray
def test_sample_takes_the_precision_that_it_is_told(finished_run, tmp_path, capsys):
    images = {}
    for precision in ("fp32", "bf16", "auto"):
        out = ["--out-dir", str(tmp_path / precision), "--precision", precision]
        assert run_command(["sample", str(finished_run), "--num-images", "2", *out]) == 0
        images[precision] = np.load(tmp_path / precision / "samples.npz")["arr_0"]
    assert not np.array_equal(images["bf16"], images["fp32"])
    settled = re.search("precision auto is (fp32|bf16) here", capsys.readouterr().out)
    assert settled is not None
    np.testing.assert_array_equal(images["auto"], images[settled[1]])


@pytest.mark.ray
def test_sample_convolves_by_winograd_where_that_is_asked_for(finished_run, tmp_path, monkeypatch):
    seen = []
    for name in ("LEAST_CHANNELS", "LEAST_TILES"):
        monkeypatch.setattr(winograd, name, 1)
    monkeypatch.setattr(winograd, "convolution", lambda *a: seen.append(1) or convolution(*a))
    arguments = ["sample", str(finished_run), "--num-images", "2", "--num-inference-steps", "1"]
    assert run_command([*arguments, "--out-dir", str(tmp_path)]) == 0
    assert not seen
    assert run_command([*arguments, "--out-dir", str(tmp_path), "--winograd"]) == 0
    assert seen


# --- runs side by side ------------------------------------------------------------------------


@pytest.mark.ray
def test_ls_and_compare_show_runs_finished_or_not_side_by_side(finished_run, tmp_path, capsys):
    begun = tmp_path / "begun"
    begun.mkdir()
    settings = json.loads((finished_run / "config.json").read_text())
    settings["finetune"]["num_steps"] = 12_345
    (begun / "config.json").write_text(json.dumps(settings))
    assert run_command(["ls", str(begun)]) == 0
    assert "base: " in capsys.readouterr().out
    assert run_command(["ls", str(finished_run)]) == 0
    results = json.loads((finished_run / "results.json").read_text())
    printed = capsys.readouterr().out
    assert "finished" in printed
    assert f"{results['tdc']['score']:.3f}" in printed
    assert f"scores: {results['metric']}" in printed
    assert run_command(["compare", str(finished_run), str(begun)]) == 0
    printed = capsys.readouterr().out
    assert "finetune.num_steps" in printed
    assert "12345" in printed
    assert "prune.method" not in printed  # the same in both
    assert f"{results['base']['score']:.3f}" in printed
    for name, value in results["tdc"]["metrics"].items():
        assert f"{name} of TDC" in printed
        assert f"{value:.4g}" in printed


def test_ls_and_compare_refuse_what_holds_no_runs(tmp_path, capsys):
    assert run_command(["ls", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err
    for named in ("run", "run/../run"):
        assert run_command(["compare", "run", named]) == 1
        assert f"two different run directories, got run, {named}." in capsys.readouterr().err


# --- paths that are not there ----------------------------------------------------------------


def errors_of(arguments, capsys):
    assert run_command(list(map(str, arguments))) == 1
    return capsys.readouterr().err.strip().splitlines()


def test_paths_are_refused_in_one_error_with_the_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    head, *problems = errors_of(
        [
            *("run", "--preset", "mnist", "--data.path", "gone.npz", "--run-dir", "file"),
            *("--evaluate.features", "dinov2", "--evaluate.features-model", "a/b/c"),
            *("--prune.method", "llm", "--proxy.replay", "old", "--store", "file/s"),
            *("--data.first-stage", "vae"),
            *("--model.config", "unet.json", "--base.batch-size", "0"),
        ],
        capsys,
    )
    lacking = find_spec("transformers") is None  # which is refused, too
    assert head == f"error: {8 + lacking} errors in the settings:"
    for words in (
        "base.batch_size must be at least 1, got 0",
        "file is a file: name a folder by --run-dir",
        "file is a file: name a folder by --store",
        "data.path gone.npz does not exist",
        "data.first_stage vae does not exist",
        "proxy.replay old does not exist",
        "evaluate.features_model a/b/c does not exist",
        "model.config unet.json does not exist",
    ):
        assert sum(words in problem for problem in problems) == 1, words


def test_what_settings_follow_from_is_refused_with_all_other_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    told = errors_of(
        [
            "sweep",
            "--data",
            "gone",
            "--base",
            "no/such/base",
            "--storage",
            "file",
            "--vary",
            "k=1,2",
        ],
        capsys,
    )
    assert len(told) == 4
    assert "--data gone does not exist" in told[1]
    assert "no/such/base does not exist, and is no name on the hub" in told[2]
    assert "file is a file: name a folder by --storage" in told[3]
    told = errors_of(["prune", "gone", "--data", "lost", "--out", "file", "--macs", "0.5"], capsys)
    assert [line.split()[0] for line in told[1:]] == ["--data", "gone", f"{tmp_path}/file"]
    told = errors_of(["score", "gone", "--reference", "lost", "--out", tmp_path], capsys)
    assert [line.split()[0] for line in told[1:]] == ["IMAGES", "--reference", str(tmp_path)]


def test_a_folder_that_cannot_be_written_to_is_refused_before_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tdc_ray.cli.paths.os.access", lambda path, mode: path != tmp_path)
    (told,) = errors_of(["run", "--run-dir", tmp_path / "a/b", "--preset", "digits"], capsys)
    assert told == f"error: {tmp_path} cannot be written to: name another folder by --run-dir."


MISSING = [
    ["run", "--data", "gone"],
    ["run", "--data.source", "folder", "--data.path", "gone"],
    ["run", "--base", "./gone"],
    ["run", "--model.config", "gone"],
    ["run", "--model.config", "gone", "--run-dir", "run"],
    ["run", "--evaluate.features", "auto", "--evaluate.inception-path", "gone"],
    ["run", "--data.first-stage", "gone", "--sampler.no-clip-sample"],
    ["plan", "--data", "gone"],
    ["plan", "--model.config", "gone"],
    ["sweep", "--base", "openai:gone", "--vary", "k=0.5"],
    ["prune", "gone", "--out", "out"],
    ["prune", ".", "--data", "gone", "--out", "out"],
    ["import", "./gone", "out"],
    ["sample", "gone"],
    ["schedule", "gone", "--macs", "0.5"],
    ["score", "gone", "--reference", "digits"],
    ["score", ".", "--reference", "gone"],
    ["export", "gone", "out"],
    ["report", "gone"],
    ["ls", "gone"],
    ["compare", "gone", "."],
    ["status", "gone"],
    ["memory", "gone"],
    ["simulate", "--costs", "gone"],
    ["train-autoencoder", "--data", "gone", "--out", "out"],
]
"""Command lines with a path that does not exist, of every command that takes one."""

REFUSE = """
import json, sys
from tdc_ray.cli.main import run_command
for arguments in json.loads(sys.argv[1]):
    assert run_command(arguments) == 1, arguments
    found = {"torch", "diffusers", "ray", "datasets"} & set(sys.modules)
    assert not found, (arguments, found)
"""


def test_a_missing_path_is_refused_before_a_framework_is_imported(tmp_path):
    assert {arguments[0] for arguments in MISSING} == set(_commands(preset("digits"))) - {"doctor"}
    command = [sys.executable, "-c", REFUSE, json.dumps(MISSING)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(MISSING)
    assert all("gone does not exist" in line for line in said)
    assert not list(tmp_path.iterdir())
