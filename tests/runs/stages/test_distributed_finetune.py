"""An expert that two workers fine-tune together, on real actors."""

import dataclasses

import pytest
import torch

from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.models.units import keep_everything
from tdc_ray.runs.stages.finetune import finetune_item
from tests.small import held_out_loss_of, make_run_dir, small_config, task_of

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_two_workers_fine_tune_one_expert_and_go_on_after_a_kill(ray_cluster, tmp_path):
    """Another order of the same work: cut after its checkpoint, it ends with the same weights."""
    config = small_config(
        compute={"workers_per_finetune": 2}, finetune={"num_steps": 4, "checkpoint_every": 2}
    )
    weights = []
    for name, first_steps in (("whole", 4), ("cut", 2)):
        run_dir = make_run_dir(tmp_path / name)
        task = task_of(run_dir, config)
        item = finetune_item(
            task, keep_everything(task.space.units), config.finetune, config.compute
        )

        def chain(item=item, steps=first_steps):
            shorter = dataclasses.replace(item.job.train, num_steps=steps)
            first = dataclasses.replace(
                item,
                job=dataclasses.replace(item.job, train=shorter),
                result_path=item.result_path.with_suffix(".first.json"),
            )
            yield [first]
            (result,) = yield [item]
            return result

        with (
            collecting([]) as events,
            Pool(config.compute, events) as pool,
        ):
            result = pool.run({"expert": chain()})["expert"]
        expert = load_expert(run_dir.expert(task.group.index))
        assert held_out_loss_of(expert, config, task.group) == pytest.approx(
            result.loss_finetuned, rel=1e-5
        )
        assert result.train_steps == 4
        weights.append(expert.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
