"""The experts as one pipeline: loads, samples, switches experts as t falls. Needs no Ray."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel

from tdc_ray.config.conditioning import null_class
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.expert_set import ExpertSet, OffloadedExperts
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.sampling import (
    image_generators,
    image_labels,
    sample,
    to_uint8,
)
from tdc_ray.errors import CheckpointError, ConfigError, StorageError
from tdc_ray.models.first_stage import FirstStage, copy_first_stage, input_shape, load_first_stage
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.storage.files import exists, read_json, write_json
from tdc_ray.storage.object_store import display_path, resolve_path

INDEX_FILE = "progressive.json"
FIRST_STAGE_DIR = "first_stage"
FORMAT = 1
OUTPUT_TYPES = ("pil", "np", "pt")


class ProgressivePipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Image generation, unconditional or by classes, with one expert per group of timesteps.

    ``pipeline.scheduler`` may be any diffusers scheduler with epsilon prediction whose timesteps
    are integers of the training schedule; ``DDPMScheduler.from_config(pipeline.scheduler.config)``
    makes one.
    """

    _optional_components: ClassVar[list[str]] = ["first_stage"]
    """Diffusers' own way to say what may be None."""

    def __init__(
        self,
        experts: ExpertSet | OffloadedExperts,
        scheduler: SchedulerMixin,
        first_stage: FirstStage | None = None,
        *,
        shape: tuple[int, int, int] = (3, 32, 32),
        num_inference_steps: int = 50,
        eta: float = 0.0,
        timestep_scale: float = 1.0,
        num_classes: int | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        """Put a pipeline together.

        Args:
            experts: The denoisers.
            scheduler: The diffusers scheduler.
            first_stage: Decodes what the experts give, where that is latents.
            shape: ``(C, H, W)`` of what the experts give.
            num_inference_steps: Steps taken when a call names none.
            eta: Stochasticity of DDIM when a call names none.
            timestep_scale: What a timestep is multiplied with before a network sees it.
            num_classes: Classes that the experts are conditioned on, without the null class; None:
                they are unconditional.
            guidance_scale: Weight of classifier-free guidance when a call names none; 1: none.
        """
        super().__init__()
        self.register_modules(experts=experts, scheduler=scheduler, first_stage=first_stage)
        self.shape, self.timestep_scale = shape, timestep_scale
        self.num_inference_steps, self.eta = num_inference_steps, eta
        self.num_classes, self.guidance_scale = num_classes, guidance_scale
        self.winograd = False
        self.register_to_config(  # diffusers tells settings from parts by this
            shape=shape,
            num_inference_steps=num_inference_steps,
            eta=eta,
            timestep_scale=timestep_scale,
            num_classes=num_classes,
            guidance_scale=guidance_scale,
        )

    @torch.inference_mode()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        *,
        seed: int = 0,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
    ) -> ImagePipelineOutput:
        """Draw images.

        Args:
            batch_size: Number of images.
            generator: One per image, or one for all; None: made from ``seed``.
            num_inference_steps: Denoising steps; None: as planned.
            eta: Stochasticity of DDIM; None: as planned.
            output_type: ``pil``, ``np`` (uint8, ``(B, H, W, C)``) or ``pt`` (in [-1, 1],
                ``(B, C, H, W)``).
            seed: Image ``i`` of a seed is the same in every batch.
            class_labels: One class per image, or one for all, for experts that are conditioned on
                classes; None: image ``i`` is of class ``i`` modulo their number.
            guidance_scale: Weight of classifier-free guidance, at least 0; 1: none; None: as
                planned.

        Returns:
            An object with ``images``.

        Raises:
            ConfigError: An argument is out of its range, or goes with other experts.
        """
        if isinstance(generator, list):
            generators = generator
        elif generator is not None:
            device = generator.device
            seeds = torch.randint(
                2**31, (batch_size,), generator=generator, device=device
            ).tolist()
            generators = [torch.Generator().manual_seed(value) for value in seeds]
        else:
            generators = image_generators(seed, 0, batch_size)
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        longest = self.scheduler.config["num_train_timesteps"]
        if not 1 <= steps <= longest:
            raise ConfigError(f"num_inference_steps must be in [1, {longest}], got {steps}.")
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(
                f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type}."
            )
        if len(generators) != batch_size:
            raise ConfigError(
                f"generator must be one, or one per image: got {len(generators)} for batch_size "
                f"{batch_size}."
            )
        labels = self._labels(class_labels, batch_size)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        null = null_class(self.experts.num_class_embeds, self.num_classes)
        if scale < 0 or (scale != 1 and null is None):
            rule = "at least 0" if null is not None else "1 for experts without a null class"
            raise ConfigError(f"guidance_scale must be {rule}, got {scale}.")
        self.scheduler.set_timesteps(steps)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            images = sample(
                self.experts.for_timestep,
                self.scheduler,
                generators=generators,
                shape=self.shape,
                num_inference_steps=steps,
                eta=self.eta if eta is None else eta,
                timestep_scale=self.timestep_scale,
                device=self.device,
                dtype=self.experts.dtype,
                on_step=bar.update,
                class_labels=labels,
                guidance_scale=scale,
                null_class=null,
                winograd=self.winograd,
            )
        if self.first_stage is not None:
            images = self.first_stage.decode(images)
        if output_type == "pt":
            return ImagePipelineOutput(images=images)
        pixels = to_uint8(images).numpy()
        if output_type == "np":
            return ImagePipelineOutput(images=pixels)
        return ImagePipelineOutput(images=self.numpy_to_pil(pixels / 255.0))

    def _labels(
        self, class_labels: int | Sequence[int] | torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        """Bring a call's labels to one per image, ``(B,)``."""
        if self.num_classes is None:
            if class_labels is not None:
                raise ConfigError("class_labels must be None: the experts are unconditional.")
            return None
        if class_labels is None:
            return image_labels(self.num_classes, 0, batch_size)
        labels = torch.as_tensor(class_labels)
        if labels.ndim == 0:
            labels = labels.expand(batch_size)
        if labels.shape != (batch_size,):
            raise ConfigError(
                f"class_labels must be one, or one per image: got {labels.tolist()} for "
                f"batch_size {batch_size}."
            )
        for label in labels.tolist():
            if label not in range(self.num_classes):
                raise ConfigError(f"class_labels must be in [0, {self.num_classes}), got {label}.")
        return labels

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        offload: bool = False,
        winograd: bool = False,
    ) -> "ProgressivePipeline":
        """Load the experts of a run: its ``experts`` folder, or the run directory itself.

        Args:
            path: The folder, or its URI, such as ``s3://bucket/run``.
            torch_dtype: Precision to bring the experts' weights to; a first stage keeps its own.
            offload: Hold at most two experts in memory: the one in use, and the next, which is
                read meanwhile.
            winograd: On CPUs, in float32: 3 x 3 convolutions by Winograd's algorithm. Wide experts
                take less time by it, and their images are off by rounding; a first stage's own
                convolutions stay. The attribute ``winograd`` may be set later, too.

        Raises:
            CheckpointError: The folder holds no experts, or one of another format.
        """
        folder = resolve_path(path)
        folder = folder if exists(folder / INDEX_FILE) else folder / "experts"
        if not exists(folder / INDEX_FILE):
            raise CheckpointError(
                f"{display_path(path)} holds no experts: {INDEX_FILE} is missing. Finish the run "
                "first."
            )
        try:
            index = read_json(folder / INDEX_FILE)
            if index["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {index['format']}, expected {FORMAT}.")
            folders = [folder / row["folder"] for row in index["experts"]]
            spans = [(row["first"], row["last"]) for row in index["experts"]]
            experts = (
                OffloadedExperts(folders, spans)
                if offload
                else ExpertSet([load_expert(one) for one in folders], spans)
            )
            scheduler = make_scheduler(
                DiffusionConfig(**index["diffusion"]), SamplerConfig(**index["sampler"])
            )
            name = index.get("first_stage")
            first_stage = None if name is None else load_first_stage(folder / name)
            pipeline = _assemble(experts.to(torch_dtype), scheduler, first_stage, index)
        except (KeyError, TypeError, StorageError) as error:
            raise CheckpointError(
                f"{display_path(folder / INDEX_FILE)} is malformed: {error}"
            ) from error
        pipeline.winograd = winograd
        return pipeline


