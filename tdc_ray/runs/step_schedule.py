"""Chooses which network runs at which sampling step within a budget: ``tdc-ray schedule``.

The choice is by losses on one half of the held-out images and noise; what is reported of it is
measured on the other half and other noise.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdc_ray.config.run import RunConfig, from_json
from tdc_ray.data.batches import fixed_batches, held_out_split, to_minus_one_one
from tdc_ray.data.latents import TrainingData, prepare_latents, training_data
from tdc_ray.diffusion.pipeline_index import PipelineIndex
from tdc_ray.diffusion.plan import one_group
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule, noise_schedule
from tdc_ray.diffusion.samplers import sampling_timesteps
from tdc_ray.diffusion.schedule import FloatArray, NoiseProcess
from tdc_ray.diffusion.step_schedule import (
    BoolArray,
    choose_networks,
    entries_of,
    step_weights,
    stitched,
)
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.execution.chain import run_chain
from tdc_ray.execution.device import worker_device
from tdc_ray.models.denoiser import Denoiser, has_classes
from tdc_ray.models.families import load_config, load_network
from tdc_ray.models.forward import max_batch_size
from tdc_ray.models.macs import macs_polynomials
from tdc_ray.models.saved_expert import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    SavedExpert,
    load_expert,
    save_expert,
)
from tdc_ray.models.structure import network_structure, units_for
from tdc_ray.models.units import keep_everything, widths_of
from tdc_ray.runs.evaluation.evaluate import evaluate, prepare_features, score
from tdc_ray.runs.evaluation.features import choose_features
from tdc_ray.runs.events import SinksFor, no_sinks
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.prune_model import prune_model
from tdc_ray.seeds import derive_seed
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
PRUNED_DIR = "pruned"
NARROWER = 0.75
"""Width of the sub-models that are made where none is named, as a share of the budget."""

Span = tuple[int, int]
"""First and last timestep, both included."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSpec:
    """What is asked for."""

    macs_share: float
    """Most macs of a step, on average, as a share of the base's, in (0, 1]."""

    widths: tuple[float, ...] | None = None
    """Macs of further sub-models of each group, as shares of the base's. None means one of
    :data:`NARROWER` times the budget where that is below what the run's experts take."""

    networks: tuple[Path, ...] = ()
    """Folders of further networks, as ``tdc-ray prune`` writes them."""

    num_images: int = 256
    """Noised images at each step by which networks are compared."""

    num_inference_steps: int | None = None
    """Sampling steps. None means as many as the run's."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network that may run at some sampling steps."""

    name: str
    folder: Path
    macs: int
    span: Span
    """Timesteps at which it may run."""

    serves: Span | None = None
    """Of an expert of the run, the timesteps of its group."""

    is_base: bool = False

    def load(self) -> Denoiser:
        """Load it, in eval mode, on this process's device."""
        network = load_network(self.folder) if self.is_base else load_expert(self.folder)
        return network.to(worker_device()).eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a schedule takes and costs, on images and noise that no choice has seen."""

    mean_macs: float
    """Of a sampling step."""

    mean_macs_share: float
    """The same as a share of the base's."""

    excess: float
    """Weighted sum over the steps of the squared error of epsilon, above the base's, as a share of
    the base's sum; below 0 is better than the base."""

    low: float
    """Of its 95 % interval, over images."""

    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepChoice:
    """What runs at one sampling step."""

    timestep: int
    network: str
    weight: float
    """What a squared error here is worth; all steps' add up to 1."""

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


