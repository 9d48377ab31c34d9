"""Is the fast training loop the plain one? Losses of every step, side by side.

    python experiments/loss_curves.py --preset digits
    python experiments/loss_curves.py --smoke

From the same weights, on the same batches, timesteps and noise: a plain fp32 loop (AdamW parameter
by parameter, a plain EMA), the same with every weight moved by a rounding error, which shows how
far rounding alone drives two trainings apart, and tdc_ray's loop in fp32, in fp32 compiled, and in
bf16.

Hardware and hours: `digits` takes about 5 minutes on 2 CPU cores, half of it for compiling.
The paper has no such table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch
from common import Flags, parse_flags
from diffusers import UNet2DModel
from output import plot_lines, write_record, write_table

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import augment, batches, to_minus_one_one
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.loss import denoising_loss, loss_weights
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.diffusion.train import learning_rate_at
from tdc_ray.execution.device import WorkerRank
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.models.unet2d.unet import build_unet
from tdc_ray.runs.stages.base_worker import train_base
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.provenance import commit

ROUNDING = 2.0**-24
"""Largest relative rounding error of fp32."""

TAIL = 50
"""Last steps whose mean loss is reported."""


@dataclass(frozen=True, kw_only=True)
class CurveFlags(Flags):
    """Flags of this experiment."""

    seeds: tuple[int, ...] = (0,)
    """Training seeds; the first one counts."""
    num_steps: int = 200
    """Optimizer steps."""
    threads: int = 2
    """CPU threads."""


def start(config: RunConfig) -> UNet2DModel:
    """Build the base as `train_base` does."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    return build_unet(
        {**base_unet(config.model, config.conditioning), "dropout": config.model.dropout}
    )


def plain(config: RunConfig, moved_by: float = 0.0) -> list[float]:
    """Train by the plain loop; return every step's loss.

    Args:
        config: The settings.
        moved_by: Relative change of every weight before the first step.
    """
    unet, train, seed = start(config).train(), config.base, derive_seed(config.seed, "base")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter *= 1 + moved_by * signs
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay, foreach=False
    )
    schedule, losses = noise_schedule(config.diffusion), []
    weights = loss_weights(schedule, train.loss_weight, train.loss_weight_gamma)
    images = batches(
        training_data(config.data, config.evaluate.cache_dir).open(),
        batch_size=train.batch_size,
        seed=derive_seed(config.seed, "base", "order"),
        num_steps=train.num_steps,
    )
    for step, (batch, _) in enumerate(images):
        torch.manual_seed(derive_seed(seed, 0, step, "dropout"))
        noise = torch.Generator().manual_seed(derive_seed(seed, 0, step, "noise"))
        shaken = torch.Generator().manual_seed(derive_seed(seed, 0, step, "augment"))
        x_0 = to_minus_one_one(augment(batch, config.data, shaken))
        epsilon = torch.randn(x_0.shape, generator=noise)
        timesteps = torch.randint(
            0, config.diffusion.num_train_timesteps, (len(x_0),), generator=noise
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(train, step)
        noised = NoisedBatch(x_0, epsilon, timesteps)
        loss = denoising_loss(unet, schedule, noised, weights=weights).mean()
        optimizer.zero_grad()
        loss.backward()
        if train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(unet.parameters(), train.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(average, unet.parameters(), strict=True):
                mine.lerp_(theirs, 1 - train.ema_decay)
        losses.append(loss.item())
    return losses


def ours(config: RunConfig) -> list[float]:
    """Train by tdc_ray's loop; return every step's loss."""
    losses: list[float] = []
    train_base(
        config,
        WorkerRank(0, 1, torch.device("cpu")),
        resume_from=None,
        wrap=lambda unet: unet,
        report=lambda metrics, _: losses.append(metrics["loss"]),
        save=lambda _: None,
    )
    return losses


def in_tens(losses: Sequence[float]) -> list[tuple[float, Sequence[float]]]:
    """Put ten steps' losses together."""
    return [(first + 10, losses[first : first + 10]) for first in range(0, len(losses), 10)]


def main(flags: CurveFlags) -> None:
    """Train each way, and compare."""
    torch.set_num_threads(flags.threads)
    folder = flags.storage / f"loss_curves-{flags.preset}"
    config = flags.config(flags.seeds[0])
    steps = 20 if flags.smoke else flags.num_steps
    base = replace(config.base, num_steps=steps, checkpoint_every=steps, log_every=1)
    config = replace(config, base=base)

    def varied(**how: str) -> RunConfig:
        return replace(config, base=replace(base, **how))  # type: ignore[arg-type]

    ways: dict[str, Callable[[], list[float]]] = {
        "plain loop, fp32": lambda: plain(config),
        "the same from weights off by a rounding error": lambda: plain(config, ROUNDING),
        "tdc_ray, fp32": lambda: ours(varied(precision="fp32")),
        "tdc_ray, bf16": lambda: ours(varied(precision="bf16")),
    }
    if not flags.smoke:
        ways["tdc_ray, fp32 compiled"] = lambda: ours(varied(compile="default"))
    curves = {name: train() for name, train in ways.items()}
    first = curves["plain loop, fp32"]
    rows = []
    for name, losses in curves.items():
        apart = [abs(one - other) for one, other in zip(losses, first, strict=True)]
        figures = [max(apart[:10]), max(apart), mean(losses[-TAIL:])]
        rows.append([name, *(f"{figure:.3g}" for figure in figures[:2]), f"{figures[2]:.5f}"])
    columns = ["", "apart in 10 steps", f"apart in {steps}", f"mean loss of the last {TAIL}"]
    note = "Apart: largest difference of a step's loss from the plain loop's."
    write_table(folder, "loss_curves", columns, rows, note)
    lines = {name: in_tens(losses) for name, losses in curves.items()}
    plot_lines(folder, "loss_curves", lines, xlabel="step", ylabel="loss of ten steps")
    record = {"num_steps": steps, "threads": flags.threads, "losses": curves}
    write_record(folder, "loss_curves", flags, {commit()}, record)


if __name__ == "__main__":
    main(parse_flags(__doc__, CurveFlags))
