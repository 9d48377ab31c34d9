"""What a sweep varies (--vary), and the settings and names of its trials."""

import difflib
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

from tdc_ray.config.run import RunConfig, from_json, to_json
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.errors import ConfigError

Value = bool | int | float | str | None
Params = Mapping[str, Value]
"""A value for every field that is varied, by its dotted name."""

ALIASES = {
    "plan.min_macs_share": "k",
    "plan.num_groups": "N",
    "plan.schedule": "schedule",
    "prune.method": "proxy",
}
"""Short names of fields in file names and tables; others are named by their last part."""

FIXED = ("preset", "seed")
"""Fields that are not varied: the seeds of a sweep are its repeats."""

CHANGE_THE_LOSS = ("base.loss_weight", "base.loss_weight_gamma")
"""Fields of the base that change what its loss means."""


@dataclass(frozen=True, slots=True)
class Choices:
    """Values that a field may have."""

    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    """Spread evenly over the logarithm."""

    whole: bool = False
    """Whole numbers alone."""

    @property
    def values(self) -> tuple[Value, ...]:
        """The two bounds."""
        return tuple(int(end) if self.whole else end for end in (self.low, self.high))


Domain = Choices | Range


def parse_space(texts: Sequence[str], config: RunConfig) -> dict[str, Domain]:
    """Parse what is varied: ``plan.num_groups=2,4`` or ``base.learning_rate=1e-4..1e-2:log``.

    Args:
        texts: ``NAME=VALUE,VALUE``, ``NAME=LOW..HIGH`` or ``NAME=LOW..HIGH:log``; whole numbers
            where the field is one. A name is dotted, or an alias such as k.
        config: Settings with these fields.

    Raises:
        ConfigError: There is no such field, or its values are malformed.
    """
    full = {alias: name for name, alias in ALIASES.items()}
    space: dict[str, Domain] = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = full.get(name, name)
        is_text = isinstance(value_of(config, name), str)
        if not values:
            raise ConfigError(f"{text} must be NAME=VALUE,VALUE,... or NAME=LOW..HIGH[:log].")
        if name in space:
            raise ConfigError(f"{name} may be given once: list all its values by commas.")
        match = re.fullmatch(r"(?P<low>[^:]+?)\.\.(?P<high>[^:]+)(?P<log>:log)?", values)
        if match is None or is_text:
            read = str.strip if is_text else _value
            space[name] = Choices(tuple(read(value) for value in values.split(",")))
            continue
        try:
            low, high = float(match["low"]), float(match["high"])
        except ValueError as error:
            raise ConfigError(f"{name}: a range must be LOW..HIGH, got {values}.") from error
        whole = _is_whole(config, name)
        if whole and not (low.is_integer() and high.is_integer()):
            raise ConfigError(f"{name}: LOW..HIGH must be whole numbers, got {values}.")
        space[name] = Range(low, high, log=bool(match["log"]), whole=whole)
    return space


CHANGE_WHAT_LOSSES_ARE_OF = (
    "data.",
    "diffusion.",
    "evaluate.features",
    "prune.held_out_share",
    "sampler.",
)
"""Fields, or how their names begin, whose values have losses that cannot be compared."""


def check_space(
    space: Mapping[str, Domain],
    config: RunConfig,
    sweep_config: SweepConfig,
    points: Sequence[Params] | None = None,
) -> None:
    """Check before any trial starts that all can run.

    Args:
        space: What is varied.
        config: The settings that are varied.
        sweep_config: How they are searched.
        points: Settings of a grid, if not all combinations.

    Raises:
        ConfigError: A name, a value or a bound is wrong, or the search cannot use the domains.
    """
    if not space:
        raise ConfigError("a sweep must vary something: --vary plan.min_macs_share=0.3,0.5")
    for name, domain in space.items():
        value_of(config, name)
        if isinstance(domain, Choices):
            if len({setting_name({name: value}) for value in domain.values}) < len(domain.values):
                raise ConfigError(f"{name}: no value may be given twice, got {domain.values}.")
        else:
            if not math.isfinite(domain.high) or not domain.low < domain.high:
                raise ConfigError(f"{name}: LOW..HIGH must rise, got {domain.low}..{domain.high}.")
            if domain.log and domain.low <= 0:
                raise ConfigError(f"{name}: a :log range must be above 0, got {domain.low}.")
            if sweep_config.search == "grid":
                raise ConfigError(
                    f"{name}: a grid needs values, got a range. List them by commas, or use "
                    "--search tpe or --search random."
                )
        if sweep_config.search != "grid" or len(space) == 1:
            for value in domain.values:
                with_params(config, {name: value}, config.seed)
    if sweep_config.search == "grid":  # a value may be legal beside others alone
        for params in grid(space) if points is None else points:
            with_params(config, params, config.seed)
    unlike = [name for name in space if name.startswith(CHANGE_WHAT_LOSSES_ARE_OF)]
    varied = space.get("evaluate.features")
    features = varied.values if isinstance(varied, Choices) else (config.evaluate.features,)
    if "none" in features and "score" in sweep_config.objectives and unlike:
        raise ConfigError(
            "sweep.objectives must be without score where evaluate.features is none and "
            f"{', '.join(unlike)} varied: losses are compared on the same images and noise alone. "
            "Give --objectives macs, or other features."
        )
    bases = [name for name in space if name.startswith(("base.", "model."))]
    if sweep_config.stop_early and (not bases or set(bases) & set(CHANGE_THE_LOSS)):
        raise ConfigError(
            "sweep.stop_early goes by the base's training loss, so it needs fields of base or "
            f"model that are varied, and none of {', '.join(CHANGE_THE_LOSS)}; got "
            f"{', '.join(space)}."
        )


