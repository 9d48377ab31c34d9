"""The Python API from a base to experts: ``tdc_ray.prune`` and ``tdc_ray.finetune``."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

import tdc_ray as tdc
from tdc_ray.cli.main import run_command
from tdc_ray.config.run import RunConfig
from tdc_ray.errors import ClusterError, ConfigError, DataError, LimitError
from tdc_ray.models.denoiser import count_params
from tdc_ray.runs.results import load_results
from tdc_ray.storage.lease import LEASE_DIR
from tests.images import random_pixels
from tests.models.counting import count_macs
from tests.small import TINY, assert_same, make_first_stage, random_unet, small_config

SEARCH = {"num_rounds": 1, "num_images": 16, "num_refit_images": 16}
"""A quick search, as keywords."""

TRAIN = {"num_steps": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "ddpm-digits"
    scheduler = DDPMScheduler(600, beta_end=0.03)
    DDPMPipeline(unet=random_unet(), scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def base(pipeline) -> tdc.Base:
    return tdc.load_base(pipeline, settings=small_config())


@pytest.fixture
def plan(base) -> tdc.Plan:
    return tdc.plan_groups(base.scheduler, num_groups=2)


def flags(settings: dict[str, object], stage: str) -> list[str]:
    named = ((f"--{stage}.{name.replace('_', '-')}", value) for name, value in settings.items())
    return [word for flag, value in named for word in (flag, str(value))]


def weights(experts: tdc.Experts) -> list[dict[str, torch.Tensor]]:
    return [experts[index].state_dict() for index in range(len(experts))]


@pytest.mark.slow
@pytest.mark.ray
def test_the_results_are_those_of_the_command_line(
    ray_cluster, cache_dir, pipeline, base, tmp_path
):
    command = ["run", "--preset", "digits-smoke", "--base", str(pipeline), "--seed", "3"]
    command += ["--plan.num-groups", "2", "--plan.schedule", "measured"]
    command += [*flags(SEARCH, "prune"), *flags(TRAIN, "finetune")]
    command += ["--evaluate.num-images", "20", "--sampler.num-inference-steps", "10"]
    command += ["--evaluate.cache-dir", str(cache_dir), "--run-dir", str(tmp_path / "run")]
    assert run_command(command) == 0
    results = load_results(tmp_path / "run" / "results.json")

    plan = tdc.plan_groups(base.scheduler, num_groups=2, schedule="measured")
    pruned = tdc.prune(base, plan, "digits", seed=3, **SEARCH)
    tuned = tdc.finetune(pruned, "digits", **TRAIN)
    assert tuned.groups == results.groups
    run = tdc.load_experts(tmp_path / "run")
    assert run.plan == tuned.plan
    assert_same(weights(tuned), weights(run))
    before = [replace(group, loss_finetuned=0.0, train_steps=0) for group in tuned.groups]
    assert [replace(group, loss_finetuned=0.0) for group in pruned.groups] == before


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_computes_what_this_process_does(ray_cluster, base, plan):
    here = tdc.prune(base, plan, "digits", **SEARCH)
    there = tdc.prune(base, plan, "digits", cluster="auto", **SEARCH)
    assert there.groups == here.groups
    assert_same(weights(there), weights(here))
    tuned = [
        tdc.finetune(pruned, "digits", cluster=cluster, **TRAIN)
        for pruned, cluster in ((here, None), (there, "auto"))
    ]
    assert_same(weights(tuned[0]), weights(tuned[1]))


@pytest.mark.ray
def test_several_nodes_need_a_folder_that_all_see(ray_cluster, base, plan, monkeypatch):
    monkeypatch.setattr("tdc_ray.execution.ray.cluster.node_resources", lambda: [{}, {}])
    with pytest.raises(ConfigError, match="folder must be one that all nodes of the cluster auto"):
        tdc.prune(base, plan, "digits", cluster="auto", **SEARCH)
    with pytest.raises(ClusterError, match=r"uses the Ray cluster at .* got 127\.0\.0\.1:1"):
        tdc.prune(base, plan, "digits", cluster="127.0.0.1:1", **SEARCH)


@pytest.mark.slow
def test_a_base_and_images_in_memory_come_to_the_same_as_files(pipeline, base, plan, tmp_path):
    loaded = DDPMPipeline.from_pretrained(pipeline)
    in_memory = tdc.load_base(loaded.unet, scheduler=loaded.scheduler, settings=small_config())
    pixels = random_pixels(40, 8, 8, 1)
    np.savez(tmp_path / "images.npz", images=pixels)
    by_path = tdc.prune(base, plan, tmp_path / "images.npz", **SEARCH)
    by_tensor = tdc.prune(in_memory, plan, torch.from_numpy(pixels).movedim(-1, 1), **SEARCH)
    assert by_tensor.groups == by_path.groups
    assert_same(weights(by_tensor), weights(by_path))


def test_pruned_experts_are_within_their_limits_and_no_ray_is_imported(base, plan):
    code_has_ray = "ray" in sys.modules
    experts = tdc.prune(base, plan, "digits", method="magnitude", **SEARCH)
    assert ("ray" in sys.modules) == code_has_ray
    assert len(experts) == len(plan.groups) == 2
    for group, limit, expert in zip(experts.groups, plan.groups, experts, strict=True):
        assert group.macs == count_macs(expert) <= limit.limit(base.macs) == group.macs_limit
        assert (group.num_params, group.train_steps) == (count_params(expert), 0)
    assert str(experts).splitlines()[1].split()[0] == "0-161"


def test_the_same_call_in_a_folder_computes_nothing_again(base, plan, tmp_path):
    first = tdc.prune(base, plan, "digits", folder=tmp_path, **SEARCH)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("groups/*/*.json")}
    again = tdc.prune(base, plan, "digits", folder=tmp_path, **SEARCH)
    assert again.groups == first.groups
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("groups/*/*.json")}
    other = tdc.prune(base, plan, "digits", folder=tmp_path, **SEARCH, refit="none")
    assert other.folder != first.folder


@pytest.mark.slow
def test_the_same_call_after_the_images_changed_makes_other_experts(base, plan, tmp_path):
    path = tmp_path / "images.npz"
    made = []
    for seed in (0, 1):
        np.savez(path, images=random_pixels(40, 8, 8, 1, seed=seed))
        pruned = tdc.prune(base, plan, path, folder=tmp_path / "made", **SEARCH)
        made.append(tdc.finetune(pruned, path, folder=tmp_path / "made", **TRAIN))
    assert made[0].folder != made[1].folder
    assert made[0].groups[0].loss_base != made[1].groups[0].loss_base


def test_temporary_work_goes_with_the_last_object_that_needs_it(base, plan):
    pipeline = tdc.prune(base, plan, "digits", **SEARCH).to_pipeline(offload=True)
    pipeline.set_progress_bar_config(disable=True)
    folder = pipeline.holds.path
    assert pipeline(2, output_type="np").images.shape == (2, 8, 8, 1)
    assert folder.exists()
    del pipeline
    assert not folder.exists()


def test_what_a_notebook_draws_at_random_stays_as_it_was(base, plan):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    tdc.finetune(tdc.prune(base, plan, "digits", **SEARCH), "digits", **TRAIN)
    assert torch.equal(torch.rand(3), expected)


def test_experts_of_classes_are_made_with_labels(plan, tmp_path):
    unet = random_unet({**TINY, "num_class_embeds": 11})
    base = tdc.load_base(
        unet,
        scheduler=DDPMScheduler(600, beta_end=0.03),
        settings=small_config(),
        num_classes=10,
    )
    pixels, labels = random_pixels(40, 8, 8), np.arange(40) % 10
    with pytest.raises(ConfigError, match="must have a label"):
        tdc.prune(base, plan, pixels, **SEARCH)
    experts = tdc.prune(base, plan, tdc.Images(pixels, labels=labels), **SEARCH)
    experts.save_pretrained(tmp_path / "experts")
    pipeline = tdc.load_experts(tmp_path / "experts").to_pipeline()
    assert (pipeline.num_classes, pipeline.null_class) == (10, 10)


def test_a_base_of_latents_is_pruned_on_them(plan, tmp_path):
    from diffusers import AutoencoderKL, LDMPipeline

    vae = AutoencoderKL.from_pretrained(make_first_stage(tmp_path / "stage"))
    ldm = LDMPipeline(vqvae=vae, unet=random_unet(), scheduler=DDPMScheduler(600, beta_end=0.03))
    settings = small_config(evaluate={"cache_dir": str(tmp_path / "cache")})
    base = tdc.load_base(ldm, settings=settings)
    experts = tdc.prune(base, plan, random_pixels(40, 16, 16), **SEARCH)
    del base
    experts.save_pretrained(tmp_path / "experts")
    images = [
        made.to_pipeline()(2, output_type="pt").images
        for made in (experts, tdc.load_experts(tmp_path / "experts"))
    ]
    assert images[0].shape == (2, 1, 16, 16)
    assert torch.equal(*images)


def prune(base: tdc.Base, plan: tdc.Plan, **changes: object) -> tdc.Experts:
    return tdc.prune(**({"base": base, "plan": plan, "images": "digits"} | SEARCH | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"halving_steps": 5}, ConfigError, "prune.halving_steps must be 0 for tdc_ray.prune"),
        ({"methods": "taylor"}, ConfigError, r"no setting prune\.methods: did you mean method\?"),
        (
            {"methods": 1, "round": 2},
            ConfigError,
            r"(?s)2 errors.*prune\.methods: .*prune\.round: ",
        ),
        ({"num_images": 0}, ConfigError, "prune.num_images must be at least 1, got 0"),
        (
            {"images": "nowhere"},
            ConfigError,
            "images must be digits or photos, a folder of images, an npz",
        ),
        ({"images": random_pixels(4, 9, 9)}, DataError, r"must be \(H, W, C\) = \(8, 8, 1\)"),
        ({"cluster": "127.0.0.1:1"}, ClusterError, "127.0.0.1:1"),
    ],
)
def test_bad_input_is_one_clear_error_before_work(base, plan, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        prune(base, plan, folder=tmp_path, **changes)
    assert not [path for path in tmp_path.rglob("*.json") if path.parent.name != LEASE_DIR]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 1}, r"no setting finetune\.lr: did you mean learning_rate\? Settings: num_steps,"),
        ({"batch_sise": 8}, r"no setting finetune\.batch_sise: did you mean batch_size\?"),
        ({"batch_size": 0}, "finetune.batch_size must be at least 1, got 0"),
    ],
)
def test_a_bad_setting_of_fine_tuning_is_one_clear_error(base, plan, settings, words):
    pruned = prune(base, plan, method="magnitude")
    with pytest.raises(ConfigError, match=words):
        tdc.finetune(pruned, "digits", num_steps=1, **settings)


def test_a_plan_of_another_noise_process_or_below_the_space_is_refused(base):
    for scheduler in (DDPMScheduler(1000), DDPMScheduler(600)):
        with pytest.raises(
            ConfigError, match=r"plan must be of the noise process of .*ddpm-digits"
        ):
            prune(base, tdc.plan_groups(scheduler))
    low = tdc.plan_groups(base.scheduler, num_groups=500, min_macs_share=0.001)
    with pytest.raises(LimitError, match="group 0"):
        prune(base, low)


def test_experts_are_fine_tuned_once(base, plan):
    tuned = tdc.finetune(prune(base, plan), "digits", **TRAIN)
    with pytest.raises(ConfigError, match="got some of 2 fine-tune steps"):
        tdc.finetune(tuned, "digits", num_steps=4)
    for steps in (0, -1):
        with pytest.raises(
            ConfigError, match=f"finetune.num_steps must be at least .*got {steps}"
        ):
            tdc.finetune(prune(base, plan), "digits", num_steps=steps)


@pytest.mark.slow
def test_saved_experts_are_fine_tuned_as_those_in_memory(base, plan, tmp_path):
    experts = prune(base, plan)
    experts.save_pretrained(tmp_path / "experts")
    del base
    loaded = tdc.load_experts(tmp_path / "experts")
    tuned = [
        tdc.finetune(one, "digits", allocation="timesteps", **TRAIN) for one in (experts, loaded)
    ]
    assert tuned[0].groups == tuned[1].groups
    assert [group.train_steps for group in tuned[0].groups] == [1, 3]
    assert_same(weights(tuned[0]), weights(tuned[1]))


def test_settings_that_a_base_brings_hold_where_a_call_does_not_say_others(pipeline, plan):
    settings = small_config(prune={"method": "taylor", **SEARCH}, seed=5)
    base = tdc.load_base(pipeline, settings=settings)
    assert isinstance(base.config, RunConfig)
    experts = tdc.prune(base, plan, "digits", refit="none")
    assert (experts.config.seed, experts.config.prune.method) == (5, "taylor")
    assert {group.source.split("/")[0] for group in experts.groups} == {"taylor", "base"}
    assert all(group.loss_refit is None for group in experts.groups)
