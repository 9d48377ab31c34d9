"""Figure 5: does the proxy get better over its rounds, and is it stable?

    python experiments/proxy_stability.py --preset digits
    python experiments/proxy_stability.py --smoke

Five rounds of three prunings of the base to 0.7 F on all timesteps; mean and standard deviation of
the loss in every round, after pruning and after the refit, over the candidates of all seeds.
`--proxy llm --llm.model NAME` asks a language model beside the offline proxy; the table's note
then has its tokens, their price, and what the best scheme gains over the offline proxy's at equal
measurements and finalists, with that one in the model's place, on held-out images and noise. What
any model could gain: partner_bound.py.

Hardware and hours: `digits` takes about 2 minutes a seed on 2 CPU cores.

The paper's Figure 5 shows mean and standard deviation of the loss over 5 rounds of 3 prunings by
GPT-4 at 0.7 F as a plot; it prints no numbers.
"""

from dataclasses import replace

from common import ProxyFlags, base_of, commits_of, parse_flags, workers
from output import mean_and_spread, plot_lines, write_record, write_table
from proxy_cost import ALONE, proxy_cost, proxy_note
from stages import all_timesteps

from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.proxies.registry import PROXIES
from tdc_ray.pruning.result import SearchResult
from tdc_ray.pruning.search import search_submodel

MACS_SHARE = 0.7
NUM_ROUNDS, NUM_CANDIDATES = 5, 3


def main(flags: ProxyFlags) -> None:
    """Search with all seeds; write table and plot."""
    folder = flags.storage / f"proxy_stability-{flags.preset}-{flags.proxy}"
    chains = {}
    searches = {"": PROXIES} if flags.proxy == "offline" else {"": PROXIES, "offline": ALONE}
    for seed in flags.seeds:
        config = flags.config(seed)
        base = base_of(flags, seed)
        prune = replace(config.prune, num_rounds=NUM_ROUNDS, num_candidates=NUM_CANDIDATES)
        for name, proxies in searches.items():
            root = folder / f"seed-{seed}" / name
            task = all_timesteps(replace(config, prune=prune), base, root, MACS_SHARE)
            memory = MemoryBank(task.context.run_dir.memory)
            chains[f"{name} {seed}"] = search_submodel(task, memory, proxies)
    with workers(flags.config(flags.seeds[0]), folder, flags.store) as pool:
        all_found: dict[str, SearchResult] = pool.run(chains)
    found = {seed: all_found[f" {seed}"] for seed in flags.seeds}
    offline = [all_found[f"{list(searches)[-1]} {seed}"] for seed in flags.seeds]
    losses: dict[str, dict[int, list[float]]] = {"after the cut": {}, "after the refit": {}}
    for choice in found.values():
        for candidate in choice.candidates:
            entry = candidate.entry
            for name, loss in zip(losses, (entry.loss_cut, entry.loss_refit), strict=True):
                if loss is not None and entry.loss_base is not None:
                    losses[name].setdefault(entry.round + 1, []).append(loss - entry.loss_base)
    rows = [
        [str(number)] + [mean_and_spread(by[number], digits=5) for by in losses.values() if by]
        for number in range(1, NUM_ROUNDS + 1)
    ]
    columns = ["round", *(f"loss above the base's {name}" for name, by in losses.items() if by)]
    cost = proxy_cost(list(found.values()), offline)
    note = "" if flags.proxy == "offline" else proxy_note(cost)
    write_table(folder, "proxy_stability", columns, rows, note)
    plot_lines(
        folder,
        "proxy_stability",
        {name: sorted(by_round.items()) for name, by_round in losses.items()},
        xlabel="round",
        ylabel="loss above the base's",
    )
    notes = [note for choice in found.values() for note in choice.cost.notes]
    record = {"method": flags.proxy, "excess_loss": losses, "notes": notes, "proxy": cost}
    write_record(folder, "proxy_stability", flags, commits_of(folder), record)


if __name__ == "__main__":
    main(parse_flags(__doc__, ProxyFlags))
