"""How far does the refit alone carry? Training-free experts beside fine-tuned ones.

    python experiments/training_free.py --preset digits
    python experiments/training_free.py --smoke

For k = 0.5 and 0.3 and N = 4 and 10, experts made from one base three ways: training-free (pruned
and refitted, no gradient step), fine-tuned (the same, then fine-tuned), and the paper's way
(pruned without a refit, then fine-tuned); the base beside them. Scores of sampled images for three
sampling seeds. `--seeds` are the sampling seeds here; the base is that of training seed 0.

Hardware and hours: `digits` about 1, `mnist --data mnist.npz` about 3 on 2 CPU cores.

The paper does not have this: it fine-tunes every expert and has no refit.
"""

from dataclasses import dataclass, replace

from common import ScoreFlags, base_of, commits_of, parse_flags, workers
from output import mean_and_spread, plot_bars, write_record, write_table
from stages import Model, experts_of, scores_of

from tdc_ray.config.run import RunConfig
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.unet import unet_config


@dataclass(frozen=True, kw_only=True)
class FreeFlags(ScoreFlags):
    """Flags of this experiment."""

    finetune_steps: int | None = None
    """Steps of a fine-tune; default: the preset's."""
    plans: tuple[tuple[float, int], ...] = ((0.5, 4), (0.5, 10), (0.3, 4), (0.3, 10))
    """Pairs of k and N."""


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """Return the three ways from the base to experts."""
    no_refit = replace(config.prune, refit="none")
    return {
        "training-free": replace(config, finetune=replace(config.finetune, num_steps=0)),
        "fine-tuned": config,
        "paper's way": replace(config, prune=no_refit),
    }


def main(flags: FreeFlags) -> None:
    """Create all experts, score them, and write the table."""
    folder = flags.storage / f"training_free-{flags.preset}"
    config = flags.config(0)
    if flags.finetune_steps is not None:
        steps = flags.finetune_steps
        config = replace(config, finetune=replace(config.finetune, num_steps=steps))
    base = base_of(flags, 0)
    macs_base = network_structure(unet_config(base)).macs
    models = {"base": Model("base", base, macs_base)}
    with workers(config, folder, flags.store) as pool:
        for k, groups in flags.plans[:1] if flags.smoke else flags.plans:
            plan = replace(config.plan, min_macs_share=k, num_groups=groups)
            for name, variant in variants(replace(config, plan=plan)).items():
                row = f"k {k:g}, N {groups}, {name}"
                root = folder / row.replace(", ", "-").replace(" ", "-").replace("'", "")
                models[row] = experts_of(pool, variant, base, root)
        metric, scores = scores_of(pool, config, folder / "scores", models, flags.seeds)
    rows = [
        [row, mean_and_spread(scores[row]), f"{model.macs / macs_base:.3f}"]
        for row, model in models.items()
    ]
    write_table(folder, "training_free", ["experts", metric, "mean macs / F"], rows)
    plot_bars(folder, "training_free", scores, metric)
    record = {
        "metric": metric,
        "num_images": config.evaluate.num_images,
        "finetune_steps": config.finetune.num_steps,
        "scores": scores,
        "macs": {row: model.macs for row, model in models.items()},
    }
    write_record(folder, "training_free", flags, commits_of(folder), record)


if __name__ == "__main__":
    main(parse_flags(__doc__, FreeFlags))
