"""What a proxy's proposals took, and what they gain over the offline proxy's."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tdc_ray.config.prune import ProxyMethod
from tdc_ray.execution.chain import Chain
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.proxies.offline import offline_proxy, propose_offline
from tdc_ray.pruning.proxy import Proposal, Proxy, Round
from tdc_ray.pruning.result import SearchCost, SearchResult, schemes_by_source
from tdc_ray.pruning.tasks.candidates import FINAL
from tdc_ray.runs.results import GroupResult


def offline_again(search: GroupSearch, round_: Round, cost: SearchCost) -> Chain[None]:
    """Have measured what the offline proxy proposes next, in the place of a partner."""
    del search, cost
    schemes = propose_offline(round_.request, round_.memory)
    yield from round_.measure([Proposal("llm", scheme) for scheme in schemes])


ALONE: Mapping[ProxyMethod, Proxy] = {"offline": offline_proxy, "llm": offline_again}
"""The offline proxy in the language model's place, too: it sees what a model sees, and has as many
measurements and as many finalists."""


def excess_loss(result: SearchResult | GroupResult) -> float:
    """Return the increase of the loss with what a search chose, on held-out images and noise."""
    loss = result.loss_cut if result.loss_refit is None else result.loss_refit
    return loss - result.loss_base


def proxy_cost(results: Sequence[SearchResult], offline: Sequence[SearchResult]) -> dict[str, Any]:
    """Compare searches with the offline proxy's, one by one, at equal measurements.

    Args:
        results: The searches.
        offline: Those by the offline proxy, in the same order.
    """
    gains = [excess_loss(a) - excess_loss(b) for a, b in zip(results, offline, strict=True)]
    return {
        "prompt_tokens": sum(one.cost.prompt_tokens for one in results),
        "completion_tokens": sum(one.cost.completion_tokens for one in results),
        "price": sum(one.cost.proxy_cost for one in results),
        "schemes": schemes_by_source(results),
        "measured": [len(one.candidates) for one in results],
        "measured_offline": [len(one.candidates) for one in offline],
        "finalists": [_num_finalists(one) for one in results],
        "finalists_offline": [_num_finalists(one) for one in offline],
        "excess_loss": [excess_loss(one) for one in results],
        "excess_loss_offline": [excess_loss(one) for one in offline],
        "difference": fmean(gains),
    }


def _num_finalists(result: SearchResult) -> int:
    """Count the schemes that were measured on the images that decide."""
    entries = [one.entry for one in result.candidates]
    return sum(one.final is not None or one.noise == FINAL.purpose for one in entries)


def proxy_note(cost: Mapping[str, Any]) -> str:
    """Write what :func:`proxy_cost` finds in a sentence."""
    base = fmean(cost["excess_loss_offline"])
    share = f" ({100 * cost['difference'] / base:+.1f} %)" if base > 0 else ""
    proposed = ", ".join(f"{number} {source}" for source, number in cost["schemes"].items())
    return (
        f"{cost['prompt_tokens']:,} tokens of prompts, {cost['completion_tokens']:,} of replies, "
        f"price {cost['price']:.4g}; measured {sum(cost['measured'])} schemes ({proposed}) with "
        f"{sum(cost['finalists'])} finalists, the offline proxy {sum(cost['measured_offline'])} "
        f"with {sum(cost['finalists_offline'])}. Excess loss {cost['difference']:+.3g} "
        f"against the offline proxy's {base:.3g}{share}; below 0 is a gain."
    )
