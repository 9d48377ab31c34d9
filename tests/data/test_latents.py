import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from tdc_ray.cli.main import run_command
from tdc_ray.cli.run import run
from tdc_ray.config.presets import preset
from tdc_ray.config.run import digest, with_absolute_paths
from tdc_ray.data.batches import batches, to_minus_one_one
from tdc_ray.data.latents import (
    SHARD,
    LatentImages,
    prepare_latents,
    shard_path,
)
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.errors import CheckpointError, ConfigError, DataError, StorageError
from tdc_ray.execution.chain import run_chain
from tdc_ray.execution.device import WorkerRank
from tdc_ray.execution.item import run_item
from tdc_ray.models.first_stage import WEIGHTS_FILE, load_first_stage
from tdc_ray.models.saved_expert import save_expert
from tdc_ray.models.unet2d.unet import save_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.noised import noised_batches
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.preflight import check
from tdc_ray.runs.stages.base_worker import sample_grid, train_base
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.run_dir import FIRST_STAGE_DIR, RunDir
from tests.small import (
    TINY,
    assert_same,
    context_of,
    group_of,
    latent_config,
    make_first_stage,
    random_unet,
    small_config,
    training_of,
)

ALONE = WorkerRank(0, 1, torch.device("cpu"))


def nothing(*_):
    """Ignores a report."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Digits at 16x16, whose 1,797 latents are in two shards."""
    folder = make_first_stage(tmp_path_factory.mktemp("first_stage"))
    config = latent_config(folder, tmp_path_factory.mktemp("cache"))
    run_chain(prepare_latents(training_of(config)))
    return config


@pytest.fixture(scope="module")
def latents(config):
    """What the first stage makes of all images."""
    images, _ = load_dataset(config.data).__getitems__(range(1797))
    return load_first_stage(Path(config.data.first_stage)).encode(to_minus_one_one(images))


def keys_of(config):
    """The items that are left to do."""
    return [item.key for items in prepare_latents(training_of(config)) for item in items]


# --- the cache -------------------------------------------------------------------------------


def test_cached_latents_and_labels_are_those_of_the_images(config, latents):
    found, images = training_of(config).open(), load_dataset(config.data)
    assert isinstance(found, LatentImages)
    assert (len(found), found.num_classes) == (1797, 10)
    everything, labels = found.__getitems__(range(1797))
    assert_same(everything, latents)
    assert everything.shape == (1797, 1, 8, 8)
    assert_same(labels, images.__getitems__(range(1797))[1])


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_latents_of_several_channels_are_cached_as_well(tmp_path, kind):
    folder = make_first_stage(tmp_path / "first_stage", kind, latent_channels=3)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    data = {"source": "npz", "path": str(tmp_path / "a.npz")}
    config = latent_config(folder, tmp_path, data=data)
    run_chain(prepare_latents(training_of(config)))
    images, _ = load_dataset(config.data).__getitems__(range(20))
    encoded = load_first_stage(folder).encode(to_minus_one_one(images))
    found, labels = training_of(config).open().__getitems__(range(20))
    assert found.shape == (20, 3, 8, 8)
    assert_same(found, encoded)
    assert labels.tolist() == [-1] * 20


def test_latents_come_in_the_order_asked_for_across_shards(config, latents):
    numbers = [1500, 3, SHARD, SHARD - 1, 3, 0, 1796]
    found, labels = training_of(config).open().__getitems__(numbers)
    assert_same(found, latents[numbers])
    assert_same(labels, load_dataset(config.data).__getitems__(numbers)[1])


def test_a_second_use_computes_nothing(config):
    assert keys_of(config) == []
    before = {path: path.stat().st_mtime_ns for path in training_of(config).latents.iterdir()}
    run_chain(prepare_latents(training_of(config)))
    assert {
        path: path.stat().st_mtime_ns for path in training_of(config).latents.iterdir()
    } == before


def test_images_without_a_first_stage_have_nothing_to_compute():
    plain = small_config()
    assert list(prepare_latents(training_of(plain))) == []
    assert training_of(plain).open() is load_dataset(plain.data)


def test_first_stage_and_data_are_the_key(config, tmp_path):
    def changed(**data):
        return replace(config, data=replace(config.data, **data))

    def with_first_stage(name, **arguments):
        return changed(first_stage=str(make_first_stage(tmp_path / name, **arguments)))

    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    same = with_first_stage("same")
    assert keys_of(same) == []
    others = [
        with_first_stage("weights", seed=1),
        with_first_stage("scale", scaling_factor=0.8),
        with_first_stage("kind", kind="VQModel"),
        changed(image_size=32),
        changed(source="npz", path=str(tmp_path / "a.npz")),
    ]
    assert training_of(same).latents == training_of(config).latents
    assert len({training_of(other).latents for other in (config, *others)}) == 6
    assert keys_of(others[0]) == ["latents/000000000", "latents/000001024"]
    assert keys_of(others[-1]) == ["latents/000000000"]