def grid(space: Mapping[str, Domain]) -> list[Params]:
    """Return every combination of values; the last field varies fastest."""
    values = [domain.values for domain in space.values() if isinstance(domain, Choices)]
    return [dict(zip(space, some, strict=True)) for some in itertools.product(*values)]


def value_of(config: RunConfig, name: str) -> Value:
    """Return a field's value by its dotted name.

    Raises:
        ConfigError: There is no such field (the message names those that are like it), or it
            cannot be varied.
    """
    known = {
        f"{stage}.{field}": value
        for stage, settings in to_json(config).items()
        if stage not in FIXED
        for field, value in settings.items()
    }
    if name in FIXED:
        raise ConfigError(f"{name} cannot be varied; use the sweep's seeds for repeats.")
    if name.startswith("budget."):
        raise ConfigError(
            f"{name} cannot be varied: a budget goes with tdc-ray run alone. Vary base.num_steps "
            "or finetune.num_steps."
        )
    if name not in known:
        endings = [field for field in known if field.rpartition(".")[2] == name]
        near = endings or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"no setting is called {name!r}.{hint}")
    value: Value = known[name]
    return value


def with_params(config: RunConfig, params: Params, seed: int) -> RunConfig:
    """Return the settings of a trial.

    Raises:
        ConfigError: A value is out of its range, or two settings disagree.
    """
    document = to_json(replace(config, seed=seed))
    if any(name.startswith("model.") for name in params):
        document["model"]["network"] = None  # is read, or chosen, by what is asked for here
    for name, value in params.items():
        stage, field = name.split(".")
        document[stage][field] = value
    try:
        return from_json(document)
    except ConfigError as error:
        changes = ", ".join(f"{name}={value}" for name, value in params.items())
        raise ConfigError(f"{changes}: {error}") from error


def labels(names: Sequence[str]) -> dict[str, str]:
    """Return short names of fields: an alias, or the last part, or all if that is not unique."""
    short = {name: ALIASES.get(name, name.rpartition(".")[2]) for name in names}
    counts = {label: list(short.values()).count(label) for label in short.values()}
    return {name: label if counts[label] == 1 else name for name, label in short.items()}


def setting_name(params: Params) -> str:
    """Return a readable name of a setting that a folder can have: ``k=0.3,N=4``."""
    short = labels(list(params))
    parts = [f"{short[name]}={_text(value)}" for name, value in params.items()]
    text = ",".join(parts)
    clean = re.sub(r"[^A-Za-z0-9.,=+_-]", "-", text)
    exact = clean == text and all(
        isinstance(value, str) or _value(_text(value)) == value for value in params.values()
    )
    if exact and len(clean) <= 100:
        return clean
    document = repr(sorted(params.items()))
    return f"{clean[:90]}-{hashlib.sha256(document.encode()).hexdigest()[:8]}"


def trial_name(params: Params, seed: int) -> str:
    """Return the name of a setting's run with a seed: ``k=0.3,N=4,seed=0``."""
    return f"{setting_name(params)},seed={seed}"


def _is_whole(config: RunConfig, name: str) -> bool:
    """Whether a field's numbers are whole; None may be another value."""
    stage, field = name.split(".")
    hint = get_type_hints(type(getattr(config, stage)))[field]
    kinds = get_args(hint) or (hint,)
    return int in kinds and float not in kinds


def _value(text: str) -> Value:
    """Parse a value as it is written on the command line."""
    named: dict[str, Value] = {"none": None, "true": True, "false": False}
    if text.strip().lower() in named:
        return named[text.strip().lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


def _text(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
