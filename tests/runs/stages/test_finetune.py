import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from tdc_ray.config.data import DataConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import held_out_split
from tdc_ray.data.dataset import ArrayImages
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.train import start_state, update
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.execution.chain import run_chain
from tdc_ray.execution.item import Report
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.families import family_of
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.models.unet2d.unet import load_unet, save_unet
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.loaded_base import load_base, prune_and_refit
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry
from tdc_ray.pruning.search import search_submodel
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.stages.expert import Expert, make_expert
from tdc_ray.runs.stages.finetune import (
    FinetuneJob,
    data_parallel,
    finetune_expert,
    finetune_item,
    short_finetune,
    short_finetune_item,
    smaller_micro_batch,
    with_margin,
)
from tdc_ray.storage.run_dir import RunDir
from tests.models.captioned import CASES
from tests.models.counting import count_macs
from tests.small import (
    assert_same,
    context_of,
    held_out_loss_of,
    make_run_dir,
    output_of,
    random_kept,
    random_unet,
    reporting_to,
    small_config,
    task_of,
    widths_of,
    with_run_dir,
)

NUM_STEPS = 5


def config_of(
    *,
    method: str = "magnitude",
    refit: str = "least-squares",
    space: str = "inner",
    halving_steps: int = 0,
    **finetune: float | str,
) -> RunConfig:
    """Five steps of 8 images, with a checkpoint after every second."""
    steps = {"num_steps": NUM_STEPS, "batch_size": 8, "checkpoint_every": 2, "log_every": 1}
    few = {"num_images": 16, "num_refit_images": 16, "num_levels": 2, "num_rounds": 1}
    return small_config(
        model={"dropout": 0.2},
        prune={
            "method": method,
            **few,
            "refit": refit,
            "space": space,
            "halving_steps": halving_steps,
        },
        finetune={**steps, **finetune},
    )


def ignore(_metrics, _step):
    pass


def make(task: GroupSearch, config: RunConfig | None = None, report: Report = ignore) -> Expert:
    config = config or config_of()
    memory = MemoryBank(task.context.run_dir.memory)
    chain = make_expert(task, memory, config.finetune, config.compute)
    return run_chain(chain, reporting_to(report))