@dataclass(frozen=True, eq=False, slots=True)
class _Problem:
    """What is chosen between: arrays of shape ``(S, K)``, steps from the noisiest on."""

    networks: Sequence[Network]
    """K of them, the base first."""

    timesteps: Sequence[int]
    """S sampled timesteps; one that a sampler visits twice is there once."""

    macs: FloatArray
    """What a network takes at a step, for all visits to it."""

    allowed: BoolArray
    """Whether it may run there."""

    visits: int
    """Sampling steps."""

    @property
    def macs_base(self) -> int:
        """Macs of one step by the base."""
        return self.networks[0].macs

    def mean_macs(self, choice: Sequence[int]) -> float:
        """Compute the mean macs of a sampling step."""
        return float(self.macs[np.arange(len(choice)), choice].sum()) / self.visits


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
    if spec.num_inference_steps is not None:
        sampler = replace(config.sampler, num_inference_steps=spec.num_inference_steps)
        config = replace(config, sampler=sampler)
    with hold_lease(out):
        networks = _networks(run_dir, config, spec, out, sinks_for)
        problem = _problem(config, networks)
        budget = spec.macs_share * problem.macs_base * problem.visits
        _check_budget(problem, spec.macs_share)
        data = training_data(config.data, config.evaluate.cache_dir)
        run_chain(prepare_latents(data))
        x_0, _ = _noisy_images(config, data, 0, spec.num_images)
        weights = _weights(config, problem, float(x_0.var(0).mean()))
        errors = _squared_errors(config, data, problem, problem.allowed, 0, spec.num_images)
        losses = errors.mean(2)
        excess = weights[:, None] * (losses - losses[:, :1])
        choice = choose_networks(np.where(problem.allowed, excess, np.inf), problem.macs, budget)
        schedules = [
            choice,
            _own_choice(problem, networks),
            stitched(problem.allowed, problem.macs, budget),
        ]
        logger.info("judging by other images and noise")
        wanted = np.zeros_like(problem.allowed)
        for one in ([0] * len(choice), *schedules):
            wanted[np.arange(len(choice)), one] = True
        errors = _squared_errors(config, data, problem, wanted, 1, spec.num_images)
        chosen, experts, stitch = (
            _judge(errors, weights, problem, schedule) for schedule in schedules
        )
        _write_pipeline(run_dir, config, problem, choice, out)
        result = StepSchedule(
            run=display_path(run),
            macs_base=problem.macs_base,
            macs_share=spec.macs_share,
            num_images=spec.num_images,
            networks={network.name: network.macs for network in networks},
            steps=tuple(
                StepChoice(
                    timestep=timestep,
                    network=networks[choice[place]].name,
                    weight=float(weights[place] / weights.sum()),
                    loss=float(losses[place, choice[place]]),
                    loss_base=float(losses[place, 0]),
                )
                for place, timestep in enumerate(problem.timesteps)
            ),
            chosen=chosen,
            experts=experts,
            stitched=stitch,
        )
        write_json(out / REPORT_FILE, asdict(result))
        if with_score:
            metric, value = _score(run_dir, config, out, chosen.mean_macs)
            result = replace(result, metric=metric, score=value)
            write_json(out / REPORT_FILE, asdict(result))
    return result


def _networks(
    run_dir: RunDir, config: RunConfig, spec: ScheduleSpec, out: Path, sinks_for: SinksFor
) -> list[Network]:
    """Return all networks that may run: base, experts, what is pruned here, and others.

    An expert, or a sub-model pruned for a group, may run in its group and in the groups beside it.

    Raises:
        ConfigError: Two have one name, or one does not take the run's images.
    """
    unet = load_config(run_dir.base_unet)
    last = config.diffusion.num_train_timesteps - 1
    base = Network(
        "base", run_dir.base_unet, network_structure(unet).macs, (0, last), is_base=True
    )
    index = PipelineIndex.load(run_dir.experts)
    spans = [(max(0, i - 1), min(i + 1, len(index.spans) - 1)) for i in range(len(index.spans))]
    near = [(index.spans[first][0], index.spans[end][1]) for first, end in spans]
    networks = [base]
    for expert, span in zip(index.experts, near, strict=True):
        folder = run_dir.experts / expert.folder
        serves = (expert.first, expert.last)
        networks.append(Network(expert.folder, folder, _macs_of(folder), span, serves))
    widths = spec.widths
    if widths is None:
        problem = _problem(config, networks)
        own = problem.mean_macs(_own_choice(problem, networks))
        below = spec.macs_share * base.macs < own
        widths = (NARROWER * spec.macs_share,) if below else ()
    prune = replace(config.prune, halving_steps=0, objective="macs")
    if prune.method == "none":
        prune = replace(prune, method="offline")
    for width in widths:
        for number, (expert, span) in enumerate(zip(index.experts, near, strict=True)):
            name = f"pruned-{number:02d}-{width:.3g}"
            group = one_group(config.diffusion, config.sampler, (expert.first, expert.last), width)
            logger.info("%s: the base pruned for t %d to %d", name, expert.first, expert.last)
            folder = out / PRUNED_DIR / name
            prune_model(
                run_dir.base_unet, replace(config, prune=prune), group, folder, None, sinks_for
            )
            networks.append(Network(name, folder, _macs_of(folder), span))
    for path in spec.networks:
        folder = resolve_path(path).resolve()
        _check_shape(folder, unet)
        networks.append(Network(folder.name, folder, _macs_of(folder), (0, last)))
    names = [network.name for network in networks]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"--networks must be folders of different names, other than the run's own, got "
            f"{', '.join(names)}. Rename one."
        )
    return networks