def test_what_was_cut_between_shards_goes_on_with_those_that_are_missing(config, tmp_path):
    cut = replace(config, evaluate=replace(config.evaluate, cache_dir=str(tmp_path)))
    first, second = next(prepare_latents(training_of(cut)))
    run_item(first, nothing)
    with pytest.raises(DataError, match=r"1 shards of the latents .* missing in .*tdc-ray run"):
        training_of(cut).open()
    assert keys_of(cut) == [second.key]
    written = shard_path(training_of(cut).latents, 0).stat().st_mtime_ns
    run_chain(prepare_latents(training_of(cut)))
    assert shard_path(training_of(cut).latents, 0).stat().st_mtime_ns == written
    assert_same(
        training_of(cut).open().__getitems__(range(1797)),
        training_of(config).open().__getitems__(range(1797)),
    )
    shard_path(training_of(cut).latents, SHARD).unlink()  # its result stays behind
    assert keys_of(cut) == [second.key]
    assert [
        path.name for path in training_of(cut).latents.iterdir() if path.suffix == ".tmp"
    ] == []


def test_latents_that_are_not_finite_are_refused(config, tmp_path):
    folder = make_first_stage(tmp_path / "first_stage")
    broken = latent_config(folder, tmp_path)
    weights = load_file(folder / WEIGHTS_FILE)
    weights["quant_conv.bias"].fill_(float("inf"))
    save_file(weights, folder / WEIGHTS_FILE)
    with pytest.raises(DataError, match="not finite for images 0 to 15"):
        run_chain(prepare_latents(training_of(broken)))
    assert not shard_path(training_of(broken).latents, 0).exists()


# --- training, pruning and sampling ----------------------------------------------------------


