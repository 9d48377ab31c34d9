"""Keys, and the store: what is the same, what is not, and what is left by whoever dies."""

import dataclasses
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tdc_ray.config.run import RunConfig
from tdc_ray.data.fingerprint import training_key
from tdc_ray.errors import StorageFailedError
from tdc_ray.execution.cache import ResultCache, key_of
from tdc_ray.execution.item import CacheMark, ItemResult, WorkItem, finished
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.tasks.candidates import candidate_item
from tdc_ray.runs.stages.base import base_item
from tdc_ray.runs.stages.finetune import finetune_item, smaller_micro_batch
from tdc_ray.storage.files import write_text
from tests.small import make_run_dir, small_config, task_of

STEP = {int: lambda old: old + 1, float: lambda old: old / 2 or 0.25, bool: lambda old: not old}


def changed(stage: object, name: str) -> object:
    """A stage's settings with another value of a number or a flag."""
    value = getattr(stage, name)
    return replace(stage, **{name: STEP[type(value)](value)})


def numbers(stage: object) -> list[str]:
    fields = dataclasses.fields(stage)
    return [field.name for field in fields if type(getattr(stage, field.name)) in STEP]


def keys(folder: Path, config: RunConfig, *, seed: int = 0, index: int = 1) -> dict[str, str]:
    task = task_of(make_run_dir(folder, seed=seed), config, index)
    kept = keep_everything(task.space.units)
    items = {
        "base": base_item(task.context.run_dir, config),
        "finetune": finetune_item(task, kept, config.finetune, config.compute),
        "measure": candidate_item(task, "base", kept, 0),
    }
    return {name: key_of(item) for name, item in items.items()}


DECIDES = [
    ("diffusion", {"base", "finetune", "measure"}, ()),
    ("base", {"base"}, ("log_every", "checkpoint_every", "keep_checkpoints")),
    ("finetune", {"finetune"}, ("log_every", "checkpoint_every", "keep_checkpoints")),
    (
        "prune",
        {"finetune", "measure"},
        (
            *("num_rounds", "num_candidates", "halving_steps", "num_passes", "num_levels"),
            *("sensitivity", "num_probes"),
            *("channel_multiple", "latency_batch_size"),
        ),
    ),
]


@pytest.mark.parametrize(("stage", "decides", "indifferent"), DECIDES)
def test_a_change_of_any_setting_changes_the_keys_of_what_follows_from_it(
    tmp_path, stage, decides, indifferent
):
    config = small_config()
    settings = getattr(config, stage)
    before = keys(tmp_path, config)
    for name in numbers(settings):
        if name in ("num_train_timesteps", "batch_size") and stage != "prune":
            continue  # they change the groups, or are tied to others
        if name in ("rescale_betas_zero_snr", "sigma_min", "sigma_max", "p_mean"):
            continue  # of networks that predict something else, and of EDM's noise process
        after = keys(tmp_path, replace(config, **{stage: changed(settings, name)}))
        expected = set() if name in indifferent else decides
        if name == "held_out_of_base":
            expected = {"base"}  # what follows from it knows the base's weights
        assert {key for key in before if before[key] != after[key]} == expected, name


def test_keys_change_with_zero_terminal_snr(tmp_path):
    config = small_config(
        diffusion={"prediction_type": "v_prediction"}, sampler={"spacing": "trailing"}
    )
    rescaled = replace(config, diffusion=changed(config.diffusion, "rescale_betas_zero_snr"))
    before, after = keys(tmp_path, config), keys(tmp_path, rescaled)
    assert all(before[key] != after[key] for key in before)


def test_keys_change_with_weights_seed_timesteps_kept_channels_precision_and_data(tmp_path):
    config = small_config()
    before = keys(tmp_path / "a", config)
    other_weights = keys(tmp_path / "b", config, seed=1)
    assert other_weights["base"] == before["base"]
    assert other_weights["finetune"] != before["finetune"]
    assert other_weights["measure"] != before["measure"]
    bf16 = {"precision": "bf16"}
    for other in (
        small_config(seed=1),
        small_config(data={"horizontal_flip": True}),
        small_config(base=bf16, finetune=bf16, prune={"refit": "none"}),
        small_config(base={"batch_size": 9}, finetune={"batch_size": 9}, prune={"batch_size": 9}),
    ):
        after = keys(tmp_path / "a", other)
        assert all(after[name] != before[name] for name in before)
    assert keys(tmp_path / "a", config, index=2)["measure"] != before["measure"]
    task = task_of(make_run_dir(tmp_path / "a"), config, 1)
    unit = task.space.units[0]
    fewer = {**keep_everything(task.space.units), unit.name: (0,)}
    assert key_of(candidate_item(task, "base", fewer, 0)) != before["measure"]


def test_keys_do_not_tell_machines_places_or_other_groups_limits_apart(tmp_path):
    config = small_config()
    compute = {"num_actors": 7, "cpus_per_actor": 3, "gpus_per_actor": 1, "max_attempts": 9}
    other = small_config(
        compute=compute,
        plan={"min_macs_share": 0.7},
        evaluate={"cache_dir": str(tmp_path / "cache"), "seed": 5},
        data={"num_workers": 2, "cache_dir": str(tmp_path / "data")},
        prune={"method": "taylor", "num_rounds": 9},
    )
    assert keys(tmp_path / "here", config) == keys(tmp_path / "there", other)


