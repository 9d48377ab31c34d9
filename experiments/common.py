"""Shared code of experiments: flags, a base for several runs, and tables with provenance."""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from rich.console import Console

from tdc_ray.cli.run import run
from tdc_ray.config.plan import FlopsSchedule
from tdc_ray.config.presets import preset
from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.config.run import RunConfig, differences, from_json, to_json, with_absolute_paths
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.config.train import Precision
from tdc_ray.data.latents import prepare_latents, training_data
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.execution.cache import ResultCache
from tdc_ray.execution.ray.cache_session import CacheSession
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.models.config_file import with_file
from tdc_ray.reporting.hparams import HParams
from tdc_ray.reporting.sinks import default_sinks, trial_sinks
from tdc_ray.runs.preflight import check
from tdc_ray.runs.results import Results
from tdc_ray.runs.run import services_of
from tdc_ray.runs.stages.base import last_checkpoint, make_base
from tdc_ray.runs.sweep.results import SweepResults, with_rows
from tdc_ray.runs.sweep.space import Choices, Domain, Params, grid, setting_name
from tdc_ray.runs.sweep.sweep import sweep
from tdc_ray.storage.files import exists, listing, read_json, write_json
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.object_store import display_path, is_remote, resolve_path
from tdc_ray.storage.provenance import commit
from tdc_ray.storage.run_dir import RunDir

SMOKE_PRESET = "digits-smoke"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of an experiment."""

    preset: str = "digits"
    """The preset that the experiment varies."""
    smoke: bool = False
    """A quick check: the digits-smoke preset and one seed."""
    storage: Path = Path("runs")
    """Folder or URI of the experiment's runs; the same command resumes an interrupted one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    data: Path | None = None
    """Where the images are, for presets that need a path."""
    first_stage: Path | None = None
    """Folder of the first stage, for presets of latent diffusion."""
    num_actors: int | None = None
    """Most concurrent actors; default: as many as fit on the cluster."""
    precision: Precision | None = None
    """Precision of training; default: the preset's."""
    architecture: str | None = None
    """Another architecture for the preset's data, such as tiny for digits; default: the
    preset's."""
    network: Path | None = None
    """The config.json of a network to train in place of the preset's architecture."""
    image_size: int | None = None
    """Side that images are learnt at, such as 8 for mnist with the architecture tiny; default: the
    preset's."""
    base_steps: int | None = None
    """Steps of the base; default: the preset's."""
    schedule: FlopsSchedule | None = "snr"
    """How the limits move with t, as in the paper's tables. None: the preset's."""
    held_out_of_base: bool = False
    """Stage 1 leaves out the images that losses are compared on: no network has seen them."""
    steps_share: float = 1.0
    """Share of the preset's steps, and of the images that are measured and scored, which sizes the
    experiment for the machine (0.25: for 2 CPU cores). With --smoke always 1."""

    @property
    def store(self) -> Path:
        """The cache that the runs of a storage share: nothing is computed twice."""
        return self.storage / "store"

    def config(self, seed: int) -> RunConfig:
        """Return the preset's settings for one seed."""
        config = replace(preset(self.preset), seed=seed)
        # Bases of several seeds may be trained side by side, each on one thread.
        compute = replace(config.compute, num_actors=self.num_actors, cpus_per_base_worker=1)
        config = replace(config, compute=compute)
        if self.precision is not None:
            base, finetune = (
                replace(train, precision=self.precision)
                for train in (config.base, config.finetune)
            )
            config = replace(config, base=base, finetune=finetune)
        data = config.data
        if self.data is not None:
            data = replace(data, path=str(self.data.resolve()))
        if self.first_stage is not None:
            data = replace(data, first_stage=str(self.first_stage.resolve()))
        if self.image_size is not None:
            data = replace(data, image_size=self.image_size)
        config = replace(config, data=data)
        if not self.smoke:
            config = in_size(config, self.steps_share)
        if self.schedule is not None:
            config = replace(config, plan=replace(config.plan, schedule=self.schedule))
        if self.architecture is not None:
            config = replace(config, model=replace(config.model, architecture=self.architecture))
        if self.network is not None:
            model = replace(config.model, config=str(self.network.resolve()))
            config = replace(config, model=with_file(model))
        if self.base_steps is not None:
            config = replace(config, base=replace(config.base, num_steps=self.base_steps))
        prune = replace(config.prune, held_out_of_base=self.held_out_of_base)
        return replace(config, prune=prune)

    @property
    def variant(self) -> str:
        """The preset, and what of the base is not the preset's: a part of folder names."""
        steps = None if self.base_steps is None else f"base-{self.base_steps}"
        held_out = "held-out" if self.held_out_of_base else None
        size = None if self.image_size is None else f"{self.image_size}px"
        return "-".join(filter(None, (self.preset, size, self.network_name, steps, held_out)))

    @property
    def network_name(self) -> str | None:
        """What the network is called where it is not the preset's."""
        return self.architecture if self.network is None else self.network.stem