class Recorder(nn.Module):
    """Keeps what the UNet is given."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.seen = unet, []

    def forward(self, x_t, timestep, **arguments):
        self.seen.append((x_t.detach().clone(), timestep))
        return self.unet(x_t, timestep, **arguments)


def test_the_base_is_trained_on_noised_latents(config):
    short = replace(config, base=replace(config.base, num_steps=2))
    recorders, grids = [], []

    def wrap(unet):
        recorders.append(Recorder(unet))
        return recorders[0]

    def save(state):
        with state.ema_weights() as unet:
            grids.append(sample_grid(unet, short, 2))

    train_base(short, ALONE, resume_from=None, wrap=wrap, report=nothing, save=save)
    order = derive_seed(short.seed, "base", "order")
    given = batches(training_of(short).open(), batch_size=32, seed=order, num_steps=2)
    for step, ((x_0, _), (x_t, timesteps)) in enumerate(
        zip(given, recorders[0].seen, strict=True)
    ):
        seed = derive_seed(derive_seed(short.seed, "base"), 0, step, "noise")
        noise = torch.Generator().manual_seed(seed)
        epsilon = torch.randn(x_0.shape, generator=noise)
        assert_same(x_t, noise_schedule(short.diffusion).add_noise(x_0, epsilon, timesteps))
    assert [(grid.shape, grid.dtype) for grid in grids] == [((2, 16, 16, 1), torch.uint8)]


def test_candidates_are_measured_on_latents(config, latents):
    (batch, *_) = noised_batches(
        context_of(RunDir(Path("/nonexistent")), config),
        group_of(config, 0),
        random_unet(),
        purpose="held-out",
    )
    everything = {row.numpy().tobytes() for row in latents}
    assert {row.numpy().tobytes() for row in batch.x_0} <= everything


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_a_pipeline_decodes_what_is_sampled(config, tmp_path, kind):
    folder = make_first_stage(tmp_path, kind)
    config = replace(config, data=replace(config.data, first_stage=str(folder)))
    whole, unet = base_pipeline(random_unet(), pipeline_index(config)), random_unet()
    pixels = replace(config, data=replace(config.data, first_stage=None, image_size=8))
    plain = base_pipeline(unet, pipeline_index(pixels))
    for pipeline in (whole, plain):
        pipeline.set_progress_bar_config(disable=True)
    expected = load_first_stage(folder).decode(plain(3, output_type="pt").images)
    assert_same(whole(3, output_type="pt").images, expected)
    assert whole(3, output_type="np").images.shape == (3, 16, 16, 1)
    assert whole(1).images[0].size == (16, 16)


def test_a_folder_of_experts_holds_its_first_stage_and_may_be_moved(config, tmp_path):
    folder = make_first_stage(tmp_path / "first_stage")
    config = replace(config, data=replace(config.data, first_stage=str(folder)))
    expected = base_pipeline(random_unet(), pipeline_index(config))
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    for group in groups:
        save_expert(
            tmp_path / "e" / str(group.index), random_unet(), TINY, keep_everything(units_of(TINY))
        )
    pipeline_index(config, {str(g.index): g for g in groups}).save(tmp_path / "e")
    (tmp_path / "first_stage").rename(tmp_path / "gone")
    (tmp_path / "e").rename(tmp_path / "moved")
    found = ProgressivePipeline.from_pretrained(tmp_path / "moved")
    for pipeline in (expected, found):
        pipeline.set_progress_bar_config(disable=True)
    assert_same(found(2, output_type="pt").images, expected(2, output_type="pt").images)
    half = ProgressivePipeline.from_pretrained(tmp_path / "moved", torch_dtype=torch.bfloat16)
    assert half.first_stage.dtype == torch.float32
    assert half.to(torch.bfloat16)(2, output_type="pt").images.isfinite().all()
    (tmp_path / "moved" / FIRST_STAGE_DIR / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        ProgressivePipeline.from_pretrained(tmp_path / "moved")


@pytest.mark.slow
def test_a_model_of_latents_is_pruned_on_them(config, tmp_path, capsys):
    save_unet(random_unet(), tmp_path / "unet")
    flags = ["--data", "digits", "--data.image-size", "16", "--sampler.no-clip-sample"]
    flags += ["--data.first-stage", config.data.first_stage, "--prune.num-images", "32"]
    flags += ["--evaluate.cache-dir", config.evaluate.cache_dir, "--method", "magnitude"]
    out = ["--out", str(tmp_path / "out")]
    assert run_command(["prune", str(tmp_path / "unet"), *flags, *out]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["macs"] <= 0.7 * report["macs_base"]
    assert (
        run_command(["prune", str(tmp_path / "unet"), *flags, *out, "--data.image-size", "8"]) == 1
    )
    assert "latents of 1x4x4, and this model takes 1x8x8" in capsys.readouterr().err


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": {"clip_sample": True}}, r"sampler\.clip_sample must be False .*got True"),
        (
            {"diffusion": {"learned_sigma": True}},
            r"diffusion\.vlb_weight must be 0\.0 .*got 0\.001",
        ),
        ({"data": {"horizontal_flip": True}}, r"data\.horizontal_flip must be False"),
        ({"data": {"crop_padding": 2}}, r"data\.crop_padding must be 0 .*got 2"),
    ],
)
def test_what_is_right_for_pixels_alone_is_refused_with_a_first_stage(config, changes, message):
    stage = config.data.first_stage
    with pytest.raises(ConfigError, match=message):
        latent_config(stage, config.evaluate.cache_dir, **changes)


@pytest.mark.parametrize("name", ["mnist-32-ldm", "ffhq256-ldm"])
def test_an_architecture_of_latents_says_how_to_get_a_first_stage(name):
    with pytest.raises(ConfigError, match=r"--data\.first-stage .*tdc-ray train-autoencoder"):
        check(preset(name))


def test_check_compares_the_latents_with_the_architecture(config):
    check(config)
    wrong = replace(config, data=replace(config.data, image_size=32))
    with pytest.raises(ConfigError, match=r"1x16x16, and model\.architecture tiny takes 1x8x8"):
        check(wrong)
    nowhere = replace(config, data=replace(config.data, first_stage="/nowhere"))
    with pytest.raises(CheckpointError, match=r"data\.first_stage /nowhere holds no first stage"):
        check(nowhere)


def test_a_run_does_not_go_on_with_another_first_stage(config, tmp_path):
    run_dir = RunDir(tmp_path / "run")
    make_first_stage(run_dir.experts / FIRST_STAGE_DIR, seed=3)  # what an earlier call copied
    with pytest.raises(StorageError, match=rf"{run_dir.experts}/{FIRST_STAGE_DIR} is a copy of"):
        run(config, run_dir.root, Console(quiet=True))
    assert not run_dir.config.exists()


def test_the_first_stage_is_part_of_the_digest_by_its_absolute_path(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    near = replace(config, data=replace(config.data, first_stage="stage"))
    assert with_absolute_paths(near).data.first_stage == str(tmp_path / "stage")
    far = replace(config, data=replace(config.data, first_stage=str(tmp_path / "stage")))
    assert digest(near) == digest(far) != digest(config)
