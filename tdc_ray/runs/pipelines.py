"""The models of a run as pipelines."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from tdc_ray.config.run import RunConfig
from tdc_ray.data.latents import training_data
from tdc_ray.data.prompts import conditions_of_images
from tdc_ray.diffusion.pipeline_index import PipelineIndex
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.sampling import image_labels
from tdc_ray.models.labels import Captions
from tdc_ray.storage.run_dir import RunDir


def pipeline_index(
    config: RunConfig, experts: Mapping[str, TimestepGroup] | None = None
) -> PipelineIndex:
    """Describe the base, or the experts in some folders, as a pipeline with a run's settings."""
    return PipelineIndex.of(
        config.data, config.diffusion, config.sampler, config.conditioning, experts
    )


def image_conditions(config: RunConfig, first: int, count: int) -> dict[str, Tensor | Captions]:
    """Return classes, or prompts, of the images ``first`` to ``first + count - 1``.

    Of models conditioned on classes, or on text, image i is of class, or prompt, i modulo their
    number: in every batch, model and run.
    """
    if (classes := image_labels(config.conditioning.num_classes, first, count)) is not None:
        return {"class_labels": classes}
    if config.data.text_encoder is None:
        return {}
    training = training_data(config.data, config.evaluate.cache_dir)
    states = training.prompts(config.sampler.negative_prompt)
    return {} if states is None else {**conditions_of_images(states, first, count)}


def save_index(run_dir: RunDir, config: RunConfig, groups: Sequence[TimestepGroup]) -> None:
    """Write the index that makes the experts of a run, one for each group, a pipeline."""
    experts = {run_dir.expert(group.index).name: group for group in groups}
    pipeline_index(config, experts).save(run_dir.experts)
