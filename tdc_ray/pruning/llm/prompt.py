"""The prompt: the task, the knapsack's scheme, what cuts cost, what was measured."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from tdc_ray.models.units import Unit
from tdc_ray.pruning.changes import (
    LEAST_FACTOR,
    MOST_FACTOR,
    MOST_WORSE,
    Planned,
    Planner,
    block_of,
)
from tdc_ray.pruning.costs import Quantity
from tdc_ray.pruning.llm.answer import Answer
from tdc_ray.pruning.memory import MemoryEntry, best
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.space import Scheme, Space

Message = Mapping[str, Any]
"""A message of OpenAI's chat protocol."""

SYSTEM = "You find out where the predictions of a pruning search are wrong."

TASK = """\
# Task
A diffusion model's network denoises images in many timesteps; timestep 0 is the least noisy. The
timesteps are split into groups, and each group gets an expert of its own: the network with some
units cut to a smaller width. A scheme gives every unit its width. A knapsack chooses the scheme:
within the group's limit of {name} it keeps what costs most to cut by the predictions below. Those
are noisy, add up what each unit costs alone, and know nothing of other groups. It is your part to
doubt them: look for structure (blocks, resolutions, neighbouring groups, earlier rounds, predicted
against measured) and say where and why the knapsack errs.

You give changes with a hypothesis. The knapsack then makes the best scheme under them, which
always meets the limit, and it is measured. The aim is the least measured increase of the group.

# Group {request.group}
timesteps: {request.timesteps[0]} to {request.timesteps[1]}, \
signal-to-noise ratio {request.snr_db[0]:.4g} to {request.snr_db[1]:.4g} dB
limit: {share} % of the {name} of the uncut base
loss of the uncut base: {request.loss_base:.6g}
round: {round} of {request.num_rounds}; measurements left in this round: \
{request.num_candidates}; later rounds see what this one measured

# The knapsack's scheme
It is predicted to cost an increase of {increase}.

{columns}
"""

COLUMNS = (
    "unit | block | kind | resolution | legal widths | width | next down | next up | factor | "
    "best of group {groups}"
)

LEGEND = """
unit: its number, in the order of the forward pass. kind: residual = inner width of a block;
  attention = heads; feed-forward = a transformer's inner channels; stream = width of the residual
  stream, which many blocks share; traced = heads, or channels that one layer reads.{removed}
width: the knapsack's. next down, next up: the next legal width: what it adds to the {name}, in
  points (% of the base's), and to the increase, with the standard error of that.{mark}
  An increase of 0 means that the prediction did not rise above its noise, not that it is free.
factor: measured over predicted cost of the unit, as far as this group's measurements tell.
best of group: the unit's width in the best measured scheme of this and the nearest other groups.
images: how many noised images a scheme was measured on, and which draw of them.
increase: {increase}.
Cuts were predicted {how}.{scale}

# Blocks, with their {name} in the knapsack's scheme in points
{blocks}
"""

REMOVED = (
    "\n  At width 0 the attention or feed-forward is removed as a whole, and with all of them the "
    "block."
)

MARK = (
    "\n  * marks steps whose cost was measured on models that were cut elsewhere too, the others "
    "on the uncut base."
)

MEASURED = """
# Measured schemes of this group, oldest first
round | proposed by | images | predicted | measured | measured / predicted | loss above the \
base's | {name} | widths other than the knapsack's above | hypothesis
"""

OTHERS = """
# Measured schemes of other groups: of their own timesteps and limits
group | round | proposed by | images | predicted | measured | measured / predicted | loss above \
the base's | {name} | widths other than the knapsack's above | hypothesis
"""

WORDS: Mapping[Quantity, str] = {"macs": "macs", "time": "time"}
"""The prompt's word for the limited quantity."""

