import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from tdc_ray.errors import CheckpointError
from tdc_ray.models.checkpoints.openai import config_from_state_dict, original_shapes, to_diffusers
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.architectures import (
    ARCHITECTURES,
    architecture,
    with_head_channels,
    with_heads,
)
from tdc_ray.models.unet2d.unet import build_unet
from tests.models.checkpoints.openai_reference import OpenAIUNet, randomise
from tests.models.counting import count_macs
from tests.small import sizes

TOLD = ("in_channels", "out_channels", "layers_per_block", "block_out_channels")
TOLD += ("down_block_types", "up_block_types")


def reference(seed: int = 0, **changes) -> OpenAIUNet:
    torch.manual_seed(seed)
    return randomise(OpenAIUNet(**changes), seed)


def converted(original: OpenAIUNet, heads: int, **how):
    return converted_by(original, with_heads(told(original), heads, **how))


def told(original: OpenAIUNet) -> NetworkConfig:
    return config_from_state_dict(original.state_dict())


def converted_by(original: OpenAIUNet, config: NetworkConfig, *, new_order: bool = False):
    unet = build_unet({**config, "sample_size": 8}).eval()
    unet.load_state_dict(to_diffusers(original.state_dict(), config, new_order))
    return unet


def largest_difference(original: OpenAIUNet, heads: int) -> float:
    return difference_of(original, converted(original, heads))


@torch.inference_mode()
def difference_of(original: OpenAIUNet, unet: UNet2DModel) -> float:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, unet.config["in_channels"], 8, 8, generator=generator)
    timesteps = torch.tensor([0.0, 123.25, 999.75])  # rescaled ones are no integers
    labels = torch.tensor([0, 2, 1]) if hasattr(original, "label_emb") else None
    expected = original(x, timesteps, labels)
    assert expected.std() > 0.1
    return (unet(x, timesteps, class_labels=labels).sample - expected).abs().max().item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"heads": 1},
        {"scale_shift": False, "out_channels": 3},
        {"num_classes": 3},
        {"channels": (32, 64, 96), "layers": 1, "attention_at": (1, 2), "heads": 2},
        {"channels": (32, 32, 64), "attention_at": ()},
        {"channels": (64,), "attention_at": (0,), "in_channels": 1, "out_channels": 2},
        {"resblock_updown": True, "num_classes": 3},
        {"resblock_updown": True, "channels": (32, 32, 64), "layers": 3, "scale_shift": False},
        {"resblock_updown": True, "timestep_channels": 64, "num_classes": 3},
    ],
    ids=str,
)
def test_a_converted_unet_gives_what_the_original_gives(changes):
    assert largest_difference(reference(**changes), changes.get("heads", 4)) < 1e-4


TWO_WIDTHS = {"channels": (32, 64, 96), "layers": 1, "attention_at": (1, 2)}


def test_other_heads_on_the_way_up_are_heard():
    original = reference(**TWO_WIDTHS, heads=2, heads_upsample=4)
    assert difference_of(original, converted(original, 2, upsample=4)) < 1e-4
    assert difference_of(original, converted(original, 2)) > 1e-2


def test_heads_of_as_many_channels_in_every_width_are_heard():
    original = reference(**TWO_WIDTHS, head_channels=32)
    config = with_head_channels(told(original), 32)
    assert difference_of(original, converted_by(original, config)) < 1e-4
    assert difference_of(original, converted(original, 2)) > 1e-2
    with pytest.raises(CheckpointError, match="heads of 40 channels do not divide attention of 6"):
        with_head_channels(told(original), 40)


def test_the_new_order_of_attention_is_heard():
    original = reference(new_order=True)
    config = with_heads(told(original), 4)
    assert difference_of(original, converted_by(original, config, new_order=True)) < 1e-4
    assert difference_of(original, converted_by(original, config)) > 1e-2


def test_the_number_of_heads_decides_the_output():
    assert largest_difference(reference(heads=4), heads=2) > 1e-2


def test_qkv_is_split_by_heads_first():
    original = reference(heads=4)
    attention, qkv = converted(original, 4).mid_block.attentions[0], original.middle_block[1].qkv
    head = slice(3 * 16, 4 * 16)  # the second head's q, after the first one's q, k and v
    assert torch.equal(attention.to_q.weight[16:32], qkv.weight[head, :, 0])
    assert torch.equal(attention.to_q.bias[16:32], qkv.bias[head])


