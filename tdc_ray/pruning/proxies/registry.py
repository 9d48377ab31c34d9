"""The proxies by the names that ``prune.method`` has."""

import time
from collections.abc import Callable, Mapping, Sequence

from tdc_ray.config.prune import ProxyMethod
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.proxies.language_model import NO_REPLY, AskJob, ProposalReply, propose_by_llm
from tdc_ray.pruning.proxies.llm_gateway import LLM_SERVICE
from tdc_ray.pruning.proxies.offline import OfflineProxy
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.space import Scheme

Propose = Callable[
    [GroupSearch, ProposalRequest, Sequence[MemoryEntry], SearchCost], Chain[list[Scheme]]
]
"""A chain that returns a proxy's schemes for a request and what is remembered, and adds what that
took to the cost of the search: one that waits for something outside yields an item."""


def _offline(
    task: GroupSearch,
    request: ProposalRequest,
    memory: Sequence[MemoryEntry],
    cost: SearchCost,
) -> Chain[list[Scheme]]:
    """Search on the driver: it takes milliseconds."""
    del task
    yield from ()
    started = time.perf_counter()
    schemes = OfflineProxy().propose(request, memory)
    cost.proxy_seconds += time.perf_counter() - started
    return schemes


def _language_model(
    task: GroupSearch,
    request: ProposalRequest,
    memory: Sequence[MemoryEntry],
    cost: SearchCost,
) -> Chain[list[Scheme]]:
    """Ask a language model; where there is no usable reply the reason is noted."""
    job = AskJob(task.context.proxy, request, tuple(memory), task.context.run_dir.transcripts)
    item = task.item(
        f"round-{request.round}-ask",
        propose_by_llm,
        job,
        result_type=ProposalReply,
        service=LLM_SERVICE,
        fallback_result=NO_REPLY,
    )
    reply = yield from result_of(item)
    cost.proxy_seconds += reply.seconds
    cost.prompt_tokens += reply.prompt_tokens
    cost.completion_tokens += reply.completion_tokens
    if reply.error is not None:
        cost.notes.append(
            f"{task.name}, round {request.round}: the offline proxy took over: {reply.error}"
        )
    return list(reply.schemes)


PROXIES: Mapping[ProxyMethod, Propose] = {"offline": _offline, "llm": _language_model}
