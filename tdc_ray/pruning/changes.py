"""Changes to the knapsack's scheme, and what the knapsack makes of them.

Whoever doubts the predictions says where: a unit's width within bounds, a predicted cost times a
factor, a block's cost within bounds, cost moved from one block to another. The knapsack makes the
best scheme under them, which is legal and within the limit whatever was said: a change that
contradicts an earlier one, or with which no scheme is near the limit, is dropped, and every one
that is dropped, or done in part, is named.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
)
from pydantic.json_schema import SkipJsonSchema

from tdc_ray.models.units import Unit
from tdc_ray.pruning.knapsack import FactorArray, knapsack, step_worth
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.predictor import Predictor
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.space import Scheme, Space

LEAST_FACTOR, MOST_FACTOR = 0.1, 10.0
"""Range of all distrust factors on a unit together."""

MOST_WORSE = 1.5
"""A scheme is not worth a measurement where it is predicted to cost this many times as much as
the knapsack's: predictions are seldom so far off (`FACTOR_SPREAD`)."""

MAX_CHANGES = 200
"""Most changes of a kind that are looked at."""

MAX_NOTE = 300
"""Most characters that are said of a change: a number may have thousands."""

MAX_HYPOTHESIS = 300
"""Most characters of a hypothesis, or of a reason to measure nothing more, that are kept."""

Curves = Mapping[str, FactorArray]
"""As of `loss_curves`."""

WidthBounds = Mapping[str, tuple[int, int]]
"""For units the least and the most width."""


def _each(kind: type[BaseModel]) -> BeforeValidator:
    """Validate the items of a list one by one; a bad one is dropped and named in ``dropped``."""

    def valid(values: Any, info: ValidationInfo) -> list[BaseModel]:
        dropped: list[str] = info.data["dropped"]
        kept = []
        values = values if isinstance(values, list) else [values] * (values is not None)
        if len(values) > MAX_CHANGES:
            dropped.append(f"{len(values) - MAX_CHANGES} of {len(values)} changes are too many")
        for value in values[:MAX_CHANGES]:
            try:
                kept.append(kind.model_validate(value))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                dropped.append(f"{str(value)[:80]} is none: {where}: {first['msg']}")
        return kept

    return BeforeValidator(valid)


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value


def short_line(value: str) -> str:
    """Return a model's words as one line of at most so many characters."""
    return " ".join(value.split())[:MAX_HYPOTHESIS]


Name = Annotated[str, BeforeValidator(_text)]
Words = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


class Bound(BaseModel):
    """The least and the most width that a unit keeps; equal ones pin it."""

    unit: int = Field(description="number of the unit")
    least: int = Field(description="least width")
    most: int = Field(description="most width; the same as least pins the unit")

    def __str__(self) -> str:
        return f"unit {self.unit} within {self.least} to {self.most}"


class Distrust(BaseModel):
    """A factor on what cuts of a unit, or of all units of a block, are predicted to cost."""

    where: Name = Field(description="number of a unit, or name of a block")
    factor: FiniteFloat = Field(
        description="above 1: it costs more than predicted; below 1: less; all factors on a unit "
        "together within 0.1 to 10"
    )

    def __str__(self) -> str:
        return f"factor {self.factor:g} on {self.where}"


class Move(BaseModel):
    """Cost moved from one block to another, as against the knapsack's scheme."""

    from_block: Name = Field(description="name of the block that gets narrower")
    to_block: Name = Field(description="name of the block that gets wider")
    points: FiniteFloat = Field(description="how much, in % of the base's cost; above 0")

    def __str__(self) -> str:
        return f"{self.points:g} points from {self.from_block} to {self.to_block}"


class Share(BaseModel):
    """The least and the most that the units of a block may cost."""

    block: Name = Field(description="name of a block")
    least: FiniteFloat = Field(description="in % of the base's cost; 0: no bound")
    most: FiniteFloat = Field(description="in % of the base's cost; 100: no bound")

    def __str__(self) -> str:
        return f"{self.least:g} to {self.most:g} points for {self.block}"