FORM = """
# Answer
predict is free (up to {predictions} replies between two measurements): it tells what the
knapsack makes of changes, and what that is predicted to cost, without distrust. measure takes one
of the measurements left. Not measured are schemes that this group has measured, the knapsack's
own, and those predicted to cost more than {worse:g} times as much as that. Without any change the
knapsack's own scheme is made.
Changes:
- bounds: a unit (by number) keeps at least and at most some width; the same twice pins it.
- distrust: a factor ({least:g} to {most:g}) on what cuts of a unit (by number) or of a block (by
  name) are predicted to cost; above 1: they cost more than predicted.
- moves: points of {name} from one block to another (by name), as against the knapsack's scheme.
- shares: the least and the most points of {name} that a block (by name) takes.
For a block's name, down and up stand for all such blocks together.
Changes that contradict earlier ones, or the limit, are dropped, and you are told which.
Call the tools predict and measure. If you have none, answer with one JSON object (letters stand
for your values, lists may be empty):
{example}
"""

EXAMPLE = (
    '{"reasoning": "...", "hypothesis": "...", "bounds": [{"unit": N, "least": W, "most": W}], '
    '"distrust": [{"where": "N or block", "factor": F}], "moves": [{"from_block": "block", '
    '"to_block": "block", "points": P}], "shares": [{"block": "block", "least": P, "most": P}], '
    '"action": "predict or measure"}'
)

MIN_RANGE = 4
"""Least number of widths more than 1 apart that are written as a range."""

MAX_QUOTED_CHARS = 20_000
"""Most characters of a bad reply that are sent back with its problems."""


def messages_for(
    request: ProposalRequest,
    memory: Sequence[MemoryEntry],
    planner: Planner,
    *,
    max_entries: int,
    max_predictions: int,
) -> list[Message]:
    """Return the messages that ask for changes.

    Args:
        request: The group, its limit, and how many schemes may be measured.
        memory: Entries of the memory bank, those of this round too.
        planner: What makes the schemes.
        max_entries: Most entries in the prompt.
        max_predictions: Replies that may only predict.
    """
    space, name = request.space, WORDS[request.space.quantity]
    start = planner.start
    nearest = _best_of(request, memory)
    content = TASK.format(
        request=request,
        name=name,
        share=_points(request.limit, space),
        round=request.round + 1,
        increase=f"{start.increase:.5g} ± {start.standard_error:.2g}",
        columns=COLUMNS.format(groups=", ".join(map(str, nearest))),
    )
    content += _units(request, planner, nearest)
    content += _legend(request, memory, planner)
    content += _memory(request, memory, start.scheme, max_entries)
    content += FORM.format(
        predictions=max_predictions,
        worse=MOST_WORSE,
        least=LEAST_FACTOR,
        most=MOST_FACTOR,
        name=name,
        example=EXAMPLE,
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def assistant_message(answer: Answer) -> Message:
    """Return an answer as the message that precedes what is said to it."""
    text = answer.text
    if len(text) > MAX_QUOTED_CHARS:
        text = f"{text[:MAX_QUOTED_CHARS]} [...]"
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                # Servers read it as a JSON object, and fail where it is none.
                "function": {"name": call.name, "arguments": _object_or_empty(call.arguments)},
            }
            for call in answer.calls
        ]
    return message


def retry_messages(answer: Answer, problem: str) -> list[Message]:
    """Return the messages after a bad reply: the reply and its problems.

    An empty reply is requested again, unchanged.
    """
    if not answer.text and not answer.calls:
        return []
    content = f"Your answer cannot be used:\n{problem}\nAnswer again, in the form described above."
    results = [result_message(call.id, {"error": problem}) for call in answer.calls]
    return [assistant_message(answer), *(results or [{"role": "user", "content": content}])]


def result_message(call: str | None, result: Mapping[str, Any]) -> Message:
    """Return the message that answers one request: a tool's, or the user's without tools."""
    content = json.dumps(result)
    if call is None:
        return {"role": "user", "content": content}
    return {"role": "tool", "tool_call_id": call, "content": content}


def planned_result(request: ProposalRequest, planner: Planner, planned: Planned) -> dict[str, Any]:
    """Return the result of predict, without regard to distrust."""
    space, start = request.space, planner.start
    changed = {
        str(number): [start.scheme[unit.name], planned.scheme[unit.name]]
        for number, unit in enumerate(space.units)
        if planned.scheme[unit.name] != start.scheme[unit.name]
    }
    result: dict[str, Any] = {
        "predicted_increase": _rounded(planned.increase),
        "standard_error": _rounded(planned.standard_error, 2),
        "knapsack_increase": _rounded(start.increase),
        "cost_in_percent": float(_points(space.cost(planned.scheme), space)),
        "limit_in_percent": float(_points(request.limit, space)),
        "widths_changed": changed,
        "points_changed": _points_changed(planner, planned.scheme),
    }
    if planned.dropped:
        result["dropped"] = list(planned.dropped)
    return result


