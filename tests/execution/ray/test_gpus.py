import logging

import pytest

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.run import RunConfig, differences, from_json, to_json
from tdc_ray.execution.item import Resources, actor_resources, base_resources
from tdc_ray.execution.ray import cluster
from tdc_ray.execution.ray.cluster import with_gpus

NODES = {
    "none": [{"CPU": 2.0}],
    "one": [{"CPU": 16.0, "GPU": 1.0, "accelerator_type:H200": 1.0}],
    "four": [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}],
}


@pytest.mark.parametrize(
    ("nodes", "asked", "base", "actor"),
    [
        ("none", {}, 0, 0),
        ("one", {}, 1, 1),
        ("one", {"num_base_workers": 2}, 0, 1),
        ("four", {"num_base_workers": 4, "workers_per_finetune": 3}, 1, 1),
        ("four", {"gpus_per_base_worker": 0, "gpus_per_actor": 0.5}, 0, 0.5),
        ("none", {"gpus_per_base_worker": 1, "gpus_per_actor": 1}, 1, 1),
    ],
)
def test_workers_have_a_gpu_where_there_is_one_and_nothing_else_is_asked_for(
    monkeypatch, caplog, nodes, asked, base, actor
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cluster, "node_resources", lambda: NODES[nodes])
    found = with_gpus(ComputeConfig(**asked))
    assert base_resources(found) == Resources(1, base)
    assert actor_resources(found) == Resources(1, actor)
    (text,) = caplog.messages
    assert text.startswith("devices: ")
    assert ("H200" in text) == (nodes == "one")
    assert (f"an actor {actor:g} GPU and 1 CPU thread" in text) == (actor > 0)


def test_settings_of_before_keep_the_gpus_that_they_name():
    document = to_json(RunConfig())
    document["compute"] |= {"gpus_per_base_worker": 0.0, "gpus_per_actor": 0.0}
    before = from_json(document)
    assert before.compute.gpus_per_actor == 0.0
    assert differences(before, RunConfig()) == []
