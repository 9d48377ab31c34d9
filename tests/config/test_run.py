import dataclasses
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.conditioning import ConditioningConfig
from tdc_ray.config.data import DataConfig
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.evaluate import EvaluateConfig
from tdc_ray.config.model import ModelConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.run import (
    RunConfig,
    default_run_dir,
    differences,
    digest,
    from_json,
    to_json,
    with_absolute_paths,
)
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.config.train import FinetuneConfig, TrainConfig
from tdc_ray.config.validation import errors_together, refuse
from tdc_ray.errors import ConfigError

PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


def changed(config, setting, value):
    """Return the config with one setting, such as ``base.num_steps``, replaced."""
    stage, name = setting.split(".")
    return replace(config, **{stage: replace(getattr(config, stage), **{name: value})})


def training_configs(kind):
    return st.builds(
        kind,
        num_steps=st.integers(0, 10**7),
        batch_size=st.integers(1, 512),
        micro_batch_size=st.none() | st.integers(1, 512),
        learning_rate=st.floats(1e-9, 1.0),
        max_grad_norm=st.none() | st.floats(0.01, 10.0),
        ema_decay=st.floats(0, 1, exclude_max=True),
        ema_warmup=st.booleans(),
        loss_weight=st.sampled_from(["min-snr", "p2"]),
        loss_weight_gamma=st.none() | st.floats(0.1, 10.0),
        precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    )


def run_configs():
    return st.builds(
        RunConfig,
        preset=st.text(max_size=12),
        seed=st.integers(-(2**40), 2**40),
        data=st.builds(
            DataConfig,
            source=st.sampled_from(["folder", "npz", "cifar10"]),
            path=PATHS,
            image_size=st.integers(8, 64),
            num_channels=st.sampled_from([1, 3]),
            horizontal_flip=st.booleans(),
            crop_padding=st.integers(0, 7),
        ),
        conditioning=st.builds(
            ConditioningConfig,
            num_classes=st.integers(1, 1000),
            label_dropout=st.floats(0, 1, exclude_max=True),
        ),
        diffusion=st.builds(
            DiffusionConfig,
            beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            beta_start=st.floats(1e-6, 0.01),
            learned_sigma=st.booleans(),
        ),
        plan=st.builds(
            PlanConfig,
            num_groups=st.integers(1, 1000),
            min_macs_share=st.floats(0, 1, exclude_min=True),
            schedule=st.sampled_from(["uni-increasing", "uni-decreasing"]),
            match_snr_mean=st.booleans(),
        ),
        base=training_configs(TrainConfig),
        prune=st.builds(
            PruneConfig,
            method=st.sampled_from(["offline", "llm", "taylor", "none"]),
            space=st.sampled_from(["inner", "full"]),
            refit=st.sampled_from(["least-squares", "none"]),
            memory=st.sampled_from(["shared", "own"]),
            halving_steps=st.integers(0, 1000),
            held_out_share=st.floats(0, 0.5, exclude_min=True),
        ),
        proxy=st.builds(
            ProxyConfig,
            temperature=st.none() | st.floats(0, 2),
            max_total_tokens=st.none() | st.integers(1, 10**9),
            max_cost=st.none() | st.floats(0.01, 100),
            price_per_million_completion_tokens=st.floats(0.01, 100),
            replay=st.none() | PATHS,
        ),
        finetune=training_configs(FinetuneConfig),
        sampler=st.builds(
            SamplerConfig,
            num_inference_steps=st.integers(1, 1000),
            guidance_scale=st.floats(0, 10),
        ),
        compute=st.builds(ComputeConfig, num_actors=st.none() | st.integers(1, 99)),
    )


# --- to and from JSON ------------------------------------------------------------------------


@given(run_configs())
def test_every_config_survives_json(config):
    document = json.loads(json.dumps(to_json(config)))
    assert from_json(document) == config
    assert digest(from_json(document)) == digest(config)


def test_json_holds_every_stage_and_every_setting_of_it():
    document = to_json(RunConfig())
    assert list(document) == [field.name for field in dataclasses.fields(RunConfig)]
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert list(document["base"]) == names
    assert list(document["finetune"])[: len(names)] == names