def _points_changed(planner: Planner, scheme: Scheme) -> dict[str, list[float | None]]:
    """Return what blocks take in the knapsack's scheme and in another, where that differs."""
    before, after = planner.points(planner.start.scheme), planner.points(scheme)
    return {
        name: [_rounded(before[name], 4), _rounded(after[name], 4)]
        for name in before
        if before[name] != after[name]
    }


def measured_result(request: ProposalRequest, entry: MemoryEntry) -> dict[str, Any]:
    """Return the result of measure."""
    result = {
        "measured_increase": _rounded(entry.increase(request.loss_base)),
        "predicted_increase": None if entry.predicted is None else _rounded(entry.predicted),
        "measurements_left_in_round": request.num_candidates,
        "images": entry.num_images,
    }
    if entry.loss_base is not None:
        result["loss_above_base"] = _rounded(entry.loss - entry.loss_base)
        result["standard_error_of_loss"] = entry.standard_error and _rounded(entry.standard_error)
    return result


def _rounded(value: float, digits: int = 5) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _object_or_empty(text: str) -> str:
    try:
        from_json(text, allow_inf_nan=False)
        return text if text.lstrip().startswith("{") else "{}"
    except ValueError:
        return "{}"


def _best_of(
    request: ProposalRequest, memory: Sequence[MemoryEntry]
) -> dict[int, MemoryEntry | None]:
    """Return the best entries of the group and of the nearest ones below and above it."""
    by_group: dict[int, list[MemoryEntry]] = {}
    for entry in memory:
        by_group.setdefault(entry.group, []).append(entry)
    own = request.group
    below = max((group for group in by_group if group < own), default=None)
    above = min((group for group in by_group if group > own), default=None)
    found: dict[int, MemoryEntry | None] = {own: None}
    for group in (own, below, above):
        if group in by_group:
            found[group] = best(by_group[group])
    return found


