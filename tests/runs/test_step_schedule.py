import json

import pytest

from tdc_ray.cli.main import run_command
from tdc_ray.config.run import to_json
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.diffusion.samplers import timesteps_of
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.runs.pipelines import save_index
from tdc_ray.storage.files import write_json
from tests.small import (
    TINY,
    assert_same,
    group_of,
    make_run_dir,
    random_kept,
    random_unet,
    small_config,
)

pytestmark = pytest.mark.ray


def schedule(run, out, *arguments):
    return run_command(["schedule", str(run), "--out", str(out), *map(str, arguments)])


def test_a_network_is_chosen_for_every_step_within_the_budget_and_the_pipeline_samples(
    finished_run, tmp_path, capsys
):
    results = json.loads((finished_run / "results.json").read_text())
    few = ("--num-images", "16")
    assert schedule(finished_run, tmp_path, "--macs", "0.9", *few, "--score") == 0
    found = json.loads((tmp_path / "schedule.json").read_text())
    assert found["macs_base"] == results["base"]["macs"]
    assert set(found["networks"]) == {"base", *(f"expert-0{i}" for i in range(4))}
    assert found["networks"]["expert-02"] == results["groups"][2]["macs"]
    steps = found["steps"]
    assert [step["timestep"] for step in steps] == list(range(900, -1, -100))
    mean = sum(found["networks"][step["network"]] for step in steps) / len(steps)
    assert found["chosen"]["mean_macs"] == mean <= 0.9 * found["macs_base"]
    assert found["experts"]["mean_macs"] == results["tdc"]["macs"]
    assert found["stitched"]["mean_macs_share"] <= 0.9
    for judged in (found["chosen"], found["experts"], found["stitched"]):
        assert judged["low"] < judged["excess"] < judged["high"]
    assert found["metric"] == results["metric"]
    assert found["score"] > 0

    pipeline = ProgressivePipeline.from_pretrained(tmp_path)
    for step in steps:
        serving = pipeline.experts.for_timestep(step["timestep"])
        own = load_expert(tmp_path / "experts" / step["network"])
        assert all(
            one.shape == other.shape and bool((one == other).all())
            for one, other in zip(serving.parameters(), own.parameters(), strict=True)
        )
    assert pipeline(2, output_type="np").images.shape == (2, 8, 8, 1)
    assert "which network runs at which sampling step" in capsys.readouterr().out


@pytest.mark.slow
def test_networks_of_edm_are_chosen_at_the_sigmas_that_its_scheduler_visits(tmp_path):
    config = small_config(
        diffusion={"sigma_data": 0.5},
        plan={"num_groups": 2},
        sampler={"scheduler": "EDMEulerScheduler", "num_inference_steps": 6},
    )
    run_dir, units = make_run_dir(tmp_path / "run"), units_of(TINY)
    for index in range(2):
        kept = random_kept(units, index)
        save_expert(run_dir.expert(index), cut(random_unet(), units, kept), TINY, kept)
    save_index(run_dir, config, [group_of(config, index) for index in range(2)])
    write_json(run_dir.config, to_json(config))
    write_json(run_dir.results, {})
    assert schedule(run_dir.root, tmp_path / "out", "--macs", "0.9", "--num-images", "4") == 0
    steps = json.loads((tmp_path / "out" / "schedule.json").read_text())["steps"]
    assert len({step["network"] for step in steps}) > 1
    assert all(step["loss"] > 0 for step in steps)
    pipeline = ProgressivePipeline.from_pretrained(tmp_path / "out")
    pipeline.scheduler.set_timesteps(6)
    assert tuple(step["timestep"] for step in steps) == timesteps_of(pipeline.scheduler)
    for step, c_noise in zip(steps, pipeline.scheduler.timesteps.tolist(), strict=True):
        serving = pipeline.experts.for_timestep(c_noise)
        own = load_expert(tmp_path / "out" / "experts" / step["network"])
        assert_same(serving.state_dict(), own.state_dict())
    assert pipeline(2, output_type="np").images.shape == (2, 8, 8, 1)


@pytest.mark.slow
def test_below_what_the_experts_take_the_base_is_pruned_further(finished_run, tmp_path):
    few = ("--num-images", "16", "--num-inference-steps", "5")
    assert schedule(finished_run, tmp_path, "--macs", "0.5", *few) == 0
    found = json.loads((tmp_path / "schedule.json").read_text())
    assert [name for name in found["networks"] if name.startswith("pruned")] == [
        f"pruned-0{i}-0.375" for i in range(4)
    ]
    assert found["chosen"]["mean_macs_share"] <= 0.5
    assert len(found["steps"]) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--macs", "1.5"], "schedule.macs must be in (0, 1], got 1.5"),
        (["--macs", "0.3", "--widths"], "--macs must be at least 0.7"),
        (["--macs", "0.9", "--networks", "nowhere"], "nowhere does not exist"),
        (["--macs", "0.9", "--networks", "."], "--networks must be folders"),
        (["--macs", "0.5", "--widths", "0.1"], "--widths must be at least 0.3"),
        (["--macs", "0.4", "--widths", "0.6"], "--macs must be at least 0.6"),
    ],
)
def test_what_cannot_be_met_is_refused(arguments, words, finished_run, tmp_path, capsys):
    assert schedule(finished_run, tmp_path / "out", *arguments) == 1
    assert words in capsys.readouterr().err
    assert schedule(tmp_path, tmp_path / "out", "--macs", "0.9") == 1
    assert "is not finished" in capsys.readouterr().err
