"""The model card of exported experts: what they are, how they were made, how to sample."""

from tdc_ray.config.run import RunConfig
from tdc_ray.runs.results import Results, score_text

CARD = """\
---
library_name: diffusers
tags: [diffusion, tdc-training, progressive-experts]
---

# {results.dataset}: {num_experts} experts by timestep

A diffusion model of {num_experts} pruned networks, each for a range of timesteps; sampling
switches between them as t falls (TDC Training, [arXiv:2312.13307](https://arxiv.org/abs/2312.13307)).
Made with tdc_ray {version}.

| timesteps | macs | of the base | parameters |
| --- | --- | --- | --- |
{groups}

## How it was made

- **From**: {base}
- **Pruned** by `{prune.method}`, refit `{prune.refit}`, space `{prune.space}`; \
k = {plan.k:g}, N = {plan.num_groups},
  `{plan.schedule}` limits.
- **Fine-tuned**: each expert {tune.num_steps} steps of {tune.batch_size} images on its own \
timesteps, learning
  rate {tune.learning_rate:g}, EMA {tune.ema_decay:g}, seed {results.seed}.
- **Data**: {results.dataset}; commit {results.commit}. All settings are in the run's \
`config.json`.

## Scores

| model | {results.metric} (lower is better) | macs of a step |
| --- | --- | --- |
| base | {scores[0]} | {results.base.macs:,.0f} |
| these experts | {scores[1]} | {results.tdc.macs:,.0f} |

"""

SCORED = """\
On {scored.num_images} images, {scored.num_inference_steps} {scored.sampler} steps, \
eta {scored.eta:g}, seed {scored.seed},
{scored.weights} weights in {scored.precision}, against {scored.reference}; \
features: {scored.features}.
{not_fid}One training seed and one sampling seed: no spread is known.

"""

UNSCORED = """\
The denoising loss over all timesteps, {scored.weights} weights,
on {scored.reference}.
No image was scored. One training seed: no spread is known.

"""
"""What stands in place of ``SCORED`` where the metric is a loss."""

PIPELINE = """\
## How to sample

With diffusers, running the code of this folder (read `pipeline.py` and `experts/experts.py`
first):

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)
images = pipeline(16, seed=0{labels}).images
```

In plain PyTorch: `python example.py`. With tdc_ray, from safetensors and no code of this folder:

```python
from tdc_ray import ProgressivePipeline

images = ProgressivePipeline.from_pretrained(DIR)(16, seed=0{labels}).images
```
"""
"""How an export is sampled from as a pipeline of its own."""

DENOISER = """\
## How to sample

In any pipeline of diffusers, in place of the network that these experts were made of:

```python
from diffusers import DiffusionPipeline
from tdc_ray import ExpertDenoiser

pipeline = DiffusionPipeline.from_pretrained(BASE)
pipeline.unet = ExpertDenoiser.from_pretrained(DIR)  # or pipeline.transformer
```

`scheduler/` has the noise process and the sampler that the scores are of{first_stage}.
"""
"""How an export is sampled from as a network."""


def model_card(results: Results, config: RunConfig, *, denoiser: bool = False) -> str:
    """Write the card of a finished run's experts, in Markdown: as a pipeline or as a network."""
    base, given = results.base, results.given_base
    groups = [
        f"| {group.timesteps[0]} to {group.timesteps[1]} | {group.macs:,} | "
        f"{group.macs / base.macs:.3f} | {group.num_params:,} |"
        for group in results.groups
    ]
    origin = f"a base trained on {results.dataset} for {base.train_steps} steps"
    if given is not None:
        origin = f"the base `{given.source}` ({given.weights} weights)"
    how = SCORED if results.losses is None else UNSCORED
    return (CARD + how + (DENOISER if denoiser else PIPELINE)).format(
        results=results,
        scores=[score_text(model.score) for model in (base, results.tdc)],
        plan=results.plan,
        prune=results.prune,
        tune=config.finetune,
        scored=results.evaluation,
        num_experts=len(results.groups),
        version=results.versions.get("tdc-ray", "(unknown version)"),
        groups="\n".join(groups),
        base=f"{origin}, {base.macs:,.0f} macs, {base.num_params:,.0f} parameters.",
        not_fid="" if results.metric == "fid" else f"{results.metric} is no FID. ",
        first_stage=", `first_stage/` what decodes latents" if config.data.first_stage else "",
        labels="" if results.evaluation.num_classes is None else ", class_labels=[0] * 16",
    )