@dataclass(frozen=True, kw_only=True)
class ProxyFlags(Flags):
    """Flags of an experiment that has a proxy."""

    proxy: Literal["offline", "llm"] = "offline"
    """Which proxy. llm: a language model, which needs OPENAI_API_KEY, and OPENAI_BASE_URL for
    servers other than OpenAI's."""
    llm: ProxyConfig = field(default_factory=ProxyConfig)
    """The language model."""

    def config(self, seed: int) -> RunConfig:
        """Return the preset's settings for one seed and this proxy."""
        config = super().config(seed)
        prune = replace(config.prune, method=self.proxy)
        return replace(config, prune=prune, proxy=self.llm)


@dataclass(frozen=True, kw_only=True)
class ScoreFlags(Flags):
    """Flags of an experiment whose scores may be of fewer images than the preset's."""

    num_images: int | None = None
    """Images that a score is taken from; default: the preset's."""

    def config(self, seed: int) -> RunConfig:
        """Return the preset's settings for one seed and this number of images."""
        config = super().config(seed)
        if self.num_images is None:
            return config
        return replace(config, evaluate=replace(config.evaluate, num_images=self.num_images))


def in_size(config: RunConfig, share: float) -> RunConfig:
    """Return settings with a share of their steps, and of the images to measure and score."""
    base, finetune = (
        replace(
            train,
            num_steps=round(share * train.num_steps),
            num_warmup_steps=round(share * train.num_warmup_steps),
        )
        for train in (config.base, config.finetune)
    )
    prune = replace(
        config.prune,
        num_images=round(share * config.prune.num_images),
        num_refit_images=round(share * config.prune.num_refit_images),
    )
    images = round(share * config.evaluate.num_images)
    evaluate = replace(config.evaluate, num_images=images)
    return replace(config, base=base, prune=prune, finetune=finetune, evaluate=evaluate)


AnyFlags = TypeVar("AnyFlags", bound=Flags)


def parse_flags(description: str | None, kind: type[AnyFlags] = Flags) -> AnyFlags:  # type: ignore[assignment]
    """Parse the command line and configure logging."""
    flags = tyro.cli(kind, description=description)
    flags = replace(flags, storage=resolve_path(flags.storage))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("tdc_ray").setLevel(logging.INFO)
    if flags.network is not None and flags.architecture is not None:
        raise ConfigError("give --network or --architecture, not both.")
    if flags.smoke:
        return replace(flags, preset=SMOKE_PRESET, seeds=flags.seeds[:1])
    return flags


@dataclass(frozen=True, kw_only=True)
class SweepFlags(Flags):
    """Flags of an experiment that is a sweep."""

    num_actors: int | None = 1
    """Most actors of each run; set more on a cluster."""
    max_concurrent: int = 2
    """Most concurrent runs; set more on a cluster."""
    steps_share: float = 0.25


def domains_of(points: Sequence[Params]) -> dict[str, Domain]:
    """Return, for every field of a grid's settings, the values that it has in them."""
    return {
        name: Choices(tuple(dict.fromkeys(point[name] for point in points))) for name in points[0]
    }


def swept(
    flags: SweepFlags,
    folder: Path,
    space: Mapping[str, Domain],
    points: Sequence[Params] | None = None,
    **how: Any,
) -> SweepResults:
    """Start or resume a sweep; what runs of a storage share, such as bases, is computed once.

    Args:
        flags: The experiment's flags.
        folder: The sweep's folder.
        space: What is varied.
        points: Settings of a grid, if not all combinations.
        how: Further settings of the sweep.
    """
    config = flags.config(flags.seeds[0])
    settings = SweepConfig(seeds=flags.seeds, max_concurrent=flags.max_concurrent, **how)
    if points is None and settings.search == "grid":
        points = grid(space)
    results = sweep(
        config,
        space,
        settings,
        folder,
        points,
        flags.store,
        sinks=[HParams(folder)],
        sinks_for=trial_sinks,
    )
    return asked_for(results, points)


def asked_for(results: SweepResults, points: Sequence[Params] | None) -> SweepResults:
    """Leave out rows of other flags from a sweep's folder.

    Args:
        results: All that it holds, and the seeds that were asked for.
        points: Settings of a grid; None means that the search chose them.
    """
    asked = None if points is None else {setting_name(point) for point in points}
    rows = [row for row in results.rows if row.seed in results.seeds]
    return with_rows(results, [row for row in rows if asked is None or row.setting in asked])


def slug(name: str) -> str:
    """Return the name of a row or model as that of a folder."""
    return name.replace(",", "").replace(" ", "-").lower()


SETTINGS_FILE = "made_by.json"


