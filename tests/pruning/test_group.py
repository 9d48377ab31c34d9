from pathlib import Path

from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.models.units import kept_digest
from tdc_ray.pruning.group import group_searches
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.space import space_of
from tdc_ray.storage.run_dir import RunDir
from tests.small import TINY, context_of, small_config, task_of

RUN_DIR = RunDir(Path("/run"))
CONFIG = small_config()


def test_groups_that_have_something_to_cut_are_the_participants_of_all():
    groups = plan_groups(CONFIG.diffusion, CONFIG.plan, CONFIG.sampler).groups
    tasks = group_searches(context_of(RUN_DIR, CONFIG), space_of(TINY), groups)
    assert [task.group for task in tasks] == list(groups)
    assert {task.participants for task in tasks} == {
        frozenset({"group-00", "group-01", "group-02"})
    }
    assert tasks[3].max_macs == tasks[3].space.macs_base


def test_an_item_is_named_and_kept_with_its_group():
    search, kept = task_of(RUN_DIR, CONFIG, 2), {"unit": (0, 2)}
    assert search.key("base") == "group-02/base"
    assert search.result_path("scores") == RUN_DIR.group(2) / "scores.json"
    named = f"base-{kept_digest(kept)}.json"
    assert search.result_path("base", kept) == RUN_DIR.group(2) / named


def test_what_stands_behind_an_item_is_the_rest_of_the_search_and_the_fine_tune():
    search, train, prune = task_of(RUN_DIR, CONFIG, 0), CONFIG.finetune, CONFIG.prune
    finetune = 3 * search.max_macs * train.num_steps * train.batch_size
    assert search.cost_behind() == finetune
    images = prune.num_images + 3 * prune.num_refit_images
    assert search.cost_behind(2) == 2 * images * search.max_macs + finetune


def test_what_items_took_adds_up():
    spent = SearchCost()
    for macs in (3.0, 4.0):
        spent.add(macs, seconds=0.5)
    assert (spent.macs, spent.seconds) == (7.0, 1.0)
