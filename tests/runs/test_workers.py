"""Who runs the chains of a job."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from tdc_ray.runs.workers import workers
from tests.small import small_config

RAY = "tdc_ray.execution.ray"


@pytest.mark.parametrize(("nodes", "gpus"), [([{"GPU": 2.0}], 1.0), ([{}], 0.0)])
def test_actors_take_the_gpus_that_a_cluster_has(monkeypatch, nodes, gpus):
    taken = []

    def pool(compute, *_, **__):
        taken.append(compute.gpus_per_actor)
        return nullcontext(SimpleNamespace(run=None))

    monkeypatch.setattr(f"{RAY}.cluster.connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(f"{RAY}.cluster.node_resources", lambda: nodes)
    monkeypatch.setattr(f"{RAY}.event_collector.collecting", lambda _: nullcontext())
    monkeypatch.setattr(f"{RAY}.pool.Pool", pool)
    with workers(small_config(), cluster="auto"):
        pass
    assert taken == [gpus]
