"""``--data PATH``: what it finds out, what flags override, and what a resumed run takes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.config.presets import STEPS_BY_SIZE, images
from tdc_ray.config.run import named_differences, to_json
from tdc_ray.errors import DataError
from tdc_ray.models.unet2d.unet import build_unet
from tdc_ray.runs.own_images import BY_SIDE
from tdc_ray.storage.files import write_json
from tests.images import random_pixels
from tests.small import TINY


def fill(folder, *names, size=(16, 16), channels=(3,)):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(*size, *channels, seed=index)).save(path)


def settings_of(*arguments):
    return parse(["run", *map(str, arguments)]).config


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_size_channels_classes_model_and_steps_come_from_the_images():
    fill(Path("img"), "cat/1.png", "dog/1.png", "dog/2.png")
    config = settings_of("--data", "img")
    assert config.preset == "images"
    assert (config.data.source, config.data.path) == ("folder", "img")
    assert (config.data.image_size, config.data.num_channels) == (16, 3)
    assert config.data.labels_from_folders
    assert config.conditioning.num_classes == 2
    assert (config.base.num_steps, config.finetune.num_steps) == STEPS_BY_SIZE[16]
    assert config.plan.schedule == "measured"
    assert (config.sampler.sampler, config.sampler.num_inference_steps) == ("dpmsolver++", 20)


def test_grey_images_without_subfolders_have_no_classes():
    fill(Path("img"), "1.png", "2.png", size=(8, 8), channels=())
    config = settings_of("--data", "img")
    assert (config.data.image_size, config.data.num_channels) == (8, 1)
    assert not config.data.labels_from_folders
    assert config.conditioning.num_classes is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a/1.png", "2.png"), []),
        (("a/1.png", "a/2.png"), []),
        (("a/1.png", "b/1.png", "2.png"), ["no classes: 2.png lies outside of the subfolders of"]),
        (("data/a/1.png", "data/b/1.png"), ["no classes: name img/data for its subfolders to be"]),
    ],
)
def test_subfolders_are_classes_if_all_images_lie_in_several(caplog, names, said):
    fill(Path("img"), *names)
    assert settings_of("--data", "img").conditioning.num_classes is None
    assert all(one.startswith(two) for one, two in zip(caplog.messages, said, strict=True))


def test_the_architecture_is_chosen_by_the_images_that_there_are():
    fill(Path("img"), "1.png", size=(16, 16))
    assert settings_of("--data", "img").model.architecture == "auto"


def test_every_flag_overrides_what_was_found():
    fill(Path("img"), "cat/1.png", "dog/1.png", size=(32, 32))
    flags = ["--data.image-size=16", "--data.num-channels", "1", "--base.num_steps", "7"]
    config = settings_of("--data", "img", *flags, "--conditioning.num-classes", "None")
    assert (config.data.image_size, config.data.num_channels) == (16, 1)
    assert (config.base.num_steps, config.finetune.num_steps) == (7, STEPS_BY_SIZE[16][1])
    assert config.conditioning.num_classes is None
    config = settings_of("--data", "img", "--data.no-labels-from-folders")
    assert (config.data.labels_from_folders, config.conditioning.num_classes) == (False, None)
    assert (
        settings_of("--data", "img", "--model.architecture", "tiny").model.architecture == "tiny"
    )
    config = settings_of("--data", "img", "--conditioning.label-dropout", "0.1")
    assert config.conditioning.num_class_embeds == 3


def test_of_few_images_as_many_are_held_out_as_losses_need(capsys):
    fill(Path("img"), *(f"{index}.png" for index in range(16)), size=(12, 20))
    assert settings_of("--data", "img").prune.held_out_share == 0.25
    before = started("--data", "img")
    given = settings_of("--data", "img", "--prune.held-out-share", "0.4")
    assert given.prune.held_out_share == 0.4
    fill(Path("img"), *(f"more{index}.png" for index in range(60)), size=(12, 20))
    assert parse(["run", "--data", "img"]) == before
    assert settings_of("--data", "img", "--run-dir", "new").prune.held_out_share == 0.1
    assert run_command(["run", "--data", "img", "--evaluate.features=none", "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "of 76 images are held out, the fewest that losses can be compared on" not in printed
    assert "data.image_size 32 -> 12x20 " in printed


def test_the_source_may_be_said():
    fill(Path("img"), "1.png")
    Path("img/metadata.csv").write_text("file_name\n1.png\n")
    assert settings_of("--data", "img").data.source == "imagefolder"
    assert settings_of("--data", "img", "--data.source", "folder").data.source == "folder"


def test_of_folders_that_are_splits_the_one_to_train_on_is_taken():
    fill(Path("img"), "train/a/1.png", "train/b/1.png", "test/a/2.png")
    config = settings_of("--data", "img")
    assert config.data.path == "img/train"
    assert config.conditioning.num_classes == 2
    fill(Path("parts"), "test/1.png", "val/1.png")
    with pytest.raises(DataError, match="holds the splits test and val, and none to train on"):
        settings_of("--data", "parts")
    fill(Path("above/again"), "train/a/1.png", "train/b/1.png", "test/a/2.png")
    assert settings_of("--data", "above").data.path == "above/again/train"
    fill(Path("img"), "1.png")  # such as a preview
    assert settings_of("--data", "img").data.path == "img/train"


def test_what_lies_beside_splits_is_left_out_and_that_is_said(caplog):
    fill(Path("up/img"), "train/1.png", "test/2.png", "masks/1.png")
    for flags in ((), ("--data.source", "folder")):
        for name in ("up/img", "up"):
            caplog.clear()
            assert settings_of("--data", name, *flags).data.path == "up/img/train"
            assert "holds splits, and beside them masks: the images of" in caplog.text
    classes = settings_of("--data", "up/img", "--data.labels-from-folders")
    assert (classes.data.path, classes.conditioning.num_classes) == ("up/img", 3)
    fill(Path("vehicles"), "train/1.png", "tram/2.png", "bus/1.png")
    assert settings_of("--data", "vehicles").conditioning.num_classes == 3


def test_a_run_on_a_split_is_resumed_whatever_came_to_lie_beside_it():
    fill(Path("img"), "train/a/1.png", "train/b/1.png", "test/a/2.png")
    before = started("--data", "img", "--run-dir", "run")
    fill(Path("img"), "masks/1.png")
    assert parse(["run", "--data", "img", "--run-dir", "run"]) == before


def test_bundled_images_have_names_and_a_folder_of_that_name_a_path():
    config = settings_of("--data", "digits")
    assert (config.data.source, config.data.image_size, config.data.path) == ("digits", 8, None)
    assert config.conditioning.num_classes == 10
    fill(Path("digits"), "1.png")
    config = settings_of("--data", "./digits")
    assert (config.data.source, config.data.image_size) == ("folder", 16)


def test_npz_files_say_their_classes():
    np.savez("a.npz", images=random_pixels(6, 16, 16), labels=np.arange(6) % 3)
    config = settings_of("--data", "a.npz")
    assert (config.data.source, config.conditioning.num_classes) == ("npz", 3)


def test_a_preset_keeps_its_shape_and_model():
    np.savez("a.npz", images=random_pixels(6, 20, 20))
    config = settings_of("--preset", "mnist", "--data", "a.npz")
    assert (config.preset, config.data.path, config.data.image_size) == ("mnist", "a.npz", 16)
    assert config.conditioning.num_classes is None
    fill(Path("img"), "1.png", size=(24, 24))
    assert run_command(["run", "--data", "img", "--preset", "digits", "--dry-run"]) == 1


def test_a_base_keeps_its_shape_and_the_rest_is_that_of_own_images():
    fill(Path("img"), "1.png", size=(24, 24))
    pipeline = DDPMPipeline(build_unet(TINY), DDPMScheduler())
    pipeline.save_pretrained("base")
    config = settings_of("--base", "base", "--data", "img")
    assert (config.preset, config.model.base) == ("images", "base")
    assert (config.data.source, config.data.path) == ("folder", "img")
    assert (config.data.image_size, config.data.num_channels) == (8, 1)
    assert config.evaluate.features == "auto"


def test_sweeps_find_out_the_same():
    fill(Path("img"), "1.png")
    command = parse(["sweep", "--data", "img", "--vary", "k=0.4,0.5"])
    assert command.config == settings_of("--data", "img")


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--data", "empty"], "--data must be digits or photos, a folder of images"),
        (["--data", "img", "--data.path", "img"], "give --data or --data.path, not both"),
        (["--data", "bad"], "--data bad holds no image that can be read"),
    ],
)
def test_bad_data_is_refused_in_one_line(capsys, command, arguments, words):
    fill(Path("img"), "1.png")
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/1.png").write_bytes(b"no image")
    assert run_command([command, *arguments]) == 1
    printed = capsys.readouterr()
    assert words in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize("command", [["run", "--dry-run"], ["plan"]])
def test_what_is_taken_and_done_is_printed(capsys, command):
    fill(Path("img"), "a/1.png", "b/1.png", size=(16, 24))
    fill(Path("img"), "b/2.png", size=(20, 24))
    Path("img/notes.txt").touch()
    assert run_command([*command, "--data", "img", "--evaluate.features", "classifier"]) == 0
    printed = capsys.readouterr().out
    where = f"{Path('img').resolve()}, read as folder"
    assert f"3 images of 2 classes in {where}, learnt as 16x16 in colour" in printed
    assert "left out: 1 .txt" in printed
    assert "changed: 1 reduced, 3 cropped to the middle" in printed
    assert "images: measured schedule" in printed


def test_help_looks_at_no_image(capsys):
    Path("img").mkdir()  # it has none
    assert run_command(["run", "--data", "img", "--help"]) == 0
    assert re.search(r"--data.num-channels .* \[the images'\]", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        run_command(["run", "--data", "img", "--help-all"])
    assert "--data.crop-padding" in capsys.readouterr().out


# --- the same command again ------------------------------------------------------------------


def started(*arguments):
    """Return the command, after its run recorded its settings."""
    command = parse(["run", *map(str, arguments)])
    write_json(command.run_dir / "config.json", to_json(command.config))
    return command


def test_the_same_command_takes_what_was_recorded_whatever_was_added():
    fill(Path("img"), "a/1.png", "b/1.png")
    before = started("--data", "img")
    fill(Path("img"), *(f"c/{i}.png" for i in range(30)), size=(32, 32))
    again = parse(["run", "--data", "img"])
    assert again == before
    assert parse(["run", "--data", f"{Path('img').resolve()}/"]).run_dir == before.run_dir
    elsewhere = parse(["run", "--data", "img", "--run-dir", "new"])
    assert elsewhere.config.conditioning.num_classes == 3
    assert elsewhere.config.data.image_size == 32


def test_other_data_flags_or_seeds_go_elsewhere():
    fill(Path("img"), "1.png")
    fill(Path("other"), "1.png")
    before = started("--data", "img")
    for change in (["--data.image-size", "8"], ["--seed", "1"], ["--base.num-steps", "2000"]):
        assert parse(["run", "--data", "img", *change]).run_dir != before.run_dir
    assert parse(["run", "--data", "other"]).run_dir != before.run_dir
    for same in (["--data.max-corrupt", "3"], ["--dry-run"], ["--compute.num-actors", "1"]):
        assert parse(["run", "--data", "img", *same]).run_dir == before.run_dir
    assert parse(["plan", "--data", "img"]).out_dir == before.run_dir


def test_a_folder_above_that_of_a_run_is_other_data():
    fill(Path("data/a"), "1.png")
    started("--data", "data/a", "--run-dir", "run")
    fill(Path("data"), *(f"b/{i}.png" for i in range(30)), size=(32, 32))
    config = parse(["run", "--data", "data", "--run-dir", "run"]).config
    assert (config.data.path, config.data.image_size) == ("data", 32)


def test_a_run_on_a_split_is_resumed_by_the_folder_above_it():
    fill(Path("img"), "train/a/1.png", "train/b/1.png", "test/a/2.png")
    before = started("--data", "img", "--run-dir", "run")
    fill(Path("img"), "train/c/1.png", size=(32, 32))
    assert parse(["run", "--data", "img", "--run-dir", "run"]) == before


@pytest.mark.parametrize("flags", [["--preset", "photos"], ["--base", "base"]])
def test_the_split_to_train_on_is_taken_whatever_the_settings_come_from(flags):
    fill(Path("img"), "train/1.png", "test/1.png")
    DDPMPipeline(build_unet(TINY), DDPMScheduler()).save_pretrained("base")
    assert settings_of("--data", "img", *flags).data.path == "img/train"


def test_another_network_in_a_file_is_another_run():
    fill(Path("img"), "a/1.png", "b/1.png", size=(8, 8))
    for name, layers in (("one", 1), ("two", 2)):
        network = {**TINY, "in_channels": 3, "out_channels": 3, "layers_per_block": layers}
        Path(f"{name}.json").write_text(json.dumps(network))
    of_file = ("--data", "img", "--model.config")
    before = started(*of_file, "one.json")
    assert parse(["run", *of_file, "two.json"]).run_dir != before.run_dir
    assert parse(["run", "--data", "img"]).run_dir != before.run_dir
    assert parse(["plan", *of_file, "one.json"]).out_dir == before.run_dir
    fill(Path("img"), *(f"c/{i}.png" for i in range(3)))
    Path("one.json").rename("same.json")
    again = parse(["run", *of_file, "same.json"])
    assert again.run_dir == before.run_dir
    assert again.config.conditioning.num_classes == 2  # as was recorded


def test_a_run_directory_of_other_data_decides_nothing(capsys):
    fill(Path("img"), "1.png")
    fill(Path("other"), "1.png", size=(8, 8), channels=())
    started("--data", "img", "--run-dir", "run")
    command = parse(["run", "--data", "other", "--run-dir", "run"])
    assert command.config.data.image_size == 8
    assert run_command(["run", "--data", "other", "--run-dir", "run"]) == 1
    assert "has other settings: " in capsys.readouterr().err
    document = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps({**document, "new": 1}))
    assert parse(["run", "--data", "other", "--run-dir", "run"]).config == command.config


def test_the_settings_that_follow_from_the_side_are_known_by_name():
    found = set()
    for side in (*STEPS_BY_SIZE, 1024):
        other = replace(images(side), data=images().data)
        changes = named_differences(to_json(images()), to_json(other))
        found |= {change.split()[0] for change in changes}
    assert found == set(BY_SIDE)


@pytest.mark.parametrize(
    ("count", "labels", "words"),
    [
        (1, [0], "the images that scores are against must be at least 2, got 1. Give more"),
        (5, None, "compared, got 0.5, which of 5 holds out 2. Give more images."),
    ],
)
def test_too_few_images_are_refused_before_work(capsys, count, labels, words):
    arrays = {"images": random_pixels(count, 8, 8)} | ({"labels": labels} if labels else {})
    np.savez("a.npz", **arrays)
    arguments = ["run", "--data", "a.npz", "--dry-run"]
    if labels is None:
        arguments += ["--evaluate.features", "none"]
    assert run_command(arguments) == 1
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_share_that_holds_out_too_few_is_refused_before_work(capsys):
    np.savez("a.npz", images=random_pixels(30, 8, 8))
    flags = ["--evaluate.features", "none", "--dry-run", "--prune.held-out-share", "0.1"]
    assert run_command(["run", "--data", "a.npz", *flags]) == 1
    words = "which of 30 holds out 3. Raise --prune.held-out-share, or give more images."
    assert words in " ".join(capsys.readouterr().err.split())


def test_what_is_warned_of_is_said_once_however_the_path_is_given(capfd):
    Path("in").mkdir()
    np.savez("in/a.npz", images=random_pixels(60, 8, 8), labels=np.arange(60) - 3)
    flags = ["--evaluate.features", "none", "--dry-run"]
    assert run_command(["run", "--data", "in/../in/a.npz", *flags]) == 0
    done = capfd.readouterr()
    assert f"{done.out}{done.err}".count("labels of") == 1
