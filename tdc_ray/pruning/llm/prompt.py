"""The prompt: the task, the units, the measurements, the memory bank."""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence

from tdc_ray.models.units import Unit
from tdc_ray.pruning.costs import Quantity
from tdc_ray.pruning.llm.reply import widths_text
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.space import Space

Message = Mapping[str, str]
"""Role and content."""

SYSTEM = (
    "You decide how the units of a neural network are narrowed. "
    "You answer with one JSON object and nothing else."
)

TASK = """\
# Task
A diffusion model's UNet denoises images in many timesteps; timestep 0 is the least noisy. The
timesteps are split into groups, and each group gets an expert of its own: the UNet with some
units cut to a smaller width, then fitted and trained on the group's timesteps alone. A scheme
gives every unit the width that it keeps.

Propose {request.num_candidates} different schemes for group {request.group}, \
best guess first, none of them in the
memory bank below. Each must have {meaning} of at most the
limit, as close to it as it gets, and a loss on the group's timesteps that is as low as possible.
A scheme above the limit is cut further by a plain rule, so its overshoot is lost; one below it
is widened by that rule until it is full.

# Group {request.group}
timesteps: {request.timesteps[0]} to {request.timesteps[1]}, \
signal-to-noise ratio {request.snr_db[0]:.4g} to {request.snr_db[1]:.4g} dB
{name} of the uncut base: {base}
limit: {limit} {unit} = {share} % of the base's
loss of the uncut base: {request.loss_base:.4g}
round: {round} of {request.num_rounds}; the memory bank grows with every round

# Units, in the order of the forward pass
"""

MAX_QUOTED_CHARS = 20_000
"""Most characters of a bad reply that are sent back with its problems."""

COLUMNS = (
    "number | unit | kind | place | resolution | channels | widths | {name} | step | score | low"
)

LEGEND = """
kind: residual = a block's inner width in GroupNorm groups; attention = heads; stream = the
  residual stream's width, which many blocks share.
place: down, mid or up with the number of its block, or the first convolution; resolution: of the
  feature maps there.
channels: of one step of width.
widths: the legal ones, all whole numbers from the first to the last; the last is uncut.{listed}
{held}
  {rule}
score: importance for this group's timesteps, mean over the unit's steps, as a z-score over the
  units; higher means that more is lost. The least important steps of a unit are cut first.
low: share of the unit's score, in %, that its less important half holds; far below 50 means that
  half of the unit is nearly free.
{times}
# Sensitivities
By how much the loss grows when a unit is cut, in % of the base's loss, as width: growth. The
smallest widths may be measured on models whose other units are narrower too.
Growths of small cuts roughly add up; what counts is growth per {name} saved.
"""

LISTED = " Where they are\n  listed, no others are legal."

TIMES = """
# Times
What the units' blocks take at their legal widths, in % of the base's time, as width: time.
{rows}
"""

ADDS_UP = "Macs add up: macs % of a scheme = 100 - sum of (uncut width - width) * step."

MULTIPLIES = (
    "It holds while all else is uncut: a stream's width multiplies with those of what reads it,\n"
    "  so that cuts of both save less than the sum of their steps."
)

TIMES_ADD_UP = (
    "Times add up: time % of a scheme = 100 - sum of (time uncut - time at the width kept), see\n"
    "  Times; a step is no more than the mean."
)


TRANSFORMER_LEGEND = """
kind: attention = heads; feed-forward = the inner channels between its two layers.
place: the number of the block; resolution: of the grid of patches.
"""

WORDS: Mapping[Quantity, Mapping[str, str]] = {
    "macs": {
        "name": "macs",
        "meaning": "macs (multiply-accumulates of one forward pass)",
        "unit": "macs",
        "held": "macs: those that the unit's steps hold, all else uncut, in % of the base's.\n"
        "step: those that go with one step of width, in % of the base's.",
    },
    "time": {
        "name": "time",
        "meaning": "a time (of one forward pass of a batch, as measured)",
        "unit": "microseconds",
        "held": "time: of the unit's block, uncut, in % of the base's.\n"
        "step: what goes with one step of width on average, in % of the base's.",
    },
}
"""The prompt's words for the limited quantity."""

FORM = """
# Answer
One JSON object of this form, a list of schemes, each a list of units and the widths they keep:
{example}
Units that are left out keep their full width. No unit twice in a scheme, no other keys, no text.
"""