def base_pipeline(unet: UNet2DModel, config: RunConfig) -> ProgressivePipeline:
    """Make a pipeline whose only expert is the base, which serves every timestep.

    Where the settings name a first stage it decodes.
    """
    experts = ExpertSet([unet], [(0, config.diffusion.num_train_timesteps - 1)])
    scheduler = make_scheduler(config.diffusion, config.sampler)
    place = config.data.first_stage
    first_stage = None if place is None else load_first_stage(Path(place))
    return _assemble(experts, scheduler, first_stage, _index(config, []))


def save_index(
    folder: Path, config: RunConfig, groups: Sequence[TimestepGroup], names: Sequence[str]
) -> None:
    """Write what makes a folder of experts a pipeline: who serves what, and how to sample.

    A first stage is copied into it, so that it needs nothing from elsewhere.

    Args:
        folder: Where the experts' folders are.
        config: The run's settings.
        groups: The groups in order.
        names: The folder of each group's expert.
    """
    rows = [
        {"folder": name, "first": group.first, "last": group.last}
        for group, name in zip(groups, names, strict=True)
    ]
    if config.data.first_stage is not None:
        copy_first_stage(Path(config.data.first_stage), folder / FIRST_STAGE_DIR)
    write_json(folder / INDEX_FILE, _index(config, rows))


def _index(config: RunConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "shape": list(input_shape(config.data)),
        "first_stage": None if config.data.first_stage is None else FIRST_STAGE_DIR,
        "diffusion": asdict(config.diffusion),
        "sampler": asdict(config.sampler),
        "num_classes": config.conditioning.num_classes,
        "experts": rows,
    }


def _assemble(
    experts: ExpertSet | OffloadedExperts,
    scheduler: SchedulerMixin,
    first_stage: FirstStage | None,
    index: dict[str, Any],
) -> ProgressivePipeline:
    channels, height, width = index["shape"]
    sampler = index["sampler"]
    return ProgressivePipeline(
        experts,
        scheduler,
        first_stage,
        shape=(channels, height, width),
        num_inference_steps=sampler["num_inference_steps"],
        eta=sampler["eta"],
        timestep_scale=DiffusionConfig(**index["diffusion"]).timestep_scale,
        num_classes=index.get("num_classes"),
        guidance_scale=sampler.get("guidance_scale", 1.0),
    )
