import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.config.model import ModelConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.run import (
    RunConfig,
    default_run_dir,
    differences,
    digest,
    from_json,
    to_json,
)
from tdc_ray.data.load import load_dataset
from tdc_ray.errors import ConfigError, DataError, StorageError
from tdc_ray.models.config_file import with_file
from tdc_ray.models.unet2d.architectures import architecture, base_unet
from tdc_ray.runs.choices import with_choices, with_smaller_network
from tdc_ray.runs.preflight import check, refuse_other_settings
from tdc_ray.runs.stages.base import base_inputs
from tdc_ray.storage.files import write_json
from tests.images import folder_config, random_pixels
from tests.small import TINY, latent_config, make_first_stage, sizes, small_config

AUTO = {"architecture": "auto"}


def images_in(folder, number, size=8):
    folder.mkdir(exist_ok=True)
    for index in range(number):
        pixels = random_pixels(size, size, seed=index)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    load_dataset.cache_clear()  # as in a later process
    return folder_config(folder)


def config_file(folder, **changes):
    path = folder / "unet.json"
    path.write_text(json.dumps({"_class_name": "UNet2DModel", **TINY, **changes}))
    return path


def with_config_file(path, **changes):
    return small_config(model={"config": str(path)} | changes)


# --- architecture auto ---------------------------------------------------------------------------


def test_auto_is_chosen_by_the_images_and_can_be_planned():
    config = with_choices(small_config(model=AUTO))
    network, space, _ = check(config)
    assert network == config.model.network
    assert sizes(network) == sizes(architecture("digits"))
    assert space.macs_base == sizes(network)[1]
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("most", "channels", "depth"),
    [(1.0, 32, 2), (0.99, 32, 1), (0.4, 16, 2), (0.1, 16, 1)],
)
def test_a_smaller_one_of_the_family_is_the_largest_that_there_is_room_for(most, channels, depth):
    config = with_choices(small_config(model=AUTO))
    smaller = with_smaller_network(config, lambda share: share <= most)
    network = smaller.model.network
    assert network["block_out_channels"] == [channels, 2 * channels]
    assert network["layers_per_block"] == depth
    assert check(smaller)[1].macs_base <= most * check(config)[1].macs_base or most == 0.1
    assert replace(smaller, model=config.model) == config


def test_a_smaller_one_that_cannot_be_pruned_to_the_limits_is_not_taken(tmp_path):
    data = {"source": "folder", "path": str(tmp_path), "image_size": 32, "num_channels": 3}
    images_in(tmp_path, 40, size=32)
    plan = {"schedule": "snr", "min_macs_share": 0.1}
    settings = {"model": AUTO, "data": data, "plan": plan, "evaluate": {"features": "none"}}
    config = with_choices(small_config(**settings))
    smaller = with_smaller_network(config, lambda _: False)
    assert smaller != config
    check(smaller)


def test_a_network_that_flags_asked_for_stays(tmp_path):
    path = config_file(tmp_path)
    for model in ({}, {"config": str(path)}, {**AUTO, "width": 2}, {**AUTO, "depth": 2}):
        config = with_choices(small_config(model=model))
        assert with_smaller_network(config, lambda _: False) == config


def test_width_and_depth_scale_what_is_chosen():
    config = with_choices(small_config(model={**AUTO, "width": 2, "depth": 1}))
    assert config.model.network["block_out_channels"] == [64, 128]
    assert config.model.network["layers_per_block"] == 1


@pytest.mark.parametrize("change", [{"width": 2.0}, {"depth": 1}])
def test_a_named_architecture_is_not_scaled(change):
    (name,) = change
    with pytest.raises(
        ConfigError, match=rf"model\.{name} must be left .* model\.architecture auto"
    ):
        ModelConfig(**change)


def test_auto_learns_the_variance_and_the_classes_that_are_asked_for():
    config = small_config(
        model=AUTO, diffusion={"learned_sigma": True}, conditioning={"num_classes": 10}
    )
    network, _, _ = check(with_choices(config))
    assert (network["out_channels"], network["num_class_embeds"]) == (2, 10)


def test_auto_is_of_the_latents_where_these_are_learnt(tmp_path):
    config = latent_config(make_first_stage(tmp_path / "stage"), tmp_path / "cache", model=AUTO)
    network, _, _ = check(with_choices(config))
    assert (network["sample_size"], network["in_channels"]) == (8, 1)


def test_a_resumed_run_keeps_its_network_though_images_were_added(tmp_path, monkeypatch):
    recorded = tmp_path / "config.json"
    config = small_config(data=images_in(tmp_path / "images", 3), model=AUTO)
    first = with_choices(config, recorded)
    write_json(recorded, to_json(first))
    for name in ("FEW", "MANY"):
        monkeypatch.setattr(f"tdc_ray.models.unet2d.auto.{name}", 5)
    config = replace(config, data=images_in(tmp_path / "images", 6))
    assert with_choices(config) != first
    again = with_choices(config, recorded)
    assert again == first
    refuse_other_settings(recorded, again, "run directory", "--run-dir")
    wider = with_choices(replace(config, model=ModelConfig(**AUTO, width=2)), recorded)
    assert "model.width 1.0 -> 2.0" in differences(first, wider)


def test_auto_and_files_do_not_change_what_older_runs_are_called():
    assert digest(RunConfig()) == "861b0a14"  # that of version 0.1.0
    assert digest(small_config(model={**AUTO, "depth": 1})) != digest(small_config(model=AUTO))


