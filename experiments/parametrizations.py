"""Does it matter what the network predicts? The same training in every parametrization.

    python experiments/parametrizations.py --preset digits --architecture tiny --base-steps 2000
    python experiments/parametrizations.py --smoke

A base for every training seed and prediction (`--predictions`): noise, velocity and image on the
preset's betas, and rectified flow, with the same steps, learning rate, seeds, order of images and
sampler (20 steps of DPM-Solver++ as diffusers spaces them; rectified flow by its own sigmas).
Beside the scores stands each one's held-out loss in one unit: the mean squared error of epsilon
that the prediction implies, on the same images and noise, at the noise levels (SNR) of the
preset's betas, all timesteps alike: DDPM's L_simple, whatever the network outputs. Rectified
flow sees these levels at its own times, between those of its training.

Hardware and hours: the first command takes about 20 minutes a seed on one CPU core that others use
too; interrupted, it resumes.

The paper does not have this: its networks predict epsilon.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from common import ScoreFlags, commits_of, parse_flags, trained_base, workers
from output import mean_and_spread, plot_bars, write_record, write_table
from stages import Model, scores_of
from torch import Tensor

from tdc_ray.config.diffusion import PredictionType
from tdc_ray.config.run import RunConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.plan import TimestepGroup, plan_groups
from tdc_ray.diffusion.prediction import PREDICTIONS
from tdc_ray.diffusion.process import at, noise_schedule
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.models.families import load_network
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.unet import unet_config
from tdc_ray.runs.stages.paired_losses import unseen_batches

SAMPLER = SamplerConfig(scheduler="DPMSolverMultistepScheduler", num_inference_steps=20)
"""The one of diffusers that samples all of them."""

SMOKE_NOISED = 90


@dataclass(frozen=True, kw_only=True)
class PredictionFlags(ScoreFlags):
    """Flags of this experiment."""

    num_actors: int | None = 1
    """Most actors that work at once; on a cluster give more."""
    predictions: tuple[PredictionType, ...] = get_args(PredictionType)
    """What the networks predict."""

    def config(self, seed: int) -> RunConfig:
        """Return the preset's settings for one seed, and the sampler of all predictions."""
        config = super().config(seed)
        noised = SMOKE_NOISED if self.smoke else config.compare.num_images
        return replace(config, sampler=SAMPLER, compare=replace(config.compare, num_images=noised))


@torch.inference_mode()
def loss_of_epsilon(
    config: RunConfig, predicts: PredictionType, base: Path, group: TimestepGroup
) -> float:
    """Compute the mean squared error of epsilon on held-out images and a group's noise levels.

    Args:
        config: The settings, whose betas have the group's timesteps.
        predicts: What the base outputs.
        base: The folder of its UNet.
        group: The group.
    """
    network, prediction = load_network(base), PREDICTIONS[predicts]
    levels, losses = noise_schedule(config.diffusion), []
    for batch in unseen_batches(config, group, [network]):
        snr, times = at(levels.snr, batch.timesteps), batch.timesteps
        signal, noise = levels.rates(times)
        if predicts == "flow_prediction":  # the same SNR, ((1 - s) / s)^2, at t = s T
            noise = 1 / (1 + snr.sqrt())
            signal, times = 1 - noise, noise.flatten() * config.diffusion.num_train_timesteps
        output: Tensor = network(signal * batch.x_0 + noise * batch.epsilon, times).sample
        error = output - prediction.target(batch.x_0, batch.epsilon, signal, noise)
        losses.append((prediction.per_epsilon(snr) * error.square()).mean((1, 2, 3)))
    return float(torch.cat(losses).mean())


def settings_of(flags: PredictionFlags, seed: int, predicts: PredictionType) -> RunConfig:
    """Return the settings of a base that predicts something else."""
    config = flags.config(seed)
    return replace(config, diffusion=replace(config.diffusion, prediction_type=predicts))


def main(flags: PredictionFlags) -> None:
    """Train every base, score it, measure its losses, and write the table."""
    folder = flags.storage / f"parametrizations-{flags.variant}"
    config = flags.config(flags.seeds[0])
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    scores: dict[str, list[float]] = {}
    losses: dict[str, list[list[float]]] = {}  # of every seed, those of the groups
    metric = ""
    with connected():  # once for all trainings
        for seed in flags.seeds:
            bases = {}
            for predicts in flags.predictions:
                settings, root = settings_of(flags, seed, predicts), folder / f"seed-{seed}"
                bases[predicts] = trained_base(settings, root / predicts, flags.store)
            with workers(config, folder, flags.store) as pool:
                for predicts, base in bases.items():
                    settings = settings_of(flags, seed, predicts)
                    model = Model("base", base, network_structure(unet_config(base)).macs)
                    place = root / f"{predicts}-scores"
                    metric, found = scores_of(pool, settings, place, {predicts: model}, [0])
                    scores.setdefault(predicts, []).extend(found[predicts])
            for predicts, base in bases.items():
                of_groups = [
                    loss_of_epsilon(flags.config(seed), predicts, base, group) for group in groups
                ]
                losses.setdefault(predicts, []).append(of_groups)
    sizes = torch.tensor([len(group.timesteps) for group in groups], dtype=torch.float64)
    rows = []
    for predicts, by_seed in losses.items():
        each = torch.tensor(by_seed, dtype=torch.float64)  # (seeds, groups)
        columns = [each @ sizes / sizes.sum(), *each.T]
        written = [mean_and_spread(column.tolist(), 5) for column in columns]
        rows.append([predicts, mean_and_spread(scores[predicts], 2), *written])
    spans = [f"t {group.first}-{group.last}" for group in groups]
    note = "Losses: mean squared errors of epsilon on held-out images at the same noise levels."
    write_table(folder, "parametrizations", ["prediction", metric, "loss", *spans], rows, note)
    plot_bars(folder, "parametrizations", scores, metric)
    record = {
        "metric": metric,
        "num_images": config.evaluate.num_images,
        "num_noised": config.compare.num_images,
        "scores": scores,
        "losses": losses,
    }
    write_record(folder, "parametrizations", flags, commits_of(folder), record)


if __name__ == "__main__":
    main(parse_flags(__doc__, PredictionFlags))
