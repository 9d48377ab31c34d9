"""Ways to spend the same macs as TDC, each a model to be scored: rows of ``equal_compute``."""

from dataclasses import dataclass, replace
from pathlib import Path

from stages import all_timesteps, untrained_like

from tdc_ray.config.compare import CompareConfig
from tdc_ray.config.model import ModelConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import FinetuneConfig
from tdc_ray.diffusion.train import start_state
from tdc_ray.execution.cache import ResultCache
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.models.families import family_of, load_config, load_network
from tdc_ray.models.saved_expert import save_expert
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.proxies.by_score import uniform_scheme
from tdc_ray.pruning.search import search_submodel
from tdc_ray.runs.pipelines import save_index
from tdc_ray.runs.results import Results
from tdc_ray.runs.stages.base import last_checkpoint
from tdc_ray.runs.stages.expert import make_expert
from tdc_ray.runs.stages.finetune import short_finetune_item
from tdc_ray.runs.stages.longer_base import LongerBaseJob, longer_base_item
from tdc_ray.storage.files import exists
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Budget:
    """What TDC's run took, and so what every other row may take."""

    stage_1: float
    """Macs of the base's training."""

    beyond: float
    """Macs of all else: fine-tunes and search."""

    search: float
    macs: int
    """Of the base, for one image."""

    macs_share: float
    """TDC's macs for one image over the base's."""

    @classmethod
    def of(cls, tdc: Results) -> "Budget":
        """Create it from a finished run."""
        base, search = tdc.base, tdc.prune.search_macs
        beyond = tdc.tdc.train_macs + search - base.train_macs
        return cls(base.train_macs, beyond, search, int(base.macs), tdc.tdc.macs / base.macs)


@dataclass(frozen=True, slots=True)
class Network:
    """One network that serves all timesteps."""

    run_dir: RunDir
    """Its expert of index 0 is it."""

    macs: int
    num_params: int
    train_macs: float
    search_macs: float


def steps_of(macs: float, macs_each: float, batch_size: int) -> int:
    """Return the steps that so many macs pay for."""
    return max(0, round(macs / (3.0 * macs_each * batch_size)))


def without_pruning(config: RunConfig, budget: Budget, num_groups: int) -> RunConfig:
    """Return the settings of TDC without pruning whose fine-tunes take all of the budget."""
    finetune = config.finetune
    steps = steps_of(budget.beyond, num_groups * budget.macs, finetune.batch_size)
    allocation = "equal" if finetune.allocation == "excess" else finetune.allocation
    return replace(
        config,
        prune=replace(config.prune, method="none", objective="macs"),
        finetune=replace(finetune, num_steps=steps, allocation=allocation),
        compare=CompareConfig(),
    )


def training_free(config: RunConfig, base: Path) -> RunConfig:
    """Return the settings of TDC without a gradient step, from a base that is trained already."""
    return replace(
        config,
        model=ModelConfig(base=str(base)),
        prune=replace(config.prune, held_out_of_base=False),
        finetune=replace(config.finetune, num_steps=0, optimizer_state="new"),
        compare=CompareConfig(),
    )


def base_for_training_free(
    config: RunConfig, budget: Budget, tdc: RunDir, root: Path, store: Path
) -> Chain[Path]:
    """Train TDC's base on by what its search leaves of the budget; return where it is."""
    cache = ResultCache(store.resolve(), display_path(root))
    steps = steps_of(budget.beyond - budget.search, budget.macs, config.base.batch_size)
    job = LongerBaseJob(RunDir(root, tdc.base_unet), config, steps, last_checkpoint(tdc, cache))
    yield from result_of(longer_base_item(job))
    return job.run_dir.longer_base


def pruned_for_all(config: RunConfig, budget: Budget, base: Path, root: Path) -> Chain[Network]:
    """Prune one network for all timesteps without a refit, and fine-tune it.

    By Taylor scores: Diff-Pruning's own, taken at many timesteps, cost more macs than there are.
    """
    prune = replace(config.prune, method="taylor", refit="none", objective="macs")
    config = replace(config, prune=prune)
    search = all_timesteps(config, base, root, budget.macs_share)
    memory, train = MemoryBank(search.context.run_dir.memory), config.finetune
    found = yield from search_submodel(search, memory)
    left, each = budget.beyond - found.cost.macs, search.space.macs(found.widths)
    train = replace(train, num_steps=steps_of(left, each, train.batch_size))
    expert = yield from make_expert(search, memory, train, config.compute)
    save_index(search.context.run_dir, config, [search.group])
    return Network(
        search.context.run_dir,
        expert.macs,
        expert.num_params,
        budget.stage_1 + expert.train_macs,
        expert.search_result.cost.macs,
    )


def from_scratch(config: RunConfig, budget: Budget, base: Path, root: Path) -> Chain[Network]:
    """Train a network of TDC's macs from random weights: every unit narrower by the same share.

    It sees the images of stage 1 for as many macs as that takes, then those that fine-tunes see.
    """
    config = replace(config, prune=replace(config.prune, refit="none"))
    untrained = untrained_like(base, root / "untrained" / "unet", config.seed)
    search = all_timesteps(config, untrained, root, budget.macs_share)
    space, run_dir = search.space, search.context.run_dir
    train = FinetuneConfig.of(config.base)
    ones = {unit.name: [1.0] * unit.width for unit in space.units}
    widths = uniform_scheme(space, search.limit, ones)
    kept = {name: tuple(range(width)) for name, width in widths.items()}
    first, last = (
        replace(train, num_steps=steps_of(macs, space.macs(widths), train.batch_size))
        for macs in (budget.stage_1, budget.stage_1 + budget.beyond)
    )
    # The learning rate falls where that of the base trained on does.
    last = replace(last, num_warmup_steps=first.num_steps, lr_schedule=config.finetune.lr_schedule)
    as_base = search
    if not search.context.prune.held_out_of_base:  # no image but one is held out, as in stage 1
        prune = replace(search.context.prune, held_out_share=1e-9)
        as_base = replace(search, context=replace(search.context, prune=prune))
    parts = [
        short_finetune_item(as_base, "scratch", kept, first, config.compute),
        short_finetune_item(search, "scratch", kept, last, config.compute, first.num_steps),
    ]
    spent = 0.0
    for part in parts:
        spent += (yield from result_of(part)).macs
    folder = run_dir.expert(search.group.index)
    if not exists(folder):
        network = load_network(untrained)
        state = start_state(family_of(network).cut(network, space.units, kept), last)
        state.load(parts[-1].job.checkpoint)
        with state.ema_weights() as averaged:
            save_expert(folder, averaged, load_config(untrained), kept)
    save_index(run_dir, config, [search.group])
    return Network(run_dir, space.macs(widths), space.num_params(widths), spent, 0.0)