def timeless(expert: Expert) -> Expert:
    cost = dataclasses.replace(expert.search_result.cost, seconds=0.0, proxy_seconds=0.0)
    search = dataclasses.replace(expert.search_result, cost=cost)
    return dataclasses.replace(expert, search_result=search, seconds=0.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> GroupSearch:
    return task_of(make_run_dir(tmp_path_factory.mktemp("whole")), config_of())


@pytest.fixture(scope="module")
def expert(task) -> Expert:
    """The expert of the least noisy group, made without a break."""
    return make(task)


def test_the_saved_expert_has_the_macs_parameters_and_loss_that_are_told(task, expert):
    saved = load_expert(task.context.run_dir.expert(task.group.index))
    assert expert.macs == count_macs(saved) <= expert.max_macs
    assert expert.num_params == count_params(saved)
    assert expert.loss_finetuned == held_out_loss_of(saved, config_of(), task.group)
    assert expert.group == task.group
    assert expert.max_macs == task.max_macs


def test_the_cost_is_three_forward_passes_for_every_image_seen(task, expert):
    assert expert.train_steps == NUM_STEPS
    assert expert.train_macs == 3 * expert.macs * NUM_STEPS * 8
    assert expert.seconds > 0


def test_a_longer_training_lowers_the_loss_after_the_cut(tmp_path):
    config = config_of(
        num_steps=30, checkpoint_every=30, learning_rate=2e-3, ema_decay=0.5, refit="none"
    )
    found = make(task_of(make_run_dir(tmp_path), config), config)
    assert found.loss_finetuned < 0.9 * found.search_result.loss_cut


def test_a_finished_expert_leaves_no_checkpoint_behind(task, expert):
    folder = task.context.run_dir.group(task.group.index)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    (result,) = folder.glob("finetune-*.json")
    told = json.loads(result.read_text())
    assert told["loss_finetuned"] == expert.loss_finetuned


def test_a_finished_expert_is_not_made_again(task, expert):
    weights = task.context.run_dir.expert(task.group.index) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    reports = []
    assert make(task, report=lambda metrics, step: reports.append((metrics, step))) == expert
    assert weights.stat().st_mtime_ns == written
    assert reports == []


def test_making_the_expert_again_gives_the_same_one(task, expert, tmp_path):
    again = with_run_dir(task, make_run_dir(tmp_path))
    assert timeless(make(again)) == timeless(expert)
    assert_same(weights_of(again), weights_of(task))


class KilledError(Exception):
    """Stands for whatever ends a worker."""


def kill_at(step: int) -> Report:
    def report(metrics, at):
        if "grad_norm" in metrics and at == step:
            raise KilledError

    return report


def weights_of(task: GroupSearch) -> dict:
    return load_expert(task.context.run_dir.expert(task.group.index)).state_dict()


def checkpoints_of(task: GroupSearch) -> list[Path]:
    return list(task.context.run_dir.group(task.group.index).glob("finetune-*.pt"))


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([1], marks=pytest.mark.slow),
        [3],
        pytest.param([4, 5], marks=pytest.mark.slow),
        pytest.param([3, 3, 5], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_killed_in_the_middle_and_started_again_gives_the_same_expert(
    task, expert, tmp_path, steps
):
    again = with_run_dir(task, make_run_dir(tmp_path))
    for step in steps:
        with pytest.raises(KilledError):
            make(again, report=kill_at(step))
        assert len(checkpoints_of(again)) == (step > 2)
        assert not again.context.run_dir.expert(again.group.index).exists()
    seen = []
    found = make(
        again, report=lambda metrics, at: seen.append(at) if "grad_norm" in metrics else None
    )
    assert seen == list(range((steps[-1] - 1) // 2 * 2 + 1, NUM_STEPS + 1))  # not from the start
    assert timeless(found) == timeless(expert)
    assert_same(weights_of(again), weights_of(task))
    assert not checkpoints_of(again)


@pytest.mark.slow
def test_killed_after_saving_and_before_its_result_gives_the_same_expert(task, expert, tmp_path):
    again = with_run_dir(task, make_run_dir(tmp_path))
    make(again)
    (result,) = again.context.run_dir.group(0).glob("finetune-*.json")
    result.unlink()
    assert timeless(make(again)) == timeless(expert)


# --- timesteps beyond the group ---------------------------------------------------------------


def test_a_margin_widens_a_group_on_either_side_within_all_timesteps():
    assert with_margin(range(31, 303), 0.1, 1000) == range(4, 330)
    assert with_margin(range(31), 0.2, 1000) == range(37)
    assert with_margin(range(722, 1000), 0.05, 1000) == range(708, 1000)
    assert with_margin(range(31, 303), 0.0, 1000) == range(31, 303)


@pytest.mark.slow
def test_a_margin_is_trained_on_and_not_measured_on(task, expert, tmp_path):
    wider = with_run_dir(task, make_run_dir(tmp_path))
    found = make(wider, config_of(timestep_margin=0.2))
    assert found.loss_finetuned != expert.loss_finetuned
    saved = load_expert(wider.context.run_dir.expert(wider.group.index))
    assert found.loss_finetuned == held_out_loss_of(saved, config_of(), task.group)


# --- taught by the base ----------------------------------------------------------------------


def test_an_expert_that_the_base_teaches_pays_for_its_forward_passes(task, expert, tmp_path):
    taught = with_run_dir(task, make_run_dir(tmp_path))
    before = weights_of_base(taught)
    found = make(taught, config_of(distillation_share=0.5))
    forward_passes = NUM_STEPS * 8 * taught.space.macs_base
    assert found.train_macs == expert.train_macs + forward_passes
    assert found.loss_finetuned != expert.loss_finetuned
    assert_same(weights_of_base(taught), before)


def weights_of_base(task: GroupSearch) -> dict[str, torch.Tensor]:
    return dict(load_unet(task.context.run_dir.base_unet).state_dict())


# --- averaged with the start -----------------------------------------------------------------


def averaging_config(**finetune: float) -> RunConfig:
    return config_of(average_with_start=0.25, **finetune)


@pytest.fixture(scope="module")
def averaged_task(tmp_path_factory) -> GroupSearch:
    task = task_of(make_run_dir(tmp_path_factory.mktemp("averaged")), averaging_config())
    make(task, averaging_config())
    return task


def test_an_expert_is_averaged_with_what_its_fine_tune_began_with(
    task, expert, averaged_task, tmp_path
):
    untrained = with_run_dir(averaged_task, make_run_dir(tmp_path))
    make(untrained, averaging_config(num_steps=0))  # of the start and itself: the start
    start, tuned, found = map(weights_of, (untrained, task, averaged_task))
    base = load_base(task.context, task.group)
    assert_same(start, prune_and_refit(base, expert.search_result.kept).network.state_dict())
    for name, weights in found.items():
        torch.testing.assert_close(weights, 0.25 * start[name] + 0.75 * tuned[name])


@pytest.mark.slow
def test_killed_before_the_average_and_started_again_gives_the_same_one(averaged_task, tmp_path):
    again = with_run_dir(averaged_task, make_run_dir(tmp_path))
    with pytest.raises(KilledError):
        make(again, averaging_config(), kill_at(3))
    make(again, averaging_config())
    assert_same(weights_of(again), weights_of(averaged_task))


# --- the base's moments ----------------------------------------------------------------------


def moments_config(**finetune: float | str) -> RunConfig:
    return config_of(optimizer_state="base", ema_decay=0.0, **finetune)


def with_moments(root: Path, config: RunConfig) -> GroupSearch:
    """The search of a base that was trained for three steps, whose checkpoint is there."""
    state = start_state(random_unet(), config.finetune)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in state.unet.parameters():
            parameter.grad = torch.randn_like(parameter)
        update(state, config.finetune)
    checkpoint = root / "base.pt"
    state.save(checkpoint)
    run_dir = RunDir(root / "run")
    with state.ema_weights() as unet:
        save_unet(unet, run_dir.base_unet)
    task = task_of(run_dir, config)
    context = dataclasses.replace(task.context, base_checkpoint=checkpoint)
    return dataclasses.replace(task, context=context)


def test_of_the_whole_base_the_first_step_is_what_the_bases_own_optimizer_does(tmp_path):
    config = moments_config(num_steps=1, num_warmup_steps=2)
    task = with_moments(tmp_path, config)
    kept = keep_everything(task.space.units)
    job = finetune_item(task, kept, config.finetune, config.compute).job
    saved = torch.load(task.context.base_checkpoint, weights_only=True)
    own = dataclasses.replace(job, checkpoint=tmp_path / "own.pt")  # of the base, at a first step
    torch.save(saved | {"step": 0}, own.checkpoint)
    new = dataclasses.replace(config.finetune, optimizer_state="new")
    found = []
    for one in (job, own, dataclasses.replace(job, train=new, checkpoint=tmp_path / "new.pt")):
        finetune_expert(one, ignore)
        found.append((weights_of(task), torch.load(one.checkpoint, weights_only=True)))
    (weights, state), (expected, own_state), (others, _) = found
    assert_same(weights, expected)
    assert_same(state["optimizer"], own_state["optimizer"])
    assert {float(one["step"]) for one in state["optimizer"]["state"].values()} == {4.0}
    assert state["optimizer"]["param_groups"][0]["lr"] == config.finetune.learning_rate / 2
    assert any(not torch.equal(others[name], value) for name, value in weights.items())


@pytest.mark.slow
def test_killed_after_its_start_with_moments_and_started_again_gives_the_same_one(tmp_path):
    config = moments_config()
    task, again = (with_moments(tmp_path / name, config) for name in ("whole", "cut"))
    found = make(task, config)
    with pytest.raises(KilledError):
        make(again, config, kill_at(3))
    assert timeless(make(again, config)) == timeless(found)
    assert_same(weights_of(again), weights_of(task))


def test_a_trial_begins_with_moments_too(tmp_path):
    config = moments_config(num_steps=2)
    task = with_moments(tmp_path, config)
    kept = random_kept(task.space.units, seed=2)
    item = short_finetune_item(task, "try", kept, config.finetune, config.compute)
    short = short_finetune(item.job, ignore)
    whole = finetune_expert(finetune_item(task, kept, config.finetune, config.compute).job, ignore)
    assert short.loss == whole.loss_finetuned
    steps = torch.load(item.job.checkpoint, weights_only=True)["optimizer"]["state"].values()
    assert {float(one["step"]) for one in steps} == {5.0}


def test_without_the_bases_checkpoint_a_fine_tune_says_what_to_do(task):
    config = moments_config()
    kept = keep_everything(task.space.units)
    job = finetune_item(task, kept, config.finetune, config.compute).job
    with pytest.raises(CheckpointError, match=r"^finetune\.optimizer_state base needs .* Use new"):
        finetune_expert(job, ignore)


# --- without training ------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["inner", "full"])
@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_without_a_step_the_expert_is_what_the_refit_left(tmp_path, refit, space):
    config = config_of(num_steps=0, refit=refit, space=space)
    task = task_of(make_run_dir(tmp_path), config)
    expert = make(task, config)
    base = load_base(task.context, task.group)
    expected = prune_and_refit(base, expert.search_result.kept).network
    assert_same(weights_of(task), expected.state_dict())
    saved = load_expert(task.context.run_dir.expert(task.group.index))
    assert_same(output_of(saved), output_of(expected))
    search = expert.search_result
    assert expert.loss_finetuned == (search.loss_cut if refit == "none" else search.loss_refit)
    assert (expert.train_steps, expert.train_macs) == (0, 0)


def test_without_pruning_and_without_a_step_the_expert_is_the_base(tmp_path):
    config = config_of(method="none", num_steps=0)
    task = task_of(make_run_dir(tmp_path), config)
    expert = make(task, config)
    assert_same(weights_of(task), load_unet(task.context.run_dir.base_unet).state_dict())
    assert expert.loss_finetuned == expert.search_result.loss_base
    assert expert.macs == task.space.macs_base


def test_only_the_groups_own_expert_is_written(task, expert):
    run_dir: RunDir = task.context.run_dir
    assert [path.name for path in run_dir.experts.iterdir()] == ["expert-00"]
    assert widths_of(expert.search_result.kept) == dict(expert.search_result.widths)


# --- successive halving ----------------------------------------------------------------------


def entries_of(task: GroupSearch) -> list[MemoryEntry]:
    return MemoryBank(task.context.run_dir.memory).all()


def halving_config(**prune: int) -> RunConfig:
    """Four candidates, of which two are tried for 2 steps, and one is left."""
    config = config_of(method="offline", halving_steps=2, learning_rate=5e-3, ema_decay=0.0)
    few = {"num_images": 32, "num_candidates": 4, **prune}
    return dataclasses.replace(
        config,
        prune=dataclasses.replace(config.prune, **few),
        plan=dataclasses.replace(config.plan, min_macs_share=0.3),
    )


@pytest.fixture(scope="module")
def halved_task(tmp_path_factory) -> GroupSearch:
    return task_of(make_run_dir(tmp_path_factory.mktemp("halved")), halving_config())


@pytest.fixture(scope="module")
def halved_expert(halved_task) -> Expert:
    return make(halved_task, halving_config())


def test_halving_tries_the_better_half_and_chooses_the_lowest_loss_of_it(
    halved_task, halved_expert
):
    entries = sorted(entries_of(halved_task), key=lambda entry: entry.final is None)
    assert len(entries) == 4
    assert [entry.final is None for entry in entries] == [False, False, True, True]
    assert all(entry.loss_tuned is not None for entry in entries[:2])
    assert all(entry.loss_tuned is None for entry in entries[2:])
    best = min(entries[:2], key=lambda entry: entry.loss_tuned)
    assert halved_expert.search_result.entry.key == best.key
    assert halved_expert.search_result.widths == best.widths
    assert halved_expert.macs == best.macs


def trials_of(task: GroupSearch, entry: MemoryEntry, num_steps: int) -> list[Path]:
    name = f"try-{entry.round}-{entry.candidate}-{num_steps}-*.json"
    return list(task.context.run_dir.group(task.group.index).glob(name))


def test_a_trial_is_the_fine_tune_cut_short(halved_task, halved_expert, tmp_path):
    (entry,) = (
        e for e in entries_of(halved_task) if e.key == halved_expert.search_result.entry.key
    )
    (trial,) = trials_of(halved_task, entry, 2)
    told = json.loads(trial.read_text())
    assert told["loss"] == entry.loss_tuned
    config = halving_config(halving_steps=0)
    short = dataclasses.replace(config.finetune, num_steps=2)
    context = context_of(make_run_dir(tmp_path), config)
    kept, checkpoint = halved_expert.search_result.kept, tmp_path / "c.pt"
    job = FinetuneJob(context, halved_task.group, kept, short, 1, checkpoint)
    assert finetune_expert(job, ignore).loss_finetuned == entry.loss_tuned


def test_halving_leaves_no_checkpoint_behind(halved_task, halved_expert):
    folder = halved_task.context.run_dir.group(halved_task.group.index)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert len(list(folder.glob("try-*.json"))) == 2


def test_what_the_trials_took_is_the_searchs(halved_task, halved_expert):
    search_alone = run_chain(
        search_submodel(halved_task, MemoryBank(halved_task.context.run_dir.memory))
    )
    tried = [entry for entry in entries_of(halved_task) if entry.loss_tuned is not None]
    trials = sum(3 * entry.macs * 2 * 8 for entry in tried)
    assert halved_expert.search_result.cost.macs == search_alone.cost.macs + trials
    assert halved_expert.train_steps == NUM_STEPS


def test_a_halving_that_is_done_is_not_done_again(halved_task, halved_expert):
    reports = []
    memory = halved_task.context.run_dir.memory.read_bytes()
    again = make(
        halved_task, halving_config(), lambda metrics, step: reports.append((metrics, step))
    )
    assert timeless(again) == timeless(halved_expert)
    assert reports == []
    assert halved_task.context.run_dir.memory.read_bytes() == memory


@pytest.mark.slow
def test_a_candidate_that_goes_on_does_so_from_where_it_was(tmp_path):
    config = halving_config(num_rounds=2, num_candidates=2 + 1)
    task = task_of(make_run_dir(tmp_path), config)
    steps = []
    make(task, config, lambda metrics, at: steps.append(at) if "grad_norm" in metrics else None)
    assert len(entries_of(task)) == 6
    trials = steps[:-NUM_STEPS]
    assert trials == [1, 2] * 3 + [3, 4] * 2  # of six three, of which two, of which one
    tuned = [entry for entry in entries_of(task) if entry.loss_tuned is not None]
    again = [entry for entry in tuned if trials_of(task, entry, 4)]
    assert (len(tuned), len(again)) == (3, 2)
    for entry in again:  # the last loss is the one that is remembered
        (trial,) = trials_of(task, entry, 4)
        assert entry.loss_tuned == json.loads(trial.read_text())["loss"]


@pytest.mark.slow
def test_killed_within_a_trial_and_started_again_gives_the_same_expert(
    halved_task, halved_expert, tmp_path
):
    again = with_run_dir(halved_task, make_run_dir(tmp_path))
    with pytest.raises(KilledError):
        make(again, halving_config(), kill_at(2))
    assert timeless(make(again, halving_config())) == timeless(halved_expert)
    assert_same(weights_of(again), weights_of(halved_task))
    assert entries_of(again) == entries_of(halved_task)


def test_a_group_that_keeps_the_base_has_nothing_to_halve(tmp_path):
    whole = task_of(make_run_dir(tmp_path), halving_config(), index=3)
    expert = make(whole, halving_config())
    assert expert.macs == whole.space.macs_base
    assert not list(whole.context.run_dir.group(3).glob("try-*"))


# --- held-out images -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", pytest.param("taylor", marks=pytest.mark.slow)])
def test_no_weight_depends_on_the_images_on_which_losses_are_measured(tmp_path, method):
    config = config_of(method=method)
    kept = make(task_of(make_run_dir(tmp_path / "kept"), config)).search_result.kept
    dataset = ArrayImages(load_dataset(DataConfig()).images[:100], None)
    _, held_out = held_out_split(dataset, config.prune.held_out_share, config.seed)
    images = dataset.images[:, 0].numpy()
    other = images.copy()
    other[held_out] = 255 - other[held_out]
    found = []
    for name, pixels in (("same", images), ("other", other)):
        np.savez(tmp_path / f"{name}.npz", images=pixels)
        data = DataConfig(source="npz", path=str(tmp_path / f"{name}.npz"))
        task = task_of(make_run_dir(tmp_path / name), dataclasses.replace(config, data=data))
        checkpoint = tmp_path / f"{name}.pt"
        job = FinetuneJob(task.context, task.group, kept, config.finetune, 1, checkpoint)
        found.append((finetune_expert(job, ignore).loss_finetuned, weights_of(task)))
    (one_loss, one), (other_loss, other_weights) = found
    assert_same(one, other_weights)
    assert one_loss != other_loss


# --- memory and several workers --------------------------------------------------------------


def test_half_the_images_at_once_gives_the_same_expert_but_for_rounding(tmp_path):
    config = config_of()
    task = task_of(make_run_dir(tmp_path), config)
    item = finetune_item(task, keep_everything(task.space.units), config.finetune, config.compute)
    finetune_expert(item.job, lambda _metrics, _step: None)
    whole = load_expert(task.context.run_dir.expert(task.group.index)).state_dict()
    job = item.reduced_memory()
    assert job.train.micro_batch_size == config.finetune.batch_size // 2
    elsewhere = dataclasses.replace(job, checkpoint=tmp_path / "other.pt")
    finetune_expert(elsewhere, lambda _metrics, _step: None)
    for name, weights in (
        load_expert(task.context.run_dir.expert(task.group.index)).state_dict().items()
    ):
        assert (weights - whole[name]).abs().max() < 1e-4, name


def test_a_micro_batch_is_halved_down_to_one_image(task):
    config, kept = config_of(), keep_everything(task.space.units)
    job, sizes = finetune_item(task, kept, config.finetune, config.compute).job, []
    while (job := smaller_micro_batch(job)) is not None:
        sizes.append(job.train.micro_batch_size)
    assert sizes == [4, 2, 1]


@pytest.mark.parametrize(("name", "branch"), [("sd3.5", "1.attn"), ("pixart", ".attn2")])
def test_workers_share_an_expert_of_which_nothing_reads_some_weights(name, branch):
    case = CASES[name]
    base, units = case.network(), space_of(case.config, "depth").units
    whole = keep_everything(units)
    kept = {unit: () if unit.endswith(branch) else steps for unit, steps in whole.items()}
    pruned, batch = family_of(base).cut(base, units, kept), case.noised(2)
    timesteps = case.schedule.model_timesteps(batch.timesteps)
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = data_parallel(pruned, kept)
        for _ in range(2):  # the second forward pass fails where the first is not reduced
            output = case.call(model, batch.x_t(case.schedule), timesteps, batch.labels).sample
            output.sum().backward()
    finally:
        distributed.destroy_process_group()
    assert any(parameter.grad is None for parameter in pruned.parameters())


def test_the_workers_of_a_fine_tune_share_its_batch():
    with pytest.raises(ConfigError, match=r"finetune\.batch_size must be a multiple"):
        small_config(compute={"workers_per_finetune": 3})
