"""Chooses which network runs at which sampling step within a budget: ``tdc-ray schedule``.

The choice is by losses on one half of the held-out images and noise; what is reported of it is
measured on the other half and other noise.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tdc_ray.config.run import RunConfig, from_json
from tdc_ray.data.latents import prepare_latents, training_data
from tdc_ray.diffusion.step_schedule import entries_of
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.execution.chain import run_chain
from tdc_ray.models.families import load_config, load_network
from tdc_ray.models.saved_expert import CONFIG_FILE, WEIGHTS_FILE, save_expert
from tdc_ray.models.structure import network_structure
from tdc_ray.models.units import keep_everything
from tdc_ray.runs.evaluation.evaluate import evaluate, prepare_features, score
from tdc_ray.runs.evaluation.features import FeatureSpec, find_features
from tdc_ray.runs.events import SinksFor, no_sinks
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.step_schedule.measure import Judgement, MeasuredSteps, judge, measure_steps
from tdc_ray.runs.step_schedule.networks import (
    PRUNED_DIR,
    Problem,
    ScheduleSpec,
    networks_of,
    own_choice,
    problem_of,
)
from tdc_ray.storage.files import (
    atomic_path,
    exists,
    fetch,
    listing,
    read_json,
    remove,
    write_json,
)
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import RunDir

REPORT_FILE = "schedule.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepChoice:
    """What runs at one sampling step."""

    timestep: int
    network: str
    loss: float
    """Of the network, by which it was chosen: the mean squared error of epsilon."""

    loss_base: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSchedule:
    """The schedule that was chosen, and what it is held against."""

    run: str
    macs_base: int
    macs_share: float
    """The budget."""

    num_images: int
    """Noised images at each step, by which networks were chosen, and as many by which schedules
    are judged."""

    networks: Mapping[str, int]
    """Macs of every network that there was to choose from."""

    steps: tuple[StepChoice, ...]
    """From the noisiest on."""

    chosen: Judgement
    experts: Judgement
    """The run's own: each step by the expert of its group."""

    stitched: Judgement
    """Of the same budget: the cheapest networks at the noisiest steps, the dearest at the rest."""

    metric: str | None = None
    score: float | None = None
    """Of as many images as the run's own scores are of, from the same noise. None means that none
    was asked for."""


def schedule_run(
    run: Path,
    out: Path,
    spec: ScheduleSpec,
    *,
    with_score: bool = False,
    sinks_for: SinksFor = no_sinks,
) -> StepSchedule:
    """Choose which network of a run takes which sampling step, and write the pipeline.

    Args:
        run: A finished run.
        out: Where to: ``experts`` (``ProgressivePipeline.from_pretrained(out)`` loads it) and
            ``schedule.json``; a folder that an earlier call wrote is written anew.
        spec: What is asked for.
        with_score: Whether the pipeline is scored as the run's models were.
        sinks_for: Makes what takes the events of pruning.

    Returns:
        What is in ``schedule.json``.

    Raises:
        TdcError: Something went wrong; raised before work starts wherever that can be known.
    """
    run_dir, out = RunDir(resolve_path(run).resolve()), resolve_path(out).resolve()
    if not exists(run_dir.results):
        raise StorageError(f"{display_path(run)} is not finished: results.json is missing.")
    files = [path for path in listing(out, "*") if not path.name.startswith(".")]
    if files and not any(exists(out / name) for name in (REPORT_FILE, PRUNED_DIR)):
        raise ConfigError(
            f"--out must be a new folder, or one that tdc-ray schedule wrote before, got "
            f"{display_path(out)}, which is something else. Name another."
        )
    config = from_json(read_json(run_dir.config))
    if with_score:
        _features_of(run_dir, config)
    if spec.num_inference_steps is not None:
        sampler = replace(config.sampler, num_inference_steps=spec.num_inference_steps)
        config = replace(config, sampler=sampler)
    with hold_lease(out):
        problem = problem_of(config, networks_of(run_dir, config, spec, out, sinks_for))
        data = training_data(config.data, config.evaluate.cache_dir)
        run_chain(prepare_latents(data, config.sampler.negative_prompt))
        measured = measure_steps(config, data, problem, spec.num_images)
        choice = measured.choose(spec.macs_share)
        schedules = [choice, own_choice(problem), measured.stitch(spec.macs_share)]
        chosen, experts, stitch = judge(config, data, measured, schedules, spec.num_images)
        write_pipeline(run_dir, config, problem, choice, out)
        result = StepSchedule(
            run=display_path(run),
            macs_base=problem.macs_base,
            macs_share=spec.macs_share,
            num_images=spec.num_images,
            networks={network.name: network.macs for network in problem.networks},
            steps=_steps(measured, choice),
            chosen=chosen,
            experts=experts,
            stitched=stitch,
        )
        write_json(out / REPORT_FILE, asdict(result))
        if with_score:
            metric, value = score_pipeline(run_dir, config, out, chosen.mean_macs)
            result = replace(result, metric=metric, score=value)
            write_json(out / REPORT_FILE, asdict(result))
    return result


def _steps(measured: MeasuredSteps, choice: Sequence[int]) -> tuple[StepChoice, ...]:
    problem = measured.problem
    return tuple(
        StepChoice(
            timestep=timestep,
            network=problem.networks[choice[place]].name,
            loss=float(measured.losses[place, choice[place]]),
            loss_base=float(measured.losses[place, 0]),
        )
        for place, timestep in enumerate(problem.timesteps)
    )


def write_pipeline(
    run_dir: RunDir, config: RunConfig, problem: Problem, choice: Sequence[int], out: Path
) -> None:
    """Write the networks that are chosen, and the index by which they are a pipeline."""
    names = [problem.networks[place].name for place in choice]
    unet = load_config(run_dir.base_unet)
    with atomic_path(out / "experts") as folder:
        folder.mkdir()
        for place in sorted(set(choice)):
            network = problem.networks[place]
            if network.is_base:
                kept = keep_everything(network_structure(unet).units)
                save_expert(folder / network.name, load_network(network.folder), unet, kept)
                continue
            (folder / network.name).mkdir()
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(fetch(network.folder) / file, folder / network.name / file)
        last = config.diffusion.num_timesteps
        entries = entries_of(problem.timesteps, names, last)
        pipeline_index(config).model_copy(update={"experts": entries}).save(folder)


def _features_of(run_dir: RunDir, config: RunConfig) -> FeatureSpec:
    """Return the features of a run; raise where it has none."""
    return find_features(config.data, config.evaluate, read_json(run_dir.features)["features"])


def score_pipeline(
    run_dir: RunDir, config: RunConfig, out: Path, macs: float
) -> tuple[str, float]:
    """Score the pipeline as the run's models were: from the same noise, on the same features."""
    scored, spec = RunDir(out), _features_of(run_dir, config)
    remove(scored.samples)  # of another choice
    run_chain(prepare_features(scored, config.data, config.evaluate, spec))
    shards = [run_chain(chain) for chain in evaluate(scored, config, spec, "tdc", macs).values()]
    return spec.metric, score(scored, shards).score
