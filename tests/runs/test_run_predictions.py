"""Whole runs whose networks predict something else than epsilon, and on other noise processes."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from tdc_ray.cli.run import run
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.errors import ConfigError
from tdc_ray.runs.export.export import export_run
from tdc_ray.runs.results import load_results

FEW_STEPS = {"num_inference_steps": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("diffusion", "sampler"),
    [
        (DiffusionConfig(prediction_type="sample"), SamplerConfig(**FEW_STEPS)),
        (
            DiffusionConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            SamplerConfig(spacing="trailing", **FEW_STEPS),
        ),
        (
            DiffusionConfig(prediction_type="flow_prediction"),
            SamplerConfig(scheduler="FlowMatchEulerDiscreteScheduler", **FEW_STEPS),
        ),
        (
            DiffusionConfig(sigma_data=0.5),
            SamplerConfig(scheduler="EDMDPMSolverMultistepScheduler", **FEW_STEPS),
        ),
    ],
    ids=["sample", "zero-snr", "flow", "edm"],
)
def test_a_run_of_any_prediction_trains_prunes_fine_tunes_scores_and_samples(
    ray_cluster, smoke_config, tmp_path, diffusion, sampler
):
    few = {"batch_size": 16, "checkpoint_every": 4, "log_every": 4, "loss_weight": "min-snr"}
    config = replace(
        smoke_config,
        diffusion=diffusion,
        plan=replace(smoke_config.plan, num_groups=2),
        base=replace(smoke_config.base, num_steps=8, **few),
        finetune=replace(smoke_config.finetune, num_steps=4, **few),
        prune=replace(smoke_config.prune, num_images=16, num_refit_images=16),
        sampler=sampler,
        evaluate=replace(smoke_config.evaluate, num_images=24, batch_size=12),
    )
    results = run(config, tmp_path / "run", Console(quiet=True))
    assert load_results(tmp_path / "run" / "results.json") == results
    assert np.isfinite([results.base.score, results.tdc.score]).all()
    pipeline = ProgressivePipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    again = pipeline(12, seed=config.evaluate.seed, output_type="np").images
    scored = np.load(tmp_path / "run" / "evaluation" / "tdc" / "0000000.npz")["arr_0"]
    assert np.abs(scored.astype(int) - again).max() <= 1
    if diffusion.is_edm:
        with pytest.raises(ConfigError, match="--denoiser must be set for experts with EDM's"):
            export_run(tmp_path / "run", tmp_path / "pipeline")
        export_run(tmp_path / "run", tmp_path / "denoiser", denoiser=True)
        denoiser = ExpertDenoiser.from_pretrained(tmp_path / "denoiser")
        c_noise = NoiseProcess.of(diffusion).conditioning
        assert (
            denoiser.experts.spans[0][0]
            == c_noise[0]
            < denoiser.experts.spans[-1][1]
            == c_noise[-1]
        )