def test_settings_that_the_document_leaves_out_have_their_defaults():
    assert from_json({"base": {"num_steps": 7}}) == RunConfig(base=TrainConfig(num_steps=7))


@pytest.mark.parametrize(
    ("document", "setting"),
    [
        ({"trainer": {}}, "trainer"),
        ({"base": {"num_step": 3}}, "base.num_step"),
        ({"finetune": {"lr": 0.1}}, "finetune.lr"),
        ({"sampler": {"steps": 10}}, "sampler.steps"),
    ],
)
def test_an_unknown_setting_is_refused_by_its_name(document, setting):
    with pytest.raises(ConfigError, match=rf"^{setting}: Unexpected keyword argument"):
        from_json(document)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"seed": "zero"}, r"^seed must be .*integer.*got 'zero'"),
        ({"seed": None}, r"^seed must be .*integer.*got None"),
        ({"base": {"num_steps": 1.5}}, r"^base\.num_steps must be .*integer.*got 1\.5"),
        (
            {"base": {"learning_rate": "fast"}},
            r"^base\.learning_rate must be .*number.*got 'fast'",
        ),
        ({"base": {"micro_batch_size": "all"}}, r"^base\.micro_batch_size must be .*got 'all'"),
        ({"data": {"path": 3}}, r"^data\.path must be .*string.*got 3"),
        ({"data": {"source": "web"}}, r"^data\.source must be .*'digits'.*got 'web'"),
        ({"data": {"num_channels": 2}}, r"^data\.num_channels must be .*1 or 3.*got 2"),
        (
            {"sampler": {"clip_sample": "often"}},
            r"^sampler\.clip_sample must be .*bool.*got 'often'",
        ),
        ({"plan": [10]}, r"^plan must be .*dictionary.*got \[10\]"),
        ([], r"dictionary.*got \[\]"),
    ],
)
def test_a_value_of_another_type_is_refused_by_the_settings_name(document, message):
    with pytest.raises(ConfigError, match=message):
        from_json(document)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"plan": {"min_macs_share": 0}}, r"^plan\.min_macs_share must be greater than 0, got 0"),
        ({"base": {"num_steps": -1}}, r"^base\.num_steps must be at least 0, got -1"),
        ({"finetune": {"num_steps": -1}}, r"^finetune\.num_steps must be at least 0, got -1"),
    ],
)
def test_a_value_out_of_its_range_is_refused_when_read(document, message):
    with pytest.raises(ConfigError, match=message):
        from_json(document)


