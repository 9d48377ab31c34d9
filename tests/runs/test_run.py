from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from diffusers import UNet2DModel
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tdc_ray.cli.run import run
from tdc_ray.config.conditioning import ConditioningConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline
from tdc_ray.errors import ConfigError, DataError, LimitError, StorageError
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.space import is_tight, space_of
from tdc_ray.reporting.text import conclusions
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.preflight import check
from tdc_ray.runs.results import load_results
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.run_dir import RunDir
from tests.models.counting import count_macs

pytestmark = pytest.mark.ray


@pytest.fixture
def results(finished_run):
    return load_results(RunDir(finished_run).results)


def test_every_group_is_within_its_limit_and_tight(results, smoke_config):
    space = space_of(architecture(smoke_config.model.architecture))
    for group in results.groups:
        assert group.macs == space.macs(group.widths) <= group.macs_limit
        assert is_tight(space, group.widths, group.macs_limit)


def test_the_experts_are_what_the_results_say(finished_run, results):
    for group in results.groups:
        expert = load_expert(finished_run / "experts" / f"expert-{group.index:02d}")
        assert (count_macs(expert), count_params(expert)) == (group.macs, group.num_params)


def test_every_group_below_the_base_was_searched_for_and_refitted(
    finished_run, results, smoke_config
):
    prune, whole = smoke_config.prune, results.groups[-1]
    entries = MemoryBank(RunDir(finished_run).memory).all()
    assert (whole.source, whole.loss_refit, whole.macs) == ("base", None, whole.macs_limit)
    assert {entry.group for entry in entries} == {group.index for group in results.groups[:-1]}
    for group in results.groups[:-1]:
        own = [entry for entry in entries if entry.group == group.index]
        assert 1 <= len(own) <= prune.num_rounds * prune.num_candidates
        best = min((entry for entry in own if entry.final), key=lambda e: e.final.distance)
        assert (group.source, group.widths) == ("offline", best.widths)
        assert (group.loss_cut, group.loss_refit) == (best.final.loss_cut, best.final.loss_refit)
        assert len({entry.loss_refit for entry in own}) == len(own)


def test_the_results_tell_how_it_was_pruned(results, smoke_config):
    prune = results.prune
    assert (prune.method, prune.refit, prune.space) == ("offline", "least-squares", "inner")
    assert prune.rounds == smoke_config.prune.num_rounds
    assert 1 <= prune.candidates <= smoke_config.prune.num_candidates
    assert prune.search_macs > 0
    assert (prune.prompt_tokens, prune.completion_tokens, prune.notes) == (0, 0, ())


def test_macs_of_tdc_are_the_mean_over_the_sampling_steps(finished_run, results):
    pipeline = ProgressivePipeline.from_pretrained(finished_run)
    pipeline.scheduler.set_timesteps(results.evaluation.num_inference_steps)
    by_step = []
    for timestep in pipeline.scheduler.timesteps.tolist():
        by_step += [g.macs for g in results.groups if g.timesteps[0] <= timestep <= g.timesteps[1]]
    assert results.tdc.macs == pytest.approx(np.mean(by_step))


def test_training_cost_adds_up_over_base_and_experts(results, smoke_config):
    batch = smoke_config.finetune.batch_size
    steps = smoke_config.finetune.num_steps
    experts = sum(3 * group.macs * steps * batch for group in results.groups)
    assert results.tdc.train_macs == pytest.approx(results.base.train_macs + experts)
    assert results.tdc.train_steps == results.base.train_steps + steps * len(results.groups)


def test_the_score_is_named_after_its_classifier_and_never_fid(results):
    assert results.metric == "fd_digits_cnn"
    assert np.isfinite([results.base.score, results.tdc.score]).all()
    assert results.base.score > 0


def test_other_scores_stand_beside_it_under_names_of_their_own(results):
    names = {f"{name}_digits_cnn" for name in ("kd", "precision", "recall")}
    for model in (results.base, results.tdc):
        assert set(model.metrics) == names
        assert 0 <= model.metrics["recall_digits_cnn"] <= 1
    assert "200 images" in results.evaluation.other_metrics


def test_the_scored_images_are_those_that_the_saved_models_sample(finished_run, smoke_config):
    base = UNet2DModel.from_pretrained(RunDir(finished_run).base_unet).eval()
    models = {
        "base": base_pipeline(base, pipeline_index(smoke_config)),
        "tdc": ProgressivePipeline.from_pretrained(finished_run / "experts"),
    }
    for which, pipeline in models.items():
        pipeline.set_progress_bar_config(disable=True)
        scored = np.load(finished_run / "evaluation" / which / "0000000.npz")["arr_0"]
        again = pipeline(len(scored), seed=smoke_config.evaluate.seed, output_type="np").images
        assert np.abs(scored.astype(int) - again).max() <= 1  # other threads, other last bits


def test_tensorboard_reads_losses_and_sample_grids(finished_run):
    base = EventAccumulator(str(finished_run / "tensorboard" / "base")).Reload()
    assert {"train/loss", "train/learning_rate"} <= set(base.Tags()["scalars"])
    assert base.Tags()["images"]
    group = EventAccumulator(str(finished_run / "tensorboard" / "group-00")).Reload()
    assert {"train/loss", "prune/loss_cut", "prune/loss_refit"} <= set(group.Tags()["scalars"])
    workers = EventAccumulator(str(finished_run / "tensorboard" / "workers")).Reload()
    (used,) = workers.Scalars("experts/utilisation")
    assert 0 < used.value <= 1
    assert workers.Tags()["images"] == ["timeline"]


