"""``tdc-ray sample``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from tdc_ray.cli.paths import check_input, check_output_folder
from tdc_ray.config.sampler import Spacing
from tdc_ray.config.train import Compile, Precision
from tdc_ray.config.validation import errors_together, require
from tdc_ray.errors import ConfigError
from tdc_ray.storage.object_store import display_path, resolve_path


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Sample images from the experts of a finished run: a grid and an npz (arr_0, uint8, NHWC)."""

    run: Positional[Path]
    """The run directory, or a folder of experts, or its URI."""
    num_images: int = 64
    """How many images."""
    seed: int = 0
    """Image i of a seed is always the same."""
    num_inference_steps: int | None = None
    """Denoising steps; default: as the run was planned."""
    scheduler: Annotated[str | None, arg(aliases=("--sampler.scheduler",))] = None
    """A scheduler of diffusers, by its class's name, or base: that of the base's own pipeline;
    default: as the run was planned."""
    spacing: Annotated[Spacing | None, arg(aliases=("--sampler.spacing",))] = None
    """How it spaces the timesteps; default: as it does."""
    karras_sigmas: Annotated[bool, arg(aliases=("--sampler.karras-sigmas",))] = False
    """Space by EDM's sigmas, where the scheduler can."""
    options: Annotated[tuple[str, ...], arg(aliases=("--sampler.options",))] = ()
    """Other settings of the scheduler, NAME=VALUE under diffusers' names."""
    labels: tuple[int, ...] | None = None
    """Classes, which take turns over the images; default: all that a conditioned model knows."""
    guidance_scale: float | None = None
    """Weight of classifier-free guidance, 1 for none; default: as the run was planned."""
    prompts: tuple[str, ...] = ()
    """Prompts, which take turns over the images, for experts conditioned on text; or text files
    of them, one a line, named by NAME.txt, or by a path with / in it."""
    negative_prompt: Annotated[str | None, arg(aliases=("--sampler.negative-prompt",))] = None
    """What guidance leads away from, in words, for all prompts; default: as the run was planned,
    or as the base's own pipeline does."""
    text_encoder: Annotated[str | None, arg(aliases=("--data.text-encoder",))] = None
    """Folder of the diffusers pipeline that encodes the prompts; default: that of the base, where
    it was, unless that is a URI."""
    batch_size: int = 64
    """Images sampled at once."""
    offload: bool = False
    """Hold at most two experts in memory: the one in use, and the next, being read meanwhile."""
    precision: Precision = "fp32"
    """Precision of the denoisers' weights and computation; images differ slightly between them.
    auto: bf16 where a short probe finds it faster, else fp32. The run's own scores are of images
    in its evaluate.precision."""
    winograd: bool = False
    """On CPUs, in fp32: 3 x 3 convolutions by Winograd's algorithm. Wide models take less time by
    it, and their images are off by rounding, some 1e-4 of the largest value."""
    compile: Annotated[Compile, arg(aliases=("--sampler.compile",))] = "none"
    """torch.compile's mode for the denoisers, each compiled before its first step, which takes
    minutes; reduce-overhead uses CUDA graphs. Images are off by rounding."""
    out_dir: Path | None = None
    """Where samples.png and samples.npz go; default: RUN/samples."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    @errors_together()
    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            require("sample", self, name, "at least 1", ok=getattr(self, name) >= 1)
        full = self.precision == "fp32"
        require("sample", self, "precision", "fp32 with --winograd", ok=full or not self.winograd)
        plain = not (self.offload or self.winograd)
        rule = "none with --offload or --winograd"
        require("sample", self, "compile", rule, ok=plain or self.compile == "none")

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_input(self.run, "a run directory, or a folder of experts")
        if self.text_encoder is not None:
            check_input(self.text_encoder, "the folder of a diffusers pipeline by --text-encoder")
        for file in self.prompts:
            if file.endswith(".txt"):
                check_input(file, "a text file of prompts by --prompts")
        check_output_folder("--out-dir", self.out_dir or self.run / "samples")

    def execute(self, console: Console) -> None:
        """Sample and write the images."""
        folder = resolve_path(self.out_dir or self.run / "samples")
        import numpy as np
        import torch

        from tdc_ray.data.prompts import conditions_of_images, prompts_named
        from tdc_ray.diffusion.pipeline import ProgressivePipeline
        from tdc_ray.diffusion.sampling import image_generators, image_labels
        from tdc_ray.models.families import family_of
        from tdc_ray.models.precision import DTYPES
        from tdc_ray.reporting.grid import save_grid
        from tdc_ray.runs.stages.precision import ProbeJob, benchmark_precision
        from tdc_ray.storage.files import atomic_path

        asked: dict[str, Any] = {
            "scheduler": self.scheduler,
            "spacing": self.spacing,
            "karras_sigmas": self.karras_sigmas,
            "options": self.options,
        }
        prompts = prompts_named(self.prompts, "prompts")[: self.num_images]
        changes = {name: value for name, value in asked.items() if value}
        if self.scheduler is not None:  # the settings of the run's are another's
            changes = {**asked, "eta": 0.0, "use_clipped_model_output": None}
        if self.negative_prompt is not None:
            changes["negative_prompt"] = self.negative_prompt
        if changes and self.num_inference_steps is not None:
            changes["num_inference_steps"] = self.num_inference_steps
        pipeline = ProgressivePipeline.from_pretrained(
            self.run,
            offload=self.offload,
            winograd=self.winograd,
            compile_mode=self.compile,
            sampler=changes,
            text_encoder=self.text_encoder,
        )
        if pipeline.reads_prompts and not prompts:
            raise ConfigError(
                "prompts must be given for experts that are conditioned on text. Name some, or a "
                "text file of them, by --prompts."
            )
        scale = pipeline.guidance_scale if self.guidance_scale is None else self.guidance_scale
        if self.negative_prompt is not None and (scale == 1 or not prompts):
            raise ConfigError(
                "negative_prompt must come with prompts and a guidance scale other than 1, got "
                f"{self.negative_prompt!r} with {scale:g}. Set --guidance-scale, or leave it out."
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Before the experts are there: a text encoder may be larger than they are.
        states = pipeline.encode_prompts(prompts, device) if prompts else None
        precision = self.precision
        if precision == "auto":
            network = pipeline.experts.for_timestep(pipeline.experts.spans[0][0])
            channels = len(family_of(network).ends(network).first.weight)
            job = ProbeJob(channels=channels, size=pipeline.shape[1:], trains=False)
            precision = benchmark_precision(job, lambda *_: None).precision
            console.print(f"precision auto is {precision} here")
        pipeline.experts.to(DTYPES[precision])
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=not console.is_terminal)
        pixels = []
        classes = torch.tensor(self.labels) if self.labels else None
        for first in range(0, self.num_images, self.batch_size):
            count = min(self.batch_size, self.num_images - first)
            generators = image_generators(self.seed, first, count)
            turns = image_labels(
                pipeline.num_classes if classes is None else len(classes), first, count
            )
            conditions: dict[str, Any] = (
                {} if states is None else conditions_of_images(states, first, count)
            )
            output = pipeline(
                count,
                generators,
                num_inference_steps=self.num_inference_steps,
                output_type="np",
                class_labels=turns if classes is None else classes[turns],
                guidance_scale=self.guidance_scale,
                **conditions,
            )
            pixels.append(output.images)
        images = np.concatenate(pixels)
        with atomic_path(folder / "samples.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, arr_0=images)
        save_grid(images, folder / "samples.png")
        name = display_path(folder)
        console.print(
            f"written: {name}/samples.npz ({images.shape}), {name}/samples.png", soft_wrap=True
        )
