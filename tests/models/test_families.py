import pytest
import torch

from tdc_ray.errors import CheckpointError, UnsupportedModelError
from tdc_ray.models.denoiser import has_classes
from tdc_ray.models.families import (
    FAMILIES,
    build_network,
    family_of,
    load_config,
    load_network,
)
from tdc_ray.models.step import run
from tdc_ray.models.structure import STRUCTURES, network_structure
from tdc_ray.models.unet2d.unet import save_unet
from tdc_ray.storage.files import write_json
from tests.small import TINY, assert_same, random_unet


def test_the_networks_that_can_be_built_are_those_whose_structure_is_known():
    assert FAMILIES.keys() == STRUCTURES.keys()


def test_a_network_is_loaded_by_the_class_that_its_config_names(tmp_path):
    unet = random_unet()
    save_unet(unet, tmp_path / "unet")
    loaded = load_network(tmp_path / "unet")
    assert type(loaded) is type(unet)
    assert_same(loaded.state_dict(), unet.state_dict())
    assert network_structure(load_config(tmp_path / "unet")) == network_structure(TINY)


def test_a_folder_without_a_network_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        load_network(tmp_path)


def test_a_network_of_an_unknown_class_is_refused_wherever_it_comes_from(tmp_path):
    write_json(tmp_path / "config.json", {"_class_name": "VQModel"})
    unknown = {**TINY, "_class_name": "VQModel"}
    for refused in (
        lambda: load_network(tmp_path),
        lambda: load_config(tmp_path),
        lambda: build_network(unknown),
        lambda: network_structure(unknown),
        lambda: family_of(torch.nn.Linear(1, 1)),
    ):
        with pytest.raises(UnsupportedModelError, match=r"takes no timestep|no such model"):
            refused()


@torch.inference_mode()
def test_a_family_runs_and_cuts_its_networks():
    network = random_unet()
    family, units = family_of(network), network_structure(network.config).units
    x_t, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    whole = network(x_t, timesteps).sample
    assert torch.equal(
        run(family.steps(network), family.start(network, x_t, timesteps, None)).hidden, whole
    )
    with torch.inference_mode(mode=False):
        cut = family.cut(network, units, {unit.name: (0,) for unit in units})
    assert cut(x_t, timesteps).sample.shape == whole.shape


def test_only_networks_that_embed_classes_have_them():
    assert not has_classes(build_network(TINY))
    assert has_classes(build_network({**TINY, "num_class_embeds": 10}))
