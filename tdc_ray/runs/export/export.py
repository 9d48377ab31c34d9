"""Exports a run's experts as a folder that diffusers, plain PyTorch and tdc_ray load."""

import importlib.resources
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from tdc_ray.config.run import from_json
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.diffusion.pipeline_index import INDEX_FILE, PipelineIndex
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.models.network_config import DEFAULT_CLASS, OWN_SETTINGS
from tdc_ray.models.saved_expert import CONFIG_FILE, WEIGHTS_FILE, SavedExpert, load_expert
from tdc_ray.models.units import KeptIndices
from tdc_ray.runs.export.model_card import model_card
from tdc_ray.runs.results import load_results
from tdc_ray.storage.files import (
    atomic_path,
    exists,
    fetch,
    read_json,
    write_json,
    write_text,
)
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import FIRST_STAGE_DIR, RunDir

EXPERTS_DIR, SCHEDULER_DIR = "experts", "scheduler"
MODULES_FILE = "modules.json"


def export_run(run: Path, folder: Path, *, denoiser: bool = False) -> None:
    """Export the experts of a finished run into a new folder, atomically.

    Args:
        run: The run directory.
        folder: A new folder.
        denoiser: Export them as one network for any pipeline of diffusers, which
            ``ExpertDenoiser.from_pretrained`` loads, with what they have in common once.

    Raises:
        CheckpointError: The run's experts are missing or malformed.
        ConfigError: The folder exists.
        StorageError: The run is not finished.
    """
    run_dir, folder = RunDir(resolve_path(run).resolve()), resolve_path(folder)
    if exists(folder):
        raise ConfigError(f"{display_path(folder)} exists: name a new folder, or remove it.")
    if not exists(run_dir.results):
        raise StorageError(
            f"{display_path(run)} is not finished: {run_dir.results.name} is missing."
        )
    export = _export_denoiser if denoiser else _export_pipeline
    config, results = from_json(read_json(run_dir.config)), load_results(run_dir.results)
    with atomic_path(folder) as temporary:
        export(run_dir, temporary)
        write_text(temporary / "README.md", model_card(results, config, denoiser=denoiser))


def _export_denoiser(run_dir: RunDir, folder: Path) -> None:
    ExpertDenoiser.from_pretrained(run_dir.experts).save_pretrained(folder)
    index = PipelineIndex.load(run_dir.experts)
    scheduler = make_scheduler(index.diffusion, index.sampler)
    scheduler.save_pretrained(folder / SCHEDULER_DIR)
    if index.first_stage is not None:
        shutil.copytree(fetch(run_dir.experts / index.first_stage), folder / FIRST_STAGE_DIR)


def _export_pipeline(run_dir: RunDir, folder: Path) -> None:
    index = PipelineIndex.load(run_dir.experts)
    if index.diffusion.is_edm:
        raise ConfigError(
            "export --denoiser must be set for experts with EDM's preconditioning "
            "(diffusion.sigma_data), got False: what is exported as a pipeline serves whole "
            "timesteps alone."
        )
    pipeline = ProgressivePipeline.from_pretrained(run_dir.root)
    if pipeline.reads_prompts:
        raise ConfigError(
            "experts conditioned on text are exported with --denoiser: the base's own pipeline, "
            "which has the text encoder, draws with them."
        )
    (folder / EXPERTS_DIR).mkdir(parents=True)
    for expert in index.experts:
        _export_expert(run_dir.experts / expert.folder, folder / EXPERTS_DIR / expert.folder)
    document = index.to_json()
    if index.first_stage is not None:
        stage = fetch(run_dir.experts / index.first_stage)
        shutil.copytree(stage, folder / FIRST_STAGE_DIR)
        document["first_stage"] = f"../{FIRST_STAGE_DIR}"
    write_json(folder / EXPERTS_DIR / INDEX_FILE, document)
    pipeline.scheduler.save_pretrained(folder / SCHEDULER_DIR)
    write_json(folder / "model_index.json", _model_index(pipeline))
    for name, place in (("pipeline", "."), ("experts", EXPERTS_DIR), ("example", ".")):
        source = importlib.resources.files("tdc_ray.runs.export.templates") / f"{name}.py"
        write_text(folder / place / f"{name}.py", source.read_text())


def _export_expert(source: Path, folder: Path) -> None:
    """Copy an expert, and describe it as a whole network and the numbers that pruning changed."""
    folder.mkdir()
    fetch(source)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(source / name, folder / name)
    saved = SavedExpert.load(source)
    arguments = {name: value for name, value in saved.unet.items() if name not in OWN_SETTINGS}
    kind = str(arguments.pop("_class_name", DEFAULT_CLASS))
    with torch.device("meta"):
        whole = getattr(diffusers, kind)(**arguments)
    document = {
        "class": kind,
        "unet": arguments,
        "attributes": _differences(whole, load_expert(source)),
    }
    if removed := _removed_branches(saved.kept):
        document["removed"] = removed
    write_json(folder / MODULES_FILE, document)


def _removed_branches(kept: KeptIndices) -> dict[str, list[str]]:
    """Return by the names of blocks which of their branches were removed as a whole."""
    removed: dict[str, list[str]] = {}
    for unit, steps in kept.items():
        if not steps:
            block, _, branch = unit.rpartition(".")
            removed.setdefault(block, []).append(branch)
    return removed


def _differences(whole: nn.Module, pruned: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the plain numbers that pruning has changed, by module and attribute."""
    changed = {}
    for name, after in pruned.named_modules():
        before = vars(whole.get_submodule(name))
        numbers = {
            key: value
            for key, value in vars(after).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
            if value != before.get(key)
        }
        if numbers:
            changed[name] = numbers
    return changed


def _model_index(pipeline: ProgressivePipeline) -> Mapping[str, Any]:
    """Describe the folder as diffusers' ``model_index.json`` does."""
    channels, height, width = pipeline.shape
    stage = pipeline.first_stage
    return {
        "_class_name": ["pipeline", "ProgressivePipeline"],
        "_diffusers_version": diffusers.__version__,
        "experts": ["experts", "Experts"],
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        "first_stage": [None, None]
        if stage is None
        else ["diffusers", type(stage.model).__name__],
        "channels": channels,
        "height": height,
        "width": width,
        "num_inference_steps": pipeline.num_inference_steps,
        "eta": pipeline.eta,
        "timestep_scale": pipeline.timestep_scale,
        "num_classes": pipeline.num_classes,
        "null_class": pipeline.null_class,
        "guidance_scale": pipeline.guidance_scale,
        "use_clipped_model_output": pipeline.use_clipped_model_output,
    }
