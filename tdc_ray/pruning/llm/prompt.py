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
from tdc_ray.pruning.predictor import FACTOR_SPREAD, PREDICTION_ERROR
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
{request.num_candidates}; until it ends changes are to the scheme
below, and predictions rest on what is listed below; later rounds see what this one measured

# The knapsack's scheme
its predicted increase: {increase}

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
  points (% of the base's), and to the predicted increase.{mark}
  below noise: what the step does was not told from noise, which does not mean that it is free.
factor: measured over predicted cost of the unit, as far as this group's measurements tell.
best of group: the unit's width in the best measured scheme of this and the nearest other groups.
predicted: {predicted}.{scale}
  In the lists of measured schemes it is what was predicted before each was measured.
  Its ± is assumed, not measured: {spread:g} % of what a unit costs, less for units of which the
  group's measurements tell something, and for a scheme {error:g} % of the whole besides.
measured: {measured},
  by which schemes are ranked, on {heat}.
  Its ± is the standard error over the images. All schemes of a group have the same images, so
  differences between them are known better than that.
images: how many noised images a scheme was measured on, and which draw of them.

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

DISTANCE = "the mean square of how far the prediction is from the uncut base's"
LOSS = "the increase of the loss above the uncut base's"
"""What schemes are ranked by: with a refit, and without one."""

OTHER_QUANTITY = """
  That is another quantity than the measured one. What was predicted before any scheme of this
  group was measured is such a loss, and measured / predicted of it only says how the two compare;
  what is predicted after that is scaled to what is measured."""

DECIDES = """\
  That is the first heat of a race: the best of yours and of the others' are measured anew, on
  {images}, which decides"""

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
of the measurements left, and tells the same beside what it measured. Not measured are schemes
that this group has measured, the knapsack's own, and those predicted to cost more than {worse:g}
times as much as that. Without any change the knapsack's own scheme is made. done ends the round
without the measurements that are left, where nothing seems worth one.
Changes:
- bounds: a unit (by number) keeps at least and at most some width; the same twice pins it.
- distrust: a factor on what cuts of a unit (by number) or of a block (by name) are predicted to
  cost; above 1: they cost more than predicted. All on a unit together are {least:g} to {most:g}.
- moves: points of {name} from one block to another (by name), as against the knapsack's scheme.
- shares: the least and the most points of {name} that a block (by name) takes.
For a block's name, down and up stand for all such blocks together.
Changes that contradict earlier ones, or the limit, are dropped, and moves may be done in part: you
are told which.
Call the tools predict, measure and done. If you have none, answer with one JSON object (letters
stand for your values, lists may be empty):
{example}
"""

EXAMPLE = (
    '{"reasoning": "...", "hypothesis": "...", "bounds": [{"unit": N, "least": W, "most": W}], '
    '"distrust": [{"where": "N or block", "factor": F}], "moves": [{"from_block": "block", '
    '"to_block": "block", "points": P}], "shares": [{"block": "block", "least": P, "most": P}], '
    '"action": "predict, measure or done"}'
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
        increase=_predicted(f"{start.increase:.5g}", start.standard_error),
        columns=COLUMNS.format(groups=", ".join(map(str, nearest))),
    )
    content += _units(request, planner, nearest)
    content += _legend(request, planner)
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
        "predicted_standard_error": _rounded(planned.standard_error, 2),
        "knapsack_increase": _rounded(start.increase),
        "cost_in_percent": float(_points(space.cost(planned.scheme), space)),
        "limit_in_percent": float(_points(request.limit, space)),
        "widths_changed": changed,
        "points_changed": _points_changed(planner, planned.scheme),
    }
    if planned.notes:
        result["not_done_as_asked"] = list(planned.notes)
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
    """Return the result of measure, beside that of planning what was measured."""
    error = entry.increase_error
    result = {
        "measured_increase": _rounded(entry.increase(request.loss_base)),
        "measured_standard_error": None if error is None else _rounded(error, 2),
        "predicted_increase": None if entry.predicted is None else _rounded(entry.predicted),
        "measurements_left_in_round": request.num_candidates,
        "images": entry.num_images,
    }
    if entry.loss_base is not None:
        result["loss_above_base"] = _rounded(entry.loss - entry.loss_base)
        result["loss_standard_error"] = entry.standard_error and _rounded(entry.standard_error, 2)
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
    increase = _predicted(f"{change:+.4g}", error)
    return f"{other}: {100 * cost / space.cost_base:+.4g}, {increase}{mark}"


def _predicted(increase: str, error: float) -> str:
    """Write a predicted increase; only one that was not told from noise has no error."""
    return f"{increase} ± {error:.2g}" if error else "below noise"


def _legend(request: ProposalRequest, planner: Planner) -> str:
    space, scale = request.space, planner.predictor.scale
    points = planner.points(planner.start.scheme)
    measured = DISTANCE if request.num_refit_images else LOSS
    predicted, other = f"{measured},\n  by a quadratic model of the loss, from gradients", ""
    if request.model is None:
        predicted = f"{LOSS},\n  measured with each unit cut alone, and added up"
        other = OTHER_QUANTITY if measured != LOSS else ""
    return LEGEND.format(
        name=WORDS[space.quantity],
        mark=MARK if request.pruned_elsewhere else "",
        removed="" if all(unit.least for unit in space.units) else REMOVED,
        predicted=predicted,
        measured=measured,
        heat=_heat(request),
        scale=other
        + (
            f"\n  All of them were multiplied by {scale:.4g}, as measurements tell."
            if scale != 1
            else "\n  No measurement has corrected them yet."
        ),
        spread=100 * FACTOR_SPREAD,
        error=100 * PREDICTION_ERROR,
        blocks="; ".join(f"{name}: {share:.4g}" for name, share in points.items()),
    )


def _heat(request: ProposalRequest) -> str:
    """Write what proposed schemes are measured on, and what decides after that."""

    def images(share: float) -> str:
        refit = round(share * request.num_refit_images)
        after = f" after a refit from {refit}" if refit else ""
        return f"{round(share * request.num_images)} noised images{after}"

    if request.images_share == 1:
        return images(1)
    return f"{images(request.images_share)}.\n{DECIDES.format(images=images(1))}"


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
    num_own = sum(entry.group == request.group for entry in memory)
    text += "\n".join(_entry(request, e, scheme) for e in own) or "None so far." * (not num_own)
    text += _left_out(num_own - len(own), "of this group, which measured worse,")
    ratios = [r for e in own if (r := _ratio(request, e)) is not None]
    if len(ratios) > 1:
        spread = statistics.stdev(ratios)
        text += f"\nmeasured / predicted: {statistics.fmean(ratios):.3f}, deviation {spread:.2g}"
    if others:
        text += "\n" + OTHERS.format(name=name)
        text += "\n".join(f"{e.group} | {_entry(request, e, scheme)}" for e in others)
    left_out = len(memory) - num_own - len(others)
    return text + _left_out(left_out, "of other groups, farther or worse,") + "\n"


def _left_out(number: int, which: str) -> str:
    return f"\nNot listed: {number} more {which}" if number else ""


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
        loss = f"{entry.loss - entry.loss_base:+.4g}{_error(entry.standard_error)}"
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
        f"{_increase(request, entry):.5g}{_error(entry.increase_error)}",
        "-" if ratio is None else f"{ratio:.3f}",
        loss,
        _points(space.cost(entry.widths), space),
        ", ".join(widths) or "none",
        entry.hypothesis or "-",
    ]
    return " | ".join(cells)


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" ± {standard_error:.2g}"


def _points(cost: float, space: Space) -> str:
    return f"{100 * cost / space.cost_base:.4g}"
