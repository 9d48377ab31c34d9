"""From how many steps on is it the denoiser, and no longer the sampler, that limits the score?

    python experiments/samplers.py --preset digits
    python experiments/samplers.py --preset mnist --data mnist.npz
    python experiments/samplers.py --smoke

Scores of the base of every seed by several samplers and numbers of steps (`--samplers`), from the
same initial noise.

Hardware and hours: `digits` takes about 8 minutes a seed on one CPU core, without the base's
training.

The paper does not have this: it samples by 100 and 200 steps of DDIM.
"""

from dataclasses import dataclass, replace

from common import ScoreFlags, base_of, commits_of, parse_flags, workers
from output import mean_and_spread, plot_bars, write_record, write_table
from stages import Model, scores_of

from tdc_ray.config.sampler import Sampler
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.unet import unet_config


@dataclass(frozen=True, kw_only=True)
class SamplerFlags(ScoreFlags):
    """Flags of this experiment."""

    num_actors: int | None = 1
    """Most actors that work at once; on a cluster give more."""
    samplers: tuple[tuple[Sampler, int], ...] = (
        ("ddim", 20),
        ("ddim", 50),
        ("ddim", 200),
        ("dpmsolver++", 10),
        ("dpmsolver++", 20),
        ("dpmsolver++", 30),
    )
    """Samplers and their steps."""


def main(flags: SamplerFlags) -> None:
    """Score the base of every seed by every sampler; write table, plot and record."""
    folder = flags.storage / f"samplers-{flags.preset}"
    scores: dict[str, list[float]] = {}
    metric = ""
    for seed in flags.seeds:
        config, base = flags.config(seed), base_of(flags, seed)
        model = Model("base", base, network_structure(unet_config(base)).macs)
        root = folder / f"seed-{seed}"
        with workers(config, root, flags.store) as pool:
            for sampler, steps in flags.samplers:
                name = f"{sampler}, {steps} steps"
                how = replace(config.sampler, sampler=sampler, num_inference_steps=steps)
                settings, place = replace(config, sampler=how), root / f"{sampler}-{steps}"
                metric, by_model = scores_of(pool, settings, place, {name: model}, [0])
                scores.setdefault(name, []).extend(by_model[name])
    rows = [[name, mean_and_spread(of_seeds, 2)] for name, of_seeds in scores.items()]
    write_table(folder, "samplers", ["sampler", metric], rows)
    plot_bars(folder, "samplers", scores, metric)
    record = {"metric": metric, "num_images": config.evaluate.num_images, "scores": scores}
    write_record(folder, "samplers", flags, commits_of(folder), record)


if __name__ == "__main__":
    main(parse_flags(__doc__, SamplerFlags))