# --- ranges ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DataConfig(image_size=3),
            r"data\.image_size must be at least 4 pixels, .* got 3",
        ),
        (lambda: DataConfig(crop_padding=-1), r"data\.crop_padding must be at least 0, got -1"),
        (
            lambda: DataConfig(image_size=8, crop_padding=8),
            r"data\.crop_padding must be below data\.image_size = 8, got 8",
        ),
        (lambda: DataConfig(num_workers=-1), r"data\.num_workers must be at least 0, got -1"),
        (lambda: DataConfig(max_corrupt=-1), r"data\.max_corrupt must be at least 0, got -1"),
        (
            lambda: DataConfig(source="npz", path="a", labels_from_folders=True),
            r"data\.labels_from_folders goes with data\.source folder, got npz",
        ),
        (lambda: ModelConfig(dropout=1.0), r"model\.dropout must be less than 1, got 1\.0"),
        (lambda: ModelConfig(dropout=-0.1), r"model\.dropout must be at least 0, got -0\.1"),
        (
            lambda: DiffusionConfig(num_train_timesteps=1),
            r"diffusion\.num_train_timesteps must be at least 2, got 1",
        ),
        (
            lambda: DiffusionConfig(beta_start=0.5, beta_end=0.1),
            r"diffusion\.beta_end must be in \[diffusion\.beta_start = 0\.5, 1\), got 0\.1",
        ),
        (lambda: DiffusionConfig(beta_start=0.0), r"diffusion\.beta_start must be greater than 0"),
        (lambda: DiffusionConfig(beta_end=1.0), r"diffusion\.beta_end"),
        (lambda: DiffusionConfig(vlb_weight=-1), r"diffusion\.vlb_weight must be at least 0"),
        (lambda: PlanConfig(num_groups=0), r"plan\.num_groups must be at least 1, got 0"),
        (lambda: PlanConfig(min_macs_share=1.1), r"plan\.min_macs_share must be at most 1"),
        (lambda: PlanConfig(min_macs_share=float("nan")), r"plan\.min_macs_share .* got nan"),
        (lambda: PlanConfig(min_group_size=0), r"plan\.min_group_size must be at least 1"),
        (lambda: PruneConfig(num_rounds=0), r"prune\.num_rounds must be at least 1, got 0"),
        (lambda: PruneConfig(num_candidates=0), r"prune\.num_candidates must be at least 1"),
        (lambda: PruneConfig(num_images=0), r"prune\.num_images must be at least 1"),
        (lambda: PruneConfig(batch_size=0), r"prune\.batch_size must be at least 1"),
        (lambda: PruneConfig(num_refit_images=0), r"prune\.num_refit_images must be at least 1"),
        (lambda: PruneConfig(num_levels=0), r"prune\.num_levels must be at least 1"),
        (lambda: PruneConfig(halving_steps=-1), r"prune\.halving_steps must be at least 0"),
        (lambda: PruneConfig(held_out_share=0), r"prune\.held_out_share must be greater than 0"),
        (lambda: PruneConfig(held_out_share=0.6), r"prune\.held_out_share .* got 0\.6"),
        (lambda: ProxyConfig(temperature=-1), r"proxy\.temperature must be at least 0, got -1"),
        (lambda: ProxyConfig(timeout_s=0), r"proxy\.timeout_s must be greater than 0, got 0"),
        (
            lambda: ProxyConfig(max_seconds=-1),
            r"proxy\.max_seconds must be greater than 0, got -1",
        ),
        (lambda: ProxyConfig(max_replies=0), r"proxy\.max_replies must be at least 1, got 0"),
        (lambda: ProxyConfig(max_retries=-1), r"proxy\.max_retries must be at least 0, got -1"),
        (lambda: ProxyConfig(max_concurrent=0), r"proxy\.max_concurrent must be at least 1"),
        (lambda: ProxyConfig(max_total_tokens=0), r"proxy\.max_total_tokens must be at least 1"),
        (lambda: ProxyConfig(max_cost=0), r"proxy\.max_cost must be greater than 0, got 0"),
        (lambda: ProxyConfig(max_cost=5), r"proxy\.max_cost 5\.0 needs prices: set"),
        (
            lambda: ProxyConfig(price_per_million_prompt_tokens=-1),
            r"proxy\.price_per_million_prompt_tokens must be at least 0, got -1",
        ),
        (
            lambda: SamplerConfig(num_inference_steps=0),
            r"sampler\.num_inference_steps must be at least 1, got 0",
        ),
        (lambda: SamplerConfig(eta=1.5), r"sampler\.eta must be at most 1, got 1\.5"),
        (lambda: SamplerConfig(steps_offset=2), r"sampler\.steps_offset must be at most 1, got 2"),
        (
            lambda: SamplerConfig(guidance_scale=-1),
            r"sampler\.guidance_scale must be at least 0, got -1",
        ),
        (
            lambda: ConditioningConfig(num_classes=0),
            r"conditioning\.num_classes must be at least 1, got 0",
        ),
        (
            lambda: ConditioningConfig(num_classes=10, label_dropout=1.0),
            r"conditioning\.label_dropout must be less than 1, got 1\.0",
        ),
        (
            lambda: ConditioningConfig(label_dropout=0.1),
            r"conditioning\.label_dropout .* 0 without conditioning\.num_classes, got 0\.1",
        ),
        (lambda: EvaluateConfig(num_images=1), r"evaluate\.num_images must be at least 2, got 1"),
        (lambda: EvaluateConfig(batch_size=0), r"evaluate\.batch_size must be at least 1"),
        (
            lambda: ComputeConfig(num_base_workers=0),
            r"compute\.num_base_workers must be at least 1, got 0",
        ),
        (lambda: ComputeConfig(cpus_per_actor=0), r"compute\.cpus_per_actor must be at least 1"),
        (lambda: ComputeConfig(gpus_per_actor=-1), r"compute\.gpus_per_actor must be at least 0"),
        (lambda: ComputeConfig(num_actors=0), r"compute\.num_actors must be at least 1, got 0"),
        (lambda: ComputeConfig(max_attempts=0), r"compute\.max_attempts must be at least 1"),
    ],
)
def test_a_value_out_of_its_range_is_refused_at_construction(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(("stage", "kind"), [("base", TrainConfig), ("finetune", FinetuneConfig)])
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("num_steps", -1, "at least 0"),
        ("batch_size", 0, "at least 1"),
        ("micro_batch_size", 0, "at least 1"),
        ("learning_rate", 0.0, "greater than 0"),
        ("num_warmup_steps", -1, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("max_grad_norm", 0.0, "greater than 0"),
        ("ema_decay", 1.0, "less than 1"),
        ("loss_weight_gamma", 5.0, "None with loss_weight constant"),
        ("log_every", 0, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("keep_checkpoints", 0, "at least 1"),
    ],
)
def test_training_errors_name_the_stage_they_are_about(stage, kind, name, value, rule):
    with pytest.raises(ConfigError, match=rf"^{stage}\.{name} must be {rule}, got {value}"):
        RunConfig(**{stage: kind(**{name: value})})


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_an_expert_is_not_all_start(share):
    with pytest.raises(ConfigError, match=rf"^finetune\.average_with_start .* got {share}"):
        RunConfig(finetune=FinetuneConfig(average_with_start=share))


def test_a_base_that_is_given_brings_no_optimizer():
    moments = FinetuneConfig(optimizer_state="base")
    assert RunConfig(finetune=moments).finetune == moments
    with pytest.raises(
        ConfigError, match=r"^finetune\.optimizer_state must be new with model\.base.*got base"
    ):
        RunConfig(finetune=moments, model=ModelConfig(base="google/ddpm-cifar10-32"))


def test_settings_from_before_there_was_a_choice_of_moments_are_those_of_new_ones():
    document = to_json(RunConfig())
    del document["finetune"]["optimizer_state"]
    assert differences(from_json(document), RunConfig()) == []


@pytest.mark.parametrize("source", ["folder", "npz", "cifar10"])
def test_every_source_but_digits_needs_a_path(source):
    with pytest.raises(ConfigError, match=rf"data\.path .* data\.source {source}.*--data\.path"):
        DataConfig(source=source)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (DataConfig(), "digits"),
        (DataConfig(source="cifar10", path="some/where"), "cifar10"),
        (DataConfig(source="npz", path="some/mnist-10k.npz"), "mnist_10k"),
        (DataConfig(source="folder", path="some/FFHQ 64/"), "FFHQ_64"),
    ],
)
def test_a_dataset_is_called_after_its_source_or_its_path(config, name):
    assert config.name == name


