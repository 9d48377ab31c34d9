from pathlib import Path

from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.pruning.group import group_searches
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.stages.finetune import ShortFinetuneResult
from tdc_ray.storage.run_dir import RunDir
from tests.small import TINY, context_of, small_config, task_of

RUN_DIR = RunDir(Path("/run"))
CONFIG = small_config()


def nothing(_job, _report):
    return {}


def test_groups_that_have_something_to_cut_are_the_participants_of_all():
    groups = plan_groups(CONFIG.diffusion, CONFIG.plan, CONFIG.sampler).groups
    tasks = group_searches(context_of(RUN_DIR, CONFIG), space_of(TINY), groups)
    assert [task.group for task in tasks] == list(groups)
    assert {task.participants for task in tasks} == {
        frozenset({"group-00", "group-01", "group-02"})
    }
    assert tasks[3].max_macs == tasks[3].space.macs_base


def test_an_item_is_named_and_kept_with_its_group():
    item = task_of(RUN_DIR, CONFIG, 2).item(
        "base", nothing, None, service="llm", fallback_result={}
    )
    assert item.key == "group-02/base"
    assert item.result_path == RUN_DIR.group(2) / "base.json"
    assert (item.service, item.fallback_result) == ("llm", {})


def test_what_stands_behind_an_item_is_the_rest_of_the_search_and_the_fine_tune():
    task = task_of(RUN_DIR, CONFIG, 0)
    item = task.item("base", nothing, None, cost=5.0, behind=7.0)
    train = CONFIG.finetune
    finetune = 3 * task.max_macs * train.num_steps * train.batch_size
    assert (item.cost, item.cost_behind) == (5.0, 7.0 + finetune)


def test_what_items_took_adds_up():
    spent = SearchCost()
    for macs in (3.0, 4.0):
        spent.add(ShortFinetuneResult(loss=1.0, macs=macs, seconds=0.5))
    assert (spent.macs, spent.seconds) == (7.0, 1.0)