class Change(BaseModel):
    """Changes to the knapsack's scheme, and the hypothesis behind them."""

    dropped: SkipJsonSchema[Annotated[list[str], BeforeValidator(lambda _: [])]] = []
    """What of the lists below cannot be read, and why."""

    reasoning: Words = Field(
        default_factory=str, description="what the numbers suggest, in a few sentences"
    )
    hypothesis: Annotated[Words, AfterValidator(short_line)] = Field(
        default_factory=str, description="one sentence that the measurement can prove wrong"
    )
    bounds: Annotated[list[Bound], _each(Bound)] = Field(default_factory=list)
    distrust: Annotated[list[Distrust], _each(Distrust)] = Field(default_factory=list)
    moves: Annotated[list[Move], _each(Move)] = Field(default_factory=list)
    shares: Annotated[list[Share], _each(Share)] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Planned:
    """What the knapsack makes of changes."""

    scheme: Scheme
    increase: float
    """Predicted by `Predictor`, whatever was distrusted."""

    standard_error: float
    notes: tuple[str, ...]
    """Changes that did not count, or only in part, and why."""


class Planner:
    """Makes schemes of one group within its limit.

    Args:
        request: The group, its limit, and what cuts cost.
        memory: Entries of the memory bank; those of the group correct the predictions.

    Raises:
        LimitError: No scheme is within the limit.
    """

    def __init__(self, request: ProposalRequest, memory: Sequence[MemoryEntry]) -> None:
        self.predictor = Predictor.of(request, memory)
        self._space, self._limit = request.space, request.limit
        self.blocks: dict[str, list[str]] = {}
        """Names of the units of every block, both in the order of the forward pass."""
        for unit in request.space.units:
            self.blocks.setdefault(block_of(unit), []).append(unit.name)
        self.start = self.plan(Change())
        """The knapsack's own scheme."""

    def plan(self, change: Change) -> Planned:
        """Make the best scheme under changes.

        Earlier ones win, and bounds before moves before shares.
        """
        notes, factors = list(change.dropped), dict.fromkeys(self.predictor.curves, 1.0)
        for doubt in change.distrust:
            products = {name: doubt.factor * factors[name] for name in self._units(doubt.where)}
            if not products:
                notes.append(f"{doubt}: there is no such unit or block")
            elif not all(LEAST_FACTOR <= product <= MOST_FACTOR for product in products.values()):
                within = f"within {LEAST_FACTOR:g} to {MOST_FACTOR:g}"
                notes.append(f"{doubt}: all factors on a unit together must be {within}")
            else:
                factors |= products
        curves = {name: factors[name] * curve for name, curve in self.predictor.curves.items()}
        space = self._space
        for text, bounds in self._bounds(change, notes):
            space = self._tightened(space, text, bounds, notes)
        for share in change.shares:
            if bounds := self._share(space, share, curves, notes):
                space = self._tightened(space, str(share), bounds, notes)
        scheme = knapsack(space, curves, self._limit, self.predictor.factors)
        predicted = self.predictor
        return Planned(
            scheme,
            predicted.increase(scheme),
            predicted.standard_error(scheme),
            tuple(note[:MAX_NOTE] for note in notes),
        )

    def points(self, scheme: Scheme) -> dict[str, float]:
        """Return what the units of every block add to the cost, in % of the base's."""
        base = self._space.cost_base
        return {name: 100 * self._cost(us, scheme) / base for name, us in self.blocks.items()}

    def objection(self, planned: Planned) -> str | None:
        """Return why a scheme is not worth a measurement, or None."""
        if planned.scheme == self.start.scheme:
            return "nothing is changed: it is the knapsack's own scheme"
        if planned.increase > MOST_WORSE * self.start.increase > 0:
            return "it is predicted to be far worse than the knapsack's"
        return None

    def _units(self, where: str) -> list[str]:
        """Return the names of a block's units, or of the unit of a number."""
        units = self._space.units
        if where.isdecimal():  # not "²"
            number = int(where[:9])
            return [units[number].name] if number < len(units) else []
        return self._block(where)

    def _block(self, name: str) -> list[str]:
        """Return the names of the units of a block, or of all blocks down, or up."""
        name = name.strip()
        if name in ("down", "up"):
            return [
                unit for block, us in self.blocks.items() if block.startswith(name) for unit in us
            ]
        return self.blocks.get(name, [])

    def _cost(self, names: Sequence[str], scheme: Scheme) -> int:
        """Return what units add to a scheme's cost, with what they alone have in common."""
        without = {**scheme, **dict.fromkeys(names, 0)}
        return self._space.cost(scheme) - self._space.cost(without)

    def _tightened(self, space: Space, text: str, bounds: WidthBounds, notes: list[str]) -> Space:
        """Keep units within bounds, unless no scheme near the limit would be left."""
        legal = dict(space.legal)
        for name, (least, most) in bounds.items():
            legal[name] = tuple(width for width in legal[name] if least <= width <= most)
        tighter = replace(space, legal=legal)
        if not all(legal.values()):
            notes.append(f"{text}: no legal width is left, or it contradicts an earlier one")
        elif space.cost(tighter.smallest) > self._limit:
            notes.append(f"{text}: no scheme would be within the limit")
        elif space.cost(tighter.widest) < min(self._limit, space.cost(space.widest)):
            notes.append(f"{text}: a part of the limit would be left over")
        else:
            return tighter
        return space

    def _share(self, space: Space, share: Share, curves: Curves, notes: list[str]) -> WidthBounds:
        """Return bounds of a block's units within which every scheme gives the block its share."""
        names, base = self._block(share.block), self._space.cost_base
        if not names:
            notes.append(f"{share}: there is no such block")
            return {}
        if any(unit.kind == "stream" for unit in space.units):
            notes.append(f"{share}: blocks have no shares where a stream's width is cut, too")
            return {}
        walk = partial(self._walk, space, curves, within=True)
        room = share.most / 100 * base - self._cost(names, space.smallest)
        upper, _ = walk(space.smallest, names, room, wider=True)
        taken = self._cost(names, space.smallest | upper)
        room = taken - share.least / 100 * base
        if room < 0 or taken > share.most / 100 * base:
            notes.append(f"{share}: the nearest that it can have are {100 * taken / base:.4g}")
            return {}
        lower, _ = walk(space.smallest | upper, names, room, wider=False)
        return {name: (lower[name], upper[name]) for name in names}

    def _bounds(self, change: Change, notes: list[str]) -> Iterator[tuple[str, WidthBounds]]:
        """Yield the least and most widths of units that each bound and move implies."""
        for bound in change.bounds:
            if 0 <= bound.unit < len(self._space.units):
                yield str(bound), {self._space.units[bound.unit].name: (bound.least, bound.most)}
            else:
                notes.append(f"{bound}: there is no such unit")
        for move in change.moves:
            giving, taking = map(self._block, (move.from_block, move.to_block))
            if not giving or not taking or set(giving) & set(taking):
                notes.append(f"{move}: there are no two such blocks")
            elif move.points <= 0:
                notes.append(f"{move}: it must be above 0")
            else:
                cost = move.points / 100 * self._space.cost_base
                walk = partial(self._walk, self._space, self.predictor.curves, self.start.scheme)
                narrower, saved = walk(giving, cost, wider=False)
                wider, spent = walk(taking, min(cost, saved), wider=True)
                if not spent:
                    notes.append(f"{move}: nothing could be moved")
                    continue
                bounds = {name: (0, width) for name, width in narrower.items()}
                num_notes = len(notes)
                yield str(move), bounds | {name: (width, 10**9) for name, width in wider.items()}
                if spent < 0.5 * cost and len(notes) == num_notes:  # not dropped
                    moved = f"{100 * spent / self._space.cost_base:.3g}"
                    notes.append(f"{move}: done in part, only {moved} points could be moved")

    def _walk(
        self,
        space: Space,
        curves: Curves,
        start: Scheme,
        names: Sequence[str],
        cost: float,
        *,
        wider: bool,
        within: bool = False,
    ) -> tuple[dict[str, int], float]:
        """Widen, or narrow, some units of a scheme by about a cost, or by at most as much.

        Returns:
            Their widths, and the cost that it came to.
        """
        scheme, worth = dict(start), step_worth(space, curves, self.predictor.factors)
        step, sign, done = space.next_wider if wider else space.next_narrower, 1 - 2 * wider, 0.0
        while done < cost:
            options = []
            for name in names:
                width = step(name, scheme[name])
                low, high = sorted((scheme[name], width))
                marginal = space.costs.marginal_cost(name, low, high, scheme)
                if marginal and not (within and done + marginal > cost):
                    value = sum(worth[name][low:high]) / marginal
                    options.append((sign * value, name, width, marginal))
            if not options:
                break
            _, name, width, marginal = min(options)
            if not within and done and done + marginal / 2 > cost:  # further off than without it
                break
            scheme[name], done = width, done + marginal
        return {name: scheme[name] for name in names}, done


def block_of(unit: Unit) -> str:
    """Return the name of a unit's block: down, mid or up with its number, or the first layer.

    Blocks of transformers are numbered from 0.
    """
    match = re.search(r"(down|up|transformer)_blocks\.(\d+)|mid_block", unit.name)
    if match is None:
        return "first"
    return f"{match[1]} {match[2]}" if match[1] else "mid"
