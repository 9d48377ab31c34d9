import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file

from tdc_ray.errors import CheckpointError
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.finite import check_finite
from tdc_ray.models.unet2d.unet import build_unet, load_unet, save_unet, unet_config
from tdc_ray.storage.files import write_json
from tests.models.counting import count_macs
from tests.small import TINY, assert_same, output_of, random_unet, sizes

WEIGHTS = "diffusion_pytorch_model.safetensors"
FOUR_HEADS = {**TINY, "num_heads": 4}


def heads_of(unet: UNet2DModel) -> set[int]:
    return {module.heads for module in unet.modules() if isinstance(module, Attention)}


def test_a_saved_unet_loads_bit_for_bit_in_eval_mode(tmp_path):
    unet = random_unet().train()
    save_unet(unet, tmp_path / "unet")
    loaded = load_unet(tmp_path / "unet")
    assert not loaded.training
    assert_same(loaded.state_dict(), unet.state_dict())
    assert_same(output_of(loaded), output_of(unet.eval()))


def test_a_saved_unet_loads_in_diffusers(tmp_path):
    unet = random_unet()
    save_unet(unet, tmp_path / "unet")
    loaded = UNet2DModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    assert_same(output_of(loaded.eval()), output_of(unet))


def test_saving_again_replaces_what_was_there(tmp_path):
    save_unet(build_unet(FOUR_HEADS), tmp_path / "unet")
    unet = random_unet(seed=1)
    save_unet(unet, tmp_path / "unet")
    assert_same(output_of(load_unet(tmp_path / "unet")), output_of(unet))
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def test_num_heads_survives_saving_and_decides_the_output(tmp_path):
    unet = random_unet(FOUR_HEADS)
    assert heads_of(unet) == {4}
    save_unet(unet, tmp_path / "unet")
    loaded = load_unet(tmp_path / "unet")
    assert heads_of(loaded) == {4}
    assert unet_config(tmp_path / "unet")["num_heads"] == 4
    assert_same(output_of(loaded), output_of(unet))

    by_head_dim = random_unet(TINY)  # the same weights, two heads of 16 in place of four of 8
    assert heads_of(by_head_dim) == {2}
    assert_same(by_head_dim.state_dict(), unet.state_dict())
    assert not torch.allclose(output_of(by_head_dim), output_of(unet), atol=1e-4)


@pytest.mark.parametrize(
    "own",
    [
        {"num_heads": 4},
        {"num_heads": 4, "num_heads_upsample": 2},
        {"timestep_channels": 48},
        {"num_heads": 4, "timestep_channels": 48},
    ],
    ids=str,
)
def test_a_unet_that_diffusers_would_build_otherwise_is_refused_by_it(tmp_path, own):
    unet = random_unet({**TINY, **own})
    save_unet(unet, tmp_path / "unet")
    config = unet_config(tmp_path / "unet")
    assert {name: config.get(name) for name in own} == own
    assert_same(output_of(load_unet(tmp_path / "unet")), output_of(unet))
    check_finite([tmp_path / "unet"])
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        UNet2DModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)


@pytest.mark.parametrize("own", [{"num_heads": 2}, {"timestep_channels": 16}], ids=str)
def test_what_is_as_the_config_has_it_loads_in_diffusers(tmp_path, own):
    unet = random_unet({**TINY, **own})  # TINY has heads, and a first level, of 16 channels
    save_unet(unet, tmp_path / "unet")
    loaded = UNet2DModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    assert_same(output_of(loaded.eval()), output_of(unet))


def test_heads_that_an_earlier_version_saved_beside_diffusers_weights_count(tmp_path):
    unet = random_unet(FOUR_HEADS)
    unet.save_pretrained(tmp_path / "unet")
    write_json(tmp_path / "unet/tdc_heads.json", {"num_heads": 4})
    assert_same(output_of(load_unet(tmp_path / "unet")), output_of(unet))