@pytest.mark.parametrize("schedule", ["snr", "constant"])
def test_matching_the_snr_mean_is_for_uniform_schedules(schedule):
    with pytest.raises(ConfigError, match=rf"plan\.match_snr_mean goes with .* got {schedule}"):
        PlanConfig(schedule=schedule, match_snr_mean=True)


def test_a_mean_share_goes_with_a_measured_schedule():
    with pytest.raises(
        ConfigError, match=r"plan\.mean_macs_share must be None unless .* got 0\.8"
    ):
        PlanConfig(mean_macs_share=0.8)


def test_measured_limits_and_steps_by_excess_need_a_model_of_inner_widths():
    for budgets in (
        {"plan": PlanConfig(schedule="measured")},
        {"finetune": FinetuneConfig(allocation="excess")},
    ):
        with pytest.raises(
            ConfigError, match=r"prune\.space must be inner or depth with .* got full"
        ):
            RunConfig(prune=PruneConfig(space="full"), **budgets)


def test_steps_by_excess_need_pruning_and_measured_limits_are_none_without():
    excess, none = FinetuneConfig(allocation="excess"), PruneConfig(method="none")
    with pytest.raises(ConfigError, match=r"allocation must be equal .* got excess"):
        RunConfig(prune=none, finetune=excess)
    measured = PlanConfig(schedule="measured")
    assert not RunConfig(plan=measured, prune=none).measures_limits
    assert RunConfig(plan=measured, prune=PruneConfig(method="taylor")).measures_limits