def test_the_folder_of_a_run_does_not_depend_on_what_auto_chose():
    config = small_config(model=AUTO)
    assert default_run_dir(with_choices(config)) == default_run_dir(config)


def test_images_that_are_missing_are_refused(tmp_path):
    config = small_config(data=folder_config(tmp_path / "nowhere"), model=AUTO)
    with pytest.raises(DataError, match="does not exist"):
        with_choices(config)


def test_plan_shows_the_plan_of_what_is_chosen(tmp_path, capsys):
    arguments = ["plan", "--model.architecture", "auto", "--out-dir", str(tmp_path)]
    assert run_command(arguments) == 0
    assert "base 22.84 M" in capsys.readouterr().out


# --- a config.json -------------------------------------------------------------------------------


def test_a_config_file_is_trained_as_it_is(tmp_path):
    config = with_choices(with_config_file(config_file(tmp_path)))
    network, space, _ = check(config)
    assert sizes(network) == sizes(TINY)
    assert space.macs_base == sizes(TINY)[1]
    assert base_unet(config.model, config.conditioning) == network


def test_the_content_of_the_file_counts_and_not_its_path(tmp_path):
    (tmp_path / "other").mkdir()
    one = with_choices(with_config_file(config_file(tmp_path)))
    same = with_choices(with_config_file(config_file(tmp_path / "other")))
    deeper = with_choices(with_config_file(config_file(tmp_path / "other", layers_per_block=2)))
    assert differences(one, same) == []
    assert base_inputs(one) == base_inputs(same) != base_inputs(deeper)
    assert default_run_dir(one) == default_run_dir(same) != default_run_dir(deeper)
    (change,) = differences(one, deeper)
    assert change.startswith("model.network ")


@pytest.mark.parametrize("fate", ["moved", "gone"])
def test_a_run_resumes_with_the_network_it_began_with(tmp_path, caplog, fate):
    path, recorded = config_file(tmp_path), tmp_path / "config.json"
    first = with_choices(with_config_file(path), recorded)
    write_json(recorded, to_json(first))
    if fate == "moved":
        path = path.rename(tmp_path / "moved.json")
    else:
        path.unlink()
    again = with_choices(with_config_file(path), recorded)
    assert differences(first, again) == []
    assert ["does not exist" in text for text in caplog.messages] == [True] * (fate == "gone")


def test_another_network_in_the_file_is_refused_with_the_ways_out(tmp_path):
    recorded = tmp_path / "config.json"
    write_json(recorded, to_json(with_choices(with_config_file(config_file(tmp_path)))))
    path = config_file(tmp_path, layers_per_block=2)
    with pytest.raises(ConfigError, match=r"\(layers_per_block 1 -> 2\)\. Restore .* --run-dir"):
        with_choices(with_config_file(path), recorded)
    path.write_text("{}[")
    with pytest.raises(StorageError, match=r"unet\.json"):
        with_choices(with_config_file(path), recorded)


def test_plan_goes_where_the_run_of_the_file_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config_file(tmp_path, sample_size=None)
    assert run_command(["plan", "--preset", "digits-smoke", "--model.config", str(path)]) == 0
    config = preset("digits-smoke")
    model = with_file(replace(config.model, config=str(path)))
    named = default_run_dir(replace(config, model=model))
    assert [one.parent for one in Path().rglob("plan.json")] == [named]


def test_a_file_without_a_size_takes_that_of_the_images(tmp_path):
    path, recorded = config_file(tmp_path, sample_size=None), tmp_path / "config.json"
    config = with_config_file(path)
    config = with_choices(replace(config, model=with_file(config.model)))
    assert config.model.network["sample_size"] == 8
    write_json(recorded, to_json(config))
    assert with_choices(with_config_file(path), recorded) == config


def test_the_dropout_of_the_file_is_trained_with(tmp_path):
    path = config_file(tmp_path, dropout=0.1)
    assert with_choices(with_config_file(path)).model.dropout == 0.1
    assert with_choices(with_config_file(config_file(tmp_path), dropout=0.2)).model.dropout == 0.2
    path = config_file(tmp_path, dropout=0.1)
    with pytest.raises(ConfigError, match=r"model\.dropout must be 0\.1 or 0 .*, got 0\.2"):
        with_choices(with_config_file(path, dropout=0.2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sample_size": 16},
            r"data\.image_size must be 16 for model\.config .*, got 8\. Set --d",
        ),
        (
            {"in_channels": 3, "out_channels": 3},
            r"data\.num_channels must be 3 for .*got 1\. Set --data\.num-channels to that",
        ),
        ({"out_channels": 2}, r"diffusion\.learned_sigma must be True for model\.config"),
        ({"num_class_embeds": 10}, r"conditioning\.num_classes must be 10 .*, got None"),
        ({"norm_num_groups": 7}, r"diffusers can build no UNet2DModel of model\.config"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_with_the_way_out(tmp_path, changes, message):
    config = with_choices(with_config_file(config_file(tmp_path, **changes)))
    with pytest.raises(ConfigError, match=message):
        check(config)


def test_a_base_brings_its_own_network(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.config must be None with model\.base"):
        ModelConfig(config="a.json", base="google/ddpm-cifar10-32")


@pytest.mark.parametrize("command", ["run", "sweep", "plan"])
def test_the_network_itself_is_no_flag(command):
    with pytest.raises(ConfigError, match=r"there is no flag --model\.network"):
        parse([command, "--model.network", "None"])


def test_a_missing_config_file_is_refused_by_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--run-dir", "run"], ["--dry-run"]):
        assert run_command(["run", "--model.config", "nowhere.json", *more]) == 1
        assert "nowhere.json does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