def test_keys_from_before_there_was_a_choice_of_moments_are_those_of_new_ones(tmp_path):
    new = small_config()
    assert "optimizer_state" not in training_key(new.finetune)["training"]
    base = small_config(finetune={"optimizer_state": "base"})
    before, after = keys(tmp_path, new), keys(tmp_path, base)
    assert {name for name in before if before[name] != after[name]} == {"finetune"}


def test_half_the_images_at_once_is_another_key_and_says_so(tmp_path):
    config = small_config(model={"dropout": 0.1})
    task = task_of(make_run_dir(tmp_path), config, 1)
    item = finetune_item(task, keep_everything(task.space.units), config.finetune, config.compute)
    assert key_of(replace(item, job=smaller_micro_batch(item.job))) != key_of(item)


def nothing(_metrics, _step):
    """Ignore what is reported."""


def write_files(job, report):
    """Leave a file and a folder beside the result."""
    folder, content = job
    write_text(folder / "file.txt", content)
    write_text(folder / "model" / "weights.txt", content * 2)
    report({}, 1)
    return {"content": content, "folder": None}


def inputs_of(job):
    return {"content": job[1]}


def item(folder: Path, content: str = "a") -> WorkItem:
    return WorkItem(
        key="item",
        function=write_files,
        job=(folder, content),
        result_path=folder / "result.json",
        cost=0.0,
        result_type=dict,
        inputs=inputs_of,
        files=(folder / "file.txt", folder / "model"),
    )


def published(root: Path, folder: Path) -> str:
    store, one = ResultCache(root, "one"), item(folder)
    key = key_of(one)
    store.compute(one, nothing, key=key)
    assert finished(one).cached == CacheMark(key, reused=False)
    return key


def test_a_result_is_taken_with_its_files_and_says_that_it_was(tmp_path):
    key = published(tmp_path / "store", tmp_path / "one")
    store, other = ResultCache(tmp_path / "store", "two"), item(tmp_path / "two")
    assert key_of(other) == key != key_of(item(tmp_path / "two", "b"))
    result = store.load(other, nothing, key=key)
    assert result["content"] == "a"
    assert finished(other) == ItemResult(result, CacheMark(key, reused=True))
    for name in ("file.txt", "model/weights.txt"):
        assert (tmp_path / "one" / name).samefile(tmp_path / "two" / name)  # linked
    one = item(tmp_path / "one")
    ResultCache(tmp_path / "store", "one").load(one, nothing, key=key)
    assert finished(one).cached == CacheMark(key, reused=False)  # its own, from before a cut


def test_a_damaged_entry_is_removed_and_never_taken(tmp_path):
    key = published(tmp_path / "store", tmp_path / "one")
    store = ResultCache(tmp_path / "store", "two")
    (file,) = store.entry(key).glob("*/0")
    file.write_text("something else")
    with pytest.raises(StorageFailedError, match="was removed"):
        store.load(item(tmp_path / "two"), nothing, key=key)
    assert not store.contains(key)
    store.compute(item(tmp_path / "two"), nothing, key=key)
    assert store.load(item(tmp_path / "three"), nothing, key=key)["content"] == "a"


@pytest.mark.slow
def test_a_publisher_that_is_killed_leaves_nothing_that_is_seen(tmp_path):
    root, folder = tmp_path / "store", tmp_path / "one"
    code = f"""
import os, signal
from pathlib import Path
from tdc_ray.execution import cache
from tests.execution.test_cache import item, key_of
cache.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # before entry.json
one = item(Path({str(folder)!r}))
one.function(one.job, lambda *_: None)
cache.ResultCache(Path({str(root)!r}), "one").save(one, key_of(one), {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    store, two = ResultCache(root, "two"), item(tmp_path / "two")
    assert list(root.rglob("weights.txt"))
    assert not store.contains(key_of(two))
    published(root, tmp_path / "two")
    assert store.load(item(tmp_path / "three"), nothing, key=key_of(two))["content"] == "a"


def test_publishers_of_the_same_do_not_mix_their_files(tmp_path):
    store = ResultCache(tmp_path / "store", "one")
    key = key_of(item(tmp_path / "one"))
    for name, content in (("one", "x"), ("two", "y")):  # as after a claim that ran out
        other = item(tmp_path / name, content)
        write_files(other.job, nothing)
        store.save(replace(other, inputs=None), key, {"content": content})
    result = store.load(item(tmp_path / "three"), nothing, key=key)
    assert (tmp_path / "three" / "file.txt").read_text() == result["content"] == "x"


def test_a_folder_at_a_uri_is_a_store_too(tmp_path, bucket):
    from tdc_ray.storage.object_store import resolve_path

    root = resolve_path(f"{bucket}/store")
    key = published(root, tmp_path / "one")
    assert (
        ResultCache(root, "two").load(item(tmp_path / "two"), nothing, key=key)["content"] == "a"
    )
    assert (tmp_path / "two" / "model" / "weights.txt").read_text() == "aa"
