"""Every method's loss after pruning, after the refit and after equal fine-tunes.

    python experiments/loss_after_pruning.py --preset digits
    python experiments/loss_after_pruning.py --smoke

Bases are pruned to 0.7 F on all timesteps, and on groups 0, 3 and 6 of 10: by every score as a
uniform ratio, as a global ranking and as a global ranking per mac, and by the offline proxy.
Losses are those above the base's, on the same held-out images, timesteps and noise. Then the best
baseline without and the best with the refit, Diff-Pruning and the proxy are fine-tuned for 50, 200
and 1000 steps of 16 images, each from the pruned and from the refitted model.

Hardware and hours: `digits` about 2, `mnist --data mnist.npz` about 8 on 2 CPU cores; both resume
after an interruption.

The paper has no such table; its Table V compares methods after fine-tuning, by FID
(pruning_methods.py). The targets are in AIMS, and results are printed beside them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from common import Flags, base_of, claim, commits_of, parse_flags, workers
from output import write_record, write_table

from tdc_ray.config.prune import PruneMethod
from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import TimestepGroup, one_group, plan_groups
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.models.unet2d.unet import unet_config
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.result import Candidate, SearchResult
from tdc_ray.pruning.search import search_submodel
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.runs.stages.finetune import short_finetune_item
from tdc_ray.storage.files import remove
from tdc_ray.storage.run_dir import RunDir

MACS_SHARE = 0.7
SETTINGS = ("all", "group 0", "group 3", "group 6")
SCORES: tuple[PruneMethod, ...] = ("random", "magnitude", "lamp", "taylor", "diff-pruning")
STEPS, SMOKE_STEPS = (50, 200, 1000), (2, 5, 10)
PROXY = "offline"
AIMS = (
    "proxy with refit at 0 steps: at most 0.10 of the best baseline's excess without refit",
    "proxy with refit at 0 steps: below the best baseline with refit by more than one standard "
    "error of the paired differences",
    "proxy with refit at 1000 steps: above no baseline by more than one standard error",
    "proxy with refit: Diff-Pruning's loss without refit after 1000 steps is reached by 200",
)

Cell = tuple[int, str]
"""A seed and a setting."""

Losses = dict[str, float]
"""Excess losses by name, such as ``taylor/global`` or ``taylor/global, refit``."""


def groups_of(config: RunConfig) -> dict[str, TimestepGroup]:
    """Return the timesteps of each setting, all with the same limit."""
    plan = plan_groups(config.diffusion, replace(config.plan, num_groups=10), config.sampler)
    last = config.diffusion.num_train_timesteps - 1
    found = {"all": one_group(config.diffusion, config.sampler, (0, last), MACS_SHARE)}
    found |= {f"group {group.index}": group for group in plan.groups}
    return {name: replace(found[name], limit_share=MACS_SHARE) for name in SETTINGS}


def task_of(
    config: RunConfig,
    base: Path,
    folder: Path,
    setting: str,
    method: PruneMethod,
    *,
    refit: bool,
) -> GroupSearch:
    """Return the search of one method on one setting."""
    prune = replace(config.prune, method=method, refit="least-squares" if refit else "none")
    name = f"{setting.replace(' ', '-')}/{method}{'' if refit else '-no-refit'}"
    run_dir = RunDir((folder / name).resolve(), base)
    space = space_of(unet_config(base), prune.space)
    context = pruning_context(run_dir, replace(config, prune=prune))
    return GroupSearch(context, space, groups_of(config)[setting])


def excess(choice: SearchResult) -> Losses:
    """Return a search's losses above the base's, of all candidates or of a proxy's best."""
    found = (
        choice.candidates if "/" in choice.candidates[0].entry.source else choice.candidates[:1]
    )
    losses = {}
    for candidate in found:
        entry = candidate.entry
        losses[entry.source] = entry.loss_cut - choice.loss_base
        if entry.loss_refit is not None:
            losses[f"{entry.source}, refit"] = entry.loss_refit - choice.loss_base
    return losses


def tune(
    task: GroupSearch,
    name: str,
    candidate: Candidate,
    config: RunConfig,
    all_steps: Sequence[int],
) -> Chain[dict[int, float]]:
    """Fine-tune a sub-model; return its loss after each of some numbers of steps."""
    losses, before = {}, 0
    for steps in all_steps:
        train = replace(config.finetune, num_steps=steps)
        item = short_finetune_item(task, name, candidate.kept, train, config.compute, before)
        result = yield from result_of(item)
        losses[steps], before = result.loss, steps
    remove(item.job.checkpoint)
    return losses


