"""``tdc_ray.prune`` and ``tdc_ray.finetune``: experts of a base, made here or on a cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tdc_ray.cli.api.base import Base
from tdc_ray.cli.api.experts import Experts
from tdc_ray.cli.api.folder import TemporaryFolder
from tdc_ray.cli.names import nearest
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.run import RunConfig, digest, with_absolute_paths, with_data
from tdc_ray.config.train import FinetuneConfig
from tdc_ray.config.validation import errors_together, refuse, require
from tdc_ray.data.images import images_config
from tdc_ray.data.load import current_fingerprint, with_commit
from tdc_ray.diffusion.plan import AFTER_STAGE_1, Plan
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.errors import ConfigError
from tdc_ray.execution.events import EventSink
from tdc_ray.models.saved_expert import SavedExpert
from tdc_ray.models.units import KeptIndices, kept_digest
from tdc_ray.reporting.bars import Bars
from tdc_ray.runs.make_experts import MadeExperts, finetune_pruned, prune_to_plan
from tdc_ray.runs.stages.base_samples import with_base_samples
from tdc_ray.runs.workers import workers
from tdc_ray.storage.digest import cached_file_digest, json_digest
from tdc_ray.storage.files import fetch
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.run_dir import RunDir

Stage = TypeVar("Stage", PruneConfig, FinetuneConfig)

SNR_TOLERANCE_DB = 0.01
"""By how much the float32 betas of schedulers may move a plan's signal-to-noise ratios."""