def test_tensorboard_reads_plan_memory_bank_and_what_was_scored(finished_run):
    shown = {
        name: EventAccumulator(str(finished_run / "tensorboard" / name)).Reload()
        for name in ("plan", "memory", "samples")
    }
    assert shown["plan"].Tags()["images"] == ["plan"]
    tags = shown["samples"].Tags()["images"]
    assert {tag.partition("/")[0] for tag in tags} == {"base", "tdc", "real"}
    entries = MemoryBank(RunDir(finished_run).memory).all()
    group = [entry for entry in entries if entry.group == 0]
    losses = [event.value for event in shown["memory"].Scalars("group-00/loss")]
    assert losses == pytest.approx([entry.loss for entry in group])
    best = [event.value for event in shown["memory"].Scalars("group-00/best_loss")]
    leaders = accumulate(group, lambda one, other: min(one, other, key=lambda entry: entry.rank))
    assert best == pytest.approx([entry.loss for entry in leaders])


def test_a_finished_run_is_read_and_not_done_again(finished_run, smoke_config, results):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.json")}
    assert run(smoke_config, finished_run, Console(quiet=True)) == results
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.json")} == before


def test_other_settings_in_the_same_directory_are_refused_by_name(finished_run, smoke_config):
    changed = replace(smoke_config, plan=replace(smoke_config.plan, min_macs_share=0.6))
    with pytest.raises(StorageError, match=r"plan\.min_macs_share 0\.5 -> 0\.6"):
        run(changed, finished_run, Console(quiet=True))


def test_a_directory_in_use_is_refused(smoke_config, tmp_path):
    with hold_lease(tmp_path), pytest.raises(StorageError, match="is in use by process"):
        run(smoke_config, tmp_path, Console(quiet=True))


def test_what_cannot_work_is_said_before_any_work(smoke_config, tmp_path):
    impossible = replace(smoke_config, plan=replace(smoke_config.plan, min_macs_share=0.01))
    with pytest.raises(LimitError, match=r"group 0.*plan\.min_macs_share"):
        run(impossible, tmp_path / "a", Console(quiet=True))
    missing = replace(smoke_config.data, source="npz", path=str(tmp_path / "none.npz"))
    with pytest.raises(DataError, match=r"none\.npz does not exist"):
        run(replace(smoke_config, data=missing), tmp_path / "b", Console(quiet=True))
    other = replace(smoke_config.data, image_size=16, num_channels=3)
    both = (
        r"(?s)2 errors in the settings.*data\.image_size must be 8.*data\.num_channels must be 1"
    )
    with pytest.raises(ConfigError, match=both):
        run(replace(smoke_config, data=other), tmp_path / "c", Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_without_pruning_a_limit_below_the_smallest_model_does_not_matter(smoke_config):
    unpruned = replace(
        smoke_config,
        plan=replace(smoke_config.plan, min_macs_share=0.01),
        prune=replace(smoke_config.prune, method="none"),
    )
    _, space, plan = check(unpruned)
    assert plan.groups[0].limit(space.macs_base) < space.macs(space.smallest)


@pytest.mark.slow
def test_a_run_may_be_conditioned_on_classes_guided_weighted_and_sampled_by_pndm(
    ray_cluster, smoke_config, tmp_path
):
    few = {"batch_size": 16, "checkpoint_every": 4, "log_every": 4, "loss_weight": "p2"}
    config = replace(
        smoke_config,
        conditioning=ConditioningConfig(num_classes=10, label_dropout=0.2),
        plan=replace(smoke_config.plan, num_groups=2),
        base=replace(smoke_config.base, num_steps=8, **few),
        finetune=replace(smoke_config.finetune, num_steps=4, **few),
        prune=replace(smoke_config.prune, method="magnitude", num_images=16, num_refit_images=16),
        sampler=SamplerConfig(sampler="pndm", num_inference_steps=4, guidance_scale=2.0),
        evaluate=replace(smoke_config.evaluate, num_images=24, batch_size=12),
    )
    results = run(config, tmp_path / "run", Console(quiet=True))
    assert load_results(tmp_path / "run" / "results.json") == results
    found = results.evaluation
    assert (found.num_classes, found.labels) == (10, "image i is of class i mod 10")
    assert (found.sampler, found.guidance_scale) == ("pndm", 2.0)
    assert "image i is of class i mod 10, guidance 2, " in " ".join(conclusions(results))
    pipeline = ProgressivePipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.null_class == 10  # now, for it asks an expert
    asked, serve = [], pipeline.experts.for_timestep
    pipeline.experts.for_timestep = lambda timestep: asked.append(timestep) or serve(timestep)
    again = pipeline(24, seed=config.evaluate.seed, output_type="np").images
    scored = np.load(tmp_path / "run" / "evaluation" / "tdc" / "0000000.npz")["arr_0"]
    assert np.abs(scored.astype(int) - again[:12]).max() <= 1  # of a batch of another size
    by_step = [
        group.macs
        for timestep in asked
        for group in results.groups
        if group.timesteps[0] <= timestep <= group.timesteps[1]
    ]
    assert len(by_step) == 5  # PNDM evaluates the second timestep twice
    assert results.tdc.macs == pytest.approx(np.mean(by_step))
    base = UNet2DModel.from_pretrained(RunDir(tmp_path / "run").base_unet)
    assert base.class_embedding.num_embeddings == 11
