import pytest
import torch
from diffusers import AutoencoderKL

from tdc_ray.errors import CheckpointError
from tdc_ray.models.checkpoints.compvis import (
    Checkpoint,
    config_from_state_dict,
    split,
    to_first_stage,
)
from tdc_ray.models.checkpoints.openai import config_from_state_dict as unet_told_by_shapes
from tdc_ray.models.checkpoints.openai import original_shapes
from tdc_ray.models.unet2d.architectures import architecture
from tests.models.checkpoints.openai_reference import (
    FirstStageKL,
    FirstStageVQ,
    OpenAIUNet,
    compvis_checkpoint,
    randomise,
)
from tests.small import assert_same

BETAS = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2


def blocks(seed: int = 0) -> tuple[OpenAIUNet, OpenAIUNet, FirstStageVQ]:
    torch.manual_seed(seed)
    unets = [randomise(OpenAIUNet(scale_shift=False, out_channels=3, heads=2), s) for s in (0, 1)]
    return *unets, randomise(FirstStageVQ(), 2)


def state_dict(*, averaged: bool = True) -> dict[str, torch.Tensor]:
    unet, ema, first_stage = blocks()
    return compvis_checkpoint(unet, ema if averaged else None, first_stage, BETAS)["state_dict"]


def first_stage_alone(state: dict[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint({}, is_averaged=False, first_stage=state, betas=None, scaling_factor=1.0)


def test_the_averaged_weights_are_taken_under_the_unets_names():
    found = split(state_dict())
    assert found.is_averaged
    assert_same(dict(found.unet), dict(blocks()[1].state_dict()))
    assert torch.equal(found.betas, BETAS)
    assert found.scaling_factor == 1.0


def test_without_averages_the_plain_weights_are_taken_and_said_to_be():
    found = split(state_dict(averaged=False))
    assert not found.is_averaged
    assert_same(dict(found.unet), dict(blocks()[0].state_dict()))


def test_a_measured_scaling_factor_comes_along():
    assert split(state_dict() | {"scale_factor": torch.tensor(0.5)}).scaling_factor == 0.5


@torch.inference_mode()
def test_a_converted_first_stage_encodes_and_decodes_as_the_original():
    original = blocks()[2]
    config = config_from_state_dict(first_stage_alone(original.state_dict()))
    model = to_first_stage(original.state_dict(), config)
    assert not model.training
    assert (model.config.scaling_factor, model.config.vq_embed_dim) == (1.0, 3)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = original.encode(images)
    assert latents.shape == (2, 3, 8, 8)
    assert (model.encode(images).latents - latents).abs().max() < 1e-4
    decoded = original.decode(latents)
    assert decoded.std() > 0.1
    assert (model.decode(latents).sample - decoded).abs().max() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("kind", [FirstStageVQ, FirstStageKL])
def test_a_first_stage_with_attention_inside_its_levels_is_converted(kind):
    torch.manual_seed(0)
    original = randomise(kind(attention_at=(1,)), 2)
    state = original.state_dict()
    model = to_first_stage(state, config_from_state_dict(first_stage_alone(state)))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents, encoded = original.encode(images), model.encode(images)
    if kind is FirstStageKL:
        assert isinstance(model, AutoencoderKL)
        assert (encoded.latent_dist.mode() - latents).abs().max() < 1e-4
    else:
        assert (encoded.latents - latents).abs().max() < 1e-4
    decoded = original.decode(latents)
    assert decoded.std() > 0.1
    assert (model.decode(latents).sample - decoded).abs().max() < 1e-4


def test_a_discriminator_is_no_part_of_a_first_stage():
    state = state_dict() | {"first_stage_model.loss.discriminator.0.bias": torch.zeros(1)}
    assert "loss.discriminator.0.bias" not in split(state).first_stage


def test_vq_f4_is_told_by_its_shapes():
    with torch.device("meta"):
        state = FirstStageVQ((128, 256, 512), layers=2).state_dict()
    state["quantize.embedding.weight"] = torch.empty(8192, 3, device="meta")
    told = config_from_state_dict(first_stage_alone(state))
    assert told["block_out_channels"] == (128, 256, 512)
    assert told["down_block_types"] == ("DownEncoderBlock2D",) * 3
    assert (told["layers_per_block"], told["latent_channels"]) == (2, 3)
    assert (told["num_vq_embeddings"], told["vq_embed_dim"]) == (8192, 3)


def test_the_unet_of_ffhq256_has_improved_diffusions_keys():
    config = architecture("ldm-ffhq256")
    shapes = original_shapes(config)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    told = unet_told_by_shapes(split({f"model.diffusion_model.{n}": state[n] for n in state}).unet)
    assert told["block_out_channels"] == config["block_out_channels"]
    assert told["down_block_types"] == config["down_block_types"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_ema.diffusion_modelout2bias": None}, r"lacks diffusion_modelout2bias \(3,\)"),
        ({"model_ema.other": 1}, r"holds other \(1,\), unknown"),
        ({"cond_stage_model.embedding.weight": 1}, r"cond_stage_model\..*only unconditional"),
    ],
)
def test_a_part_that_is_missing_or_unknown_is_named(change, words):
    state = state_dict()
    for name, size in change.items():
        if size is None:
            del state[name]
        else:
            state[name] = torch.zeros(size)
    with pytest.raises(CheckpointError, match=words):
        split(state)


def test_a_checkpoint_without_a_unet_is_refused():
    with pytest.raises(CheckpointError, match=r"holds no model\.diffusion_model"):
        split({"first_stage_model.quant_conv.bias": torch.zeros(3)})


def test_a_wrong_tensor_of_the_first_stage_is_named():
    original = dict(blocks()[2].state_dict())
    config = config_from_state_dict(first_stage_alone(original))
    del original["decoder.up.0.block.1.norm2.bias"]
    with pytest.raises(CheckpointError, match=r"lacks decoder\.up\.0\.block\.1\.norm2\.bias"):
        to_first_stage(original, config)
    with pytest.raises(CheckpointError, match=r"lacks encoder\.down\.0.*it holds encoder\.model"):
        config_from_state_dict(first_stage_alone({"encoder.model": torch.zeros(1)}))
    original["decoder.conv_out.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"has the shape \(1,\), expected 4 dimensions"):
        config_from_state_dict(first_stage_alone(original))
