"""Exports load in processes that have no Ray, and not even tdc_ray."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from torchvision.utils import make_grid

from tdc_ray.cli.main import run_command
from tdc_ray.config.run import RunConfig, to_json
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.diffusion.sampling import image_generators
from tdc_ray.models.families import family_of
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import SpaceKind
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.export.export import _export_expert, export_run
from tdc_ray.runs.export.model_card import model_card
from tdc_ray.runs.export.templates import experts
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.results import LossDifference, save_results
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir
from tests.runs.test_results import RESULTS
from tests.small import (
    TINY,
    TINY_DIT,
    assert_same,
    latent_config,
    make_first_stage,
    random_dit,
    random_kept,
    random_unet,
    small_config,
)

FEW = {"num_inference_steps": 4}


@torch.no_grad()
def test_an_expert_without_branches_and_blocks_is_exported(tmp_path):
    config = {**TINY_DIT, "num_layers": 4, "norm_elementwise_affine": True}
    base, units = random_dit(config), space_of(config, "depth").units
    kept = random_kept(units, 1)
    for name in ("0.attn1", "0.ff", "1.attn1", "2.ff", "3.attn1", "3.ff"):
        kept[f"transformer_blocks.{name}"] = ()
    pruned = family_of(base).cut(base, units, kept)
    save_expert(tmp_path / "expert", pruned, config, kept)
    _export_expert(tmp_path / "expert", tmp_path / "exported")
    loaded = copy.deepcopy(experts.load_expert(tmp_path / "exported"))
    assert_same(loaded.state_dict(), pruned.state_dict())
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 2])
    for network in (loaded, loaded.train()):
        assert torch.equal(network(*inputs).sample, pruned(*inputs).sample)
    loaded.enable_gradient_checkpointing()  # gives blocks their arguments by position
    with torch.enable_grad():
        assert torch.equal(loaded(*inputs).sample, pruned(*inputs).sample)


BLOCK = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it is an error
"""
BY_DIFFUSERS = (
    BLOCK
    + """
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({folder!r}, custom_pipeline={folder!r}, {trust}=True)
"""
)
BY_US = (
    BLOCK
    + """
from tdc_ray import ProgressivePipeline

pipeline = ProgressivePipeline.from_pretrained({folder!r})
"""
)
SAMPLE = """
import numpy
pipeline.set_progress_bar_config(disable=True)
numpy.save({out!r}, pipeline(3, seed=5, output_type="np").images)
"""


def make_run(
    root: Path, config: RunConfig, base: UNet2DModel | None = None, space: SpaceKind = "inner"
) -> RunDir:
    """A finished run's directory, whose experts are random."""
    run_dir = RunDir(root)
    base = base or random_unet()
    settings = {**TINY, "num_class_embeds": base.config["num_class_embeds"]}
    units = units_of(settings, space)
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    names = [f"expert-{group.index:02d}" for group in groups]
    for seed, name in enumerate(names):
        kept = random_kept(units, seed)
        save_expert(run_dir.experts / name, cut(base, units, kept), settings, kept)
    pipeline_index(config, dict(zip(names, groups, strict=True))).save(run_dir.experts)
    write_json(run_dir.config, to_json(config))
    save_results(run_dir.results, RESULTS)
    return run_dir


def images_by(script: str, blocked: list[str], folder: Path, out: Path) -> np.ndarray:
    """What a fresh process samples from an export."""
    text = (script + SAMPLE).format(
        blocked=blocked, folder=str(folder), out=str(out), trust="trust_remote_code"
    )
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(out)


def conditional(tmp_path: Path) -> tuple[RunConfig, UNet2DModel]:
    config = small_config(
        conditioning={"num_classes": 10, "label_dropout": 0.1},
        sampler={**FEW, "guidance_scale": 2.0},
    )
    return config, random_unet({**TINY, "num_class_embeds": 11})


def latent(tmp_path: Path) -> tuple[RunConfig, None]:
    return latent_config(make_first_stage(tmp_path / "stage"), tmp_path / "cache"), None


