"""The proxy that asks a language model for changes of the knapsack's scheme.

It predicts as often as it likes and has schemes measured until the round's measurements are
spent, or it says that it is done: as many as the offline proxy has, whose schemes are all measured
before, as they would be without it (`pruning.search`). So nonsense takes nothing from the offline
proxy, and what is chosen is never behind what that one alone would have found (`pruning.race`).

All changes of a round are to the scheme, and by the predictions, of its start, which the prompt
shows: the same pin means the same change in every turn, so that what one measurement came to can
be held against the next, and the hypothesis behind it against the prompt. What was measured
corrects the predictions of the next round.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.errors import ProxyError, ProxyReplyError
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.pruning.changes import Planned, Planner, short_line
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.knapsack import step_worth
from tdc_ray.pruning.llm.answer import Answer, Done, Request, TokenUsage
from tdc_ray.pruning.llm.budget import Budget
from tdc_ray.pruning.llm.chat import (
    check_server,
    send,
    server_host,
    token_limit_field,
)
from tdc_ray.pruning.llm.prompt import (
    Message,
    assistant_message,
    measured_result,
    messages_for,
    planned_result,
    result_message,
    retry_messages,
)
from tdc_ray.pruning.llm.reply import Form, num_format_bytes, read_reply
from tdc_ray.pruning.llm.transcripts import (
    VERSION,
    LLMExchange,
    append_exchange,
    find_transcripts,
    recorded_answers,
    transcript_path,
)
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.proxy import Proposal, ProposalRequest, Round
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.space import Scheme, fit_to_limit

logger = logging.getLogger(__name__)

UNKNOWN_FORMAT = (400, 404, 422)
"""HTTP statuses of servers that do not know tools, or structured output."""

TRIED = "this group has measured this scheme already"

LLM_SERVICE = "llm"
"""Name of the pool's service that makes the calls; see `LLMGateway`."""


