import random

import pytest

from tdc_ray.models.unet2d.architectures import ARCHITECTURES, architecture
from tdc_ray.models.unet2d.layers import all_layers
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.pruning.space import space_of
from tests.models.configs import CONFIGS
from tests.small import sizes


def counted(config, units, scheme) -> tuple[int, int]:
    """Parameters and macs of the cut UNet, layer by layer."""
    left = {unit.name: scheme[unit.name] * unit.channels for unit in units}
    num_params = macs = 0
    for layer in all_layers(config):
        rows = sum(left.get(some.unit, some.count) for some in layer.outputs)
        columns = sum(left.get(some.unit, some.count) for some in layer.inputs)
        weights = rows * columns * layer.kernel_area
        num_params += weights + (rows if layer.has_bias else 0)
        macs += weights * layer.pixels
    return num_params, macs


@pytest.mark.parametrize("kind", ["inner", "full"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *CONFIGS])
def test_macs_and_parameters_of_any_scheme_are_those_of_its_layers(name, kind):
    config = {**CONFIGS, **ARCHITECTURES}[name]
    space, draw = space_of(config, kind), random.Random(name)
    assert (space.num_params_base, space.macs_base) == sizes(config)
    for _ in range(200 if name in ARCHITECTURES else 20):
        scheme = {unit.name: draw.randint(1, unit.width) for unit in space.units}
        num_params, macs = counted(config, space.units, scheme)
        assert (space.num_params(scheme), space.macs(scheme)) == (num_params, macs)


@pytest.mark.parametrize("name", ["tiny", "iddpm-cifar10"])
def test_macs_of_inner_units_add_up_and_those_of_streams_multiply(name):
    inner, full = (space_of(architecture(name), kind) for kind in ("inner", "full"))
    assert not inner.macs_table.pairs
    streams = {unit.name for unit in full.units if unit.kind == "stream"}
    for pair in full.macs_table.pairs:
        assert streams & set(pair)  # no two inner units meet in a layer
    assert streams <= {unit for pair in full.macs_table.pairs for unit in pair}


def test_the_full_space_has_the_inner_one_in_it():
    inner, full = (units_of(architecture("mnist32"), kind) for kind in ("inner", "full"))
    assert tuple(unit for unit in full if unit.kind != "stream") == inner