def _check_shape(folder: Path, base: Mapping[str, object]) -> None:
    """Refuse a network that does not take what the run's networks take.

    Raises:
        ConfigError: It does not.
    """
    if not exists(folder / CONFIG_FILE):
        raise ConfigError(
            f"--networks must be folders that tdc-ray prune wrote, or of experts, got "
            f"{display_path(folder)}."
        )
    unet = SavedExpert.load(folder).unet
    for key in ("sample_size", "in_channels", "out_channels", "num_class_embeds"):
        if unet.get(key) != base.get(key):
            raise ConfigError(
                f"--networks {display_path(folder)} must have the run's {key} {base.get(key)}, "
                f"got {unet.get(key)}."
            )


def _macs_of(folder: Path) -> int:
    saved = SavedExpert.load(folder)
    layers = network_structure(saved.unet).layers
    _, macs = macs_polynomials(list(layers), units_for(saved.unet, saved.kept))
    return macs.total(widths_of(saved.kept))


def _problem(config: RunConfig, networks: Sequence[Network]) -> _Problem:
    visited = sampling_timesteps(config.diffusion.num_train_timesteps, config.sampler)
    timesteps = list(dict.fromkeys(visited))
    visits = np.array([visited.count(timestep) for timestep in timesteps])
    spans = np.array([network.span for network in networks])  # (K, 2)
    at = np.array(timesteps)[:, None]  # (S, 1)
    macs = np.array([network.macs for network in networks], dtype=np.float64)
    allowed = (spans[:, 0] <= at) & (at <= spans[:, 1])
    return _Problem(networks, timesteps, visits[:, None] * macs, allowed, len(visited))


def _weights(config: RunConfig, problem: _Problem, data_variance: float) -> FloatArray:
    """Return what a squared error is worth at every step, all visits to it together: ``(S,)``."""
    visited = sampling_timesteps(config.diffusion.num_train_timesteps, config.sampler)
    alphas_cumprod = NoiseProcess.of(config.diffusion).alphas_cumprod
    by_visit = step_weights(alphas_cumprod, visited, data_variance)
    return np.array([by_visit[np.equal(visited, t)].sum() for t in problem.timesteps])


def _check_budget(problem: _Problem, share: float) -> None:
    """Refuse a budget that the cheapest network of every step exceeds.

    Raises:
        ConfigError: It does.
    """
    cheapest = np.where(problem.allowed, problem.macs, np.inf).argmin(1)
    least = problem.mean_macs(cheapest.tolist()) / problem.macs_base
    if least > share * (1 + 1e-9):
        raise ConfigError(
            f"--macs must be at least {least:.4f}, which the cheapest network of every step "
            f"takes, got {share}. Raise it, or name narrower ones by --widths."
        )


def _own_choice(problem: _Problem, networks: Sequence[Network]) -> list[int]:
    """Return the run's own schedule: of each step the expert of its group."""
    groups = {place: one.serves for place, one in enumerate(networks) if one.serves}
    return [
        next(place for place, (first, last) in groups.items() if first <= timestep <= last)
        for timestep in problem.timesteps
    ]


