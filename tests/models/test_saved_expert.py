import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tdc_ray.errors import CheckpointError, UnsupportedModelError
from tdc_ray.models.saved_expert import CONFIG_FILE, WEIGHTS_FILE, load_expert, save_expert
from tdc_ray.models.structure import units_for
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import load_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import KeptIndices, keep_everything
from tests.models.configs import CONFIGS
from tests.small import TINY, assert_same, output_of, random_kept, random_unet

KEPT = random_kept(units_of(TINY), seed=0)


def save_random(folder: Path, *, seed: int = 0, kept: KeptIndices = KEPT) -> None:
    save_expert(folder, cut(random_unet(seed=seed), units_for(TINY, kept), kept), TINY, kept)


@pytest.mark.parametrize("kind", ["inner", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_expert_loads_bit_for_bit_in_eval_mode(tmp_path, name, kind):
    config = CONFIGS[name]
    units = units_of(config, kind)
    kept = random_kept(units, seed=len(name))
    expert = cut(random_unet(config), units, kept)
    save_expert(tmp_path / "expert", expert.train(), config, kept)
    loaded = load_expert(tmp_path / "expert")
    assert not loaded.training
    assert_same(loaded.state_dict(), expert.state_dict())
    assert_same(output_of(loaded), output_of(expert.eval()))


@pytest.mark.parametrize("kind", ["inner", "full"])
def test_an_expert_that_keeps_everything_is_the_base(tmp_path, kind):
    unet = random_unet()
    save_expert(tmp_path / "expert", unet, TINY, keep_everything(units_of(TINY, kind)))
    assert_same(output_of(load_expert(tmp_path / "expert")), output_of(unet))


def test_the_dropout_of_a_base_loaded_by_diffusers_is_kept(tmp_path):
    unet, kept = random_unet(dropout=0.25), keep_everything(units_of(TINY))
    save_expert(tmp_path / "expert", unet, dict(unet.config), kept)
    loaded = load_expert(tmp_path / "expert")
    assert loaded.mid_block.resnets[0].dropout.p == 0.25
    assert_same(output_of(loaded), output_of(unet))


def test_what_diffusers_would_save_without_its_widths_is_refused(tmp_path):
    save_random(tmp_path / "expert")
    with pytest.raises(UnsupportedModelError, match=r"Save it by .*save_expert, or .*export"):
        load_expert(tmp_path / "expert").save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    whole = cut(random_unet(), units_of(TINY), keep_everything(units_of(TINY)))
    whole.save_pretrained(tmp_path / "whole")
    assert_same(output_of(load_unet(tmp_path / "whole")), output_of(random_unet()))


def test_saving_again_replaces_what_was_there(tmp_path):
    save_random(tmp_path / "expert", seed=0)
    save_random(tmp_path / "expert", seed=1)
    expected = cut(random_unet(seed=1), units_of(TINY), KEPT)
    assert_same(load_expert(tmp_path / "expert").state_dict(), expected.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


def test_an_expert_is_json_and_safetensors_and_no_pickle(tmp_path):
    save_random(tmp_path / "expert")
    files = {path.name for path in (tmp_path / "expert").iterdir()}
    assert files == {CONFIG_FILE, WEIGHTS_FILE}
    document = json.loads((tmp_path / "expert" / CONFIG_FILE).read_text())
    assert document["kept"] == {name: list(places) for name, places in KEPT.items()}
    expected = cut(random_unet(), units_of(TINY), KEPT).state_dict()
    assert_same(load_file(tmp_path / "expert" / WEIGHTS_FILE), expected)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_an_expert_is_a_checkpoint_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} holds no expert: expert\.json is missing"):
        load_expert(tmp_path / name)


def truncate(folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    del tensors["conv_out.weight"]
    save_file(tensors, folder / WEIGHTS_FILE)


def keep_one_group_less(folder: Path) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    document["kept"]["mid_block.resnets.0"].pop()
    (folder / CONFIG_FILE).write_text(json.dumps(document))


def forget_a_unit(folder: Path) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    del document["kept"]["mid_block.resnets.0"]
    (folder / CONFIG_FILE).write_text(json.dumps(document))


def keep_one_slice_less(folder: Path) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    document["kept"]["stream:down_blocks.1.resnets.0"].pop()
    (folder / CONFIG_FILE).write_text(json.dumps(document))


def forget_a_stream(folder: Path) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    del document["kept"]["stream:down_blocks.1.resnets.0"]
    (folder / CONFIG_FILE).write_text(json.dumps(document))


def forget_the_unet(folder: Path) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    del document["unet"]
    (folder / CONFIG_FILE).write_text(json.dumps(document))


def tear_the_description(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text('{"unet": {"sample_size"')


def name_a_block_of_an_unknown_kind(folder: Path) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    document["unet"]["down_block_types"][0] = "SkipDownBlock2D"
    (folder / CONFIG_FILE).write_text(json.dumps(document))


HARMS = [
    truncate,
    remove_weights,
    drop_a_tensor,
    keep_one_group_less,
    forget_a_unit,
    forget_the_unet,
    tear_the_description,
    name_a_block_of_an_unknown_kind,
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_torn_or_mismatched_expert_is_a_checkpoint_error_that_names_it(tmp_path, harm):
    save_random(tmp_path / "expert")
    harm(tmp_path / "expert")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'expert'} holds no whole expert"):
        load_expert(tmp_path / "expert")


@pytest.mark.parametrize("harm", [keep_one_group_less, keep_one_slice_less, forget_a_stream])
def test_a_mismatched_expert_of_the_full_space_is_a_checkpoint_error(tmp_path, harm):
    save_random(tmp_path / "expert", kept=random_kept(units_of(TINY, "full"), seed=0))
    harm(tmp_path / "expert")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'expert'} holds no whole expert"):
        load_expert(tmp_path / "expert")
