"""The proxy that asks a language model, validates its replies, and asks again after bad ones."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.errors import ProxyError, ProxyReplyError
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.llm.budget import Budget
from tdc_ray.pruning.llm.chat import Answer, check_server, send, server_host, token_limit_field
from tdc_ray.pruning.llm.prompt import messages_for, retry_messages
from tdc_ray.pruning.llm.reply import parse_reply, response_format
from tdc_ray.pruning.llm.transcripts import (
    LLMExchange,
    TokenUsage,
    append_exchange,
    find_transcripts,
    recorded_reply,
    transcript_path,
)
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.space import Scheme

logger = logging.getLogger(__name__)

UNKNOWN_FORMAT = (400, 404, 422)
"""HTTP statuses of servers that do not support structured output."""


LLM_SERVICE = "llm"
"""Name of the pool's service that makes the calls; see `LLMGateway`."""


def language_model_proxy(
    search: GroupSearch,
    request: ProposalRequest,
    memory: Sequence[MemoryEntry],
    cost: SearchCost,
) -> Chain[list[Scheme]]:
    """Ask a language model; without a usable reply the reason is noted."""
    context = search.context
    name = f"round-{request.round}-ask"
    item = WorkItem(
        key=search.key(name),
        function=propose_by_llm,
        job=AskJob(context.proxy, request, tuple(memory), context.run_dir.transcripts),
        result_path=search.result_path(name),
        result_type=ProposalReply,
        cost=0.0,
        cost_behind=search.cost_behind(),
        service=LLM_SERVICE,
        fallback_result=NO_REPLY,
    )
    reply = yield from result_of(item)
    cost.proxy_seconds += reply.seconds
    cost.prompt_tokens += reply.prompt_tokens
    cost.completion_tokens += reply.completion_tokens
    if reply.error is not None:
        cost.notes.append(
            f"{search.name}, round {request.round}: the offline proxy took over: {reply.error}"
        )
    return list(reply.schemes)


def check_proxy(config: ProxyConfig) -> None:
    """Check that there is an API key, or a transcript to replay.

    Raises:
        ProxyError: There is none in this process's environment, or in ``proxy.replay``, or the
            server refuses it.
    """
    if config.replay is None:
        server_host()
        check_server()
    else:
        find_transcripts(Path(config.replay))


@dataclass(frozen=True, slots=True)
class AskJob:
    """A request for one group's schemes of one round."""

    config: ProxyConfig
    request: ProposalRequest
    memory: tuple[MemoryEntry, ...]
    transcripts: Path
    """The run's folder of transcripts."""


@dataclass(frozen=True, slots=True)
class ProposalReply:
    """The schemes, or the error, and the usage."""

    schemes: Sequence[Scheme] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 0
    cost: float = 0.0
    error: str | None = None
    """Why there are no schemes."""

    seconds: float = 0.0


NO_REPLY = ProposalReply(error="whoever makes the calls died")
"""Result of :func:`propose_by_llm` if its process died too often."""


class LanguageModel:
    """Asks a language model, or the transcripts of an earlier run, for the schemes of a job.

    They are valid, but may be above the limit or in the memory bank.
    """

    def __init__(self, job: AskJob, budget: Budget) -> None:
        self._job, self._budget = job, budget
        self._deadline = time.monotonic() + job.config.max_seconds
        self.usage = TokenUsage()
        """Usage of its calls."""

    def propose(self) -> list[Scheme]:
        """Return the schemes of the first reply that is valid.

        Raises:
            ProxyError: No key, no answer, no usable reply, or no budget for one.
        """
        config, request, folder = self._job.config, self._job.request, self._job.transcripts
        if config.replay is not None:
            folder = find_transcripts(Path(config.replay))
            path = transcript_path(folder, request.group, request.round)
            return parse_reply(recorded_reply(path), request)
        limit = token_limit_field(server_host())
        self._budget.count_earlier(folder)
        path = transcript_path(folder, request.group, request.round)
        messages = messages_for(request, self._job.memory, max_entries=config.max_memory_entries)
        schema = None if config.reply_format == "json" else response_format(request.space)
        num_replies = 0
        while True:
            fields = {
                "model": config.model,
                "messages": messages,
                limit: config.max_completion_tokens,
                "temperature": config.temperature,
                "response_format": schema,
            }
            body = {name: value for name, value in fields.items() if value is not None}
            started = time.monotonic()
            answer, used = self._call(body)
            schemes, problem = _validate(answer, request)
            seconds = time.monotonic() - started
            append_exchange(path, LLMExchange(body, answer.text, problem, used, seconds))
            if problem is None:
                return schemes
            if schema and config.reply_format == "auto" and answer.status in UNKNOWN_FORMAT:
                schema = None
                continue
            num_replies += 1
            if answer.status != 200 or num_replies == config.max_replies:
                raise ProxyError(f"{config.model}, reply {num_replies}: {problem}")
            messages = [*messages, *retry_messages(answer.text, problem)]

    def _call(self, body: dict[str, Any]) -> tuple[Answer, TokenUsage]:
        """Make a call within the budget; unknown usage counts as the most that it can be."""
        config = self._job.config
        once = TokenUsage(
            calls=1,
            prompt_tokens=len(json.dumps(body)),  # no token stands for less than a byte
            completion_tokens=config.max_completion_tokens,
        )
        used = bound = sum([once] * config.max_retries, start=once)
        self._budget.reserve(bound, self._deadline - time.monotonic())
        try:
            answer = send(
                body,
                timeout_s=config.timeout_s,
                max_retries=config.max_retries,
                max_seconds=self._deadline - time.monotonic(),
            )
            unknown = answer.unanswered + (answer.status == 200 and answer.usage is None)
            used = sum([once] * unknown, start=answer.usage or TokenUsage())
        finally:
            self._budget.settle(bound, used)
            self.usage += used
        return answer, used


def _validate(answer: Answer, request: ProposalRequest) -> tuple[list[Scheme], str | None]:
    """Return the schemes of an answer, or the problem with it."""
    if answer.problem is not None:
        return [], answer.problem
    try:
        return parse_reply(answer.text, request), None
    except ProxyReplyError as error:
        return [], str(error)


def propose_by_llm(job: AskJob, report: Report, budget: Budget | None = None) -> ProposalReply:
    """Ask for schemes; an error is a result, too, for the search has another proxy.

    Args:
        job: The request.
        report: Is called with the usage.
        budget: The budget that all calls share; None means one of this call alone.
    """
    started = time.perf_counter()
    budget = budget or Budget(job.config)
    model = LanguageModel(job, budget)
    schemes: list[Scheme] = []
    error = None
    try:
        schemes = model.propose()
    except ProxyError as failure:
        error = str(failure)
        logger.warning("group %d, round %d: %s", job.request.group, job.request.round, error)
    used, seconds = model.usage, time.perf_counter() - started
    report({"proxy_tokens": used.tokens, "proxy_seconds": seconds}, job.request.round + 1)
    return ProposalReply(
        schemes=schemes,
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        calls=used.calls,
        cost=budget.cost(used),
        error=error,
        seconds=seconds,
    )