@pytest.mark.parametrize(
    ("name", "count"), [("iddpm-cifar10", 446), ("iddpm-imagenet64", 450), ("ldm-ffhq256", 368)]
)
def test_a_named_architecture_has_as_many_tensors_and_is_told_by_their_shapes(name, count):
    config = architecture(name)
    shapes = original_shapes(config)
    assert len(shapes) == count
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = config_from_state_dict(state)
    for key in TOLD:
        assert found[key] == config[key]
    scale_shift = config.get("resnet_time_scale_shift", "default")
    assert found["resnet_time_scale_shift"] == scale_shift
    weights = to_diffusers(state, config)
    with torch.device("meta"):
        unet = build_unet(config)
    shapes = {name: value.shape for name, value in weights.items()}
    assert shapes == {name: value.shape for name, value in unet.state_dict().items()}


def test_adms_512_is_told_by_its_shapes_and_embeds_timesteps_in_256_channels():
    with torch.device("meta"):
        original = OpenAIUNet(
            (128, 256, 256, 512, 512, 1024, 1024),
            timestep_channels=256,
            attention_at=(4, 5, 6),
            head_channels=64,
            num_classes=1000,
            resblock_updown=True,
        )
        config = {**with_head_channels(told(original), 64), "sample_size": 512}
        unet = build_unet(config)
    assert unet.time_proj.num_channels == 256
    # By the original code: experiments/results/adm_import.json
    assert sizes(config) == (558_997_638, 1_976_244_633_600)
    assert sizes(config) == (count_params(unet), count_macs(unet))


def test_the_keys_are_those_of_improved_diffusion():
    keys = set(original_shapes(ARCHITECTURES["iddpm-cifar10"]))
    assert {
        "time_embed.0.weight",
        "input_blocks.4.0.op.weight",
        "input_blocks.5.0.skip_connection.bias",
        "input_blocks.5.1.qkv.weight",
        "middle_block.1.proj_out.weight",
        "output_blocks.3.1.conv.weight",
        "output_blocks.7.2.conv.weight",
        "output_blocks.15.0.out_layers.3.weight",
        "out.2.bias",
    } <= keys
    assert keys == set(OpenAIUNet((32, 64, 64, 64), layers=3, attention_at=(1, 2)).state_dict())


def test_heads_are_one_width_where_diffusers_can_say_so():
    config = config_from_state_dict(reference().state_dict())
    assert with_heads(config, 4)["attention_head_dim"] == 16
    assert "num_heads" not in with_heads(config, 4)
    two = config_from_state_dict(
        reference(channels=(32, 64, 96), attention_at=(1, 2)).state_dict()
    )
    assert (with_heads(two, 2)["num_heads"], with_heads(two, 2)["attention_head_dim"]) == (2, None)
    with pytest.raises(CheckpointError, match="5 heads do not divide attention of 64 channels"):
        with_heads(config, 5)


def changed(change) -> tuple[dict[str, Tensor], NetworkConfig]:
    state = dict(reference().state_dict())
    config = with_heads(config_from_state_dict(state), 4)
    change(state)
    return state, config


def lose(state: dict[str, Tensor]) -> None:
    del state["middle_block.1.norm.bias"]


def add(state: dict[str, Tensor]) -> None:
    state["middle_block.1.rel_pos"] = torch.zeros(3)


def round_off(state: dict[str, Tensor]) -> None:
    state["out.0.bias"] = state["out.0.bias"].int()


def widen(state: dict[str, Tensor]) -> None:
    state["input_blocks.1.0.in_layers.2.bias"] = torch.zeros(33)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose, r"lacks middle_block\.1\.norm\.bias \(64,\), expected"),
        (add, r"holds middle_block\.1\.rel_pos \(3,\), unknown"),
        (round_off, r"out\.0\.bias is torch\.int32, expected floats"),
        (widen, r"input_blocks\.1\.0\.in_layers\.2\.bias has the shape \(33,\), expected \(32,\)"),
    ],
)
def test_a_wrong_tensor_is_named_with_what_was_expected(change, words):
    with pytest.raises(CheckpointError, match=words):
        to_diffusers(*changed(change))


def test_other_networks_are_no_such_checkpoint():
    with pytest.raises(CheckpointError, match=r"lacks input_blocks\.0\.0\.weight; it holds conv"):
        config_from_state_dict({"conv.weight": torch.zeros(1)})
    state = {
        name: value
        for name, value in reference().state_dict().items()
        if not name.startswith("input_blocks.3.")  # resampled without a convolution
    }
    with pytest.raises(CheckpointError, match=r"levels of equally many.*\[\[\(32, False\)"):
        config_from_state_dict(
            {k.replace("input_blocks.4.", "input_blocks.3."): state[k] for k in state}
        )
    odd = dict(reference().state_dict())
    odd["input_blocks.0.0.weight"] = torch.zeros(48, 3, 3, 3)
    with pytest.raises(CheckpointError, match="found 48, then"):
        config_from_state_dict(odd)
