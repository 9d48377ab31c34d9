"""The models of a run as pipelines."""

from collections.abc import Mapping, Sequence

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.pipeline_index import PipelineIndex
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.storage.run_dir import RunDir


def pipeline_index(
    config: RunConfig, experts: Mapping[str, TimestepGroup] | None = None
) -> PipelineIndex:
    """Describe the base, or the experts in some folders, as a pipeline with a run's settings."""
    return PipelineIndex.of(
        config.data, config.diffusion, config.sampler, config.conditioning, experts
    )


def save_index(run_dir: RunDir, config: RunConfig, groups: Sequence[TimestepGroup]) -> None:
    """Write the index that makes the experts of a run, one for each group, a pipeline."""
    experts = {run_dir.expert(group.index).name: group for group in groups}
    pipeline_index(config, experts).save(run_dir.experts)
