"""The networks between which is chosen, and the sampling steps at which each may run."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.pipeline_index import PipelineIndex
from tdc_ray.diffusion.plan import one_group
from tdc_ray.diffusion.samplers import checked_timesteps
from tdc_ray.diffusion.schedule import FloatArray, nearest_timesteps
from tdc_ray.diffusion.step_schedule import BoolArray
from tdc_ray.errors import ConfigError
from tdc_ray.execution.device import worker_device
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import load_config, load_network
from tdc_ray.models.finite import check_finite
from tdc_ray.models.macs import macs_polynomials
from tdc_ray.models.network_config import SHAPES, NetworkConfig
from tdc_ray.models.saved_expert import CONFIG_FILE, WEIGHTS_FILE, SavedExpert, load_expert
from tdc_ray.models.structure import network_structure, units_for
from tdc_ray.models.units import widths_of
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.events import SinksFor, no_sinks
from tdc_ray.runs.prune_model import prune_model
from tdc_ray.storage.files import exists
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import RunDir

logger = logging.getLogger(__name__)

PRUNED_DIR = "pruned"
NARROWER = 0.75
"""Width of the sub-models that are made where none is named, as a share of the budget."""

Span = tuple[int, int]
"""First and last timestep, both included."""


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


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """What is chosen between: arrays of shape ``(S, K)``, steps from the noisiest on."""

    networks: Sequence[Network]
    """K of them, the base first."""

    timesteps: Sequence[int]
    """S sampled timesteps, those of training that are nearest; one that a sampler visits twice is
    there once."""

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

    def budget(self, share: float) -> float:
        """Return the macs of all steps at a share of the base's."""
        return share * self.macs_base * self.visits


def networks_of(
    run_dir: RunDir,
    config: RunConfig,
    spec: ScheduleSpec,
    out: Path,
    sinks_for: SinksFor = no_sinks,
) -> list[Network]:
    """Return all networks that may run: base, experts, others that are named, what is pruned here.

    An expert, or a sub-model pruned for a group, may run in its group and in the groups beside it.

    Args:
        run_dir: A finished run.
        config: Its settings.
        spec: What is asked for.
        out: Where sub-models are pruned to; those that are there are not pruned again.
        sinks_for: Makes what takes the events of pruning.

    Raises:
        ConfigError: The budget is below what the networks take at least, two networks have one
            name, or one does not take the run's images; raised before anything is pruned.
    """
    unet = load_config(run_dir.base_unet)
    span = (0, config.diffusion.num_timesteps - 1)
    macs = network_structure(unet).macs
    networks = [Network("base", run_dir.base_unet, macs, span, is_base=True)]
    index = PipelineIndex.load(run_dir.experts)
    for expert, near in zip(index.experts, _with_neighbours(index.spans), strict=True):
        folder, serves = run_dir.experts / expert.folder, (expert.first, expert.last)
        networks.append(Network(expert.folder, folder, _macs_of(folder), near, serves))
    for path in spec.networks:
        folder = resolve_path(path).resolve()
        _check_shape(folder, unet)
        networks.append(Network(folder.name, folder, _macs_of(folder), span))
    names = [network.name for network in networks]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"--networks must be folders of different names, other than the run's own, got "
            f"{', '.join(names)}. Rename one."
        )
    wanted = _to_prune(config, spec, unet, networks, index.spans, out)
    at_limit = [
        replace(network, macs=math.floor(width * macs + 1e-6)) for network, width, _ in wanted
    ]
    _check_budget(problem_of(config, [*networks, *at_limit]), spec.macs_share)
    for network, width, serves in wanted:
        _prune(run_dir, config, network, serves, width, sinks_for)
        networks.append(replace(network, macs=_macs_of(network.folder)))
    return networks


def _with_neighbours(spans: Sequence[Span]) -> list[Span]:
    """Return of every range the one from the start of that before it to the end of that behind."""
    last = len(spans) - 1
    return [(spans[max(0, i - 1)][0], spans[min(last, i + 1)][1]) for i in range(len(spans))]


