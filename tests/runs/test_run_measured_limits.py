"""A whole run whose groups share one budget."""

from dataclasses import replace

import pytest
from rich.console import Console

from tdc_ray.cli.run import run
from tdc_ray.diffusion.plan import AFTER_STAGE_1, plan_groups
from tdc_ray.execution.item import load_result
from tdc_ray.pruning.tasks.second_order import SecondOrderResult
from tdc_ray.runs.results import comparable
from tdc_ray.storage.files import read_json
from tdc_ray.storage.run_dir import RunDir

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_the_budget_goes_where_cuts_cost_most_and_a_resume_ends_the_same(
    finished_run, smoke_config, tmp_path
):
    config = replace(
        smoke_config,
        model=replace(smoke_config.model, base=str(RunDir(finished_run).base_unet)),
        plan=replace(smoke_config.plan, schedule="measured", mean_macs_share=0.9),
        finetune=replace(smoke_config.finetune, num_steps=0),
        evaluate=replace(smoke_config.evaluate, num_images=16, batch_size=16),
    )
    run_dir = RunDir(tmp_path / "run")
    results = run(config, run_dir.root, Console(quiet=True))
    plan = read_json(run_dir.plan)
    shares = [group["limit_share"] for group in plan["groups"]]
    assert plan["mean_limit_share"] == pytest.approx(0.9)
    assert len(set(shares)) > 1
    assert AFTER_STAGE_1 not in plan["notes"]
    assert run_dir.plan_plot.exists()
    before = plan_groups(config.diffusion, config.plan, config.sampler)
    assert [g["first"] for g in plan["groups"]] == [group.first for group in before.groups]
    limits = [group.macs_limit / results.base.macs for group in results.groups]
    assert limits == pytest.approx(shares, abs=1e-6)
    assert all(group.macs <= group.macs_limit for group in results.groups)
    models = [
        load_result(path, SecondOrderResult).value
        for path in run_dir.root.glob("groups/*/second-order.json")
    ]
    assert len(models) == len(shares)  # also of groups that keep the whole base
    assert results.prune.search_macs > sum(model.macs for model in models)
    # The same models take as much as in a run whose limits do not need them.
    graded = load_result(RunDir(finished_run).group(0) / "second-order.json", SecondOrderResult)
    measured = load_result(run_dir.group(0) / "second-order.json", SecondOrderResult)
    assert measured.value.macs == graded.value.macs
    assert [group.train_steps for group in results.groups] == [0] * len(shares)

    run_dir.results.unlink()  # as if it had been cut just before
    run_dir.plan.unlink()
    again = run(config, run_dir.root, Console(quiet=True))
    assert comparable(again) == comparable(results)
    assert read_json(run_dir.plan) == plan
