import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdc_ray.cli.main import run_command
from tdc_ray.config.conditioning import ConditioningConfig, null_class
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.run import RunConfig, digest
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.data.batches import batches
from tdc_ray.data.dataset import ImageBatch
from tdc_ray.data.fingerprint import conditioning_key
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline
from tdc_ray.diffusion.pipeline_index import INDEX_FILE
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.sampling import SamplingSpec, image_generators, image_labels, sample
from tdc_ray.diffusion.train import TrainState, start_state, train
from tdc_ray.errors import ConfigError
from tdc_ray.execution.device import WorkerRank
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.families import build_network
from tdc_ray.models.labels import CaptionDropout
from tdc_ray.models.network_config import CONDITION_CLASS, STATES
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import keep_everything
from tdc_ray.runs.evaluation.evaluate import SampleJob, sample_images
from tdc_ray.runs.pipelines import pipeline_index, save_index
from tdc_ray.runs.preflight import check, check_conditioning, check_data
from tdc_ray.runs.stages.base_worker import sample_grid, train_base
from tdc_ray.runs.stages.finetune import FinetuneJob, finetune_expert
from tdc_ray.storage.run_dir import RunDir
from tests.models.counting import count_macs
from tests.small import TINY, assert_same, context_of, group_of, random_unet, sizes, small_config

SHAPE = (1, 8, 8)
NULL = 10
WITH_NULL = {**TINY, "num_class_embeds": NULL + 1}
CAPTIONED = {
    "_class_name": CONDITION_CLASS,
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 8,
}


def config_of(*, guidance_scale: float = 1.0, **conditioning: Any) -> RunConfig:
    """Digits with their ten classes; four steps of 64 images."""
    steps = {"num_steps": 4, "batch_size": 64, "checkpoint_every": 2, "log_every": 1}
    return small_config(
        base=steps,
        finetune=steps,
        conditioning={"num_classes": 10, **conditioning},
        sampler={"num_inference_steps": 4, "guidance_scale": guidance_scale},
    )


# --- what can go together --------------------------------------------------------------------


def check_of(
    *, embeds: int | None, data: int | None, guidance: float = 1.0, **settings: Any
) -> None:
    check_conditioning(
        ConditioningConfig(**settings),
        guidance_scale=guidance,
        num_class_embeds=embeds,
        num_data_classes=data,
    )