def messages_for(
    request: ProposalRequest, memory: Sequence[MemoryEntry], *, max_entries: int
) -> list[Message]:
    """Return the messages that ask for schemes.

    Args:
        request: The group, its limit, and measurements of the base.
        memory: Entries of the memory bank.
        max_entries: Most entries in the prompt.
    """
    space, divisor = request.space, 1000 if request.space.quantity == "time" else 1
    head = TASK.format(
        **WORDS[space.quantity],
        request=request,
        round=request.round + 1,
        base=space.cost_base // divisor,
        limit=request.limit // divisor,
        share=_percent(request.limit, space),
    )
    half = [
        {"unit": u.name, "keep": space.floor_width(u.name, u.width // 2)} for u in space.units[:2]
    ]
    form = FORM.format(example=json.dumps({"schemes": [half]}))
    parts = [_units(request), _sensitivities(request), _memory(request, memory, max_entries)]
    content = "".join([head, *parts, form])
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def retry_messages(reply: str, problem: str) -> list[Message]:
    """Return the messages after a bad reply: the reply and its problems.

    An empty reply is requested again, unchanged.
    """
    if not reply:
        return []
    if len(reply) > MAX_QUOTED_CHARS:
        reply = f"{reply[:MAX_QUOTED_CHARS]} [...]"
    content = (
        f"Your answer cannot be used:\n{problem}\nAnswer again, with the whole JSON object of the "
        "form described above and nothing else."
    )
    return [{"role": "assistant", "content": reply}, {"role": "user", "content": content}]


def _units(request: ProposalRequest) -> str:
    space, words = request.space, WORDS[request.space.quantity]
    means = [statistics.fmean(request.scores[unit.name]) for unit in space.units]
    mean, spread = statistics.fmean(means), statistics.pstdev(means)
    lines = [COLUMNS.format(**words)]
    for number, unit in enumerate(space.units):
        cells = [
            str(number),
            unit.name,
            unit.kind,
            _place(unit),
            _resolution(unit),
            str(unit.channels),
            widths_text(space.legal[unit.name], "-"),
            _percent(space.costs.marginal_cost(unit.name, 0, unit.width, space.full), space),
            _percent(statistics.fmean(space.step_costs(unit.name)), space),
            f"{(means[number] - mean) / spread if spread else 0.0:+.2f}",
            _low(request.scores[unit.name]),
        ]
        lines.append(" | ".join(cells))
    are_all_legal = all(len(legal) == legal[-1] for legal in space.legal.values())
    is_time = space.quantity == "time"
    adds_up = all(unit.kind != "stream" for unit in space.units)
    legend = LEGEND.format(
        **words,
        listed="" if are_all_legal else LISTED,
        rule=TIMES_ADD_UP if is_time else ADDS_UP if adds_up else MULTIPLIES,
        times=TIMES.format(rows=_times(space)) if is_time else "",
    )
    if any(unit.kind == "feed-forward" for unit in space.units):
        legend = TRANSFORMER_LEGEND + legend[legend.index("channels:") :]
    return "\n".join([*lines, legend])


def _place(unit: Unit) -> str:
    if (block := re.match(r"transformer_blocks\.(\d+)", unit.name)) is not None:
        return block[1]
    match = re.search(r"(down|up)_blocks\.(\d+)|mid_block", unit.name)
    if match is None:
        return "first"
    return f"{match[1]} {match[2]}" if match[1] else "mid"


def _resolution(unit: Unit) -> str:
    side = math.isqrt(unit.pixels)
    return f"{side}x{side}" if side * side == unit.pixels else f"{unit.pixels} pixels"


def _low(scores: Sequence[float]) -> str:
    total = sum(scores)
    return f"{100 * sum(sorted(scores)[: len(scores) // 2]) / total:.0f}" if total else "0"


def _times(space: Space) -> str:
    """List every unit's cost at its legal widths, the widest first."""
    lines = []
    for number, (name, legal) in enumerate(space.legal.items()):
        times = [(w, space.costs.marginal_cost(name, 0, w, space.full)) for w in reversed(legal)]
        lines.append(_row(number, [(width, _percent(time, space)) for width, time in times]))
    return "\n".join(lines)


def _sensitivities(request: ProposalRequest) -> str:
    lines = []
    for number, unit in enumerate(request.space.units):
        measured = sorted(request.sensitivities.get(unit.name, {}).items(), reverse=True)
        if measured:
            growths = [(w, f"{100 * loss / request.loss_base:+.2g}") for w, loss in measured]
            lines.append(_row(number, growths))
    return "\n".join(lines or ["None were measured."])


def _row(number: int, values: Sequence[tuple[int, str]]) -> str:
    """Format a unit's values at some of its widths."""
    return f"{number} | " + ", ".join(f"{width}: {value}" for width, value in values)


def _memory(request: ProposalRequest, memory: Sequence[MemoryEntry], max_entries: int) -> str:
    """List entries, the group's own before its neighbours', and the best first."""

    def order(entry: MemoryEntry) -> tuple[int, int, bool, float]:
        distance = abs(entry.group - request.group)
        return (distance, entry.group, math.isnan(entry.loss), entry.loss)

    chosen: dict[tuple[tuple[str, int], ...], MemoryEntry] = {}
    for entry in sorted(memory, key=order):
        chosen.setdefault(tuple(sorted(entry.widths.items())), entry)
    entries = list(chosen.values())[:max_entries]
    title = "\n\n# Memory bank: schemes that were measured, best of this group last\n"
    if not entries:
        return f"{title}It is empty.\n"
    legend = (
        "Units are given by their number, as number: width; those left out are uncut.\n"
        "Losses of other groups are of their timesteps and compare only within one group.\n"
    )
    return title + legend + "\n".join(_entry(request, e) for e in reversed(entries)) + "\n"


def _entry(request: ProposalRequest, entry: MemoryEntry) -> str:
    space, is_own = request.space, entry.group == request.group
    cost = space.cost(entry.widths)
    loss = f"loss {entry.loss:.4g}"
    if is_own:
        loss += f" ({100 * (entry.loss / request.loss_base - 1):+.3g} % of the base's)"
    share = f"{WORDS[space.quantity]['name']} {_percent(cost, space)} %"
    if is_own and entry.overshoot:
        share += f" (cut to it from {_percent(entry.overshoot, space)} points above the limit)"
    elif cost > request.limit:
        over = _percent(cost - request.limit, space)
        share += f" (overshoots this group's limit by {over} points)"
    widths = [
        f"{number}: {entry.widths[unit.name]}"
        for number, unit in enumerate(space.units)
        if entry.widths[unit.name] < unit.width
    ]
    group = "this group" if is_own else f"group {entry.group}"
    return f"{group} | {share} | {loss} | {', '.join(widths) or 'uncut'}"


def _percent(cost: float, space: Space) -> str:
    return f"{100 * cost / space.cost_base:.4g}"