def heun(tmp_path: Path) -> tuple[RunConfig, None]:
    """Steps between timesteps, and two evaluations for a step."""
    return small_config(sampler={**FEW, "scheduler": "HeunDiscreteScheduler"}), None


def quadratic(tmp_path: Path) -> tuple[RunConfig, None]:
    return small_config(
        sampler={**FEW, "scheduler": "DDPMScheduler", "spacing": "quadratic", "steps_offset": 1}
    ), None


def plain(tmp_path: Path) -> tuple[RunConfig, None]:
    return small_config(sampler=FEW), None


@pytest.mark.parametrize(
    ("make", "space"),
    [
        (plain, "full"),
        pytest.param(plain, "inner", marks=pytest.mark.slow),
        pytest.param(conditional, "inner", marks=pytest.mark.slow),
        pytest.param(heun, "inner", marks=pytest.mark.slow),
        pytest.param(quadratic, "inner", marks=pytest.mark.slow),
        pytest.param(latent, "full", marks=pytest.mark.slow),
    ],
)
def test_the_same_images_without_ray_and_without_us(tmp_path, make, space):
    config, base = make(tmp_path)
    run_dir, out = make_run(tmp_path / "run", config, base, space), tmp_path / "out"
    export_run(run_dir.root, out)
    pipeline = ProgressivePipeline.from_pretrained(run_dir.root)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(3, seed=5, output_type="np").images
    assert len(np.unique(wanted)) > 10
    theirs = images_by(BY_DIFFUSERS, ["ray", "tdc_ray"], out, tmp_path / "theirs.npy")
    np.testing.assert_array_equal(theirs, wanted)
    run_dir.root.rename(tmp_path / "gone")  # the export holds all that it needs
    if make is plain and space == "inner":
        ours = images_by(BY_US, ["ray"], out, tmp_path / "ours.npy")
    else:
        ours = ProgressivePipeline.from_pretrained(out)(3, seed=5, output_type="np").images
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("name", ["tiny", "heads"])
def test_an_expert_is_rebuilt_from_its_tensors_and_numbers(tmp_path, name):
    from tdc_ray.runs.export.templates.experts import load_expert as load_plainly

    own = {"num_heads": 4, "attention_head_dim": 8, "timestep_channels": 48}
    config = TINY if name == "tiny" else {**TINY, **own}
    run_dir = make_run(tmp_path / "run", small_config(sampler=FEW))
    units, base = units_of(config, "full"), random_unet(config)
    kept = random_kept(units, 1)
    first = run_dir.experts / "expert-00"
    for folder in run_dir.experts.glob("expert-*"):
        save_expert(folder, cut(base, units, kept), config, kept)
    export_run(run_dir.root, tmp_path / "out")
    noise, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    with torch.inference_mode():
        found = load_plainly(tmp_path / "out/experts/expert-00")(noise, timesteps).sample
        ours = copy.deepcopy(load_expert(first))  # from where it is mapped to aligned addresses
        assert torch.equal(found, ours(noise, timesteps).sample)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    from tdc_ray.runs.export.templates.experts import load_expert as load_plainly

    run_dir = make_run(tmp_path / "run", small_config(sampler=FEW))
    export_run(run_dir.root, tmp_path / "out")
    folder = tmp_path / "out/experts/expert-00"
    document = json.loads((folder / "modules.json").read_text())
    document["unet"]["num_class_embeds"] = 3
    (folder / "modules.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"do not fit: class_embedding\.weight"):
        load_plainly(folder)


def velocity(tmp_path: Path) -> tuple[RunConfig, None]:
    sampler = {
        "spacing": "trailing",
        "num_inference_steps": 3,
        "use_clipped_model_output": False,
    }
    return small_config(diffusion={"prediction_type": "v_prediction"}, sampler=sampler), None


def image(tmp_path: Path) -> tuple[RunConfig, None]:
    return small_config(diffusion={"prediction_type": "sample"}, sampler=FEW), None


def without_signal(tmp_path: Path) -> tuple[RunConfig, None]:
    noise = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    return small_config(diffusion=noise, sampler=FEW | {"spacing": "trailing"}), None


@pytest.mark.parametrize(
    "make",
    [
        plain,
        pytest.param(image, marks=pytest.mark.slow),
        pytest.param(without_signal, marks=pytest.mark.slow),
        pytest.param(velocity, marks=pytest.mark.slow),
        pytest.param(latent, marks=pytest.mark.slow),
    ],
)
def test_the_plain_example_gives_the_pipelines_images_for_the_same_noise(tmp_path, make):
    config, base = make(tmp_path)
    run_dir, noise_path = make_run(tmp_path / "run", config, base), tmp_path / "noise.pt"
    export_run(run_dir.root, tmp_path / "out")
    pipeline = ProgressivePipeline.from_pretrained(run_dir.root)
    pipeline.set_progress_bar_config(disable=True)
    wanted = torch.from_numpy(pipeline(4, seed=5, output_type="np").images).permute(0, 3, 1, 2)
    noise = [torch.randn(1, 8, 8, generator=g) for g in image_generators(5, 0, 4)]
    torch.save(torch.stack(noise), noise_path)
    text = BLOCK.format(blocked=["ray", "tdc_ray"]) + (
        "import runpy, torch\n"
        f"torch.randn = lambda *_, **__: torch.load({str(noise_path)!r})\n"
        f"sys.argv = ['example.py', '--num-images', '4', '--out', {str(tmp_path / 'i.png')!r}]\n"
        f"runpy.run_path({str(tmp_path / 'out/example.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "i.png") as image:
        found = np.array(image.convert("L")).astype(int)
    assert np.abs(found - make_grid(wanted, nrow=2)[0].numpy()).max() <= 1


def test_the_card_tells_what_from_what_and_how(tmp_path):
    run_dir = make_run(tmp_path / "run", small_config(sampler=FEW))
    assert run_command(["export", str(run_dir.root), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers")
    for word in (RESULTS.metric, f"{RESULTS.tdc.score:.3f}", "trust_remote_code", "example.py"):
        assert word in card
    assert len([line for line in card.splitlines() if " to " in line and line[0] == "|"]) == len(
        RESULTS.groups
    )
    assert ("is no FID" in card) == (RESULTS.metric != "fid")


def test_the_card_of_losses_tells_that_no_image_was_scored():
    losses = LossDifference(loss_tdc=0.05, loss_base=0.06, difference=-0.01, low=-0.02, high=0.0)
    base, tdc = (replace(RESULTS.tdc, score=score) for score in (0.06, 0.05))
    results = replace(RESULTS, metric="held_out_loss", base=base, tdc=tdc, losses=losses)
    card = model_card(results, small_config())
    assert "| base | 0.06000 |" in card
    assert "No image was scored" in card
    assert "FID" not in card


def test_as_a_denoiser_it_goes_into_a_pipeline_of_diffusers(tmp_path):
    run_dir = make_run(tmp_path / "run", small_config(sampler=FEW))
    out = tmp_path / "out"
    assert run_command(["export", str(run_dir.root), str(out), "--denoiser"]) == 0
    shutil.move(run_dir.root, tmp_path / "gone")
    scheduler = DDIMScheduler.from_pretrained(out, subfolder="scheduler")
    pipeline = DDIMPipeline(ExpertDenoiser.from_pretrained(out), scheduler)
    assert pipeline(num_inference_steps=4, output_type="np").images.shape == (1, 8, 8, 1)
    parts = sum(path.stat().st_size for path in (tmp_path / "gone").rglob("*.safetensors"))
    assert (out / "experts.safetensors").stat().st_size < 0.9 * parts
    assert "ExpertDenoiser.from_pretrained(DIR)" in (out / "README.md").read_text()


def test_an_unfinished_run_or_a_folder_that_exists_is_refused(tmp_path, capsys):
    run_dir = make_run(tmp_path / "run", small_config(sampler=FEW))
    (tmp_path / "there").mkdir()
    assert run_command(["export", str(run_dir.root), str(tmp_path / "there")]) == 1
    assert "there exists: name a new folder" in capsys.readouterr().err
    run_dir.results.unlink()
    assert run_command(["export", str(run_dir.root), str(tmp_path / "out")]) == 1
    assert "is not finished: results.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
