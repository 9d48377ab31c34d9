"""The model card of exported experts: what they are, how they were made, how to sample."""

from tdc_ray.config.run import RunConfig
from tdc_ray.runs.results import Results

CARD = """\
---
library_name: diffusers
tags: [diffusion, tdc-training, progressive-experts]
---

# {dataset}: {num_experts} experts by timestep

A diffusion model of {num_experts} pruned UNets, each for a range of timesteps; sampling switches
between them as t falls (TDC Training, [arXiv:2312.13307](https://arxiv.org/abs/2312.13307)).
Made with tdc_ray {version}.

| timesteps | macs | of the base | parameters |
| --- | --- | --- | --- |
{groups}

## How it was made

- **From**: {base}
- **Pruned** by `{method}`, refit `{refit}`, space `{space}`; k = {k:g}, N = {num_groups},
  `{schedule}` limits.
- **Fine-tuned**: each expert {steps} steps of {batch_size} images on its own timesteps, learning
  rate {lr:g}, EMA {ema:g}, seed {seed}.
- **Data**: {dataset}; commit {commit}. All settings are in the run's `config.json`.

## Scores

| model | {metric} (lower is better) | macs of a step |
| --- | --- | --- |
| base | {base_score:.3f} | {base_macs:,.0f} |
| these experts | {score:.3f} | {macs:,.0f} |

On {num_images} images, {inference_steps} {sampler} steps, eta {eta:g}, seed {sample_seed},
{weights} weights in {precision}, against {reference}; features: {features}.
{not_fid}One training seed and one sampling seed: no spread is known.

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


def model_card(results: Results, config: RunConfig) -> str:
    """Write the card of a finished run's experts, in Markdown."""
    evaluation, plan, tuned = results.evaluation, results.plan, config.finetune
    rows = [
        f"| {group.timesteps[0]} to {group.timesteps[1]} | {group.macs:,} | "
        f"{group.macs / results.base.macs:.3f} | {group.num_params:,} |"
        for group in results.groups
    ]
    given = results.given_base
    made = f"a base trained on {results.dataset} for {results.base.train_steps} steps"
    if given is not None:
        made = f"the base `{given.source}` ({given.weights} weights)"
    labels = "" if evaluation.num_classes is None else ", class_labels=[0] * 16"
    return CARD.format(
        dataset=results.dataset,
        num_experts=len(results.groups),
        version=results.versions.get("tdc-ray", "(unknown version)"),
        groups="\n".join(rows),
        base=f"{made}, {results.base.macs:,.0f} macs, {results.base.num_params:,.0f} parameters.",
        method=results.prune.method,
        refit=results.prune.refit,
        space=results.prune.space,
        k=plan.k,
        num_groups=plan.num_groups,
        schedule=plan.schedule,
        steps=tuned.num_steps,
        batch_size=tuned.batch_size,
        lr=tuned.learning_rate,
        ema=tuned.ema_decay,
        seed=results.seed,
        commit=results.commit,
        metric=results.metric,
        base_score=results.base.score,
        base_macs=results.base.macs,
        score=results.tdc.score,
        macs=results.tdc.macs,
        num_images=evaluation.num_images,
        inference_steps=evaluation.num_inference_steps,
        sampler=evaluation.sampler,
        eta=evaluation.eta,
        sample_seed=evaluation.seed,
        weights=evaluation.weights,
        precision=evaluation.precision,
        reference=evaluation.reference,
        features=evaluation.features,
        not_fid="" if results.metric == "fid" else f"{results.metric} is no FID. ",
        labels=labels,
    )
