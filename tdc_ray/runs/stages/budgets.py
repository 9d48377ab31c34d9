"""Budgets over all groups, shared after stage 1: macs of a sampling step, steps of fine-tunes."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tdc_ray.config.train import FinetuneConfig
from tdc_ray.diffusion.plan import Plan, TimestepGroup, with_limits
from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.execution.chain import Chain, results_of
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.joint_limits import share_budget, tradeoff
from tdc_ray.pruning.tasks.candidates import base_item
from tdc_ray.pruning.tasks.second_order import second_order_item


def measured_plan(plan: Plan, searches: Sequence[GroupSearch]) -> Chain[Plan]:
    """Model the loss of every group, then give each the limit at which all together lose least.

    Args:
        plan: A measured schedule's plan; its mean limit is the budget.
        searches: Those of its groups, in order.
    """
    curves = yield from _tradeoffs(searches)
    steps = [group.num_sampling_steps for group in plan.groups]
    return with_limits(plan, share_budget(curves, steps, plan.mean_limit_share))


def finetunes_by_excess(
    train: FinetuneConfig, searches: Sequence[GroupSearch]
) -> Chain[list[FinetuneConfig]]:
    """Model the loss of every group, and share the steps by what their limits are to cost.

    A group weighs as much as its limit adds to its loss, times its timesteps. Where no limit adds
    anything all have the same.

    Args:
        train: The settings that all fine-tunes have in common.
        searches: Those of the groups, in order.
    """
    curves = yield from _tradeoffs(searches)
    excess = [
        np.interp(-search.group.limit_share, -curve[:, 0], curve[:, 1])
        for search, curve in zip(searches, curves, strict=True)
    ]
    weights = [
        float(increase) * len(search.group.timesteps)
        for search, increase in zip(searches, excess, strict=True)
    ]
    return _shared(train, weights if any(weights) else [1.0] * len(weights))


def finetunes(train: FinetuneConfig, groups: Sequence[TimestepGroup]) -> list[FinetuneConfig]:
    """Return each group's settings where their steps need no model: equal, or by timesteps."""
    if train.allocation == "timesteps":
        return _shared(train, [len(group.timesteps) for group in groups])
    return _shared(train, [1.0] * len(groups))


def _tradeoffs(searches: Sequence[GroupSearch]) -> Chain[list[FloatArray]]:
    """Model every group's loss; the searches find the models done, as their items are the same.

    The base is measured first, as in a search: the model reads the images' weights from there.
    """
    yield from results_of([base_item(search) for search in searches])
    results = yield from results_of([second_order_item(search) for search in searches])
    return [
        tradeoff(search.space, JointIncrease(search.space, result.model))
        for search, result in zip(searches, results, strict=True)
    ]


def _shared(train: FinetuneConfig, weights: Sequence[float]) -> list[FinetuneConfig]:
    """Share the steps of all fine-tunes by weights, to the last step."""
    total = train.num_steps * len(weights)
    parts = [total * weight / math.fsum(weights) for weight in weights]
    steps = [math.floor(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: steps[i] - parts[i])
    for index in by_remainder[: total - sum(steps)]:
        steps[index] += 1
    # The steps are what the results follow from, however they were shared.
    return [replace(train, num_steps=count, allocation="equal") for count in steps]
