import inspect
import json

import pytest
from diffusers import UNet2DConditionModel, UNet2DModel

from tdc_ray.errors import ConfigError, StorageError, UnsupportedModelError
from tdc_ray.models.config_file import read_network
from tdc_ray.models.families import check_buildable
from tdc_ray.models.network_config import OWN_SETTINGS, NetworkConfig
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.models.unet2d.config_file import UNetConfigFile
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.models.unet2d_condition.config_file import UNetConditionConfigFile
from tdc_ray.storage.files import write_json
from tests.small import TINY, random_unet, sizes


def write(folder, document):
    path = folder / "config.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(path)


def test_settings_that_a_file_leaves_out_are_diffusers_defaults():
    parameters = inspect.signature(UNet2DModel).parameters.items()
    expected = {
        name: list(p.default) if isinstance(p.default, tuple) else p.default
        for name, p in parameters
    }
    assert UNetConfigFile().model_dump() == expected | dict.fromkeys(OWN_SETTINGS)
    assert set(expected) | {*OWN_SETTINGS, "_class_name"} == set(NetworkConfig.__annotations__)


def test_those_of_a_captioned_unet_are_diffusers_defaults_too():
    expected = {
        name: list(p.default) if isinstance(p.default, tuple) else p.default
        for name, p in inspect.signature(UNet2DConditionModel).parameters.items()
    }
    assert UNetConditionConfigFile().model_dump() == expected


def test_what_diffusers_saves_is_read_as_it_was_built(tmp_path):
    random_unet().save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        network = read_network(str(source))
        assert sizes(network) == sizes(TINY)
        assert {name: network[name] for name in TINY} == json.loads(json.dumps(TINY))


def test_a_number_of_heads_beside_the_file_counts(tmp_path):
    config = {**TINY, "num_heads": 4}
    save_unet(build_unet(config), tmp_path / "unet")
    assert read_network(str(tmp_path / "unet"))["num_heads"] == 4


def test_settings_of_our_own_are_checked_by_name(tmp_path):
    write(tmp_path, TINY)
    write_json(tmp_path / "tdc_heads.json", {"timestep_channels": 0})
    with pytest.raises(ConfigError, match=r"timestep_channels must be at least 1, got 0"):
        read_network(str(tmp_path))


def test_a_pair_of_equal_sides_is_one(tmp_path):
    assert read_network(write(tmp_path, {"sample_size": [16, 16]}))["sample_size"] == 16
    assert read_network(write(tmp_path, {"sample_size": [8, 12]}))["sample_size"] == [8, 12]


def test_a_captioned_unets_null_for_a_default_is_taken(tmp_path):
    document = {"_class_name": "UNet2DConditionModel", "upcast_attention": None}
    assert read_network(write(tmp_path, document))["upcast_attention"] is None


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, r"AutoencoderKL; only a UNet2DModel or DiT"),
        ({"_class_name": ["UNet2DModel"]}, r"or UNet2DConditionModel can be trained"),
        (
            {"_class_name": "UNet2DConditionModel", "class_embed_type": "timestep"},
            r"no config of a UNet2DConditionModel: class_embed_type must be None",
        ),
        (
            {"_class_name": "UNet2DConditionModel", "norm_num_groups": None},
            r"norm_num_groups must be set: .* without norms, or without a middle block, .*None",
        ),
        (
            {"_class_name": "UNet2DConditionModel", "mid_block_type": None},
            r"mid_block_type must be set: .* not described here, got None",
        ),
        ({"cross_attention_dim": 8}, r"no config of a UNet2DModel: cross_attention_dim: Extra"),
        ({"layers_per_block": 2.5}, r"layers_per_block .*integer.*got 2\.5"),
        ({"layers_per_block": 10**9}, r"layers_per_block must be at most 64"),
        ({"block_out_channels": [10**9]}, r"block_out_channels\.0 must be at most 65536"),
        ({"block_out_channels": "x"}, r"block_out_channels .*list.*got 'x'"),
        ({"sample_size": [8, 8, 8]}, r"sample_size"),
        ({"num_class_embeds": "ten"}, r"num_class_embeds .*integer"),
        ({"in_channels": 3, "out_channels": 4}, r"found 3 in and 4 out\. Set out_channels to 3"),
        ([], r"must hold a JSON object"),
        ('{"act_fn": "' + "x" * 10**6 + '"}', r"at most 1,000,000 bytes"),
    ],
)
def test_what_is_no_config_is_refused_with_the_reason(tmp_path, document, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_network(write(tmp_path, document))
    assert str(caught.value).startswith(f"model.config {tmp_path}/config.json ")


def test_a_file_that_is_missing_or_torn_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/config\.json does not exist: name the"):
        read_network(str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match=r"config\.json is not JSON"):
        read_network(write(tmp_path, '{"sample_size": '))


def test_values_that_contradict_each_other_are_refused(tmp_path):
    network = read_network(write(tmp_path, {**TINY, "norm_num_groups": 7}))
    with pytest.raises(ConfigError, match=r"can build no UNet2DModel of a: ValueError: .*7"):
        check_buildable(network, "a")
    check_buildable(architecture("digits"), "a")


def test_a_block_that_is_not_supported_is_refused_with_those_that_are(tmp_path):
    kinds = ["AttnSkipDownBlock2D", "DownBlock2D"]
    network = read_network(write(tmp_path, {**TINY, "down_block_types": kinds}))
    with pytest.raises(UnsupportedModelError, match=r"AttnSkipDownBlock2D is not .*DownBlock2D"):
        network_structure(network)
