"""Checks that settings share: one message names the setting, its rule and its value."""

from tdc_ray.errors import ConfigError


def require(stage: str, config: object, name: str, rule: str, *, ok: bool) -> None:
    """Refuse a setting that breaks its rule."""
    if not ok:
        raise ConfigError(f"{stage}.{name} must be {rule}, got {getattr(config, name)}.")


def at_least(least: int, stage: str, config: object, *names: str) -> None:
    """Refuse settings below a bound; None is none of them."""
    for name in names:
        value = getattr(config, name)
        require(stage, config, name, f"at least {least}", ok=value is None or value >= least)
