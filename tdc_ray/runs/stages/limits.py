"""The limits of a measured schedule: one budget over all groups, shared after stage 1."""

from collections.abc import Sequence

from tdc_ray.diffusion.plan import Plan, with_limits
from tdc_ray.execution.chain import Chain, results_of
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.joint_limits import share_budget, tradeoff
from tdc_ray.pruning.tasks.second_order import second_order_item


def measured_plan(plan: Plan, searches: Sequence[GroupSearch]) -> Chain[Plan]:
    """Model the loss of every group, then give each the limit at which all together lose least.

    The searches find the models done: their items are the same.

    Args:
        plan: A measured schedule's plan; its mean limit is the budget.
        searches: Those of its groups, in order.
    """
    results = yield from results_of([second_order_item(search) for search in searches])
    curves = [
        tradeoff(search.space, JointIncrease(search.space, result.model))
        for search, result in zip(searches, results, strict=True)
    ]
    steps = [group.num_sampling_steps for group in plan.groups]
    return with_limits(plan, share_budget(curves, steps, plan.mean_limit_share))