def test_by_default_the_offline_proxy_prunes_the_inner_widths_and_what_is_left_is_refitted():
    prune = RunConfig().prune
    found = (prune.method, prune.space, prune.refit, prune.memory, prune.halving_steps)
    assert found == ("offline", "inner", "least-squares", "shared", 0)


def test_no_setting_holds_a_key():
    names = {field.name for field in dataclasses.fields(ProxyConfig)}
    assert not any("key" in name for name in names)
    with pytest.raises(
        ConfigError, match=r"proxy\.base_url must have no user or password"
    ) as told:
        ProxyConfig(base_url="http://me:secret@localhost:8000/v1")
    assert "secret" not in str(told.value)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().base.num_steps = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().plan.num_groups = 3


def test_configs_pickle_and_are_keys():
    config = changed(RunConfig(), "plan.num_groups", 3)
    assert pickle.loads(pickle.dumps(config)) == config
    assert {config: 1}[changed(RunConfig(), "plan.num_groups", 3)] == 1


@pytest.mark.parametrize("make", [PlanConfig, RunConfig])
def test_a_misspelt_setting_is_refused_at_construction(make):
    with pytest.raises(ConfigError, match=r"num_group: Unexpected keyword argument, got 3"):
        make(num_group=3)


def test_timesteps_are_rescaled_to_a_thousand_only_when_asked():
    assert DiffusionConfig(num_train_timesteps=4000).timestep_scale == 1.0
    rescaled = DiffusionConfig(num_train_timesteps=4000, rescale_timesteps=True)
    assert rescaled.timestep_scale == 0.25


# --- rules between stages --------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["sampler.num_inference_steps", "plan.num_groups"])
def test_there_are_at_most_as_many_sampling_steps_and_groups_as_timesteps(setting):
    short = RunConfig(
        diffusion=DiffusionConfig(num_train_timesteps=50),
        sampler=SamplerConfig(num_inference_steps=50),
    )
    assert changed(short, setting, 50).diffusion.num_train_timesteps == 50
    rule = r"at most diffusion\.num_train_timesteps = 50, got 51"
    with pytest.raises(ConfigError, match=rf"^{setting} must be {rule}"):
        changed(short, setting, 51)


def test_the_base_batch_is_split_evenly_over_its_workers():
    rule = r"a multiple of compute\.num_base_workers = 3, got 64"
    with pytest.raises(ConfigError, match=rf"^base\.batch_size must be {rule}"):
        RunConfig(base=TrainConfig(batch_size=64), compute=ComputeConfig(num_base_workers=3))


def test_a_base_is_shared_by_several_workers_and_not_compiled():
    shared = ComputeConfig(sharding="full", num_base_workers=2)
    other = RunConfig(compute=shared)
    assert "compute.sharding none -> full" in differences(RunConfig(), other)
    with pytest.raises(ConfigError, match=r"num_base_workers must be at least 2 .*full, got 1"):
        changed(other, "compute.num_base_workers", 1)
    with pytest.raises(ConfigError, match=r"base\.compile must be none .*full, got default"):
        changed(other, "base.compile", "default")


def test_experts_are_fine_tuned_by_one_worker_so_their_batch_is_not_split():
    config = RunConfig(
        base=TrainConfig(batch_size=6),
        finetune=FinetuneConfig(batch_size=5),
        compute=ComputeConfig(num_base_workers=3),
    )
    assert config.finetune.batch_size == 5


@pytest.mark.parametrize("sampler", ["ddpm", "pndm", "dpmsolver++"])
def test_eta_is_for_ddim(sampler):
    with pytest.raises(ConfigError, match=rf"sampler\.eta .* got 0\.5 with {re.escape(sampler)}"):
        RunConfig(sampler=SamplerConfig(sampler=sampler, eta=0.5))
    with pytest.raises(
        ConfigError, match=rf"use_clipped_.* ddim, got it with {re.escape(sampler)}"
    ):
        RunConfig(sampler=SamplerConfig(sampler=sampler, use_clipped_model_output=True))


