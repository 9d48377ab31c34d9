"""Experts in pipelines of diffusers: tiny networks of random weights, built from configs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    ModelMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.models.saved_expert import save_expert
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.runs.pipelines import pipeline_index
from tests.diffusion.test_pipeline import groups_of
from tests.small import TINY, assert_same, random_kept, random_unet, small_config

SPANS = [(0, 249), (250, 599), (600, 999)]
UNITS = units_of(TINY)
KEPT = [random_kept(UNITS, seed) for seed in range(3)]
SCHEDULER = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def randomised(network: ModelMixin) -> ModelMixin:
    """The network, none of whose parameters is at its initial 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def text_unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        **changes,
    )
    return randomised(unet)


def transformer() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "sample_size": 8}
    return randomised(DiTTransformer2DModel(in_channels=4, out_channels=8, **sizes))


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0,
    ).eval()


def copies(network: ModelMixin, spans: Sequence[tuple[float, float]] = SPANS) -> ExpertDenoiser:
    """Experts that all are the network."""
    experts = [type(network).from_config(network.config).eval() for _ in spans]
    for expert in experts:
        expert.load_state_dict(network.state_dict())
    return ExpertDenoiser(experts, spans)


def pruned() -> ExpertDenoiser:
    return ExpertDenoiser([cut(random_unet(), UNITS, kept) for kept in KEPT], SPANS, kept=KEPT)


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images_of(pipeline: DiffusionPipeline, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 4, "output_type": "np", **arguments}
    return torch.as_tensor(pipeline(generator=torch.manual_seed(7), **arguments).images)


def without_text(**parts: Any) -> dict[str, Any]:
    """Components of a text pipeline that gets embeddings."""
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    parts = {"scheduler": SCHEDULER, "vae": autoencoder(), **parts}
    return {**dict.fromkeys(names), "requires_safety_checker": False, **parts}


PROMPT = {"prompt_embeds": noise(1, 5, 8), "height": 16, "width": 16}
GUIDED = {**PROMPT, "negative_prompt_embeds": noise(1, 5, 8, seed=4)}
IMAGE, MASK = noise(1, 3, 16, 16).sigmoid(), (noise(1, 1, 16, 16) > 0).float()


def text_to_image() -> tuple[ModelMixin, dict[str, Any], dict[str, Any]]:
    return text_unet(), without_text(), GUIDED


def image_to_image() -> tuple[ModelMixin, dict[str, Any], dict[str, Any]]:
    sized = {key: value for key, value in GUIDED.items() if key not in ("height", "width")}
    return text_unet(), without_text(), {**sized, "image": IMAGE, "strength": 0.8}


def inpainting() -> tuple[ModelMixin, dict[str, Any], dict[str, Any]]:
    return text_unet(), without_text(), {**GUIDED, "image": IMAGE, "mask_image": MASK}


def controlled() -> tuple[ModelMixin, dict[str, Any], dict[str, Any]]:
    unet = text_unet()
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    parts = without_text(controlnet=randomised(control))
    return unet, parts, {**GUIDED, "image": IMAGE}


def consistency() -> tuple[ModelMixin, dict[str, Any], dict[str, Any]]:
    parts = without_text(scheduler=LCMScheduler.from_config(SCHEDULER.config))
    return text_unet(time_cond_proj_dim=8), parts, PROMPT


def large() -> tuple[ModelMixin, dict[str, Any], dict[str, Any]]:
    """SDXL, whose pipeline reads ``unet.add_embedding``."""
    unet = text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
    )
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pooled = {"pooled_prompt_embeds": noise(1, 8), "negative_pooled_prompt_embeds": noise(1, 8)}
    parts = {**dict.fromkeys(names), "scheduler": SCHEDULER, "vae": autoencoder()}
    return unet, parts, {**GUIDED, **pooled}