def _to_prune(
    config: RunConfig,
    spec: ScheduleSpec,
    unet: NetworkConfig,
    networks: Sequence[Network],
    spans: Sequence[Span],
    out: Path,
) -> list[tuple[Network, float, Span]]:
    """Return the sub-models that are to be pruned, each with its width and its timesteps.

    Raises:
        ConfigError: A width is less than is left when everything is pruned.
    """
    space = space_of(unet, config.prune.space, config.prune.channel_multiple)
    least = space.macs(space.smallest) / space.macs_base
    widths = spec.widths
    if widths is None:
        problem = problem_of(config, networks)
        own = problem.mean_macs(own_choice(problem)) / problem.macs_base
        narrower = max(NARROWER * spec.macs_share, least)
        widths = (narrower,) if spec.macs_share < own else ()
    if any(width < least for width in widths):
        raise ConfigError(
            f"--widths must be at least {least:.4f}, which is left when everything that can be "
            f"pruned is, got {min(widths)}."
        )
    found = []
    for width in widths:
        for group, near in enumerate(_with_neighbours(spans)):
            name = f"pruned-{group:02d}-{width:.3g}"
            network = Network(name, out / PRUNED_DIR / name, 0, near)
            found.append((network, width, spans[group]))
    return found


def _prune(
    run_dir: RunDir,
    config: RunConfig,
    network: Network,
    serves: Span,
    width: float,
    sinks_for: SinksFor,
) -> None:
    """Prune and refit the base for a group's timesteps, as ``tdc-ray prune`` does.

    By the run's method, but for a language model, in whose place the offline proxy is.
    """
    logger.info("%s: the base pruned for t %d to %d", network.name, *serves)
    prune = replace(config.prune, halving_steps=0, objective="macs")
    if prune.method in ("none", "llm"):  # a language model costs money that nobody asked to spend
        prune = replace(prune, method="offline")
    group = one_group(config.diffusion, config.sampler, serves, width)
    settings = replace(config, prune=prune)
    prune_model(run_dir.base_unet, settings, group, network.folder, None, sinks_for)


def _check_shape(folder: Path, base: Mapping[str, object]) -> None:
    """Refuse a network that does not take what the run's networks take.

    Raises:
        ConfigError: It does not.
        CheckpointError: Its weights are damaged, or no numbers.
    """
    if not exists(folder / CONFIG_FILE):
        raise ConfigError(
            f"--networks must be folders that tdc-ray prune wrote, or of experts, got "
            f"{display_path(folder)}."
        )
    unet = SavedExpert.load(folder).unet
    for key in SHAPES:
        if unet.get(key) != base.get(key):
            raise ConfigError(
                f"--networks {display_path(folder)} must have the run's {key} {base.get(key)}, "
                f"got {unet.get(key)}."
            )
    check_finite([folder / WEIGHTS_FILE])


def _macs_of(folder: Path) -> int:
    saved = SavedExpert.load(folder)
    layers = network_structure(saved.unet).layers
    _, macs = macs_polynomials(list(layers), units_for(saved.unet, saved.kept))
    return macs.total(widths_of(saved.kept))


def problem_of(config: RunConfig, networks: Sequence[Network]) -> Problem:
    """Lay out the networks over the steps of the settings' sampler."""
    visited = nearest_timesteps(checked_timesteps(config.diffusion, config.sampler))
    timesteps = sorted(set(visited), reverse=True)
    visits = np.array([visited.count(timestep) for timestep in timesteps])
    spans = np.array([network.span for network in networks])  # (K, 2)
    at = np.array(timesteps)[:, None]  # (S, 1)
    macs = np.array([network.macs for network in networks], dtype=np.float64)
    allowed = (spans[:, 0] <= at) & (at <= spans[:, 1])
    return Problem(networks, timesteps, visits[:, None] * macs, allowed, len(visited))


def _check_budget(problem: Problem, share: float) -> None:
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


def own_choice(problem: Problem) -> list[int]:
    """Return the run's own schedule: of each step the expert of its group."""
    groups = {place: one.serves for place, one in enumerate(problem.networks) if one.serves}
    return [
        next(place for place, (first, last) in groups.items() if first <= timestep <= last)
        for timestep in problem.timesteps
    ]
