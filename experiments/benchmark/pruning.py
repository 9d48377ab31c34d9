"""Pruning: candidates and sensitivities measured, schemes counted and fitted to limits."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning
from diffusers import UNet2DModel
from torch import Tensor, nn

from benchmark.peers import plain_loss
from benchmark.timing import Row, SpeedFlags, compared, random_scheme
from tdc_ray.config.data import DataConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import Precision
from tdc_ray.diffusion.plan import TimestepGroup, plan_groups
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.models.families import build_network, family_of
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.architectures import architecture, base_unet
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.models.units import KeptIndices, SpaceKind, keep_everything
from tdc_ray.pruning.criteria.random import random_scores
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.knapsack import loss_curves, step_worth
from tdc_ray.pruning.noised import noised_batches
from tdc_ray.pruning.proxies.by_score import sorted_scores, uniform_scheme
from tdc_ray.pruning.sensitivity import levels
from tdc_ray.pruning.space import Space, Values, fit_to_limit, space_of
from tdc_ray.pruning.tasks.candidates import CandidateJob, measure_candidate
from tdc_ray.pruning.tasks.sensitivities import SensitivityJob, measure_sensitivities
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.storage.run_dir import RunDir

PLAIN = "the whole network for each"
MIN_SHARE = 0.5
"""Least limit that schemes are fitted to, as a share of the base's macs: the paper's k."""


def pruned_setting(flags: SpeedFlags, folder: Path) -> tuple[RunDir, RunConfig, TimestepGroup]:
    """Save a random base in a run directory; return it with settings and the first group."""
    prune = PruneConfig(num_images=16, num_refit_images=16, num_levels=2, batch_size=16)
    if flags.smoke:
        config = preset("digits-smoke")
        prune = replace(prune, num_images=4, num_refit_images=4, batch_size=4)
    else:
        config = preset("cifar10")
        images = np.random.default_rng(0).integers(0, 256, (512, 32, 32, 3), np.uint8)
        np.savez(folder / "images.npz", images=images)
        path = str(folder / "images.npz")
        data = DataConfig(source="npz", path=path, image_size=32, num_channels=3)
        config = replace(config, data=data)
    config = replace(config, prune=prune)
    run_dir = RunDir(folder / "run")
    torch.manual_seed(0)
    save_unet(build_unet(base_unet(config.model, config.conditioning)), run_dir.base_unet)
    return run_dir, config, plan_groups(config.diffusion, config.plan, config.sampler).groups[0]


def without_refit(config: RunConfig, precision: Precision = "fp32") -> RunConfig:
    """Return settings under which losses are measured straight after pruning."""
    return replace(config, prune=replace(config.prune, refit="none", precision=precision))


def nothing(_metrics: Mapping[str, float], _step: int) -> None:
    """Ignore a report."""


def measuring(flags: SpeedFlags) -> list[Row]:
    """Time the losses of candidates, and the sensitivities of units."""
    with tempfile.TemporaryDirectory() as place:
        run_dir, config, group = pruned_setting(flags, Path(place))
        torch.manual_seed(0)
        unet = build_unet(base_unet(config.model, config.conditioning)).eval()
        space = space_of(base_unet(config.model, config.conditioning))
        schedule = noise_schedule(config.diffusion)
        seen = list(
            noised_batches(pruning_context(run_dir, config), group, unet, purpose="held-out")
        )
        scores = random_scores(space.units, 0)
        max_macs = group.limit(space.macs_base)
        schemes = [
            fit_to_limit(
                space, random_scheme(space.units, seed), max_macs, random_values(space, seed)
            )
            for seed in range(1 if flags.smoke else 2)
        ]
        candidates = [select_top(space.units, scores, scheme) for scheme in schemes]
        inner = space.units[:: max(1, len(space.units) // (1 if flags.smoke else 4))]
        full, names = keep_everything(space.units), tuple(unit.name for unit in inner)

        def losses(config: RunConfig) -> list[float]:
            context = pruning_context(run_dir, config)
            jobs = [CandidateJob(context, group, kept, 1) for kept in candidates]
            return [measure_candidate(job, nothing).loss_cut for job in jobs]

        def plain(choices: list[KeptIndices]) -> list[float]:
            return [plain_loss(cut(unet, space.units, kept), seen, schedule) for kept in choices]

        def sensitivities(config: RunConfig) -> Any:
            known = scores if config.prune.refit == "none" else {}
            job = SensitivityJob(pruning_context(run_dir, config), group, names, full, known)
            return measure_sensitivities(job, nothing).sensitivities

        narrower: list[KeptIndices] = [
            {**full, **select_top((unit,), scores, {unit.name: width})}
            for unit in inner
            for width in levels(unit, config.prune.num_levels)
        ]
        bare, bf16 = without_refit(config), without_refit(config, "bf16")
        variants = {"no refit": bare, "no refit, bf16": bf16, "refit too": config}
        weighed = CandidateJob(
            pruning_context(run_dir, config), group, full, 0, saves_weights=True
        )
        measure_candidate(weighed, nothing)  # as a search begins
        rows = []
        for section, ours, choices, count in (
            ("measuring a candidate", losses, candidates, len(candidates)),
            ("sensitivity of a unit", sensitivities, narrower, len(names)),
        ):
            rows += compared(
                section,
                {PLAIN: partial(plain, choices)}
                | {f"ours, {name}": partial(ours, chosen) for name, chosen in variants.items()},
                min(3, flags.repeats),
                against=PLAIN,
                scale=1 / count,
                batch=config.prune.batch_size,
            )
        same = max(
            abs(one - other) for one, other in zip(losses(bare), plain(candidates), strict=True)
        )
        return [
            *rows,
            Row(
                section="measuring a candidate",
                name="largest difference",
                unit="loss",
                values=(same,),
            ),
        ]


DIT: NetworkConfig = {  # DiT-S (arXiv:2212.09748) of ten blocks
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 10,
    "sample_size": 32,
}
BLOCKS = (3, 5, 7)
"""Those that go by depth: three of ten leave about 0.7 of the macs."""


def depth(flags: SpeedFlags) -> list[Row]:
    """Time forward passes of a transformer pruned to as many macs by width and by depth.

    In CPU time, which with one thread is the wall time of a machine that does nothing else.
    """
    config = {**DIT, "attention_head_dim": 8, "sample_size": 8} if flags.smoke else DIT
    torch.manual_seed(0)
    base, space = build_network(config).eval(), space_of(config, "depth")
    gone = tuple(f"transformer_blocks.{index}." for index in BLOCKS)
    by_depth = {n: 0 if n.startswith(gone) else width for n, width in space.full.items()}
    limit, scores = space.macs(by_depth), random_scores(space.units, 0)
    schemes = {
        "base": space.full,
        "by width": uniform_scheme(space_of(config), limit, sorted_scores(scores)),
        "by width, multiples of 64": uniform_scheme(
            space_of(config, "inner", 64), limit, sorted_scores(scores)
        ),
        "by depth": by_depth,
    }
    section, ways, macs = f"DiT at {limit / space.macs_base:.2f} F", {}, []
    for name, scheme in schemes.items():
        kept = select_top(space.units, scores, scheme)
        network = family_of(base).cut(base, space.units, kept)
        noise = torch.randn(1, 4, config["sample_size"], config["sample_size"])
        step = torch.full((1,), 500)
        ways[name] = partial(torch.inference_mode()(network), noise, step, class_labels=step)
        share = space.macs(scheme) / space.macs_base
        row = Row(section=section, name=f"macs, {name}", unit="F", values=(share,))
        macs.append(replace(row, precision=""))
    times = compared(
        section,
        ways,
        flags.repeats,
        against="base",
        unit="s of CPU",
        batch=1,
        clock=time.process_time,
    )
    return [*times, *macs]


def random_values(space: Space, seed: int) -> Values:
    """Draw sensitivities; return the value of every step that follows from them."""
    draw = np.random.default_rng(seed)
    grown = {
        unit.name: {width: float(draw.random()) for width in levels(unit, 4)}
        for unit in space.units
    }
    return step_worth(space, loss_curves(space, grown))


def counted_macs(unet: UNet2DModel, example: tuple[Tensor, Tensor]) -> int:
    """Count the macs of convolutions and linear layers by running a UNet on the meta device."""
    macs = 0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal macs
        channels = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        macs += output.numel() // channels * module.weight.numel()

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.inference_mode():
        unet(*(tensor.to("meta") for tensor in example))
    return macs


def counting(flags: SpeedFlags) -> list[Row]:
    """Time counting the macs of a scheme, and fitting it to a limit."""
    config = architecture("tiny" if flags.smoke else "iddpm-cifar10")
    unet = build_unet(config)
    with torch.device("meta"):
        empty = build_unet(config)
    size, channels = config["sample_size"], config["in_channels"]
    example = (torch.zeros(1, channels, size, size), torch.zeros(1, dtype=torch.long))
    kinds: tuple[SpaceKind, ...] = ("inner", "full")
    rows = []
    for kind in kinds:
        space = space_of(config, kind)
        schemes = [random_scheme(space.units, seed) for seed in range(5 if flags.smoke else 100)]
        scores = random_scores(space.units, 0)
        kept = select_top(space.units, scores, schemes[0])
        pruned = cut(unet, space.units, kept)

        def table(space: Space = space, schemes: list[dict[str, int]] = schemes) -> None:
            for scheme in schemes:
                space.macs(scheme)

        def build(space: Space = space, kept: KeptIndices = kept) -> int:
            return counted_macs(cut(empty, space.units, kept), example)

        section, against = f"counting, {kind}", "a meta model, cut and run"
        ways = {
            against: build,
            "torch-pruning's counter, cut before": partial(
                torch_pruning.utils.count_ops_and_params, pruned, example
            ),
        }
        few = max(1, min(3, flags.repeats))
        peers = compared(section, ways, few, against=against, unit="us", scale=1e6)
        (ours,) = compared(
            section, {"our table": table}, 5 * few, unit="us", scale=1e6 / len(schemes)
        )
        rows += [*peers, replace(ours, against=against), repairing(space, schemes, kind)]
    return [replace(row, precision="") for row in rows]


def repairing(space: Space, schemes: list[dict[str, int]], kind: str) -> Row:
    """Time fitting random schemes to limits between k and the base, one by one."""
    values, seconds = random_values(space, 0), []
    for number, scheme in enumerate(schemes):
        share = MIN_SHARE + (1 - MIN_SHARE) * number / len(schemes)
        limit = max(space.macs(space.smallest), int(share * space.macs_base))
        started = time.perf_counter()
        fit_to_limit(space, scheme, limit, values)
        seconds.append(1e3 * (time.perf_counter() - started))
    return Row(section=f"counting, {kind}", name="repair", unit="ms", values=tuple(seconds))
