"""Does measuring in bf16 rank candidates as fp32 does?

    python experiments/bf16_ranking.py --preset digits
    python experiments/bf16_ranking.py --smoke

Random schemes at 0.7 F for all timesteps and for groups 0, 3 and 6 of 10, each pruned and refitted
in fp32; their losses on the same held-out images and noise in fp32 and in bf16. Reported are
Spearman's rank correlation, whether both put the same scheme first, and the largest difference of
two losses beside the spread of the fp32 losses.

Hardware and hours: `digits` takes about 10 minutes on 2 CPU cores, and 4 more for a base.
The paper has no such table.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

import numpy as np
from common import Flags, base_of, parse_flags
from loss_after_pruning import MACS_SHARE, groups_of
from output import write_record, write_table
from scipy.stats import spearmanr

from tdc_ray.pruning.criteria.random import random_scores
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.loaded_base import load_base, prune_and_refit
from tdc_ray.pruning.noised import held_out_loss
from tdc_ray.pruning.proxies.by_score import sorted_scores
from tdc_ray.pruning.space import Space, fit_to_limit
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.storage.provenance import commit
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class RankingFlags(Flags):
    """Flags of this experiment."""

    seeds: tuple[int, ...] = (0,)
    """Training seeds; the first one counts."""
    base: Path | None = None
    """Folder of a trained UNet of the preset; default: one is trained in the storage."""
    num_schemes: int = 20
    """Schemes of each setting."""


def random_scheme(space: Space, seed: int) -> dict[str, int]:
    """Draw a scheme within the limit."""
    generator = np.random.default_rng(seed)
    drawn = {unit.name: int(generator.integers(1, unit.width + 1)) for unit in space.units}
    values = sorted_scores(random_scores(space.units, seed))
    return fit_to_limit(space, drawn, int(MACS_SHARE * space.macs_base), values)


def main(flags: RankingFlags) -> None:
    """Measure in both precisions, and compare the orders."""
    folder, config = flags.storage / f"bf16_ranking-{flags.preset}", flags.config(flags.seeds[0])
    unet = base_of(flags, flags.seeds[0]) if flags.base is None else flags.base.resolve()
    count = 3 if flags.smoke else flags.num_schemes
    rows, losses = [], {}
    for name, group in groups_of(config).items():
        run_dir = RunDir(folder / name.replace(" ", "-"), unet)
        context = pruning_context(run_dir, config)
        in_bf16 = replace(context, prune=replace(context.prune, precision="bf16"))
        base = load_base(context, group)
        found = []
        for seed in range(count):
            scheme = random_scheme(base.space, seed)
            kept = select_top(base.space.units, random_scores(base.space.units, seed), scheme)
            pruned = prune_and_refit(base, kept).network
            found.append(
                [held_out_loss(pruned, how, group, base.schedule) for how in (context, in_bf16)]
            )
        fp32, bf16 = zip(*found, strict=True)
        apart = max(abs(one - other) for one, other in found)
        first = "same" if np.argmin(fp32) == np.argmin(bf16) else "another"
        figures = [f"{spearmanr(fp32, bf16).statistic:.4f}", first, f"{apart:.2g}"]
        rows.append([name, *figures, f"{stdev(fp32):.2g}"])
        losses[name] = {"fp32": fp32, "bf16": bf16}
    columns = ["timesteps", "rank correlation", "best scheme", "apart", "spread"]
    write_table(folder, "bf16_ranking", columns, rows)
    record = {"num_schemes": count, "losses": losses}
    write_record(folder, "bf16_ranking", flags, {commit()}, record)


if __name__ == "__main__":
    main(parse_flags(__doc__, RankingFlags))
