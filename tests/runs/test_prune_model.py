"""``tdc-ray prune`` and ``tdc-ray memory``, in this process and in real ones."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline
from PIL import Image
from rich.console import Console

from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.config.run import to_json
from tdc_ray.models.first_stage import input_shape
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.models.unet2d.unet import save_unet, unet_config
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.reporting.console import print_memory
from tdc_ray.runs.prune_model import for_unet
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir
from tests.models.counting import count_macs
from tests.pruning.llm.openai_server import (
    Handler,
    calling,
    echoes_key,
    fails,
    hangs_up,
    refuses_format,
    says,
    says_key,
    serving,
)
from tests.pruning.requests import NAMES, entry
from tests.small import TINY, make_first_stage, make_run_dir, output_of, random_unet, small_config

FEW = ("--prune.num-images", "32", "--prune.num-refit-images", "32", "--prune.num-levels", "1")
FEW += ("--prune.num-rounds", "2", "--prune.num-candidates", "2")
KEY = "sk-proj-Kq73-secretSECRET-91xz"
REPORT = {"macs_base", "macs", "macs_limit", "loss_base", "loss_cut", "loss_refit", "method"}
REPORT |= {"seconds"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_dir(tmp_path_factory.mktemp("model")).base_unet


def prune(model: Path, out: Path, *arguments: str) -> dict:
    command = ["prune", str(model), "--out", str(out), "--data", "digits", *FEW, *arguments]
    assert run_command(command) == 0
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("method", ["offline", "magnitude", "diff-pruning"])
def test_a_pruned_model_is_within_the_limit_and_loads(model, tmp_path, method):
    report = prune(model, tmp_path, "--macs", "0.6", "--method", method, "--timesteps", "0", "9")
    assert report.keys() >= REPORT
    assert report["method"] == method
    assert report["macs"] <= report["macs_limit"] == int(0.6 * report["macs_base"])
    pruned = load_expert(str(tmp_path))
    assert count_macs(pruned) == report["macs"]
    assert torch.isfinite(output_of(pruned)).all()


def test_the_refit_is_what_keeps_the_bases_prediction(model, tmp_path):
    prune(model, tmp_path / "refit", "--method", "taylor")
    without = prune(model, tmp_path / "cut", "--method", "taylor", "--prune.refit", "none")
    assert without["loss_refit"] is None
    refitted, pruned = (
        min(one.final.distance for one in MemoryBank(path).all() if one.final is not None)
        for folder in ("refit", "cut")
        for path in (tmp_path / folder).glob("search/*/memory.jsonl")
    )
    assert refitted < pruned  # from the base's prediction


def test_the_same_command_again_measures_nothing_again(model, tmp_path):
    first = prune(model, tmp_path, "--method", "offline")
    memory = next(tmp_path.glob("search/*/memory.jsonl"))
    results = {path: path.stat().st_mtime_ns for path in tmp_path.glob("search/*/groups/*/*.json")}
    lines = memory.read_text()
    second = prune(model, tmp_path, "--method", "offline")
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert memory.read_text() == lines
    different = {"seconds", "proxy_seconds"}
    assert {k: v for k, v in first.items() if k not in different} == {
        k: v for k, v in second.items() if k not in different
    }
    prune(model, tmp_path, "--method", "offline", "--macs", "0.8")
    assert len(list(tmp_path.glob("search/*"))) == 2


@pytest.mark.slow
def test_the_full_space_goes_below_what_inner_widths_can_reach(model, tmp_path):
    report = prune(
        model, tmp_path, "--macs", "0.2", "--prune.space", "full", "--method", "offline"
    )
    assert count_macs(load_expert(tmp_path)) == report["macs"] <= 0.2 * report["macs_base"]


def test_a_model_conditioned_on_classes_is_pruned_with_its_labels(tmp_path):
    save_unet(random_unet({**TINY, "num_class_embeds": 10}), tmp_path / "model")
    report = prune(tmp_path / "model", tmp_path / "out", "--method", "offline")
    assert report["macs"] <= report["macs_limit"]


def test_memory_shows_every_scheme_best_last(model, tmp_path, capsys):
    report = prune(model, tmp_path, "--method", "taylor")
    capsys.readouterr()
    assert run_command(["memory", str(tmp_path)]) == 0
    assert "taylor/" in capsys.readouterr().out
    (path,) = tmp_path.rglob("memory.jsonl")
    print_memory(Console(width=200), MemoryBank(path).all(), path)
    shown = capsys.readouterr().out
    assert "distance" in shown
    rows = [line for line in shown.splitlines() if "taylor/" in line]
    assert f"{report['loss_refit']:.5f}" in rows[-1]
    command = ["memory", str(tmp_path), "--group", "9"]
    assert run_command(command) == 1
    assert "--group must be in the memory bank (0), got 9" in capsys.readouterr().err


def test_memory_shows_what_every_scheme_keeps(capsys):
    entries = [entry(2, 0.06, u0=2), entry(1, 0.03, u3=1)]
    print_memory(Console(width=120), entries, Path("memory.jsonl"))
    shown = " ".join(capsys.readouterr().out.split())
    for one in entries:
        assert " ".join(map(str, one.widths.values())) in shown
    assert f"widths: of {', '.join(NAMES)}" in shown


def test_labels_that_the_model_does_not_know_are_refused(tmp_path, capsys):
    save_unet(random_unet({**TINY, "num_class_embeds": 9}), tmp_path / "model")
    command = ["prune", str(tmp_path / "model"), "--data", "digits"]
    assert run_command([*command, "--out", str(tmp_path / "out")]) == 1
    assert "labels of --data must be below 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--macs", "1.5"], ["prune.macs", "(0, 1]", "1.5"]),
        (["--macs", "0.5", "--milliseconds", "9"], ["--macs or --milliseconds, not both"]),
        (["--milliseconds", "0"], ["prune.milliseconds", "above 0", "0"]),
        (["--prune.objective", "latency"], ["prune.objective", "latency with --milliseconds"]),
        (["--macs", "0.01"], ["limited to", "smallest pruned model"]),
        (["--data", "nowhere"], ["--data", "nowhere"]),
        (["--timesteps", "5", "2000"], ["timesteps", "999", "2000"]),
        (["--group", "77"], ["--group", "77"]),
        (["--group", "0", "--timesteps", "0", "9"], ["--timesteps or --group"]),
        (["--data.image-size", "16"], ["data.image_size", "8", "16"]),
        (["--prune.method", "none"], ["prune.method", "none", "--method"]),
        (["--prune.halving-steps", "5"], ["prune.halving_steps", "0", "5"]),
    ],
)
def test_bad_input_is_one_clear_error_before_work(model, tmp_path, capsys, arguments, words):
    run_dir, out = RunDir(tmp_path / "run"), tmp_path / "out"
    shutil.copytree(model, run_dir.base_unet)
    write_json(run_dir.config, to_json(small_config()))
    assert run_command(["prune", str(run_dir.root), "--out", str(out), *arguments]) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error
    assert not (out / "report.json").exists()


def with_config(model: Path, folder: Path, **changes) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_config_of_another_diffusers_is_read_as_far_as_it_is_known(model, tmp_path):
    other = with_config(model, tmp_path / "model", of_a_later_version=1, sample_size=[8, 8])
    prune(other, tmp_path / "out", "--method", "magnitude")
    assert output_of(load_expert(tmp_path / "out")).shape[-1] == 8


@pytest.mark.parametrize("size", [None, [8, 16, 8]])
def test_a_model_without_a_size_is_refused(model, tmp_path, capsys, size):
    other = with_config(model, tmp_path / "model", sample_size=size)
    command = ["prune", str(other), "--out", str(tmp_path / "out"), "--data", "digits"]
    assert run_command(command) == 1
    error = capsys.readouterr().err
    assert "sample_size" in error
    assert str(size) in error


def test_the_settings_are_those_of_the_models_run_whatever_other_runs_are_named(tmp_path):
    for name, schedule in (("one", "linear"), ("other", "squaredcos_cap_v2")):
        run_dir = make_run_dir(tmp_path / name)
        config = small_config(diffusion={"beta_schedule": schedule}, prune={"method": "taylor"})
        write_json(run_dir.config, to_json(config))
    rest = [str(tmp_path / "one"), "--out", str(tmp_path / "out")]
    command = parse(["prune", "--proxy.replay", str(tmp_path / "other"), *rest])
    assert command.config.diffusion.beta_schedule == "linear"
    assert (command.method, command.config.prune.method) == (None, "taylor")
    again = parse(["prune", "--preset", "digits", *rest])
    assert again.config.prune.method == "offline"


def test_how_the_models_run_shared_budgets_plays_no_part(tmp_path):
    run_dir = make_run_dir(tmp_path / "one")
    shared = {"plan": {"schedule": "measured"}, "finetune": {"allocation": "excess"}}
    write_json(run_dir.config, to_json(small_config(**shared)))
    rest = [str(run_dir.root), "--out", str(tmp_path / "out")]
    command = parse(["prune", "--prune.space", "full", *rest])  # which measured limits refuse
    assert not command.config.models_all_groups


@pytest.mark.parametrize("flag", ["--no-verbose", "--data.no-horizontal-flip", "--macs=0.5"])
def test_a_flag_without_a_value_does_not_hide_the_model(tmp_path, flag):
    run_dir = make_run_dir(tmp_path / "run")
    write_json(run_dir.config, to_json(small_config(diffusion={"num_train_timesteps": 700})))
    command = parse(["prune", flag, str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert command.config.diffusion.num_train_timesteps == 700


@pytest.mark.parametrize("flags", [[], ["--preset", "mnist"]])
def test_a_pipeline_brings_its_noise_process(tmp_path, flags):
    scheduler = DDPMScheduler(400, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(random_unet(), scheduler).save_pretrained(tmp_path / "pipeline")
    rest = [str(tmp_path / "pipeline"), "--out", str(tmp_path / "out"), "--data", "digits"]
    noise = parse(["prune", *rest, *flags]).config.diffusion
    assert (noise.num_train_timesteps, noise.beta_schedule) == (400, "squaredcos_cap_v2")
    assert parse(["prune", *rest, "--diffusion.num-train-timesteps", "300"]).config.diffusion == (
        replace(noise, num_train_timesteps=300)
    )


def test_a_pipeline_of_latents_brings_its_first_stage_and_the_size_of_its_images(tmp_path):
    vae = AutoencoderKL.from_pretrained(make_first_stage(tmp_path / "stage"))
    unet = random_unet()
    ldm = LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler())
    ldm.save_pretrained(tmp_path / "pipeline")
    config = parse(["prune", str(tmp_path / "pipeline"), "--out", "out"]).config
    data = for_unet(config, dict(unet.config), "digits").data
    assert (data.image_size, data.num_channels) == (16, 1)
    assert input_shape(data) == (1, 8, 8)


@pytest.mark.parametrize(
    ("part", "setting", "message"),
    [
        (
            "unet",
            "sample_size",
            "sample_size in the model's config.json must be the size of its images",
        ),
        ("vqvae", "in_channels", "must name in_channels"),
        ("vqvae", "block_out_channels", "must name block_out_channels"),
    ],
)
def test_a_pipeline_of_latents_that_lacks_a_size_gets_one_clear_error(
    tmp_path, capsys, part, setting, message
):
    vae = AutoencoderKL.from_pretrained(make_first_stage(tmp_path / "stage"))
    ldm = LDMPipeline(vqvae=vae, unet=random_unet(), scheduler=DDIMScheduler())
    ldm.save_pretrained(tmp_path / "pipeline")
    path = tmp_path / "pipeline" / part / "config.json"
    write_json(path, {**json.loads(path.read_text()), setting: None})
    flags = ["--data", "digits", "--out", str(tmp_path / "out")]
    assert run_command(["prune", str(tmp_path / "pipeline"), *flags]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_nothing_that_something_else_wrote_is_written_over(model, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("mine")
    for out in (tmp_path / "mine", tmp_path / "mine" / "model.safetensors"):
        command = ["prune", str(model), "--data", "digits", "--out", str(out)]
        assert run_command(command) == 1
        words = (
            "is a file: name a folder by --out" if out.is_file() else "--out must be a new folder"
        )
        assert words in capsys.readouterr().err
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "mine"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["model.safetensors"]


def test_what_was_pruned_of_another_model_is_not_written_over(model, tmp_path, capsys):
    (tmp_path / "search").mkdir()
    report = json.dumps({"model": "/models/another"})
    (tmp_path / "report.json").write_text(report)
    assert run_command(["prune", str(model), "--data", "digits", "--out", str(tmp_path)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "holds what was pruned of /models/another" in said
    assert "Name another folder" in said
    assert (tmp_path / "report.json").read_text() == report


def test_a_model_of_no_run_asks_for_its_data(model, tmp_path, capsys):
    assert run_command(["prune", str(model), "--out", str(tmp_path / "out")]) == 1
    assert "does not say what it was trained on: set --data" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere", "pruned"])
def test_what_holds_no_unet_is_told_with_a_way_out(tmp_path, capsys, name):
    (tmp_path / "pruned").mkdir()
    command = ["prune", str(tmp_path / name), "--data", "digits", "--out", str(tmp_path / "out")]
    assert run_command(command) == 1
    told = " ".join(capsys.readouterr().err.split())
    words = {
        "nowhere": "does not exist: name the folder of a UNet2DModel",
        "pruned": "holds no UNet2DModel: neither it nor its unet",
    }[name]
    assert f"{name} {words}" in told
    assert "tdc-ray import BASE DIR makes such a folder" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample_size": 9}, "a sample_size of 9 cannot be halved 1 times"),
        ({}, "conv_in.weight of"),
    ],
)
def test_a_size_or_weights_that_cannot_be_used_are_refused_before_work(
    tmp_path, capsys, changes, words
):
    unet = random_unet({**TINY, **changes})
    unet.conv_in.weight.data[0, 0, 0, 0] = torch.inf
    save_unet(unet, tmp_path / "unet")
    images = np.zeros((8, 9 if changes else 8, 9 if changes else 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    flags = ["--data", str(tmp_path / "images.npz"), "--out", str(tmp_path / "out")]
    assert run_command(["prune", str(tmp_path / "unet"), *flags]) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_scheduler_two_folders_up_tells_what_a_checkpoint_predicts(tmp_path, capsys):
    DDPMPipeline(random_unet(), DDPMScheduler(prediction_type="sample")).save_pretrained(tmp_path)
    save_unet(random_unet(), tmp_path / "checkpoint-5/unet")
    flags = ["--data", "digits", "--out", str(tmp_path / "out")]
    for place in ("checkpoint-5/unet", "checkpoint-5"):
        assert run_command(["prune", str(tmp_path / place), *flags]) == 1
        assert "has prediction_type sample" in " ".join(capsys.readouterr().err.split())


def test_a_pipeline_that_does_not_predict_noise_is_refused(tmp_path, capsys):
    scheduler = DDPMScheduler(prediction_type="sample")
    DDPMPipeline(random_unet(), scheduler).save_pretrained(tmp_path / "pipeline")
    assert run_command(["prune", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out")]) == 1
    assert "prediction_type sample" in capsys.readouterr().err


def test_where_a_model_tells_no_noise_process_what_is_taken_is_said(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "bare")
    prune(tmp_path / "bare", tmp_path / "out", "--method", "magnitude")
    told = " ".join(capsys.readouterr().out.split())
    assert "does not say diffusion.num_train_timesteps" in told
    assert "linear betas over 1000 timesteps are taken" in told


def test_named_data_keep_the_other_settings_and_a_model_of_classes_reads_folders(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / "images" / name / "0.png")
    config = small_config(data={"max_corrupt": 3, "source": "folder", "path": "elsewhere"})
    images = str(tmp_path / "images")
    for embeds, labels in ((None, False), (2, True)):
        data = for_unet(config, {**TINY, "num_class_embeds": embeds}, images).data
        assert (data.path, data.max_corrupt, data.labels_from_folders) == (images, 3, labels)
    assert for_unet(replace(config, data=data), TINY, "digits").data.source == "digits"


def test_a_bare_unet_of_latents_takes_the_first_stage_that_is_named(tmp_path):
    stage = make_first_stage(tmp_path / "stage", latent_channels=4)
    save_unet(random_unet({**TINY, "in_channels": 4, "out_channels": 4}), tmp_path / "unet")
    flags = ["--preset", "mnist-32-ldm", "--data.first-stage", str(stage), "--out", "out"]
    flags += ["--data.image-size", "16", "--data", "digits"]
    config = parse(["prune", str(tmp_path / "unet"), *flags]).config
    unet = unet_config(tmp_path / "unet")
    data = for_unet(config, unet, "digits").data
    assert input_shape(data) == (4, unet["sample_size"], unet["sample_size"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["OPENAI_API_KEY is not set", "prune.method offline"]),
        (["--proxy.replay", "nowhere"], ["proxy.replay", "nowhere", "--proxy.replay"]),
    ],
)
def test_without_a_key_or_a_transcript_nothing_is_begun(
    model, tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    command = ["prune", str(model), "--out", str(tmp_path), "--data", "digits", "--method", "llm"]
    assert run_command([*command, *flags]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert not list(tmp_path.iterdir())


def pins(unit: int, width: int) -> str:
    bounds = [{"unit": unit, "least": width, "most": width}]
    return json.dumps({"hypothesis": "h", "bounds": bounds, "action": "measure"})


def doubts(handler: Handler) -> None:
    """Calls a tool, each time with another doubt."""
    factor = 1.2 + len(handler.server.requests) / 4
    calling(("measure", {"hypothesis": "h", "distrust": [{"where": "1", "factor": factor}]}))(
        handler
    )


def everything_below(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "".join(path.read_bytes().decode(errors="replace") for path in files)


@pytest.mark.parametrize(
    ("script", "source"),
    [
        ([doubts], "llm"),
        pytest.param([refuses_format(says(pins(1, 6)))], "llm", marks=pytest.mark.slow),
        pytest.param(
            [fails(500), fails(429, Retry_After="0"), says(pins(1, 6))],
            "llm",
            marks=pytest.mark.slow,
        ),
        ([says("I would cut a lot."), says('{"action": "cut"}'), says_key], "offline"),
        pytest.param(
            [says("[]"), says(None, refusal="No."), hangs_up], "offline", marks=pytest.mark.slow
        ),
        ([echoes_key(401)], "offline"),
    ],
)
def test_whatever_the_server_says_a_run_ends_well_and_keeps_the_key_to_itself(
    model, tmp_path, monkeypatch, capfd, script, source
):
    command = ["prune", str(model), "--out", str(tmp_path)]
    command += ["--data", "digits", "--method", "llm", "--verbose", *FEW]
    command += ["--proxy.timeout-s", "2", "--proxy.max-seconds", "8", "--proxy.max-retries", "2"]
    with serving(*script) as server:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert run_command(command) == 0
        num_requests = len(server.requests)
        assert num_requests > 0
        replay = [*command, "--proxy.replay", str(tmp_path)]
        replay[replay.index("--out") + 1] = str(tmp_path / "replayed")
        if source == "llm":
            assert run_command(replay) == 0
            assert len(server.requests) == num_requests  # not one call
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["macs"] <= report["macs_limit"]
    memory = next(tmp_path.glob("search/*/memory.jsonl")).read_text().splitlines()
    sources = {json.loads(line)["source"] for line in memory}
    assert source in sources
    assert report["source"] in sources
    assert report["schemes"].keys() == sources
    nothing = "the language model contributed nothing" in report["notes"][0]
    assert nothing is (source == "offline")
    if source == "offline":
        assert sources == {"offline"}
        assert "the language model was given up" in " ".join(report["notes"])
    else:
        again = json.loads((tmp_path / "replayed" / "report.json").read_text())
        assert again["widths"] == report["widths"]
        assert report["prompt_tokens"] >= 1000
    for text in (*capfd.readouterr(), everything_below(tmp_path)):
        assert KEY not in text
        assert KEY[8:] not in text


@pytest.mark.slow
def test_a_limit_in_milliseconds_is_met_and_saves_time(model, tmp_path, capsys):
    arguments = ["--method", "magnitude", "--prune.refit", "none"]
    arguments += ["--prune.latency-batch-size", "32", "--prune.channel-multiple", "8"]
    command = ["prune", str(model), "--data", "digits", *FEW, *arguments]
    command += ["--out", str(tmp_path), "--milliseconds"]
    assert run_command([*command, "1e-5"]) == 1
    error = capsys.readouterr().err
    least, base = (float(ms) for ms in re.findall(r"([\d.]+)(?:e-05)? ms", error)[1:])
    assert "Raise --milliseconds" in error
    (table,) = tmp_path.glob("search/latency-*.json")
    measured = table.stat().st_mtime_ns
    assert run_command([*command, str(0.5 * least + 0.5 * base)]) == 0
    assert table.stat().st_mtime_ns == measured
    assert "a forward pass of 32 images takes" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    time = report["time"]
    assert least <= time["table_ms"] <= time["limit_ms"] < time["base_table_ms"]
    assert time["base_table_ms"] == pytest.approx(base, rel=1e-3)
    assert report["macs"] == count_macs(load_expert(tmp_path)) < report["macs_base"]
