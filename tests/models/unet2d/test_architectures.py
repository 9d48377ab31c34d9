import subprocess
import sys

import pytest

from tdc_ray.errors import ConfigError
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.unet2d.architectures import ARCHITECTURES, LATENT, architecture
from tdc_ray.models.unet2d.layers import blocks, layers
from tdc_ray.models.unet2d.unet import build_unet
from tests.models.counting import count_macs
from tests.small import sizes


@pytest.mark.parametrize(
    ("name", "num_params", "macs"),
    [  # parameters and "FLOPs" as the paper prints them (arXiv:2312.13307, tables I and V)
        ("iddpm-cifar10", 52.5e6, 8.14e9),
        ("iddpm-imagenet64", 121e6, 39.3e9),
        ("ldm-ffhq256", 274.1e6, 96.1e9),
        ("ddpm-ffhq256", 113.7e6, 248.7e9),
    ],
)
def test_the_papers_models_have_its_parameters_and_macs(name, num_params, macs):
    found = sizes(architecture(name))
    assert found == (pytest.approx(num_params, rel=0.005), pytest.approx(macs, rel=0.005))


def test_iddpm_on_cifar10_is_counted_to_the_last_weight():
    assert sizes(architecture("iddpm-cifar10")) == (52_546_438, 8_137_015_296)


@pytest.mark.parametrize("name", ["tiny", "digits", "mnist16", "mnist32"])
def test_the_small_models_count_what_they_are_built_of(name):
    unet = build_unet(architecture(name))
    assert sizes(architecture(name)) == (count_params(unet), count_macs(unet))


@pytest.mark.parametrize("name", ["tiny", "mnist32"])
def test_every_parameter_belongs_to_a_layer_of_the_walk(name):
    built: dict[str, int] = {}
    for parameter_name, parameter in build_unet(architecture(name)).named_parameters():
        layer = parameter_name.rpartition(".")[0]
        built[layer] = built.get(layer, 0) + parameter.numel()
    walked = {
        layer.name: layer.num_params
        for part in blocks(architecture(name))
        for layer in layers(part)
    }
    assert walked == built


def test_an_unknown_architecture_is_an_error_that_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"one of tiny, digits, .*, got resnet50\."):
        architecture("resnet50")


def test_latent_architectures_are_architectures():
    assert set(ARCHITECTURES) >= LATENT


def test_counting_needs_no_torch():
    code = (
        "import sys; from tdc_ray.models.unet2d.architectures import ARCHITECTURES; "
        "from tdc_ray.pruning.space import space_of; "
        "[space_of(config, 'full') for config in ARCHITECTURES.values()]; "
        "print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