def language_model_proxy(search: GroupSearch, round_: Round, cost: SearchCost) -> Chain[None]:
    """Let a language model have schemes measured; why it leaves some unmeasured is noted."""
    context, request = search.context, round_.request
    conversation = Conversation()
    while round_.left:
        asking = replace(request, num_candidates=round_.left)
        job = AskJob(
            context.proxy,
            asking,
            tuple(round_.memory),
            context.run_dir.transcripts,
            conversation,
            tuple(round_.measured),
        )
        turn = f"-{conversation.turn}" * (conversation.turn > 0)
        name = f"round-{request.round}-beside{turn}"  # 0.1.0 asked otherwise under "-ask"
        item = WorkItem(
            key=search.key(name),
            function=propose_by_llm,
            job=job,
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
        cost.proxy_cost += reply.cost
        where = f"{search.name}, round {request.round}"
        cost.notes += [f"{where}: a change of the language model: {note}" for note in reply.notes]
        if reply.error is not None:
            cost.notes.append(f"{where}: the language model was given up: {reply.error}")
            return
        measured = yield from round_.measure(_proposals(request, reply))
        if reply.done is not None and round_.left:
            cost.notes.append(
                f"{where}: the language model left {round_.left} of {request.num_candidates} "
                f"measurements unused: {reply.done or 'it did not say why'}"
            )
        if reply.done is not None or not measured:
            return
        conversation = reply.conversation


def _proposals(request: ProposalRequest, reply: "ProposalReply") -> list[Proposal]:
    """Return a reply's proposals; those of 0.1.0 may be above the limit, or below it."""
    proposals = []
    for place, scheme in enumerate(reply.schemes):
        hypothesis, repaired = "", False
        if reply.hypotheses:
            hypothesis, repaired = reply.hypotheses[place], reply.repaired[place]
        else:
            predicted = Planner(request, ()).predictor
            worth = step_worth(request.space, predicted.curves)
            fitted = fit_to_limit(request.space, scheme, request.limit, worth)
            scheme, repaired = fitted, fitted != dict(scheme)
        source = "llm/repaired" if repaired else "llm"
        proposals.append(Proposal(source, scheme, hypothesis or None))
    return proposals


def check_proxy(config: ProxyConfig) -> None:
    """Check that there is an API key, or a transcript to replay.

    Raises:
        ProxyError: There is none in this process's environment, or in ``proxy.replay``, or the
            server refuses it, or the transcripts are of an older question.
    """
    if config.replay is None:
        server_host(config.base_url)
        check_server(config.base_url)
    else:
        find_transcripts(Path(config.replay))


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said in a round so far."""

    messages: tuple[Message, ...] = ()
    """Empty at its start."""

    pending: tuple[str | None, ...] = ()
    """For every scheme of the last turn the id of the tool call that waits for its losses; None
    without tools."""

    schemes: tuple[Scheme, ...] = ()
    """The schemes of the last turn."""

    planned: tuple[Mapping[str, Any], ...] = ()
    """Of each of them what the changes came to (`planned_result`); empty where it was not kept
    yet."""

    form: Form | None = None
    """The form that the server takes; None: not known."""

    turn: int = 0
    """How often the model has had schemes measured."""


@dataclass(frozen=True, slots=True)
class AskJob:
    """A request for one group's next schemes of one round."""

    config: ProxyConfig
    request: ProposalRequest
    """As many schemes as it asks for may be measured."""

    memory: tuple[MemoryEntry, ...]
    """What the group sees at the round's start; changes are to the scheme that follows from it."""

    transcripts: Path
    """The run's folder of transcripts."""

    conversation: Conversation = field(default_factory=Conversation)
    measured: tuple[MemoryEntry, ...] = ()
    """What schemes of the model came to in this round."""


@dataclass(frozen=True, slots=True)
class ProposalReply:
    """The schemes that are to be measured, or the error, and the usage."""

    schemes: tuple[Scheme, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 0
    cost: float = 0.0
    error: str | None = None
    """Why there are no schemes."""

    seconds: float = 0.0
    hypotheses: tuple[str, ...] = ()
    """Behind each scheme; empty in replies of 0.1.0."""

    repaired: tuple[bool, ...] = ()
    """Whether some of the changes behind a scheme did not count, or only in part."""

    notes: tuple[str, ...] = ()
    """Which these are, and why."""

    done: str | None = None
    """Why the model wants nothing more measured in this round; None means that it may."""

    conversation: Conversation = field(default_factory=Conversation)


NO_REPLY = ProposalReply(error="whoever makes the calls died")
"""Result of :func:`propose_by_llm` if its process died too often."""


class _Chosen(NamedTuple):
    """A scheme that is to be measured."""

    call: str | None
    """Id of the tool's call that asks for it."""

    hypothesis: str
    planned: Planned
    result: Mapping[str, Any]
    """Of planning it (`planned_result`)."""


class LanguageModel:
    """Asks a language model, or the transcripts of an earlier run, what to measure next."""

    def __init__(self, job: AskJob, budget: Budget) -> None:
        self._job, self._budget = job, budget
        self._deadline = time.monotonic() + job.config.max_seconds
        self._recorded: list[Answer] | None = None
        self._number = 0
        self.usage = TokenUsage()
        """Usage of its calls."""

    def propose(self) -> ProposalReply:
        """Let it predict until it has schemes measured, or is done, and return these.

        Raises:
            ProxyError: No key, no answer, no usable reply, or no budget for one.
        """
        config, request, said = self._job.config, self._job.request, self._job.conversation
        limit = self._begin()
        planner = Planner(request, self._job.memory)
        messages = [*said.messages, *self._results_so_far()] or messages_for(
            request,
            self._job.memory,
            planner,
            max_entries=config.max_memory_entries,
            max_predictions=config.max_predictions,
        )
        forms = list(get_args(Form)) if config.reply_format == "auto" else [config.reply_format]
        is_live = self._recorded is None  # in a replay the server refuses again
        known = self._budget.forms if is_live and config.reply_format == "auto" else {}
        server = config.base_url, config.model
        form = said.form or known.get(server, forms[0])
        answered, num_bad, num_predictions = bool(said.messages), 0, 0
        while True:
            fields = {
                "model": config.model,
                "messages": messages,
                limit: config.max_completion_tokens,
                "temperature": config.temperature,
            }
            body = {name: value for name, value in fields.items() if value is not None}
            if config.stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            answer, asked, unread, problem = self._ask(body, form)
            if problem is not None:
                is_unknown = answer.status in UNKNOWN_FORMAT and form != forms[-1]
                if is_unknown and config.reply_format == "auto" and not answered:
                    refused, form = form, forms[forms.index(form) + 1]
                    if is_live:
                        how = "%s takes no %s: asked for %s from now on"
                        logger.warning(how, config.model, refused, form)
                    continue
                num_bad += 1
                if answer.status != 200 or num_bad == config.max_replies:
                    raise ProxyError(f"{config.model}, reply {num_bad}: {problem}")
                messages = [*messages, *retry_messages(answer, problem)]
                continue
            answered, known[server] = True, form
            left = config.max_predictions - num_predictions
            chosen, results = self._decide(planner, asked, left - 1)
            messages = [*messages, assistant_message(answer), *results, *unread]
            reasons = [one.change.reasoning for one in asked if one.change.action == "done"]
            if chosen or reasons:
                said = Conversation(
                    messages=tuple(messages),
                    pending=tuple(one.call for one in chosen),
                    schemes=tuple(one.planned.scheme for one in chosen),
                    planned=tuple(one.result for one in chosen),
                    form=form,
                    turn=said.turn + 1,
                )
                return ProposalReply(
                    schemes=said.schemes,
                    hypotheses=tuple(one.hypothesis for one in chosen),
                    repaired=tuple(bool(one.planned.notes) for one in chosen),
                    notes=tuple(note for one in chosen for note in one.planned.notes),
                    done=short_line(reasons[0]) if reasons else None,
                    conversation=said,
                )
            if left == 0:
                raise ProxyError(
                    f"{config.model} had nothing measured in {config.max_predictions + 1} "
                    "replies: proxy.max_predictions."
                )
            num_predictions += 1

    def _begin(self) -> str:
        """Open the transcript that answers, or check the server; return its field of a limit."""
        config, folder = self._job.config, self._job.transcripts
        if config.replay is not None:
            path = self._transcript(find_transcripts(Path(config.replay)))
            self._recorded = recorded_answers(path, self._job.conversation.turn)
            return token_limit_field("")
        field_name = token_limit_field(server_host(config.base_url))
        self._budget.count_earlier(folder)
        return field_name

    def _transcript(self, folder: Path) -> Path:
        return transcript_path(folder, self._job.request.group, self._job.request.round)

    def _results_so_far(self) -> list[Message]:
        """Return the messages that tell how the schemes of the last turn measured."""
        job, messages = self._job, list[Message]()
        entries = {_key(entry.widths): entry for entry in job.measured}
        said = job.conversation
        planned = said.planned or ({},) * len(said.schemes)
        for call, scheme, told in zip(said.pending, said.schemes, planned, strict=True):
            entry = entries.get(_key(scheme))
            measured = entry and measured_result(job.request, entry)
            messages.append(
                result_message(call, {**told, **(measured or {"not_measured": TRIED})})
            )
        return messages

    def _decide(
        self, planner: Planner, asked: list[Request], left: int
    ) -> tuple[list[_Chosen], list[Message]]:
        """Plan what was asked for: return what is to be measured, and the answers to the rest.

        Args:
            planner: Makes the schemes.
            asked: What the reply asks for.
            left: Replies that may still only predict, unless one is measured.
        """
        request, known = self._job.request, (*self._job.memory, *self._job.measured)
        tried = {_key(e.widths) for e in known if e.group == request.group}
        chosen: list[_Chosen] = []
        results: list[tuple[str | None, dict[str, Any]]] = []
        for one in asked:
            change = one.change
            if isinstance(change, Done) or change.action == "done":
                continue
            planned = planner.plan(change)
            result = planned_result(request, planner, planned)
            objection = planner.objection(planned)
            if _key(planned.scheme) in tried:
                result["not_measured"] = TRIED
            elif change.action == "measure" and objection is not None:
                result["not_measured"] = objection
            elif change.action == "measure" and len(chosen) == request.num_candidates:
                result["not_measured"] = "no measurement is left in this round"
            elif change.action == "measure":
                chosen.append(_Chosen(one.call, change.hypothesis, planned, result))
                tried.add(_key(planned.scheme))
                continue
            results.append((one.call, result))
        # A measurement begins the count anew.
        left = self._job.config.max_predictions if chosen else left
        messages = [
            result_message(call, {**result, "replies_that_may_only_predict": left})
            for call, result in results
        ]
        return chosen, messages

    def _ask(
        self, body: dict[str, Any], form: Form
    ) -> tuple[Answer, list[Request], list[Message], str | None]:
        """Get the next answer, and read and note it.

        Returns:
            The answer, what it asks for, the answers to calls that cannot be read, for each has to
            have one, and why nothing of it can be used.
        """
        started = time.monotonic()
        if self._recorded is None:
            answer, used = self._call(body, form)
        elif self._recorded:
            answer, used = self._recorded.pop(0), TokenUsage()
        else:
            raise ProxyError("proxy.replay: the transcript has no more replies.")
        asked, unread, problem = list[Request](), dict[str | None, str](), answer.problem
        if problem is None:
            try:
                asked, unread = read_reply(answer)
            except ProxyReplyError as error:
                problem = str(error)
        if self._recorded is None:
            exchange = LLMExchange(
                request=answer.request,
                reply=answer.text,
                error=problem,
                usage=used,
                seconds=time.monotonic() - started,
                calls=answer.calls,
                status=answer.status,
                turn=self._job.conversation.turn,
                number=self._number,
                version=VERSION,
            )
            append_exchange(self._transcript(self._job.transcripts), exchange)
            self._number += 1
        results = [result_message(call, {"error": why}) for call, why in unread.items()]
        return answer, asked, results, problem

    def _call(self, body: dict[str, Any], form: Form) -> tuple[Answer, TokenUsage]:
        """Make a call within the budget; unknown usage counts as the most that it can be."""
        config = self._job.config
        once = TokenUsage(
            calls=1,
            # No token stands for less than a byte.
            prompt_tokens=len(json.dumps(body)) + num_format_bytes(form),
            completion_tokens=config.max_completion_tokens,
        )
        used = bound = sum([once] * config.max_retries, start=once)
        self._budget.reserve(bound, self._deadline - time.monotonic())
        try:
            answer = send(
                body,
                form,
                base_url=config.base_url,
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


def _key(scheme: Scheme) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(scheme.items()))


def propose_by_llm(job: AskJob, report: Report, budget: Budget | None = None) -> ProposalReply:
    """Ask for schemes; an error is a result, too, for the search has another proxy.

    Args:
        job: The request.
        report: Is called with the usage.
        budget: The budget that all calls share; None means one of this call alone.
    """
    started = time.perf_counter()
    budget = budget or Budget(job.config)
    model, reply = LanguageModel(job, budget), ProposalReply()
    try:
        reply = model.propose()
    except ProxyError as failure:
        reply = ProposalReply(error=str(failure))
        logger.warning("group %d, round %d: %s", job.request.group, job.request.round, reply.error)
    used, seconds = model.usage, time.perf_counter() - started
    report({"proxy_tokens": used.tokens, "proxy_seconds": seconds}, job.request.round + 1)
    return replace(
        reply,
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        calls=used.calls,
        cost=budget.cost(used),
        seconds=seconds,
    )
