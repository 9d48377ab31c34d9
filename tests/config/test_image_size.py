from dataclasses import replace

import pytest

from tdc_ray.cli.parse import parse
from tdc_ray.config.data import DataConfig
from tdc_ray.config.evaluate import EvaluateConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.run import default_run_dir, from_json, to_json
from tdc_ray.errors import ConfigError


@pytest.mark.parametrize("size", [64, 64.0, "64", "64x64", [64, 64], (64, 64)])
def test_however_a_square_is_written_it_is_one_number(size):
    data = DataConfig(image_size=size)
    assert data.image_size == 64
    assert (data.height, data.width) == (64, 64)
    assert data == DataConfig(image_size=64)


@pytest.mark.parametrize("size", ["48x64", "48X64", [48, 64], (48, 64), ["48", 64]])
def test_other_shapes_are_height_by_width(size):
    data = DataConfig(image_size=size, num_channels=3)
    assert data.image_size == (48, 64)
    assert data.shape == (3, 48, 64)


@pytest.mark.parametrize(
    "size",
    [3, 0, -8, "x", "48x", "64x3", "48x64x3", "big", 48.5, float("inf"), None, [], [8, 8, 8], {}],
)
def test_what_is_no_size_is_refused_by_the_rule(size):
    message = r"data\.image_size must be at least 4 pixels, .* HEIGHTxWIDTH .*, got "
    with pytest.raises(ConfigError, match=message):
        DataConfig(image_size=size)


def test_the_flag_takes_both_and_names_what_is_wrong():
    flags = ["plan", "--preset", "images", "--data.image-size"]
    assert parse([*flags, "24x32"]).config.data.image_size == (24, 32)
    assert parse([*flags, "24"]).config.data.image_size == 24
    with pytest.raises(ConfigError, match=r"data\.image_size must be .*, got '24,32'"):
        parse([*flags, "24,32"])


def test_settings_are_kept_by_files_and_squares_keep_their_names():
    config = preset("images")
    wide = replace(config, data=replace(config.data, image_size=(24, 32)))
    document = to_json(wide)
    document["data"]["image_size"] = [24, 32]  # as JSON has it
    assert from_json(document) == wide
    assert default_run_dir(wide) != default_run_dir(config)
    square = replace(config, data=replace(config.data, image_size=[32, 32]))
    assert to_json(square) == to_json(config)
    assert default_run_dir(square) == default_run_dir(config)


def test_padding_is_below_the_shorter_side():
    DataConfig(image_size=(8, 16), crop_padding=7)
    with pytest.raises(ConfigError, match=r"crop_padding must be below .* = 8x16, got 8"):
        DataConfig(image_size=(8, 16), crop_padding=8)


def test_ready_statistics_are_of_squares():
    config = replace(preset("images"), evaluate=EvaluateConfig(reference="cifar10"))
    with pytest.raises(
        ConfigError, match=r"evaluate\.reference must be None where images are not"
    ):
        replace(config, data=replace(config.data, image_size=(8, 16)))