@pytest.mark.parametrize(
    "found",
    [
        {"embeds": None, "data": None},
        {"embeds": None, "data": 10},
        {"embeds": 10, "data": 10, "num_classes": 10},
        {"embeds": 1000, "data": 10, "num_classes": 1000},
        {"embeds": 11, "data": 10, "num_classes": 10, "label_dropout": 0.1, "guidance": 3.0},
        {"embeds": 11, "data": 10, "num_classes": 10, "guidance": 3.0},  # trained elsewhere
        {"embeds": 11, "data": 10, "num_classes": 11},
    ],
)
def test_what_fits_is_let_through(found):
    check_of(**found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"embeds": None, "data": 10, "num_classes": 10},
            "conditioning.num_classes must be None for this base, .* got 10",
        ),
        (
            {"embeds": 1000, "data": 10},
            "conditioning.num_classes must be 1000 for this base, or 999 if .*, got None",
        ),
        (
            {"embeds": 1000, "data": 10, "num_classes": 10},
            "conditioning.num_classes must be 1000 .* got 10",
        ),
        (
            {"embeds": 10, "data": 10, "num_classes": 10, "label_dropout": 0.1},
            "conditioning.label_dropout must be 0 for a base without a null class, got 0.1",
        ),
        (
            {"embeds": 10, "data": 10, "num_classes": 10, "guidance": 2.0},
            "sampler.guidance_scale must be 1 .* got 2.0.* --conditioning.label-dropout",
        ),
        (
            {"embeds": None, "data": 10, "guidance": 2.0},
            "sampler.guidance_scale must be 1 for a base without a null class, got 2.0",
        ),
        (
            {"embeds": 10, "data": None, "num_classes": 10},
            "data must have a label from 0 on for every image with conditioning.num_classes 10, "
            "and has none, or not for all .*--data.labels-from-folders",
        ),
        (
            {"embeds": 6, "data": 10, "num_classes": 5},
            "conditioning.num_classes must be above every label .* up to 9, got 5",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_settings_name(found, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_of(**found)


def test_a_run_is_refused_before_any_work(tmp_path):
    check(config_of(label_dropout=0.1, guidance_scale=2.0))
    with pytest.raises(ConfigError, match=r"sampler\.guidance_scale must be 1"):
        check(config_of(guidance_scale=2.0))
    with pytest.raises(ConfigError, match="above every label of the data, which go up to 9"):
        check(config_of(num_classes=9))
    np.savez(tmp_path / "bare.npz", images=np.zeros((4, 8, 8), np.uint8))
    bare = replace(config_of().data, source="npz", path=str(tmp_path / "bare.npz"))
    with pytest.raises(ConfigError, match="data must have a label"):
        check(replace(config_of(), data=bare))


def test_images_without_a_label_among_others_are_refused_where_labels_are_needed(tmp_path, caplog):
    labels = np.array([0, 1, -1, 9])
    np.savez(tmp_path / "some.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels)
    some = replace(config_of().data, source="npz", path=str(tmp_path / "some.npz"))
    with pytest.raises(ConfigError, match=r"data must have a label .*put labels into the npz"):
        check(replace(config_of(), data=some))
    assert f"labels of {some.path} are left out: 1 of 4 are below 0" in caplog.text
    check_data(replace(small_config(), data=some), TINY)  # none are needed


@pytest.mark.parametrize(("label_dropout", "embeds", "null"), [(0.0, 10, None), (0.1, 11, 10)])
def test_a_named_architecture_embeds_the_classes_and_the_null_class(label_dropout, embeds, null):
    config = config_of(label_dropout=label_dropout)
    settings = base_unet(config.model, config.conditioning)
    unet = build_unet(settings)
    assert unet.class_embedding.num_embeddings == embeds
    assert null_class(embeds, 10) == null
    assert sizes(settings) == (count_params(unet), count_macs(unet))
    assert base_unet(config.model, small_config().conditioning) is TINY


# --- training --------------------------------------------------------------------------------


class Told(nn.Module):
    """Forwards everything and records the classes that it got."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet, self.seen = unet, []

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        self.seen.append(class_labels.tolist())
        return self.unet(x, timestep, class_labels=class_labels)


def told(config: RunConfig, *, seed: int = 0, first: int = 0, **settings: Any) -> list[list[int]]:
    """The classes of each forward pass."""
    base = replace(config.base, **settings)
    state = start_state(build_unet(WITH_NULL), base)
    state.step, model = first, Told(state.unet)
    train(
        state,
        model,
        labelled(config, first, base.num_steps),
        noise_schedule(config.diffusion),
        base,
        config.data,
        timesteps=range(1000),
        seed=seed,
        label_dropout=config.conditioning.label_dropout,
        report=lambda *_: None,
        save=lambda _: None,
    )
    return model.seen


def labelled(config: RunConfig, first: int = 0, num_steps: int = 4) -> Any:
    dataset, size = load_dataset(config.data), config.base.batch_size
    return batches(dataset, batch_size=size, seed=0, start_step=first, num_steps=num_steps)


def test_training_tells_the_model_the_labels_of_its_images():
    expected = [labels.tolist() for _, labels in labelled(config_of())]
    assert told(config_of()) == expected
    parts = told(config_of(), micro_batch_size=30)
    assert [len(part) for part in parts] == [30, 30, 4] * 4
    assert list(itertools.chain(*parts)) == list(itertools.chain(*expected))


def test_labels_are_dropped_at_the_rate_asked_for_and_the_others_stay():
    config = config_of(label_dropout=0.3)
    config = replace(config, base=replace(config.base, batch_size=500))
    seen = torch.tensor(told(config))
    whole = torch.stack([labels for _, labels in labelled(config)])
    dropped = seen == NULL
    assert abs(dropped.double().mean() - 0.3) < 0.04  # four standard deviations of 2,000 draws
    assert_same(seen[~dropped], whole[~dropped])
    assert not torch.equal(dropped[0], dropped[1])


def test_what_is_dropped_follows_from_seed_and_step():
    config = config_of(label_dropout=0.5)
    whole = told(config)
    torch.manual_seed(9)
    assert told(config) == whole
    assert told(config, first=2) == whole[2:]
    assert told(config, seed=1) != whole


class Captioned(nn.Module):
    """A network that reads captions and predicts nothing; records what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.seen = build_network(CAPTIONED), []

    def forward(self, x: Tensor, timestep: Tensor, **captions: Tensor) -> SimpleNamespace:
        del timestep
        self.seen.append(captions[STATES])
        return SimpleNamespace(sample=x * next(self.network.parameters()).mean())


def captions_told(dropout: CaptionDropout | None) -> tuple[Tensor, Tensor]:
    """The captions of some images, and those that a network was told in training."""
    config = small_config(base={"num_steps": 4, "batch_size": 500})
    given = [torch.randn(500, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    model = Captioned()
    train(
        start_state(model.network, config.base),
        model,
        [ImageBatch(torch.zeros(500, 1, 8, 8), {STATES: states}) for states in given],
        noise_schedule(config.diffusion),
        config.base,
        config.data,
        timesteps=range(1000),
        seed=0,
        caption_dropout=dropout,
        report=lambda *_: None,
        save=lambda _: None,
    )
    return torch.stack(given), torch.stack(model.seen)


def test_captions_are_dropped_at_the_rate_asked_for_and_the_others_stay():
    empty = torch.full((3, 8), 9.0)
    given, seen = captions_told(CaptionDropout(0.3, {STATES: empty}))
    dropped = (seen == empty).all(dim=(-2, -1))
    assert abs(dropped.double().mean() - 0.3) < 0.04  # four standard deviations of 2,000 draws
    assert_same(seen[~dropped], given[~dropped])
    assert not torch.equal(dropped[0], dropped[1])
    given, seen = captions_told(None)
    assert_same(seen, given)


def test_training_with_a_dropout_of_captions_resumes_bit_for_bit(tmp_path):
    config = small_config(base={"num_steps": 4, "batch_size": 8, "checkpoint_every": 2})
    draws = torch.Generator().manual_seed(0)
    given = [
        ImageBatch(
            torch.randn(8, 1, 8, 8, generator=draws),
            {STATES: torch.randn(8, 3, 8, generator=draws)},
        )
        for _ in range(4)
    ]

    def trained(share: float, resume_from: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(1)
        state = start_state(build_network(CAPTIONED), config.base)
        if resume_from is not None:
            state.load(resume_from)
            torch.manual_seed(3)
        train(
            state,
            state.unet,
            given[state.step :],
            noise_schedule(config.diffusion),
            config.base,
            config.data,
            timesteps=range(1000),
            seed=0,
            caption_dropout=CaptionDropout(share, {STATES: torch.full((3, 8), 9.0)}),
            report=lambda *_: None,
            save=lambda state: state.save(tmp_path / f"{state.step}-{share}.pt"),
        )
        return state.state_dict()

    whole = trained(0.5)
    assert_same(trained(0.5, tmp_path / "2-0.5.pt"), whole)
    with pytest.raises(AssertionError):
        assert_same(trained(0.0), whole)


def test_a_dropout_of_captions_changes_no_key_of_runs_without(monkeypatch):
    base, conditioning = small_config(), ConditioningConfig()
    assert "caption_dropout" not in conditioning_key(conditioning)
    changed = small_config(conditioning={"caption_dropout": 0.1})
    assert digest(changed) != digest(base)
    hashed: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr("tdc_ray.config.run.json_digest", lambda one: hashed.append(one) or "")
        digest(base)
        digest(changed)
    assert ["caption_dropout" in one.get("conditioning", {}) for one in hashed] == [False, True]
    assert conditioning_key(changed.conditioning)["caption_dropout"] == 0.1
    with pytest.raises(ConfigError, match="caption_dropout must be 0 for a base that is not"):
        check(changed)


def run_base(config: RunConfig, folder: Path, resume_from: Path | None = None) -> TrainState:
    return train_base(
        config,
        WorkerRank(0, 1, torch.device("cpu")),
        resume_from=resume_from,
        wrap=lambda unet: unet,
        report=lambda *_: None,
        save=lambda state: state.save(folder / f"{state.step}.pt"),
    )


def test_stopped_and_resumed_equals_not_stopped(tmp_path):
    config = config_of(label_dropout=0.5)
    whole = run_base(config, tmp_path)
    torch.manual_seed(3)
    resumed = run_base(config, tmp_path, tmp_path / "2.pt")
    assert_same(resumed.state_dict(), whole.state_dict())


def moved_rows(before: nn.Module, after: nn.Module) -> list[bool]:
    change = after.class_embedding.weight - before.class_embedding.weight
    return (change != 0).any(dim=1).tolist()


@pytest.mark.parametrize(("label_dropout", "embeds"), [(0.0, 10), (0.5, 11)])
def test_the_base_learns_all_that_it_embeds(tmp_path, label_dropout, embeds):
    config = config_of(label_dropout=label_dropout)
    none = replace(config, base=replace(config.base, num_steps=0))
    start = copy.deepcopy(run_base(none, tmp_path).unet)
    assert moved_rows(start, run_base(config, tmp_path).unet) == [True] * embeds


@pytest.mark.slow
def test_after_training_a_label_decides_what_is_drawn(tmp_path):
    shades = np.repeat([0, 255], 32).astype(np.uint8)
    images = np.broadcast_to(shades[:, None, None], (64, 8, 8))
    np.savez(tmp_path / "shades.npz", images=images, labels=np.repeat([0, 1], 32))
    config = config_of(num_classes=2)
    config = replace(
        config,
        data=replace(config.data, source="npz", path=str(tmp_path / "shades.npz")),
        base=replace(
            config.base,
            num_steps=80,
            batch_size=32,
            learning_rate=3e-3,
            num_warmup_steps=0,
            checkpoint_every=80,
        ),
    )
    unet = run_base(config, tmp_path).unet.eval()
    black, white = (draw(unet, class_labels=torch.tensor([i, i, i])) for i in (0, 1))
    assert white.mean() - black.mean() > 0.5  # from the same noise


def conditional_run_dir(root: Path) -> RunDir:
    run_dir = RunDir(root)
    save_unet(random_unet(WITH_NULL), run_dir.base_unet)
    return run_dir


@pytest.mark.parametrize("label_dropout", [0.0, 0.5])
def test_a_fine_tune_is_told_the_labels_and_drops_them(tmp_path, label_dropout):
    config = config_of(label_dropout=label_dropout)
    config = replace(config, prune=replace(config.prune, num_images=16))
    run_dir, group = conditional_run_dir(tmp_path), group_of(config, 1)
    kept = keep_everything(units_of(WITH_NULL))
    finetune_expert(
        FinetuneJob(
            context_of(run_dir, config),
            group,
            kept,
            config.finetune,
            1,
            tmp_path / "checkpoint.pt",
        ),
        lambda *_: None,
    )
    expert = load_expert(run_dir.expert(group.index))
    rows = [True] * 10 + [label_dropout > 0]
    assert moved_rows(random_unet(WITH_NULL), expert) == rows


# --- guidance --------------------------------------------------------------------------------


class Bound(nn.Module):
    """A denoiser that needs no classes: it is guided, or gets one class, on its own."""

    def __init__(self, unet: nn.Module, labels: Tensor, scale: float | None = None) -> None:
        super().__init__()
        self.unet, self.labels, self.scale = unet, labels, scale

    def forward(self, x: Tensor, timestep: Tensor) -> SimpleNamespace:
        cond = self.unet(x, timestep, class_labels=self.labels).sample
        if self.scale is None:
            return SimpleNamespace(sample=cond)
        nulls = torch.full_like(self.labels, NULL)
        uncond = self.unet(x, timestep, class_labels=nulls).sample
        guided = uncond[:, :1] + self.scale * (cond[:, :1] - uncond[:, :1])
        return SimpleNamespace(sample=torch.cat([guided, cond[:, 1:]], dim=1))


def draw(
    unet: nn.Module,
    *,
    sampler: str = "ddim",
    learned: bool = False,
    first: int = 0,
    class_labels: Tensor | None = None,
    **guidance: Any,
) -> Tensor:
    how = SamplerConfig(sampler=sampler)
    scheduler = make_scheduler(DiffusionConfig(learned_sigma=learned), how)
    clips = how.clips_epsilon
    spec = SamplingSpec(
        shape=SHAPE, num_inference_steps=5, use_clipped_model_output=clips, **guidance
    )
    generators = image_generators(0, first, 3)
    return sample(lambda _: unet, scheduler, spec, generators, class_labels=class_labels)


LABELS = torch.tensor([3, 0, 7])


def test_a_scale_of_1_is_sampling_without_guidance_bit_for_bit():
    unet = random_unet(WITH_NULL)
    plain = draw(Bound(unet, LABELS))
    assert_same(draw(unet, class_labels=LABELS), plain)
    assert_same(draw(unet, class_labels=LABELS, guidance_scale=1.0, null_class=NULL), plain)
    assert not torch.allclose(draw(unet, class_labels=LABELS + 1), plain, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(
    ("sampler", "learned"), [("ddim", False), ("ddim", True), ("ddpm", True), ("pndm", False)]
)
def test_guidance_moves_from_the_unconditional_through_the_conditional(sampler, learned, scale):
    unet = random_unet({**WITH_NULL, "out_channels": 2 if learned else 1})
    how = {"sampler": sampler, "learned": learned}
    guided = draw(unet, **how, class_labels=LABELS, guidance_scale=scale, null_class=NULL)
    expected = draw(Bound(unet, LABELS, scale), **how)
    size = expected.abs().max()
    assert (guided - expected).abs().max() < 1e-3 * size
    assert (draw(Bound(unet, LABELS), **how) - expected).abs().max() > 1e-2 * size


@pytest.mark.parametrize(("sampler", "learned"), [("ddim", False), ("ddpm", True)])
def test_in_bf16_guided_images_are_near_those_of_float32(sampler, learned):
    unet = random_unet({**WITH_NULL, "out_channels": 2 if learned else 1})
    how = {"sampler": sampler, "learned": learned, "guidance_scale": 3.0, "null_class": NULL}
    exact = draw(unet, **how, class_labels=LABELS)
    found = draw(unet.bfloat16(), **how, class_labels=LABELS, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().mean() < 0.05 * exact.abs().mean()


# --- labels at sampling ----------------------------------------------------------------------


def test_an_image_has_the_same_class_in_every_batch_and_all_come_equally_often():
    whole = image_labels(10, 0, 40)
    assert_same(torch.cat([image_labels(10, first, 8) for first in range(0, 40, 8)]), whole)
    assert whole.bincount().tolist() == [4] * 10
    assert image_labels(None, 0, 40) is None


def test_base_and_experts_are_scored_on_images_of_the_same_classes(tmp_path):
    config = config_of(guidance_scale=2.0, label_dropout=0.1)
    run_dir, unet = conditional_run_dir(tmp_path), random_unet(WITH_NULL)
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    for group in groups:
        save_expert(
            run_dir.expert(group.index), unet, WITH_NULL, keep_everything(units_of(WITH_NULL))
        )
    save_index(run_dir, config, groups)
    config = replace(config, evaluate=replace(config.evaluate, batch_size=8))
    for which in ("base", "tdc"):
        for first, number in ((0, 16), (16, 8)):
            sample_images(SampleJob(run_dir, config, which, first, number), lambda *_: None)
    found = {
        which: np.concatenate(
            [np.load(path)["arr_0"] for path in sorted((run_dir.samples / which).glob("*.npz"))]
        )
        for which in ("base", "tdc")
    }
    np.testing.assert_array_equal(found["base"], found["tdc"])
    pipeline = base_pipeline(unet, pipeline_index(config))
    pipeline.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(24)]
    expected = pipeline(24, output_type="np", class_labels=labels, guidance_scale=2.0).images
    assert np.abs(found["base"].astype(int) - expected).max() <= 1  # other batches
    other = pipeline(24, output_type="np", class_labels=labels[::-1]).images
    assert (other != expected).any()


def test_a_grid_of_samples_is_of_all_classes_and_guided(tmp_path):
    config = config_of(guidance_scale=3.0, label_dropout=0.5)
    state = run_base(config, tmp_path)
    with state.ema_weights() as unet:
        grid = sample_grid(unet, config, num_images=4)
        pipeline = base_pipeline(unet, pipeline_index(config))
        pipeline.set_progress_bar_config(disable=True)
        assert_same(torch.from_numpy(pipeline(4, output_type="np").images), grid)
        plain = pipeline(4, output_type="np", guidance_scale=1.0).images
    assert (plain != grid.numpy()).any()


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder of experts that were trained with a null class, to be guided by 2."""
    config = config_of(label_dropout=0.1, guidance_scale=2.0)
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    names = [str(group.index) for group in groups]
    for name in names:
        unet = random_unet(WITH_NULL, seed=int(name))
        save_expert(tmp_path / name, unet, WITH_NULL, keep_everything(units_of(WITH_NULL)))
    pipeline_index(config, dict(zip(names, groups, strict=True))).save(tmp_path)
    return tmp_path


def quiet(path: Path) -> ProgressivePipeline:
    pipeline = ProgressivePipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_saved_experts_know_their_classes_and_guidance(saved):
    pipeline = quiet(saved)
    assert (pipeline.num_classes, pipeline.guidance_scale) == (10, 2.0)
    planned = pipeline(3, output_type="pt").images
    given = pipeline(3, output_type="pt", class_labels=[0, 1, 2], guidance_scale=2.0).images
    assert_same(planned, given)
    threes = pipeline(3, output_type="pt", class_labels=3).images
    assert_same(pipeline(3, output_type="pt", class_labels=torch.tensor([3, 3, 3])).images, threes)
    assert not torch.equal(threes, planned)
    assert not torch.equal(pipeline(3, output_type="pt", guidance_scale=1.0).images, planned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 10}, r"class_labels must be in \[0, 10\), got 10"),
        ({"class_labels": [0, -1]}, r"class_labels must be in \[0, 10\), got -1"),
        (
            {"class_labels": [1, 2, 3]},
            r"class_labels must be one, or one per image: .* batch_size 2",
        ),
        ({"guidance_scale": -0.5}, r"guidance_scale must be at least 0, got -0\.5"),
    ],
)
def test_a_call_that_cannot_be_is_refused(saved, arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        quiet(saved)(2, **arguments)


def test_unconditional_experts_and_those_without_a_null_class_refuse_what_needs_one(saved):
    plain = base_pipeline(random_unet(), pipeline_index(small_config()))
    with pytest.raises(ConfigError, match="class_labels must be None"):
        plain(2, class_labels=1)
    with pytest.raises(ConfigError, match=r"guidance_scale must be 1 .* null class, got 2"):
        plain(2, guidance_scale=2)
    full = base_pipeline(
        random_unet({**TINY, "num_class_embeds": 10}), pipeline_index(config_of())
    )
    with pytest.raises(ConfigError, match=r"guidance_scale must be 1 .* null class, got 2"):
        full(2, guidance_scale=2)


def test_experts_from_before_there_were_classes_are_unconditional(saved):
    index = json.loads((saved / INDEX_FILE).read_text())
    del index["num_classes"], index["sampler"]["guidance_scale"]
    (saved / INDEX_FILE).write_text(json.dumps(index))
    pipeline = ProgressivePipeline.from_pretrained(saved)
    assert (pipeline.num_classes, pipeline.guidance_scale) == (None, 1.0)


def test_the_command_line_samples_the_classes_that_it_is_told(saved, tmp_path):
    arguments = ["sample", str(saved), "--num-images", "5", "--batch-size", "2"]
    arguments += ["--labels", "4", "7", "--guidance-scale", "1.5"]
    assert run_command([*arguments, "--out-dir", str(tmp_path / "out")]) == 0
    found = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    labels = [4, 7, 4, 7, 4]
    expected = quiet(saved)(5, output_type="np", class_labels=labels, guidance_scale=1.5).images
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert run_command(["sample", str(saved), "--labels", "10"]) == 1