def _units(
    request: ProposalRequest, planner: Planner, nearest: Mapping[int, MemoryEntry | None]
) -> str:
    space, scheme, predictor = request.space, planner.start.scheme, planner.predictor
    lines = []
    for number, unit in enumerate(space.units):
        width = scheme[unit.name]
        others = space.next_narrower(unit.name, width), space.next_wider(unit.name, width)
        steps = [_step(request, planner, number, other) for other in others]
        kept = [str(entry.widths[unit.name]) if entry else "-" for entry in nearest.values()]
        factor = f"{predictor.positive[number]:.2f} ± {predictor.spreads[number]:.2f}"
        cells = [
            str(number),
            block_of(unit),
            unit.kind,
            _resolution(unit),
            _widths_text(space.legal[unit.name]),
            str(width),
            *steps,
            factor,
            ", ".join(kept),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def _step(request: ProposalRequest, planner: Planner, number: int, other: int) -> str:
    """Write what another width of a unit does to the cost and to the increase."""
    space, scheme, unit = request.space, planner.start.scheme, request.space.units[number]
    width = scheme[unit.name]
    if other == width:
        return "-"
    cost = space.cost({**scheme, unit.name: other}) - space.cost(scheme)
    change, error = planner.predictor.change(number, width, other)
    mark = "*" if min(other, width) <= request.pruned_elsewhere.get(unit.name, 0) else ""
    return f"{other}: {100 * cost / space.cost_base:+.4g}, {change:+.4g} ± {error:.2g}{mark}"


def _legend(request: ProposalRequest, memory: Sequence[MemoryEntry], planner: Planner) -> str:
    space, scale = request.space, planner.predictor.scale
    own = [entry for entry in memory if entry.group == request.group]
    points = planner.points(planner.start.scheme)
    by_distance = any(e.loss_refit is not None and e.distance is not None for e in own)
    return LEGEND.format(
        name=WORDS[space.quantity],
        mark=MARK if request.pruned_elsewhere else "",
        removed="" if all(unit.least for unit in space.units) else REMOVED,
        increase="mean square of how far a model's prediction is from the uncut base's, by which "
        "schemes are ranked"
        if by_distance or request.model is not None
        else "loss above the uncut base's, by which schemes are ranked",
        how="by a quadratic model of the loss, from gradients"
        if request.model is not None
        else "by measuring each unit alone",
        scale=f" All of them were multiplied by {scale:.4g}, as measurements tell."
        if scale != 1
        else " No measurement has corrected them yet: the standard errors are assumed.",
        blocks="; ".join(f"{name}: {share:.4g}" for name, share in points.items()),
    )


def _resolution(unit: Unit) -> str:
    side = math.isqrt(unit.pixels)
    return f"{side}x{side}" if side * side == unit.pixels else f"{unit.pixels} pixels"


def _widths_text(legal: Sequence[int]) -> str:
    """Format a unit's legal widths: equal steps, of which there may be hundreds, as a range."""
    parts, first = [], 0
    while first < len(legal):
        last = min(first + 1, len(legal) - 1)
        step = legal[last] - legal[first]
        while last + 1 < len(legal) and legal[last + 1] - legal[last] == step:
            last += 1
        if step > 1 and last - first < MIN_RANGE - 1:
            parts.append(str(legal[first]))
            first += 1
            continue
        text = f"{legal[first]}-{legal[last]}" if last > first else str(legal[first])
        parts.append(f"{text} by {step}" if step > 1 else text)
        first = last + 1
    return ", ".join(parts)


def _memory(
    request: ProposalRequest, memory: Sequence[MemoryEntry], scheme: Scheme, max_entries: int
) -> str:
    """List the group's own entries, and what room is left of the nearest groups' best."""

    def order(entry: MemoryEntry) -> tuple[int, int, bool, float]:
        distance = abs(entry.group - request.group)
        return (distance, entry.group, math.isnan(entry.rank), entry.rank)

    entries = sorted(memory, key=order)[:max_entries]
    own = sorted((e for e in entries if e.group == request.group), key=lambda e: e.key)
    others = [entry for entry in entries if entry.group != request.group]
    name = WORDS[request.space.quantity]
    text = MEASURED.format(name=name)
    text += "\n".join(_entry(request, e, scheme) for e in own) or "None so far."
    ratios = [r for e in own if (r := _ratio(request, e)) is not None]
    if len(ratios) > 1:
        spread = statistics.stdev(ratios)
        text += f"\nmeasured / predicted: {statistics.fmean(ratios):.3f}, deviation {spread:.2g}"
    if others:
        text += "\n" + OTHERS.format(name=name)
        text += "\n".join(f"{e.group} | {_entry(request, e, scheme)}" for e in others)
    return text + "\n"


def _increase(request: ProposalRequest, entry: MemoryEntry) -> float:
    base = request.loss_base if entry.group == request.group else entry.loss_base
    return entry.increase(math.nan if base is None else base)


def _ratio(request: ProposalRequest, entry: MemoryEntry) -> float | None:
    increase = _increase(request, entry)
    if not entry.predicted or not math.isfinite(increase):
        return None
    return increase / entry.predicted


def _entry(request: ProposalRequest, entry: MemoryEntry, scheme: Scheme) -> str:
    space, ratio, loss = request.space, _ratio(request, entry), "-"
    if entry.loss_base is not None:
        error = "" if entry.standard_error is None else f" ± {entry.standard_error:.2g}"
        loss = f"{entry.loss - entry.loss_base:+.4g}{error}"
    widths = [
        f"{number}: {entry.widths[unit.name]}"
        for number, unit in enumerate(space.units)
        if entry.widths[unit.name] != scheme[unit.name]
    ]
    images = "-" if entry.num_images is None else f"{entry.num_images} of {entry.noise}"
    cells = [
        str(entry.round + 1),
        entry.source,
        images,
        "-" if entry.predicted is None else f"{entry.predicted:.5g}",
        f"{_increase(request, entry):.5g}",
        "-" if ratio is None else f"{ratio:.3f}",
        loss,
        _points(space.cost(entry.widths), space),
        ", ".join(widths) or "none",
        entry.hypothesis or "-",
    ]
    return " | ".join(cells)


def _points(cost: float, space: Space) -> str:
    return f"{100 * cost / space.cost_base:.4g}"
