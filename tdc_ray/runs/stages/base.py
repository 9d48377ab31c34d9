"""Stage 1: the base of a run is imported, taken from the cache, or trained by Ray Train."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from tdc_ray.config.run import RunConfig
from tdc_ray.data.fingerprint import training_key
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.errors import CheckpointError
from tdc_ray.execution.cache import ResultCache
from tdc_ray.execution.events import reporter
from tdc_ray.execution.item import Inputs, ItemResult, Report, WorkItem, load_result
from tdc_ray.execution.ray.cache_session import CacheSession
from tdc_ray.execution.ray.event_collector import EventCollector
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.runs.pretrained.importer import import_base
from tdc_ray.runs.pretrained.sources import PretrainedBase
from tdc_ray.runs.stages.base_result import BaseResult
from tdc_ray.runs.stages.base_trainer import train_base_on_ray
from tdc_ray.runs.stages.base_worker import STATE_FILE
from tdc_ray.runs.stages.data_key import base_workers_key, run_data_key
from tdc_ray.runs.stages.finetune import NO_BASE_CHECKPOINT
from tdc_ray.storage.files import exists, listing
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import RunDir

VERSION = 1
"""Rises whenever the results of stage 1 change, so that cached bases are trained again."""

logger = logging.getLogger(__name__)


def make_base(
    run_dir: RunDir,
    config: RunConfig,
    pretrained: PretrainedBase | None,
    events: EventCollector,
    session: CacheSession,
) -> None:
    """Write the base into the run directory, unless an earlier call did.

    Args:
        run_dir: The run.
        config: Its settings.
        pretrained: The base to import. None means to train one.
        events: Called with the events of training.
        session: The cache, which may have another run's base.

    Raises:
        TdcError: The base cannot be imported, trained, or read from the cache.
    """
    folder = display_path(run_dir.base_unet)
    if pretrained is not None:
        if not exists(run_dir.base_result):
            logger.info("stage 1: importing the base %s (%s)", pretrained.source, folder)
            _import(run_dir, config, pretrained)
        return
    item = base_item(run_dir, config)
    with (
        events.recording(item.key) as reported,
        session.compute_once(item, reported, reporter(events, item.key)) as is_done,
    ):
        if not is_done:
            logger.info("stage 1: training the base (%s)", folder)
            train_base_on_ray(run_dir, config, item.key, events)
            events.forward()  # its last reports


def _import(run_dir: RunDir, config: RunConfig, pretrained: PretrainedBase) -> None:
    started = time.perf_counter()
    structure = network_structure(import_base(pretrained, config, run_dir.base))
    seconds = time.perf_counter() - started
    result = BaseResult(structure.macs, structure.num_params, 0, 0.0, seconds)
    ItemResult(result).save(run_dir.base_result)


def last_checkpoint(run_dir: RunDir, cache: ResultCache | None) -> Path | None:
    """Return the last checkpoint of the training that made a run's base, if it is still there.

    It holds what ``base/unet`` does not: the raw weights, the optimizer's moments, the count of
    steps. A base from a cache has none of its own; the run that trained it may have kept it.
    """
    mark = load_result(run_dir.base_result, BaseResult).cached
    if mark is None or not mark.reused:
        return _checkpoint_in(run_dir)
    if cache is None:  # what is here is of an attempt that a cached base cut short
        return None
    name = cache.saved_by(mark.key)
    if name is None:
        return None
    other = RunDir(resolve_path(name))
    if not exists(other.base_result) or not exists(other.base_unet):
        return None
    is_same = weights_digest(other.base_unet) == weights_digest(run_dir.base_unet)
    return _checkpoint_in(other) if is_same else None  # that folder may have another base by now


def checkpoint_of_moments(
    run_dir: RunDir,
    config: RunConfig,
    groups: Sequence[TimestepGroup],
    cache: ResultCache | None,
) -> Path | None:
    """Return the base's last checkpoint if fine-tunes begin with its moments, else None.

    Raises:
        CheckpointError: It is gone, and there are experts yet to be made.
    """
    if config.finetune.optimizer_state == "new" or config.finetune.num_steps == 0:
        return None
    found = last_checkpoint(run_dir, cache)
    if found is None and not all(exists(run_dir.expert(group.index)) for group in groups):
        raise CheckpointError(NO_BASE_CHECKPOINT)
    return found


def _checkpoint_in(run_dir: RunDir) -> Path | None:
    kept = listing(run_dir.base_training, f"checkpoint_*/{STATE_FILE}")
    return kept[-1] if kept else None


def base_inputs(config: RunConfig) -> Inputs:
    """Return the cache inputs of the base."""
    return {
        "stage": "base",
        "version": VERSION,
        "unet": base_unet(config.model, config.conditioning),
        "dropout": config.model.dropout,
        **_held_out_key(config),
        **base_workers_key(config.compute),
        **run_data_key(config),
        **training_key(config.base),
    }


def _held_out_key(config: RunConfig) -> Inputs:
    """Return what is held out of stage 1, if anything is: keys are older than the choice."""
    prune = config.prune
    return {"held_out_share": prune.held_out_share} if prune.held_out_of_base else {}


def base_item(run_dir: RunDir, config: RunConfig) -> WorkItem[RunConfig, BaseResult]:
    """Return the item of stage 1, for its cache key; Ray Train runs it."""
    return WorkItem(
        key="base",
        function=_no_item,
        job=config,
        result_path=run_dir.base_result,
        cost=0.0,
        num_steps=config.base.num_steps,
        inputs=base_inputs,
        files=(run_dir.base_unet,),
        result_type=BaseResult,
    )


def _no_item(_config: RunConfig, _report: Report) -> BaseResult:
    raise AssertionError("stage 1 is no item of a pool")