def test_settings_of_our_own_that_the_weights_are_not_of_are_a_checkpoint_error(tmp_path):
    random_unet().save_pretrained(tmp_path / "unet")
    write_json(tmp_path / "unet/tdc_heads.json", {"timestep_channels": 48})
    with pytest.raises(CheckpointError, match=r"(?s)damaged UNet2DModel.*linear_1\.weight"):
        load_unet(tmp_path / "unet")


def test_own_weights_without_their_settings_are_a_checkpoint_error(tmp_path):
    save_unet(random_unet(FOUR_HEADS), tmp_path / "unet")
    (tmp_path / "unet/tdc_heads.json").unlink()
    with pytest.raises(CheckpointError, match="unet holds no UNet2DModel in safetensors"):
        load_unet(tmp_path / "unet")


def test_own_weights_that_are_cut_short_are_a_checkpoint_error(tmp_path):
    save_unet(random_unet(FOUR_HEADS), tmp_path / "unet")
    file = tmp_path / "unet/tdc_unet.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="unet holds a damaged UNet2DModel"):
        load_unet(tmp_path / "unet")


def test_a_saved_config_tells_layers_and_cost_without_the_weights(tmp_path):
    unet = random_unet()
    save_unet(unet, tmp_path / "unet")
    (tmp_path / "unet" / WEIGHTS).unlink()
    config = unet_config(tmp_path / "unet")
    assert sizes(config) == (count_params(unet), count_macs(unet)) == sizes(TINY)


def test_dropout_is_no_part_of_the_architecture_but_is_saved(tmp_path):
    save_unet(build_unet({**TINY, "dropout": 0.25}), tmp_path / "unet")
    assert load_unet(tmp_path / "unet").mid_block.resnets[0].dropout.p == 0.25


def test_a_folder_that_is_not_there_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere holds no model: config\.json is missing"):
        load_unet(tmp_path / "nowhere")


def truncate(folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def tear_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"block_out_channels": [16,')


def widen_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"block_out_channels": [16, 48]}))


@pytest.mark.parametrize("harm", [truncate, remove_weights, tear_config, widen_config])
def test_a_broken_folder_is_a_checkpoint_error_that_names_it(tmp_path, harm):
    save_unet(random_unet(), tmp_path / "unet")
    harm(tmp_path / "unet")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'unet'} holds no UNet2DModel"):
        load_unet(tmp_path / "unet")


def test_weights_that_lack_a_tensor_are_a_checkpoint_error(tmp_path):
    save_unet(random_unet(), tmp_path / "unet")
    tensors = load_file(tmp_path / "unet" / WEIGHTS)
    del tensors["conv_out.weight"]
    save_file(tensors, tmp_path / "unet" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"unet lacks the weights conv_out\.weight"):
        load_unet(tmp_path / "unet")


def test_weights_that_the_config_knows_nothing_of_are_a_checkpoint_error(tmp_path):
    save_unet(random_unet({**TINY, "num_class_embeds": 3}), tmp_path / "unet")
    config = json.loads((tmp_path / "unet/config.json").read_text())
    (tmp_path / "unet/config.json").write_text(json.dumps(config | {"num_class_embeds": None}))
    words = r"unet holds the weights class_embedding\.weight, which the network"
    with pytest.raises(CheckpointError, match=words):
        load_unet(tmp_path / "unet")


def test_weights_that_git_lfs_has_not_fetched_are_a_checkpoint_error(tmp_path):
    save_unet(random_unet(), tmp_path / "unet")
    (tmp_path / "unet" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid x")
    with pytest.raises(
        CheckpointError, match=r"is a pointer of Git LFS: fetch it by git lfs pull"
    ):
        check_finite([tmp_path / "unet"])


class WritesWhenUnpickled:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_a_checkpoint_error_and_is_never_unpickled(tmp_path):
    folder, trace = tmp_path / "unet", tmp_path / "it was unpickled"
    save_unet(random_unet(), folder)
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(WritesWhenUnpickled(trace)))
    with pytest.raises(CheckpointError):
        load_unet(folder)
    assert not trace.exists()