def finalists(choices: Mapping[PruneMethod, SearchResult], table: Losses) -> dict[str, Candidate]:
    """Choose what is fine-tuned: two baselines, Diff-Pruning's best, and the proxy's."""
    baselines = {c.entry.source: c for m in SCORES for c in choices[m].candidates}
    by_cut = sorted(baselines, key=lambda source: table[source])
    by_refit = sorted(baselines, key=lambda source: table[f"{source}, refit"])
    second = by_refit[0] if by_refit[0] != by_cut[0] else by_cut[1]
    diff = next(source for source in by_cut if source.startswith("diff-pruning"))
    chosen = dict.fromkeys((by_cut[0], second, diff))
    return {source: baselines[source] for source in chosen} | {PROXY: choices[PROXY].candidates[0]}


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value, which shows no spread."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def verdicts(tables: Mapping[Cell, Losses], setting: str, all_steps: Sequence[int]) -> list[str]:
    """Compare the numbers of one setting with AIMS."""
    cells = [table for (_, name), table in tables.items() if name == setting]
    last, refit = f", {all_steps[-1]} steps", ", refit"

    def best(table: Losses, wanted: Callable[[str, str], bool]) -> float:
        """Return the least loss of the baselines whose name and variant are wanted."""
        parts = {name: name.partition(", ")[::2] for name in table if "/" in name}
        return min(table[name] for name, part in parts.items() if wanted(*part))

    def gap(ours: Sequence[float], theirs: Sequence[float]) -> str:
        gaps = [one - other for one, other in zip(ours, theirs, strict=True)]
        return f"{mean(gaps):+.3g} (standard error {standard_error(gaps):.2g})"

    ours = [table[f"{PROXY}{refit}"] for table in cells]
    plain = [best(t, lambda _, variant: not variant) for t in cells]
    published = [
        best(t, lambda name, variant: not variant and "per-mac" not in name) for t in cells
    ]
    refitted = [best(t, lambda _, variant: variant == "refit") for t in cells]
    lines = [
        f"aim 1: {mean(ours) / mean(plain):.3f} of the best baseline's, "
        f"{mean(ours) / mean(published):.3f} of the best uniform or plain global one's",
        f"aim 2: {gap(ours, refitted)} from the best baseline with refit",
    ]
    if any(name.endswith(last) for name in cells[0]):
        tuned = [best(t, lambda _, variant: variant.endswith(last[2:])) for t in cells]
        at_last = [table[f"{PROXY}{refit}{last}"] for table in cells]
        lines.append(f"aim 3: {gap(at_last, tuned)} from the best baseline of each seed")
        diff = [
            best(t, lambda name, variant: name.startswith("diff") and variant == last[2:])
            for t in cells
        ]
        for steps in all_steps:
            at = [table[f"{PROXY}{refit}, {steps} steps"] for table in cells]
            lines.append(
                f"aim 4: after {steps} steps {gap(at, diff)} from Diff-Pruning without refit "
                f"after {all_steps[-1]}"
            )
    return [f"{setting}: {line}" for line in lines]


def settings_of(flags: Flags) -> tuple[str, ...]:
    """Return a name of the timesteps for which models are pruned."""
    return SETTINGS[-1:] if flags.smoke else SETTINGS


def steps_of(flags: Flags) -> tuple[int, ...]:
    """Return the steps after which losses are measured."""
    return SMOKE_STEPS if flags.smoke else STEPS


def main(flags: Flags) -> None:
    """Prune, measure, fine-tune, and write the tables."""
    folder = flags.storage / f"loss_after_pruning-{flags.preset}"
    tasks: dict[tuple[Cell, PruneMethod, bool], GroupSearch] = {}
    configs: dict[int, RunConfig] = {}
    for seed in flags.seeds:
        config = flags.config(seed)
        base = base_of(flags, seed)
        config = replace(
            config, finetune=replace(config.finetune, batch_size=16, learning_rate=2e-4)
        )
        configs[seed] = config
        claim(folder / f"seed-{seed}", config)
        for setting in settings_of(flags):
            for method in (*SCORES, PROXY):
                for refit in (True, False):
                    place = folder / f"seed-{seed}"
                    task = task_of(config, base, place, setting, method, refit=refit)
                    tasks[(seed, setting), method, refit] = task
    searched = {key: task for key, task in tasks.items() if key[2]}
    with workers(flags.config(flags.seeds[0]), folder, flags.store) as pool:
        found = pool.run(
            {
                str(key): search_submodel(task, MemoryBank(task.context.run_dir.memory))
                for key, task in searched.items()
            }
        )
        tables: dict[Cell, Losses] = {}
        for cell in dict.fromkeys(cell for cell, _, _ in searched):
            tables[cell] = {}
            for method in (*SCORES, PROXY):
                tables[cell] |= excess(found[str((cell, method, True))])
        write_all(folder, flags, tables)
        chains = {}
        for cell in tables:
            choices = {m: found[str((cell, m, True))] for m in (*SCORES, PROXY)}
            for source, candidate in finalists(choices, tables[cell]).items():
                for refit in (True, False):
                    method: PruneMethod = source.split("/")[0]  # type: ignore[assignment]
                    name = f"{source}{', refit' if refit else ''}"
                    task = tasks[cell, method, refit]
                    place = source.replace("/", "-")
                    chains[f"{cell}|{name}"] = tune(
                        task, place, candidate, configs[cell[0]], steps_of(flags)
                    )
        for key, losses in pool.run(chains).items():
            place, name = key.split("|")
            cell = next(cell for cell in tables if str(cell) == place)
            base_loss = found[str((cell, PROXY, True))].loss_base
            for steps, loss in losses.items():
                tables[cell][f"{name}, {steps} steps"] = loss - base_loss
    write_all(folder, flags, tables)


def write_all(folder: Path, flags: Flags, tables: Mapping[Cell, Losses]) -> None:
    """Write the results so far: a table, the verdicts, and every seed's numbers."""
    names = sorted({name for table in tables.values() for name in table})
    rows = []
    for name in names:
        row = [name]
        for setting in settings_of(flags):
            values = [t[name] for (_, s), t in tables.items() if s == setting and name in t]
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
            row.append(f"{mean(values):.3g}{spread} ({len(values)})" if values else "-")
        rows.append(row)
    write_table(
        folder, "loss_after_pruning", ["loss above the base's (seeds)", *settings_of(flags)], rows
    )
    lines = [
        line
        for setting in settings_of(flags)
        for line in verdicts(tables, setting, steps_of(flags))
    ]
    for line in lines:
        print(line)
    record = {f"seed {seed}, {setting}": table for (seed, setting), table in tables.items()}
    write_record(
        folder,
        "loss_after_pruning",
        flags,
        commits_of(folder),
        {"aims": AIMS, "verdicts": lines, "excess_loss": record},
    )


if __name__ == "__main__":
    main(parse_flags(__doc__))