def claim(root: Path, config: RunConfig) -> None:
    """Reserve a folder for one set of settings, and record the commit that it was started with.

    Raises:
        StorageError: It holds results of other settings.
    """
    path = root / SETTINGS_FILE
    if not exists(path):
        write_json(path, {"commit": commit(), "settings": to_json(with_absolute_paths(config))})
        return
    try:
        before = from_json(read_json(path)["settings"])
    except ConfigError as error:
        raise StorageError(
            f"{display_path(root)} is of another version: {error} Choose another --storage."
        ) from error
    if changed := differences(before, config):
        raise StorageError(
            f"{display_path(root)} has results of other settings: {'; '.join(changed)}. Use the "
            "same flags to go on, or another --storage."
        )


def refuse_auto(config: RunConfig) -> None:
    """Refuse a precision that only a run can settle.

    Raises:
        ConfigError: A stage's precision is auto.
    """
    for stage in (config.base, config.prune, config.finetune):
        if stage.precision == "auto":
            raise ConfigError(
                "precision must be fp32, bf16 or fp16 for this experiment, got auto: the preset "
                "leaves it to a run to find out. Set --precision."
            )


def commits_of(folder: Path) -> set[str | None]:
    """Return the commits that an experiment's folders were started with."""
    return {read_json(path)["commit"] for path in listing(folder, f"**/{SETTINGS_FILE}")}


@contextmanager
def workers(config: RunConfig, folder: Path, store: Path) -> Iterator[Pool]:
    """Start or join a Ray cluster and yield a pool of its actors; the folder is held meanwhile.

    Latents that the settings need are computed first, where they are missing.

    Args:
        config: The settings.
        folder: The experiment's folder.
        store: What is shared with other runs.
    """
    refuse_auto(config)
    with (
        hold_lease(folder),
        connected(),
        collecting(default_sinks(RunDir(folder.resolve()), Console())) as events,
        CacheSession(ResultCache(store.resolve(), display_path(folder.resolve()))) as session,
        Pool(config.compute, events, session=session, services=services_of(config)) as pool,
    ):
        pool.run(
            {"latents": prepare_latents(training_data(config.data, config.evaluate.cache_dir))}
        )
        yield pool


def trained_base(
    config: RunConfig, folder: Path, store: Path, shorter: Path | None = None
) -> Path:
    """Train a base, unless it is finished; return the folder of its UNet.

    Args:
        config: The settings; only those that decide stage 1 matter.
        folder: The experiment's folder for this base.
        store: What is shared with other runs.
        shorter: That of a base of fewer steps and else the same settings: at a constant learning
            rate its training goes on, which gives what all steps at once would give.
    """
    run_dir = RunDir(folder.resolve())
    stage_1 = ("preset", "seed", "data", "model", "conditioning", "diffusion", "base")
    check(config)
    refuse_auto(config)
    sampler = SamplerConfig(clip_sample=config.data.first_stage is None)  # as latents demand
    deciding = {name: getattr(config, name) for name in stage_1}
    claim(run_dir.root, RunConfig(**deciding, sampler=sampler))
    if not exists(run_dir.base_result):
        with (
            hold_lease(run_dir.root),
            connected(),
            collecting(default_sinks(run_dir, Console())) as events,
            CacheSession(ResultCache(store.resolve(), display_path(run_dir.root))) as session,
        ):
            if shorter is not None and config.base.lr_schedule == "constant":
                continue_training(RunDir(shorter.resolve()), run_dir, store.resolve())
            training = training_data(config.data, config.evaluate.cache_dir)
            with Pool(config.compute, events) as encoders:  # whose actors end before the training
                encoders.run({"latents": prepare_latents(training)})
            make_base(run_dir, config, None, events, session)
    return run_dir.base_unet


def continue_training(shorter: RunDir, run_dir: RunDir, store: Path) -> None:
    """Give a base's training the checkpoints of a shorter one's, unless it has begun."""
    state = last_checkpoint(shorter, ResultCache(store, display_path(run_dir.root)))
    if state is None or exists(run_dir.base_training):
        return
    if is_remote(run_dir.root) or is_remote(state):  # copying them may take longer than training
        return
    # Ray Train's folder: its list of checkpoints names them relative to it.
    part = run_dir.base_training.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(state.parent.parent, part)
    part.rename(run_dir.base_training)


def base_folder(flags: Flags, seed: int) -> Path:
    """Return the folder of the run that trains a seed's base."""
    size = "" if flags.steps_share == 1 else f"-{flags.steps_share:g}"
    return flags.storage / f"base-{flags.variant}{size}" / f"seed-{seed}"


def base_of(flags: Flags, seed: int, shorter: Path | None = None) -> Path:
    """Return the folder of the UNet that is a seed's base in all experiments of a storage."""
    return trained_base(flags.config(seed), base_folder(flags, seed), flags.store, shorter)


def run_once(config: RunConfig, folder: Path, store: Path) -> Results:
    """Run or resume one run, or read the results of a finished one.

    Args:
        config: Its settings.
        folder: Its directory.
        store: What it shares with other runs.
    """
    return run(config, folder, Console(), store)
