"""A whole run whose groups are limited in time."""

from dataclasses import replace

import pytest
from rich.console import Console

from tdc_ray.cli.run import run
from tdc_ray.storage.run_dir import RunDir

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_groups_keep_to_limits_of_time_that_is_measured_once(finished_run, smoke_config, tmp_path):
    config = replace(
        smoke_config,
        model=replace(smoke_config.model, base=str(RunDir(finished_run).base_unet)),
        plan=replace(smoke_config.plan, num_groups=2, min_macs_share=0.9),
        prune=replace(
            smoke_config.prune,
            method="magnitude",
            refit="none",
            objective="latency",
            channel_multiple=8,
            latency_batch_size=32,
        ),
        finetune=replace(smoke_config.finetune, num_steps=0),
        evaluate=replace(smoke_config.evaluate, num_images=16, batch_size=16, precision="bf16"),
    )
    run_dir = RunDir(tmp_path / "run")
    results = run(config, run_dir.root, Console(quiet=True))
    assert results.prune.objective == "latency"
    assert results.evaluation.precision == "bf16"
    for group in results.groups:
        assert group.milliseconds <= group.milliseconds_limit
    assert min(group.macs for group in results.groups) < results.base.macs
    assert len(results.times.experts_ms) == len(results.groups)
    measured = run_dir.latency.stat().st_mtime_ns
    run_dir.results.unlink()  # as if it had been cut just before
    again = run(config, run_dir.root, Console(quiet=True))
    assert run_dir.latency.stat().st_mtime_ns == measured
    assert [group.widths for group in again.groups] == [group.widths for group in results.groups]
