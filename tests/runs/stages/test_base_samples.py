"""Images that are drawn from the base in place of a data set."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline
from safetensors.torch import load_file

from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.config.data import DataConfig
from tdc_ray.config.run import differences, digest
from tdc_ray.data.latents import prepare_latents
from tdc_ray.data.load import load_dataset
from tdc_ray.data.tensor_shards import shard_path
from tdc_ray.diffusion.sampling import image_generators, sample, to_uint8
from tdc_ray.errors import ConfigError, DataError
from tdc_ray.execution.chain import run_chain
from tdc_ray.models.first_stage import load_first_stage
from tdc_ray.models.unet2d.unet import save_unet
from tdc_ray.runs.evaluation.features import find_features
from tdc_ray.runs.stages.base_samples import (
    draw_base_samples,
    drawing_macs,
    with_base_samples,
)
from tests.small import (
    TINY,
    assert_same,
    latent_config,
    make_first_stage,
    random_unet,
    small_config,
    sizes,
    training_of,
)

FEW = {"source": "base", "num_images": 70}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "unet"
    save_unet(random_unet({**TINY, "num_class_embeds": 10}), folder)
    return folder


def config_of(unet, cache_dir, **changes):
    config = small_config(
        data=FEW,
        conditioning={"num_classes": 10},
        sampler={"num_inference_steps": 2},
        evaluate={"cache_dir": str(cache_dir)},
        **changes,
    )
    return with_base_samples(config, unet)


def drawn(config, unet):
    run_chain(draw_base_samples(config, unet))
    return load_dataset(config.data).__getitems__(range(config.data.num_images))


def test_what_was_interrupted_resumes_with_the_shards_that_are_there(unet, tmp_path):
    config = config_of(unet, tmp_path)
    images, labels = drawn(config, unet)
    assert images.shape == (70, 1, 8, 8)
    assert labels.tolist() == [i % 10 for i in range(70)]
    first, second = (shard_path(Path(config.data.path), i) for i in (0, 64))
    second.unlink()
    with pytest.raises(DataError, match="1 shards of the base's samples are missing"):
        load_dataset(config.data).__getitems__([0]) if not load_dataset.cache_clear() else None
    written = first.stat().st_mtime_ns
    assert_same(drawn(config, unet), (images, labels))
    assert first.stat().st_mtime_ns == written