def test_pndm_cannot_sample_networks_that_predict_the_image():
    image, pndm = DiffusionConfig(prediction_type="sample"), SamplerConfig(sampler="pndm")
    with pytest.raises(ConfigError, match=r"sampler\.sampler must be ddim, ddpm or dpmsolver"):
        RunConfig(diffusion=image, sampler=pndm)


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_gamma_is_above_0(gamma):
    train = FinetuneConfig(loss_weight="p2", loss_weight_gamma=gamma)
    with pytest.raises(ConfigError, match=rf"^finetune\.loss_weight_gamma .* got {gamma}"):
        RunConfig(finetune=train)


# --- telling configs apart -------------------------------------------------------------------

CHANGES = [
    ("data.horizontal_flip", True),
    ("model.dropout", 0.1),
    ("conditioning.num_classes", 10),
    ("diffusion.vlb_weight", 0.5),
    ("plan.num_groups", 3),
    ("base.num_steps", 9),
    ("prune.method", "random"),
    ("prune.space", "full"),
    ("prune.refit", "none"),
    ("prune.memory", "own"),
    ("prune.halving_steps", 50),
    ("proxy.model", "another"),
    ("finetune.num_steps", 9),
    ("sampler.eta", 1.0),
    ("evaluate.seed", 5),
]


@pytest.mark.parametrize(("setting", "value"), CHANGES)
def test_a_difference_is_named_with_both_values(setting, value):
    stage, name = setting.split(".")
    one, other = RunConfig(), changed(RunConfig(), setting, value)
    before = getattr(getattr(one, stage), name)
    assert differences(one, other) == [f"{setting} {before} -> {value}"]
    assert digest(one) != digest(other)


def test_all_differences_are_named():
    other = changed(replace(RunConfig(), seed=3), "base.num_steps", 9)
    assert differences(RunConfig(), other) == ["seed 0 -> 3", "base.num_steps 2000 -> 9"]
    assert differences(other, other) == []


@pytest.mark.parametrize(
    ("name", "value"), [("num_actors", 7), ("cpus_per_actor", 2), ("gpus_per_actor", 0.5)]
)
def test_what_the_run_takes_of_the_cluster_makes_no_other_run(name, value):
    other = changed(RunConfig(), f"compute.{name}", value)
    assert digest(other) == digest(RunConfig())
    assert differences(RunConfig(), other) == []
    assert default_run_dir(other) == default_run_dir(RunConfig())


@pytest.mark.parametrize("name", ["num_base_workers", "cpus_per_base_worker"])
def test_how_the_base_is_spread_makes_another_run(name):
    other = changed(RunConfig(), f"compute.{name}", 2)
    assert digest(other) != digest(RunConfig())
    assert differences(RunConfig(), other) == [f"compute.{name} 1 -> 2"]


def test_a_relative_path_and_its_absolute_one_are_the_same_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = changed(RunConfig(), "evaluate.cache_dir", "cache")
    absolute = changed(RunConfig(), "evaluate.cache_dir", str(tmp_path / "cache"))
    assert with_absolute_paths(relative) == with_absolute_paths(absolute)
    assert differences(relative, absolute) == []


def test_the_datas_cache_is_the_same_place_in_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = changed(RunConfig(), "data.cache_dir", "cache")
    assert with_absolute_paths(relative).data.cache_dir == str(tmp_path / "cache")


@pytest.mark.parametrize(("name", "value"), [("max_corrupt", 99), ("cache_dir", "elsewhere")])
def test_a_run_that_corrupt_files_or_a_full_cache_stopped_goes_on_with_other_settings(name, value):
    other = changed(RunConfig(), f"data.{name}", value)
    assert differences(RunConfig(), other) == []
    assert default_run_dir(other) == default_run_dir(RunConfig())