def flow() -> tuple[ModelMixin, dict[str, Any], dict[str, Any]]:
    """Stable Diffusion 3, whose network takes the timestep as its fourth, beginning with T."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "sample_size": 8}
    widths = ("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim")
    channels = {"in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    network = SD3Transformer2DModel(**sizes, **channels, **dict.fromkeys(widths, 8))
    names = [
        f"{name}{place}" for name in ("text_encoder", "tokenizer") for place in ("", "_2", "_3")
    ]
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": autoencoder()}
    pooled = {"pooled_prompt_embeds": noise(1, 8), "negative_pooled_prompt_embeds": noise(1, 8)}
    return randomised(network), {**dict.fromkeys(names), **parts}, {**GUIDED, **pooled}


def of_classes() -> tuple[ModelMixin, dict[str, Any], dict[str, Any]]:
    parts = {"vae": autoencoder(), "scheduler": DDIMScheduler()}
    return transformer(), parts, {"class_labels": [1, 2]}


def unconditional() -> tuple[ModelMixin, dict[str, Any], dict[str, Any]]:
    return random_unet(), {"scheduler": SCHEDULER}, {"batch_size": 2}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("DDIMPipeline", unconditional),
        ("DDPMPipeline", unconditional),
        ("DiTPipeline", of_classes),
        ("StableDiffusionPipeline", text_to_image),
        ("StableDiffusionImg2ImgPipeline", image_to_image),
        ("StableDiffusionInpaintPipeline", inpainting),
        ("StableDiffusionControlNetPipeline", controlled),
        ("LatentConsistencyModelPipeline", consistency),
        ("StableDiffusionXLPipeline", large),
        ("StableDiffusion3Pipeline", flow),
    ],
)
def test_copies_draw_the_images_of_the_network_in_any_pipeline(
    kind: str, make: Callable[[], tuple[ModelMixin, dict[str, Any], dict[str, Any]]]
):
    if make not in (unconditional, of_classes):
        pytest.importorskip("transformers")
    network, parts, arguments = make()
    place = "transformer" if make in (of_classes, flow) else "unet"
    pipeline = getattr(diffusers, kind)(**parts, **{place: network})
    expected = images_of(pipeline, **arguments)
    denoiser, used = copies(network), set()
    for expert in denoiser.experts:
        expert.register_forward_pre_hook(lambda module, _: used.add(module))
    setattr(pipeline, place, denoiser)
    assert torch.equal(images_of(pipeline, **arguments), expected)
    assert len(used) >= 2
    assert expected.std() > 0.05


def test_a_pipeline_saves_and_loads_its_experts(tmp_path):
    pipeline = DDIMPipeline(copies(random_unet()), SCHEDULER)
    expected = images_of(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.unet, ExpertDenoiser)
    assert torch.equal(images_of(loaded), expected)


def test_timesteps_go_to_the_expert_of_the_nearest():
    denoiser = ExpertDenoiser([random_unet(seed=seed) for seed in range(3)], SPANS)
    x = noise(2, 1, 8, 8)
    with torch.no_grad():
        for timestep, place in (
            (0, 0),
            (249.4, 0),
            (249.5, 1),
            (torch.tensor(599), 1),
            (torch.tensor([600.0]), 2),
            (1000.0, 2),
            (torch.tensor([250, 300]), 1),
        ):
            expected = denoiser.experts[place](x, timestep).sample
            assert torch.equal(denoiser(x, timestep).sample, expected)
            assert torch.equal(denoiser(x, timestep=timestep, return_dict=False)[0], expected)
    for timestep in (-1, 1000, 1001.5, float("nan")):
        with pytest.raises(ConfigError, match=f"no expert serves timestep {timestep}:"):
            denoiser(x, timestep)
    with pytest.raises(ConfigError, match=r"each of 2 samples: got a tensor of shape \(3,\)"):
        denoiser(x, torch.tensor([1, 2, 3]))


def test_a_batch_with_timesteps_of_several_experts_is_split_with_its_gradients():
    denoiser = ExpertDenoiser([text_unet(), text_unet(), text_unet()], SPANS)
    for scale, expert in enumerate(denoiser.experts):
        expert.conv_in.weight.data *= scale + 1
    x, timesteps, text = noise(4, 4, 8, 8), torch.tensor([700, 3, 300, 601]), noise(4, 5, 8)
    skips = (noise(4, 8, 8, 8), noise(4, 8, 8, 8), noise(4, 8, 4, 4), noise(4, 16, 4, 4))
    control = {
        "down_block_additional_residuals": skips,
        "mid_block_additional_residual": noise(4, 16, 4, 4),
        "added_cond_kwargs": {"text_embeds": noise(4, 8)},
    }
    found = denoiser(x, timesteps, text, **control).sample
    found.square().sum().backward()
    for row, timestep in enumerate(timesteps.tolist()):
        one = slice(row, row + 1)
        alone = {
            "down_block_additional_residuals": tuple(skip[one] for skip in skips),
            "mid_block_additional_residual": control["mid_block_additional_residual"][one],
        }
        expert = denoiser.experts.for_timestep(timestep)
        expected = expert(x[one], timestep, text[one], **alone).sample
        torch.testing.assert_close(found[one], expected, rtol=1e-4, atol=1e-4)
    assert all(expert.conv_in.weight.grad is not None for expert in denoiser.experts)


def test_timesteps_are_scaled_after_the_expert_is_chosen():
    denoiser = ExpertDenoiser([random_unet(seed=1), random_unet()], [(0, 1), (2, 3)])
    denoiser.timestep_scale = 250.0
    x = noise(1, 1, 8, 8)
    assert torch.equal(denoiser(x, 2).sample, random_unet()(x, 500.0).sample)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(random_unet, torch.float32), (text_unet, torch.float16), (transformer, torch.float32)],
)
def test_copies_are_saved_once_and_load_the_same(tmp_path, make, dtype):
    network = make().to(dtype)
    denoiser = copies(network).to(dtype)
    denoiser.save_pretrained(tmp_path / "one")
    loaded = ExpertDenoiser.from_pretrained(tmp_path / "one")
    assert_same(loaded.state_dict(), denoiser.state_dict())
    assert loaded.dtype == dtype
    assert not loaded.training
    assert loaded.num_parameters() == network.num_parameters()
    assert denoiser.num_parameters() == 3 * network.num_parameters()
    assert loaded.config.sample_size == 8
    network.save_pretrained(tmp_path / "plain")
    plain = (tmp_path / "plain" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert (tmp_path / "one" / "experts.safetensors").stat().st_size < 1.2 * plain
    loaded.save_pretrained(tmp_path / "one", max_shard_size="20KB")  # over itself
    assert len(list((tmp_path / "one").glob("experts-*.safetensors"))) > 2
    again = ExpertDenoiser.from_pretrained(tmp_path / "one", torch_dtype=torch.float16)
    assert_same(again.state_dict(), denoiser.half().state_dict())


def test_pruned_experts_share_what_no_group_cut_and_load_the_same(tmp_path):
    denoiser = pruned()
    denoiser.save_pretrained(tmp_path)
    loaded = ExpertDenoiser.from_pretrained(tmp_path, torch_dtype="auto")
    assert_same(loaded.state_dict(), denoiser.state_dict())
    first, second, third = loaded.experts
    assert first.conv_in.weight is second.conv_in.weight is third.conv_in.weight
    assert first.mid_block.resnets[0].conv1.weight is not third.mid_block.resnets[0].conv1.weight
    assert loaded.num_parameters() < 0.9 * denoiser.num_parameters()
    x = noise(2, 1, 8, 8)
    with torch.no_grad():
        for timestep in (5, 500, 800):
            assert torch.equal(loaded(x, timestep).sample, denoiser(x, timestep).sample)


def test_a_run_s_experts_load_as_a_denoiser(tmp_path):
    config = small_config()
    groups = groups_of(config)
    names = [f"expert-{group.index:02d}" for group in groups]
    for seed, name in enumerate(names):
        kept = random_kept(UNITS, seed)
        save_expert(tmp_path / "experts" / name, cut(random_unet(), UNITS, kept), TINY, kept)
    pipeline_index(config, dict(zip(names, groups, strict=True))).save(tmp_path / "experts")
    denoiser = ExpertDenoiser.from_pretrained(tmp_path)
    experts = ProgressivePipeline.from_pretrained(tmp_path).experts
    assert denoiser.experts.spans == experts.spans
    assert denoiser.experts[0].conv_in.weight is denoiser.experts[1].conv_in.weight
    denoiser.save_pretrained(tmp_path / "out")
    loaded = ExpertDenoiser.from_pretrained(tmp_path, subfolder="out", offload=True)
    x = noise(2, 1, 8, 8)
    with torch.no_grad():
        for timestep in (0, 450, 999):
            expected = experts.for_timestep(timestep)(x, timestep).sample
            torch.testing.assert_close(denoiser(x, timestep).sample, expected)
            torch.testing.assert_close(loaded(x, timestep).sample, expected)


def test_a_denoiser_lies_in_a_store(bucket):
    denoiser = pruned()
    denoiser.save_pretrained(f"{bucket}/pipe/unet")
    loaded = ExpertDenoiser.from_pretrained(f"{bucket}/pipe", subfolder="unet")
    assert_same(loaded.state_dict(), denoiser.state_dict())


def test_offloaded_experts_stay_where_they_are_but_for_the_one_in_use(tmp_path):
    pruned().save_pretrained(tmp_path)
    denoiser = ExpertDenoiser.from_pretrained(tmp_path, offload=True).to("meta", torch.float16)
    assert (denoiser.device.type, denoiser.dtype) == ("meta", torch.float16)
    x = torch.empty(1, 1, 8, 8, dtype=torch.float16, device="meta")
    shared, moved = denoiser.experts[0].conv_in.weight, []
    for timestep in (800, 3):
        assert denoiser(x, timestep).sample.device.type == "meta"
        in_use = denoiser.experts.for_timestep(timestep)
        assert denoiser._moved.keys() == {*in_use.parameters(), *in_use.buffers()}
        moved.append(denoiser._moved[shared])
    assert moved[0] is moved[1]  # what both have is moved once
    assert {parameter.device.type for parameter in denoiser.parameters()} == {"cpu"}


def test_it_behaves_as_its_class_does():
    network = text_unet()
    denoiser = copies(network)
    assert denoiser.config.block_out_channels == network.config.block_out_channels
    assert denoiser.down_blocks is denoiser.experts[2].down_blocks
    assert not hasattr(denoiser, "nothing")
    denoiser.enable_gradient_checkpointing()
    assert all(expert.is_gradient_checkpointing for expert in denoiser.experts)
    denoiser.disable_gradient_checkpointing()
    denoiser.set_attn_processor(dict(denoiser.attn_processors))
    network.enable_freeu(0.9, 0.2, 1.2, 1.4)
    denoiser.enable_freeu(0.9, 0.2, 1.2, 1.4)
    x, text = noise(1, 4, 8, 8), noise(1, 5, 8)
    for timestep in (3, 300, 800):
        assert torch.equal(denoiser(x, timestep, text)[0], network(x, timestep, text)[0])
    for name in ("load_lora_adapter", "set_adapters", "_load_ip_adapter_weights"):
        with pytest.raises(ConfigError, match=f"{name} is of one network: .* make experts of"):
            getattr(denoiser, name)({})


def test_what_could_not_be_loaded_the_same_is_not_saved(tmp_path):
    experts = [cut(random_unet(), UNITS, kept) for kept in KEPT]
    with pytest.raises(ConfigError, match=r"0 to 249 is not the network .* \(kept=\.\.\.\)"):
        ExpertDenoiser(experts, SPANS).save_pretrained(tmp_path / "out")
    denoiser = copies(random_unet())
    attention = denoiser.experts[1].mid_block.attentions[0]
    attention.heads = attention.sliceable_head_dim = 4
    with pytest.raises(ConfigError, match=r"timesteps 250 to 599 .*attentions\.0\.heads differs"):
        denoiser.save_pretrained(tmp_path / "out")
    for option in ({"push_to_hub": True}, {"safe_serialization": False}, {"variant": "fp16"}):
        with pytest.raises(ConfigError, match=f"no option {next(iter(option))}="):
            denoiser.save_pretrained(tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"which has notes\.txt in it"):
        copies(random_unet()).save_pretrained(tmp_path)


@torch.no_grad()
def test_networks_of_other_widths_go_together_and_are_not_saved(tmp_path):
    networks = [random_unet(), random_unet({**TINY, "block_out_channels": (16, 48)})]
    denoiser, x_t = ExpertDenoiser(networks, SPANS[:2]), torch.randn(2, 1, 8, 8)
    for network, (first, _) in zip(networks, SPANS[:2], strict=True):
        assert_same(denoiser(x_t, first).sample, network(x_t, first).sample)
    with pytest.raises(ConfigError, match="is not the network that its config describes"):
        denoiser.save_pretrained(tmp_path / "out")


def test_experts_must_go_together():
    unet = random_unet()
    with pytest.raises(ConfigError, match="got 1 experts, 3 spans"):
        ExpertDenoiser([unet], SPANS)
    coloured = random_unet({**TINY, "in_channels": 3})
    with pytest.raises(ConfigError, match="must have one in_channels, got 1, 3"):
        ExpertDenoiser([unet, coloured], SPANS[:2])
    for overlapping in ([(0, 500), (500, 999)], [(400, 0), (401, 999)]):
        with pytest.raises(ConfigError, match="spans must be first and last timestep of each"):
            ExpertDenoiser([unet, unet], overlapping)
    with pytest.raises(ConfigError, match="must take a timestep, got a AutoencoderKL"):
        ExpertDenoiser([autoencoder()], SPANS[:1])


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: change(f, format=2), "format must be 1, got 2"),
        (lambda f: change(f, experts=[]), "experts: Tuple should have at least 1 item"),
        (lambda f: change(f, base={"_class_name": "Path"}), "has no model Path"),
        (lambda f: change(f, base={**TINY, "in_channels": 3}), "size mismatch"),
        (lambda f: (f / "experts.safetensors").unlink(), "Missing key"),
        (lambda f: (f / "experts.safetensors").write_bytes(b"torn"), "SafetensorError"),
        (lambda f: (f / "config.json").unlink(), "holds no experts"),
    ],
    ids=["format", "none", "class", "shape", "missing", "torn", "nothing"],
)
def test_a_malformed_folder_is_a_checkpoint_error(tmp_path, harm, message):
    copies(random_unet()).save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=rf"(?s){tmp_path}.*{message}"):
        ExpertDenoiser.from_pretrained(tmp_path)


def test_only_folders_that_exist_are_loaded_and_only_with_options_that_count(tmp_path):
    with pytest.raises(CheckpointError, match=r"owner/name does not exist\. .*snapshot_download"):
        ExpertDenoiser.from_pretrained("owner/name")
    with pytest.raises(ConfigError, match="no option device_map"):
        ExpertDenoiser.from_pretrained(tmp_path, device_map="auto", low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match=r"a torch\.dtype, got 'float16'"):
        ExpertDenoiser.from_pretrained(tmp_path, torch_dtype="float16")


def test_no_class_of_diffusers_takes_the_folder_for_its_own(tmp_path):
    copies(random_unet()).save_pretrained(tmp_path, safe_serialization=True, variant=None)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        UNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
