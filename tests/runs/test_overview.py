import json
from dataclasses import replace

import pytest

from tdc_ray.config.run import RunConfig, to_json
from tdc_ray.errors import StorageError
from tdc_ray.runs.overview import differing, find_runs, load_overview, load_overviews
from tests.small import TINY, small_config


def make_run(folder, config: RunConfig):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    return folder


def other_seed(seed: int) -> RunConfig:
    config = small_config()
    return replace(config, seed=seed, finetune=replace(config.finetune, num_steps=7))


def test_runs_are_found_at_any_depth_and_folders_of_networks_are_not(tmp_path):
    one = make_run(tmp_path / "a", small_config())
    two = make_run(tmp_path / "sweep" / "trials" / "b", small_config())
    network = one / "base" / "unet"
    network.mkdir(parents=True)
    (network / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    assert find_runs(tmp_path) == [one, two]
    assert find_runs(one) == [one]


def test_settings_that_differ_are_named_with_every_runs_value(tmp_path):
    roots = [
        make_run(tmp_path / name, config)
        for name, config in (("a", small_config()), ("b", other_seed(3)), ("c", other_seed(4)))
    ]
    runs = [load_overview(root) for root in roots]
    steps = small_config().finetune.num_steps
    assert differing(runs) == {
        "seed": [small_config().seed, 3, 4],
        "finetune.num_steps": [steps, 7, 7],
    }
    assert differing(runs[:1]) == {}


def test_sizes_are_written_as_their_flag_takes_them(tmp_path):
    config = small_config()
    sizes = [replace(config, data=replace(config.data, image_size=size)) for size in (8, (8, 12))]
    roots = [make_run(tmp_path / str(index), config) for index, config in enumerate(sizes)]
    runs = [load_overview(root) for root in roots]
    assert differing(runs) == {"data.image_size": ["8", "8x12"]}


def test_networks_that_differ_are_one_setting(tmp_path):
    networks = (TINY, {**TINY, "layers_per_block": 2})
    models = [{"architecture": "auto", "network": network} for network in networks]
    runs = [
        load_overview(make_run(tmp_path / str(index), small_config(model=model)))
        for index, model in enumerate(models)
    ]
    (name, (one, two)), *others = differing(runs).items()
    assert (name, others) == ("model.network", [])
    assert one.startswith("[16, 32] (")
    assert two.startswith("[16, 32] (")


def test_a_run_that_is_not_finished_says_how_far_it_is(tmp_path):
    run = load_overview(make_run(tmp_path / "a", small_config()))
    assert run.results is None
    assert run.progress.startswith("base: ")


def test_a_run_of_another_version_is_listed_beside_others(tmp_path):
    one = make_run(tmp_path / "a", small_config())
    two = make_run(tmp_path / "b", small_config())
    settings = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(settings | {"later": 1}))
    runs = load_overviews([one, two])
    assert [run.root for run in runs] == [one, two]
    assert runs[1].progress.startswith("unreadable: ")
    assert "later" in runs[1].progress


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(StorageError, match="is no run directory"):
        load_overview(tmp_path)