def test_settings_that_are_new_leave_the_digests_of_old_runs_as_they_are(monkeypatch):
    hashed = []
    monkeypatch.setattr("tdc_ray.config.run.json_digest", lambda one: hashed.append(one) or "")
    other = changed(RunConfig(), "evaluate.metrics", ("kid",))
    for config in (RunConfig(), other):
        digest(config)
    assert not {"metrics", "features_model"} & set(hashed[0]["evaluate"])
    assert "sharding" not in hashed[0]["compute"]
    assert hashed[1]["evaluate"]["metrics"] == ("kid",)
    [difference] = differences(RunConfig(), other)
    assert difference == "evaluate.metrics ('kid', 'precision-recall') -> ('kid',)"


def test_the_digest_is_eight_hexadecimal_digits():
    assert len(digest(RunConfig())) == 8
    assert int(digest(RunConfig()), 16) >= 0


def test_the_default_run_directory_tells_preset_seed_and_settings():
    config = replace(RunConfig(), preset="mnist", seed=3)
    assert default_run_dir(config) == Path("runs") / f"mnist-seed3-{digest(config)}"
    longer = changed(config, "base.num_steps", 9)
    assert default_run_dir(longer) != default_run_dir(config)


def test_a_base_has_an_absolute_path_unless_it_is_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline").mkdir()
    for base, found in (
        ("openai:a.pt", f"openai:{tmp_path}/a.pt"),
        ("compvis:b/a.ckpt", f"compvis:{tmp_path}/b/a.ckpt"),
        ("pipeline", f"{tmp_path}/pipeline"),
        ("google/ddpm-cifar10-32", "google/ddpm-cifar10-32"),
    ):
        config = changed(RunConfig(), "model.base", base)
        assert with_absolute_paths(config).model.base == found
        assert digest(config) != digest(RunConfig())


def test_a_number_of_heads_without_a_base_is_refused():
    with pytest.raises(ConfigError, match=r"model\.num_heads goes with model\.base, got 4"):
        ModelConfig(num_heads=4)
    assert ModelConfig(num_heads=4, base="openai:a.pt").num_heads == 4
    for flags, words in (
        ({"use_new_attention_order": True}, "use_new_attention_order goes with model.base"),
        ({"num_heads": 4, "num_head_channels": 8, "base": "x"}, "num_head_channels must be None"),
        ({"num_heads_upsample": 4, "base": "x"}, "given together with model.num_heads, got 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            ModelConfig(**flags)


def test_all_that_is_wrong_is_refused_together_and_each_by_its_name():
    document = {
        "base": {"num_steps": -1},
        "sampler": {"eta": 2},
        "model": {"num_heads": 4, "config": "a.json", "width": 2.0},
        "compare": {"kind": "none", "swaps": True},
    }
    names = ["model.width", "model.num_heads", "base.num_steps", "sampler.eta", "compare.swaps"]
    with pytest.raises(ConfigError) as refused:
        from_json(document)
    assert [problem.split(" ", 1)[0] for problem in refused.value.args] == names
    assert str(refused.value).startswith("5 errors in the settings:\n  model.width must be left")
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


def test_an_error_that_ends_a_check_is_itself_and_has_what_was_refused_before():
    only = ConfigError("a must be 1, got 2.")
    with pytest.raises(ConfigError) as refused, errors_together():
        raise only
    assert refused.value is only

    @errors_together()
    def ends_by(error):
        refuse("b must be 1, got 3.")
        raise error

    with pytest.raises(ConfigError) as refused:
        ends_by(only)
    assert refused.value.args == ("b must be 1, got 3.", "a must be 1, got 2.")
    assert refused.value.__cause__ is only
    with pytest.raises(KeyError) as failed:
        ends_by(KeyError("c"))
    assert failed.value.__notes__ == ["b must be 1, got 3."]


def test_stages_that_disagree_are_refused_together():
    stages = {"plan": PlanConfig(num_groups=2000), "compute": ComputeConfig(num_base_workers=7)}
    with pytest.raises(ConfigError) as refused:
        RunConfig(**stages, sampler=SamplerConfig(sampler="ddpm", eta=0.5))
    names = ["plan.num_groups", "base.batch_size", "sampler.eta"]
    assert [problem.split(" ", 1)[0] for problem in refused.value.args] == names
