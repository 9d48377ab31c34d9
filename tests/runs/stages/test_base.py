"""Stage 1: what its results are found again by."""

from dataclasses import replace
from pathlib import Path

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.presets import preset
from tdc_ray.runs.evaluation import evaluate
from tdc_ray.runs.stages.base import base_inputs
from tdc_ray.storage.digest import json_digest
from tdc_ray.storage.run_dir import RunDir

KEY = "526004f9bbf3ace7e0ead4e05f9355d31b30ceabede9fe13505e3b2218c77e6b"
"""The digest of a base's inputs before there was a choice of what is predicted (c8f0b0b)."""


def test_results_from_before_other_predictions_are_found_again(monkeypatch):
    monkeypatch.setattr(evaluate, "weights_digest", str)
    before = replace(preset("digits"), compute=ComputeConfig())  # of one thread
    diffusion = replace(before.diffusion, prediction_type="v_prediction")
    configs = before, replace(before, diffusion=diffusion)
    bases = [base_inputs(config) for config in configs]
    assert json_digest(bases[0]) == KEY != json_digest(bases[1])
    held_out = replace(before, prune=replace(before.prune, held_out_of_base=True))
    assert json_digest(base_inputs(held_out)) != KEY
    run_dir = RunDir(Path("run"))
    jobs = [evaluate.SampleJob(run_dir, config, "base", 0, 4) for config in configs]
    keys = [evaluate.sample_inputs(job)["diffusion"] for job in jobs]
    assert keys == [bases[0]["diffusion"], bases[1]["diffusion"]]