def _noisy_images(
    config: RunConfig, data: TrainingData, half: int, num_images: int
) -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1] of one half of those that are held out, and their classes."""
    dataset = data.open()
    _, held_out = held_out_split(dataset, config.prune.held_out_share, config.seed)
    middle = (len(held_out) + 1) // 2
    indices = (held_out[:middle], held_out[middle:] or held_out)[half]
    seed = derive_seed(config.seed, "schedule", half)
    (batch,) = fixed_batches(dataset, num_images, num_images, seed, indices=indices)
    return to_minus_one_one(batch.images), batch.labels


@torch.inference_mode()
def _squared_errors(
    config: RunConfig,
    data: TrainingData,
    problem: _Problem,
    wanted: BoolArray,
    half: int,
    num_images: int,
) -> FloatArray:
    """Measure networks at steps: the squared error of the prediction, of every image.

    All networks see the same images and, at a step, the same noise.

    Args:
        config: The run's settings.
        data: What its networks were trained on.
        problem: Networks and steps.
        wanted: ``(S, K)``: what is measured.
        half: Of the held-out images.
        num_images: Noised images at each step.

    Returns:
        ``(S, K, num_images)``; no number where nothing was measured.
    """
    schedule = noise_schedule(config.diffusion)
    x_0, labels = _noisy_images(config, data, half, num_images)
    errors = np.full((*wanted.shape, num_images), np.nan)
    for place, network in enumerate(problem.networks):
        if not wanted[:, place].any():
            continue
        logger.info("measuring %s at %d steps", network.name, wanted[:, place].sum())
        loaded = network.load()
        for step in np.flatnonzero(wanted[:, place]).tolist():
            timestep = problem.timesteps[step]
            generator = torch.Generator().manual_seed(
                derive_seed(config.seed, "schedule", half, timestep)
            )
            batch = NoisedBatch(
                x_0,
                torch.randn(x_0.shape, generator=generator),
                torch.full((num_images,), timestep),
                labels if has_classes(loaded) else None,
            )
            errors[step, place] = _errors_of(loaded, batch, schedule)
    return errors


def _errors_of(network: Denoiser, batch: NoisedBatch, schedule: NoiseSchedule) -> FloatArray:
    """Compute the mean squared error of the prediction for every image of a batch: ``(B,)``."""
    schedule = schedule.to(network.device)
    errors = []
    for part in batch.split(max_batch_size(network)):
        moved = part.to(network.device)
        target = moved.target(schedule)
        predicted = moved.predict(network, schedule)[:, : target.shape[1]]
        errors.append((predicted.float() - target).square().mean((1, 2, 3)).double().cpu())
    return torch.cat(errors).numpy()


def _judge(
    errors: FloatArray, weights: FloatArray, problem: _Problem, choice: Sequence[int]
) -> Judgement:
    """Hold a schedule against the base by errors ``(S, K, M)`` that it was not chosen by."""
    steps = np.arange(len(choice))
    differences = weights @ (errors[steps, choice] - errors[:, 0])  # (M,)
    whole = float(weights @ errors[:, 0].mean(1))
    mean = float(differences.mean()) / whole
    half_width = 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5 / whole
    macs = problem.mean_macs(choice)
    return Judgement(
        mean_macs=macs,
        mean_macs_share=macs / problem.macs_base,
        excess=mean,
        low=mean - half_width,
        high=mean + half_width,
    )


def _write_pipeline(
    run_dir: RunDir, config: RunConfig, problem: _Problem, choice: Sequence[int], out: Path
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
        last = config.diffusion.num_train_timesteps
        entries = entries_of(problem.timesteps, names, last)
        pipeline_index(config).model_copy(update={"experts": entries}).save(folder)


def _score(run_dir: RunDir, config: RunConfig, out: Path, macs: float) -> tuple[str, float]:
    """Score the pipeline as the run's models were: from the same noise, on the same features."""
    scored = RunDir(out)
    remove(scored.samples)  # of another choice
    write_json(scored.features, read_json(run_dir.features))
    spec = choose_features(config.data, config.evaluate, scored.features)
    run_chain(prepare_features(scored, config.data, config.evaluate, spec))
    shards = [run_chain(chain) for chain in evaluate(scored, config, spec, "tdc", macs).values()]
    return spec.metric, score(scored, shards).score