def prune(
    base: Base,
    plan: Plan,
    images: Any,
    *,
    seed: int | None = None,
    folder: str | Path | None = None,
    cluster: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Experts:
    """Prune a base to the limit of every group of a plan, and refit it, without a gradient step.

    The results are those of ``tdc-ray run --base ... --finetune.num-steps 0`` with these settings.

    Args:
        base: The base, of :func:`tdc_ray.load_base`.
        plan: The groups, of ``tdc_ray.plan_groups(base.scheduler, ...)``.
        images: What the base denoises: a tensor, an array, a data set, or :class:`tdc_ray.Images`
            of these, which must have the base's size; or a path, whose images are brought to it,
            or the name of a bundled source; or ``"base"``: they are drawn from the base.
        seed: Of everything random; None means the base's settings'.
        folder: Where measurements and experts go: the same call resumes there after an
            interruption. None means a temporary folder, which goes with what is returned.
        cluster: Address of a Ray cluster, ``auto`` for the one that runs here, or ``local`` to
            start one. None means this process, without Ray.
        progress: Whether bars are shown.
        settings: Fields of ``config.prune.PruneConfig``, such as ``method="taylor"``; the others
            are the base's settings'.

    Raises:
        TdcError: Something went wrong; raised before work starts wherever that can be known.
    """
    _check_plan(plan, base)
    pruning = _changed("prune", base.config.prune, {"halving_steps": 0} | settings)
    rule = "0 for tdc_ray.prune, which takes no gradient step"
    require("prune", pruning, "halving_steps", rule, ok=not pruning.halving_steps)
    measured = AFTER_STAGE_1 in plan.notes
    config = replace(
        base.config,
        seed=base.config.seed if seed is None else seed,
        prune=pruning,
        plan=PlanConfig(num_groups=len(plan.groups), schedule="measured" if measured else "snr"),
        finetune=replace(base.config.finetune, num_steps=0),
    )
    root, temporary = _root(folder)
    config = _with_images(config, images, base, root)
    run_dir = _run_dir(root, "prune", config, base, plan, [])
    made = prune_to_plan(
        run_dir,
        config,
        base.pretrained,
        plan,
        workers(config, _sinks(progress=progress), cluster, _only_here(temporary)),
    )
    return _experts(base, made, run_dir, temporary)


def finetune(
    experts: Experts,
    images: Any,
    *,
    num_steps: int,
    folder: str | Path | None = None,
    cluster: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Experts:
    """Fine-tune pruned experts, each on its own timesteps.

    The results are those of ``tdc-ray run --base ...`` with these settings and those of pruning.

    Args:
        experts: The experts, of :func:`tdc_ray.prune`; they stay as they are.
        images: As for :func:`tdc_ray.prune`.
        num_steps: Optimizer steps of each expert, or on average, as ``allocation`` says.
        folder: As for :func:`tdc_ray.prune`.
        cluster: As for :func:`tdc_ray.prune`.
        progress: Whether bars are shown.
        settings: Fields of ``config.train.FinetuneConfig``, such as ``learning_rate=1e-4``; the
            others are the base's settings'.

    Raises:
        TdcError: Something went wrong; raised before work starts wherever that can be known.
    """
    if steps := max(group.train_steps or 0 for group in experts.groups):
        raise ConfigError(
            f"experts must be those of tdc_ray.prune, got some of {steps} fine-tune steps: give "
            "the pruned ones with more num_steps."
        )
    base = experts.base
    train = _changed("finetune", experts.config.finetune, settings | {"num_steps": num_steps})
    require("finetune", train, "num_steps", "at least 1", ok=num_steps > 0)
    root, temporary = _root(folder)
    config = _with_images(replace(experts.config, finetune=train), images, base, root)
    saved = [SavedExpert.load(fetch(place)) for place in experts.folders]
    kept = [one.kept for one in saved]
    run_dir = _run_dir(root, "finetune", config, base, experts.plan, kept)
    made = finetune_pruned(
        run_dir,
        config,
        base.pretrained,
        experts.plan,
        list(zip(experts.groups, kept, strict=True)),
        workers(config, _sinks(progress=progress), cluster, _only_here(temporary)),
    )
    return _experts(base, made, run_dir, temporary)


def _changed(stage: str, config: Stage, changes: Mapping[str, Any]) -> Stage:
    """Return a stage's settings with others.

    Raises:
        ConfigError: There is no such setting, or it is out of its range.
    """
    known = [field.name for field in fields(config)]
    with errors_together():
        for name in changes:
            if name not in known:
                near = nearest(stage, name, known)
                hint = f"did you mean {near}? " if near else ""
                refuse(f"there is no setting {stage}.{name}: {hint}Settings: {', '.join(known)}.")
    return replace(config, **changes)


def _check_plan(plan: Plan, base: Base) -> None:
    """Refuse a plan of another noise process."""
    snr_db = NoiseProcess.of(base.config.diffusion).snr_db
    if plan.num_train_timesteps != len(snr_db) or not np.allclose(
        [group.snr_db_first for group in plan.groups],
        snr_db[[group.first for group in plan.groups]],
        rtol=0,
        atol=SNR_TOLERANCE_DB,
    ):
        raise ConfigError(
            f"plan must be of the noise process of {base.pretrained.source}, got one of "
            f"{plan.num_train_timesteps} timesteps from {plan.groups[0].snr_db_first:.2f} dB: use "
            "tdc_ray.plan_groups(base.scheduler, ...)."
        )


def _root(folder: str | Path | None) -> tuple[Path, TemporaryFolder | None]:
    """Return where work goes, and what holds it if it is temporary."""
    if folder is not None:
        return resolve_path(folder).resolve(), None
    temporary = TemporaryFolder()
    return temporary.path, temporary


def _only_here(temporary: TemporaryFolder | None) -> Path | None:
    """Return a folder of this machine alone."""
    return None if temporary is None else temporary.path


def _with_images(config: RunConfig, images: Any, base: Base, root: Path) -> RunConfig:
    classes = config.conditioning.num_classes is not None
    data = images_config(images, config.data, root / "images", classes=classes)
    config = with_absolute_paths(with_data(config, with_commit(data, config.data.path)))
    return with_base_samples(config, base.pretrained)


def _run_dir(
    root: Path,
    job: str,
    config: RunConfig,
    base: Base,
    plan: Plan,
    kept: Sequence[KeptIndices],
) -> RunDir:
    """Return a folder below the root, named by all that a job's results follow from."""
    weights = [cached_file_digest(fetch(path)) for path in base.pretrained.files]
    # In a notebook, files may have changed since a call before.
    images = current_fingerprint(config.data)
    pruned = [kept_digest(one) for one in kept]
    document = [digest(config), images, weights, asdict(plan), pruned]
    return RunDir(root / f"{job}-{json_digest(document)[:8]}")


def _sinks(*, progress: bool) -> Sequence[EventSink]:
    return (Bars(),) if progress else ()


def _experts(
    base: Base, made: MadeExperts, run_dir: RunDir, temporary: TemporaryFolder | None
) -> Experts:
    return Experts(base, made.plan, made.groups, made.config, run_dir.experts, temporary)
