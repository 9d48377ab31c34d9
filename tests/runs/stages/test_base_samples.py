"""Images that are drawn from the base in place of a data set."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline

import tdc_ray as tdc
from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.config.data import DataConfig
from tdc_ray.config.run import differences, digest
from tdc_ray.data.latents import prepare_latents
from tdc_ray.data.load import load_dataset
from tdc_ray.data.tensor_shards import shard_path
from tdc_ray.diffusion.pipeline import base_pipeline
from tdc_ray.diffusion.sampling import image_generators, to_uint8
from tdc_ray.errors import ConfigError, DataError
from tdc_ray.execution.chain import run_chain
from tdc_ray.models.families import load_network
from tdc_ray.models.first_stage import load_first_stage
from tdc_ray.models.unet2d.unet import save_unet
from tdc_ray.runs.evaluation.features import find_features
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.stages.base_samples import (
    draw_base_samples,
    drawing_macs,
    with_base_samples,
)
from tdc_ray.seeds import derive_seed
from tests.small import (
    TINY,
    assert_same,
    latent_config,
    make_first_stage,
    random_unet,
    sizes,
    small_config,
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
    load_dataset.cache_clear()  # another process
    with pytest.raises(DataError, match="1 shards of the base's samples are missing"):
        load_dataset(config.data).__getitems__([0])
    written = first.stat().st_mtime_ns
    assert_same(drawn(config, unet), (images, labels))
    assert first.stat().st_mtime_ns == written


def test_they_are_what_the_bases_pipeline_draws_from_noise_that_is_not_scored(unet, tmp_path):
    config = config_of(unet, tmp_path, seed=3)
    pipeline = base_pipeline(load_network(unet), pipeline_index(config))
    pipeline.set_progress_bar_config(disable=True)

    def images_of(seed):
        output = pipeline(4, image_generators(seed, 0, 4), output_type="np")  # labels 0 to 3
        return torch.from_numpy(output.images).permute(0, 3, 1, 2)

    images = drawn(config, unet).images[:4]
    assert_same(images, images_of(derive_seed(3, "base samples")))
    assert not torch.equal(images, images_of(3))
    macs = sizes({**TINY, "num_class_embeds": 10})[1]
    assert drawing_macs(config, macs) == 70 * 2 * macs
    guided = replace(config, sampler=replace(config.sampler, guidance_scale=2.0))
    assert drawing_macs(guided, macs) == 70 * 4 * macs


def test_their_folder_is_named_by_what_they_follow_from_wherever_the_base_lies(unet, tmp_path):
    config = config_of(unet, tmp_path)
    copy = tmp_path / "copy"
    save_unet(random_unet({**TINY, "num_class_embeds": 10}), copy)
    assert with_base_samples(config, copy) == config
    save_unet(random_unet({**TINY, "num_class_embeds": 10}, seed=1), copy)
    others = [
        with_base_samples(config, copy),
        config_of(unet, tmp_path, seed=1),
        config_of(unet, tmp_path, prune={"num_images": 9}),  # the same, as their number is given
        with_base_samples(replace(config, sampler=replace(config.sampler, eta=0.5)), unet),
    ]
    names = [Path(one.data.path).name for one in (config, *others)]
    assert len(set(names)) == 4
    assert names[3] == names[0]
    moved = config_of(unet, tmp_path / "elsewhere")
    assert (moved.data.path, digest(moved)) != (config.data.path, digest(config))
    assert [one.split(".")[0] for one in differences(config, moved)] == ["evaluate"]


def test_by_default_search_and_refit_get_an_image_for_each_noised_one(unet, tmp_path):
    prune = {"num_images": 90, "num_refit_images": 45, "held_out_share": 0.25}
    config = small_config(
        data={"source": "base"}, prune=prune, evaluate={"cache_dir": str(tmp_path)}
    )
    assert len(load_dataset(with_base_samples(config, unet).data)) == 120


def test_latents_are_kept_as_the_base_draws_them(tmp_path):
    save_unet(random_unet(), tmp_path / "unet")
    stage = make_first_stage(tmp_path / "vae")
    config = latent_config(stage, tmp_path, data={"source": "base", "num_images": 5})
    config = with_base_samples(config, tmp_path / "unet")
    images = drawn(config, tmp_path / "unet").images
    assert [*prepare_latents(training_of(config))] == []  # none is encoded
    latents = training_of(config).open().__getitems__(range(5)).images
    assert latents.shape == (5, 1, 8, 8)
    decoded = load_first_stage(stage).decode(latents)
    assert_same(images, to_uint8(decoded).permute(0, 3, 1, 2))


def test_a_score_against_them_has_a_name_of_its_own(unet, tmp_path):
    config = config_of(unet, tmp_path)
    spec = find_features(config.data, config.evaluate, "classifier")
    assert (spec.metric, spec.name_of("kd")) == ("fd_base_samples_cnn", "kd_base_samples_cnn")
    inception = replace(spec, kind="inception", metric="fd_base_samples_inception")
    assert inception.name_of("precision") == "precision_base_samples_inception"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run --data base", "name it by --base"),
        ("run --data.source base", "name it by --base"),
        (
            "run --preset digits-smoke --base {base} --data base --compare equal-macs",
            "--compare must be none",
        ),
        (
            "run --preset ddpm-cifar10 --base {base} --data base --evaluate.reference cifar10",
            "reference must be None with",
        ),
        ("run --base {base} --data base --data.path x", "give --data or --data.path"),
        ("run --data digits --data.num-images 9", "data.num_images goes with data.source base"),
    ],
)
def test_what_cannot_work_is_refused(unet, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments.format(base=unet).split()) == 1
    assert words in capsys.readouterr().err


def test_without_a_base_there_is_nothing_to_draw_from():
    with pytest.raises(ConfigError, match="draws images from a base: name it"):
        load_dataset(DataConfig(source="base"))


def test_a_latent_pipeline_says_the_shape_and_the_scheduler_of_its_samples(tmp_path):
    vae = AutoencoderKL.from_pretrained(make_first_stage(tmp_path / "vae"))
    scheduler = DDIMScheduler(400, clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    LDMPipeline(vae, random_unet(), scheduler).save_pretrained(tmp_path / "p")
    flags = ["--data", "base", "--data.num-images", "9", "--sampler.scheduler", "base"]
    for command in (
        ["run", "--base", str(tmp_path / "p"), *flags],
        ["prune", str(tmp_path / "p"), "--out", "out", *flags],
    ):
        config = parse(command).config
        assert (config.data.source, config.data.num_images) == ("base", 9)
        assert config.data.shape == (1, 16, 16)
        assert config.sampler.of_base["_class_name"] == "DDIMScheduler"
        assert config.sampler.of_base["timestep_spacing"] == "trailing"
        assert (config.sampler.steps_offset, config.sampler.clip_sample) == (1, False)


@pytest.mark.slow
def test_a_pipeline_is_pruned_without_images_by_command_and_in_python(tmp_path):
    folder = tmp_path / "p"
    DDPMPipeline(random_unet(), DDPMScheduler(600)).save_pretrained(folder)
    few = {"num_images": 20, "num_refit_images": 20, "num_levels": 1, "method": "magnitude"}
    flags = [f"--prune.{name.replace('_', '-')}={value}" for name, value in few.items()]
    flags += ["--sampler.num-inference-steps", "2", "--evaluate.cache-dir", str(tmp_path)]
    out = tmp_path / "out"
    command = ["prune", str(folder), "--data", "base", "--macs", "0.7", "--out", str(out), *flags]
    assert run_command(command) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["macs"] <= report["macs_limit"]
    assert 0 < report["drawing_macs"] == 23 * 2 * report["macs_base"] < report["search_macs"]
    settings = small_config(
        sampler={"num_inference_steps": 2}, evaluate={"cache_dir": str(tmp_path)}
    )
    base = tdc.load_base(folder, settings=settings)
    plan = tdc.plan_groups(base.scheduler, num_groups=2, min_macs_share=0.5)
    experts = tdc.prune(base, plan, "base", progress=False, **few)
    assert experts.config.data.source == "base"
    assert min(group.macs for group in experts.groups) < 0.8 * base.macs
