import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file

from tdc_ray.config.data import DataConfig
from tdc_ray.errors import CheckpointError, ConfigError, StorageError
from tdc_ray.models.first_stage import (
    BATCH,
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_latents,
    copy_first_stage,
    first_stage_digest,
    input_shape,
    load_first_stage,
)
from tests.small import TINY, assert_same, make_first_stage

KINDS = ("AutoencoderKL", "VQModel")


def images(count=3, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, size, size, generator=generator) * 2 - 1


def rewrite(folder, **changes):
    """Change the config; None takes a setting out."""
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / CONFIG_FILE).write_text(json.dumps(kept))
    return folder


# --- encode and decode -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 32])
def test_images_of_any_size_become_the_latents_told_and_images_again(tmp_path, kind, size):
    folder = make_first_stage(tmp_path, kind)
    first_stage = load_first_stage(folder)
    latents = first_stage.encode(images(3, size))
    data = DataConfig(image_size=size, first_stage=str(folder))
    assert latents.shape[1:] == input_shape(data) == (1, size // 2, size // 2)
    assert first_stage.decode(latents).shape == (3, 1, size, size)
    assert latents.dtype == first_stage.decode(latents).dtype == torch.float32


def test_latents_of_an_autoencoder_kl_are_the_scaled_mode(tmp_path):
    first_stage = load_first_stage(make_first_stage(tmp_path, scaling_factor=0.7))
    model = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        mode = model.encode(images()).latent_dist.mode()
        decoded = model.decode(mode).sample
    assert_same(first_stage.encode(images()), mode * 0.7)
    torch.testing.assert_close(first_stage.decode(mode * 0.7), decoded)


def test_a_vq_model_encodes_unquantised_and_decodes_quantised(tmp_path):
    first_stage = load_first_stage(make_first_stage(tmp_path, "VQModel", scaling_factor=1.0))
    model = VQModel.from_pretrained(tmp_path).eval()
    latents = first_stage.encode(images())
    with torch.inference_mode():
        quantised, *_ = model.quantize(latents)
        as_it_is = model.decode(latents, force_not_quantize=True).sample
        of_codes = model.decode(quantised, force_not_quantize=True).sample
        assert_same(latents, model.encode(images()).latents)
    assert not torch.allclose(latents, quantised, atol=1e-3)
    torch.testing.assert_close(first_stage.decode(latents), of_codes)
    assert not torch.allclose(first_stage.decode(latents), as_it_is, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scaling_factor_is_the_folders_own(tmp_path, kind):
    one = load_first_stage(make_first_stage(tmp_path / "one", kind, scaling_factor=1.0))
    two = load_first_stage(make_first_stage(tmp_path / "two", kind, scaling_factor=2.0))
    assert_same(two.encode(images()), 2 * one.encode(images()))
    assert_same(two.decode(two.encode(images())), one.decode(one.encode(images())))


def test_a_shift_is_taken_off_before_scaling(tmp_path):
    plain = load_first_stage(make_first_stage(tmp_path, scaling_factor=2.0))
    shifted = load_first_stage(rewrite(tmp_path, shift_factor=0.5))
    torch.testing.assert_close(shifted.encode(images()), plain.encode(images()) - 1.0)
    decoded = shifted.decode(shifted.encode(images()))
    torch.testing.assert_close(decoded, plain.decode(plain.encode(images())))


def test_many_images_go_through_in_parts(tmp_path):
    first_stage, many = load_first_stage(make_first_stage(tmp_path)), images(2 * BATCH + 3)
    seen = []
    first_stage.model.encoder.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    latents = first_stage.encode(many)
    assert seen == [BATCH, BATCH, 3]
    torch.testing.assert_close(latents[20:21], first_stage.encode(many[20:21]))


def test_a_first_stage_is_frozen(tmp_path):
    first_stage = load_first_stage(make_first_stage(tmp_path))
    assert not first_stage.model.training
    assert not any(parameter.requires_grad for parameter in first_stage.parameters())


# --- the digest and the copy -----------------------------------------------------------------


def test_the_digest_names_weights_and_settings_and_not_the_place(tmp_path):
    make_first_stage(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    rewrite(tmp_path / "copy", _diffusers_version="0.1", _name_or_path="elsewhere")
    make_first_stage(tmp_path / "weights", seed=1)
    make_first_stage(tmp_path / "scale", scaling_factor=0.8)
    names = ("one", "copy", "weights", "scale")
    found = {name: first_stage_digest(tmp_path / name) for name in names}
    assert found["one"] == found["copy"]
    assert len({found["one"], found["weights"], found["scale"]}) == 3


def test_a_copy_is_made_once_and_another_first_stage_is_refused(tmp_path):
    folder, copy = make_first_stage(tmp_path / "one"), tmp_path / "run" / "first_stage"
    for _ in range(2):
        copy_first_stage(folder, copy)
    assert first_stage_digest(copy) == first_stage_digest(folder)
    other = make_first_stage(tmp_path / "other", seed=1)
    with pytest.raises(StorageError, match=rf"{other} is no longer the one .*--run-dir"):
        copy_first_stage(other, copy)


def test_a_variant_alone_is_copied_under_the_name_that_diffusers_loads(tmp_path):
    folder, copy = make_first_stage(tmp_path / "one"), tmp_path / "run" / "first_stage"
    expected = first_stage_digest(folder)
    (folder / WEIGHTS_FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    copy_first_stage(folder, copy)
    assert first_stage_digest(folder) == first_stage_digest(copy) == expected
    AutoencoderKL.from_pretrained(copy, use_safetensors=True, low_cpu_mem_usage=False)


# --- what is refused -------------------------------------------------------------------------


def cut_short(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:1000])


def without_a_weight(folder):
    weights = load_file(folder / WEIGHTS_FILE)
    del weights["decoder.conv_out.bias"]
    save_file(weights, folder / WEIGHTS_FILE)


def as_a_pickle(folder):
    weights = load_file(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    torch.save(weights, folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / CONFIG_FILE).unlink(), r"holds no first stage: config\.json is missing"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), r"config\.json is not JSON"),
        (lambda f: (f / CONFIG_FILE).write_text("[]"), "must be one of VQModel, .*got None"),
        (lambda f: rewrite(f, _class_name="UNet2DModel"), "must be one of .*, got UNet2DModel"),
        (lambda f: rewrite(f, scaling_factor=None), r"must name scaling_factor.*1\.0 .*VQ-f4"),
        (lambda f: rewrite(f, scaling_factor=0), "scaling_factor in .* must be above 0, got 0"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), "holds no AutoencoderKL in safetensors"),
        (as_a_pickle, "holds no AutoencoderKL in safetensors"),
        (cut_short, "holds no AutoencoderKL in safetensors"),
        (without_a_weight, r"lacks the weights decoder\.conv_out\.bias"),
    ],
)
def test_a_spoilt_folder_is_one_error_that_says_what_is_wrong(tmp_path, spoil, message):
    spoil(make_first_stage(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        load_first_stage(tmp_path)


def test_a_digest_needs_weights(tmp_path):
    (make_first_stage(tmp_path) / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="holds no first stage in safetensors"):
        first_stage_digest(tmp_path)


@pytest.mark.parametrize("changes", [{"image_size": 15}, {"image_size": 16, "num_channels": 3}])
def test_images_that_the_first_stage_does_not_take_are_refused(tmp_path, changes):
    data = DataConfig(first_stage=str(make_first_stage(tmp_path)), **changes)
    with pytest.raises(ConfigError, match=r"takes images of 1 channels and a size that 2 divides"):
        input_shape(data)


def test_latents_that_the_model_does_not_take_are_refused_with_both_shapes(tmp_path):
    data = DataConfig(image_size=32, first_stage=str(make_first_stage(tmp_path)))
    message = "turns images of 32x32 into latents of 1x16x16, and this model takes 1x8x8"
    with pytest.raises(ConfigError, match=message):
        check_latents(data, TINY, "this model")
    check_latents(DataConfig(image_size=16, first_stage=data.first_stage), TINY, "this model")


def test_images_without_a_first_stage_are_inputs_as_they_are():
    assert input_shape(DataConfig(image_size=12, num_channels=3)) == (3, 12, 12)
