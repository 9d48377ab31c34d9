"""Models in and out: pruned, imported, exported, sampled from."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from tdc_ray.cli.commands.run import Settings
from tdc_ray.config.autoencoder import AutoencoderConfig
from tdc_ray.config.prune import SearchMethod
from tdc_ray.config.train import Precision, require
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.storage.object_store import is_remote, located, shown


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Cut any saved UNet2DModel to some of its macs, or to a time, and refit it.

    No gradient step, no Ray.

    Run the same command again to go on after a cut. The language model (--method llm) needs
    OPENAI_API_KEY, and OPENAI_BASE_URL for servers other than OpenAI's.
    """

    model_dir: Positional[Path]
    """Folder of a diffusers UNet2DModel or of a pipeline with one, or a run directory; or its
    URI."""
    config: Settings
    out: Path
    """Where the pruned model and report.json go."""
    macs: float | None = None
    """Most macs that are left, as a share of the model's, in (0, 1]; default: 0.7, unless there is
    a limit in milliseconds."""
    milliseconds: float | None = None
    """Most time of a forward pass of --prune.latency-batch-size images on this device, in place of
    macs."""
    method: SearchMethod | None = None
    """Who proposes what is cut; default: prune.method, which is that of the model's run."""
    data: str | None = None
    """digits, an npz file, a folder of npz files or of images, or CIFAR-10's; default: what the
    model's run was trained on."""
    timesteps: tuple[int, int] | None = None
    """First and last timestep to prune for; default: all."""
    group: int | None = None
    """A group of the plan (--plan.num-groups and so on) to prune for, in place of timesteps."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def __post_init__(self) -> None:
        share = self.macs
        require("prune", self, "macs", "in (0, 1]", ok=share is None or 0 < share <= 1)
        time = self.milliseconds
        require("prune", self, "milliseconds", "above 0", ok=time is None or 0 < time < math.inf)
        if share is not None and time is not None:
            raise ConfigError("give --macs or --milliseconds, not both.")
        if self.timesteps is not None and self.group is not None:
            raise ConfigError("give --timesteps or --group, not both.")

    def execute(self, console: Console) -> None:
        """Prune, and print what is left."""
        from tdc_ray.diffusion.plan import one_group, plan_groups
        from tdc_ray.models.unet2d.unet import given_unet_config
        from tdc_ray.reporting.console import print_pruned
        from tdc_ray.runs.pretrained.settings import noise_told, untold
        from tdc_ray.runs.prune_model import (
            REPORT_FILE,
            for_unet,
            prune_model,
            run_config_of,
            unet_dir,
        )

        unet = unet_dir(self.model_dir)
        trained = run_config_of(unet) is not None
        if not trained and self.data is None and self.config.data.source == "digits":
            raise ConfigError(
                f"{shown(self.model_dir)} is in no run directory and does not tell what it was "
                "trained on: set --data to digits, an npz file or a folder of images."
            )
        config = for_unet(self.config, given_unet_config(unet), self.data)
        if self.method is not None:
            config = replace(config, prune=replace(config.prune, method=self.method))
        if self.milliseconds is not None:
            config = replace(config, prune=replace(config.prune, objective="latency"))
        if not trained and (missing := untold(noise_told(str(self.model_dir)))):
            noise, names = config.diffusion, ", ".join(missing)
            console.print(
                f"{shown(self.model_dir)} does not tell {names}: {noise.beta_schedule} betas "
                f"over {noise.num_train_timesteps} timesteps are taken (--preset, --diffusion.*)",
                soft_wrap=True,
            )
        share = 0.7 if self.macs is None else self.macs
        if self.group is None:
            span = self.timesteps or (0, config.diffusion.num_train_timesteps - 1)
            group = one_group(config.diffusion, config.sampler, span, share)
        else:
            groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
            if not 0 <= self.group < len(groups):
                raise ConfigError(f"--group must be 0 to {len(groups) - 1}, got {self.group}.")
            group = replace(groups[self.group], limit_share=share)
        report = prune_model(unet, config, group, self.out, console, self.milliseconds)
        print_pruned(console, report)
        console.print(f"written: {shown(self.out)}/{REPORT_FILE} and the model", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Bring a base into diffusers' format, with the noise process that it was trained with.

    ``tdc-ray run --base DIR`` starts from it, and so it does from the base itself.
    """

    source: Positional[str]
    """A base as --base takes it, such as openai:FILE.pt or compvis:FILE.ckpt."""
    out: Positional[Path]
    """A new folder."""
    config: Settings
    verbose: bool = False
    """Log more, and show where an error came from."""

    def execute(self, console: Console) -> None:
        """Write the base, and say what it does not tell."""
        from tdc_ray.models.unet2d.layers import count
        from tdc_ray.runs.pretrained.settings import import_base, untold
        from tdc_ray.runs.pretrained.sources import find_base
        from tdc_ray.storage.files import exists

        out = located(self.out)
        if exists(out) and (is_remote(out) or not out.is_dir() or any(out.iterdir())):
            raise StorageError(f"{shown(out)} must be a new or an empty folder: choose another.")
        base = find_base(self.source)
        num_params, macs = count(import_base(base, self.config, out))
        console.print(
            f"written: {shown(out)} ({base.weights} weights, {num_params / 1e6:.2f} M parameters, "
            f"{macs / 1e9:.2f} G macs)",
            soft_wrap=True,
        )
        for name in untold(base.told):
            stage, _, setting = name.partition(".")
            value = getattr(getattr(self.config, stage), setting)
            console.print(f"taken from the settings, not the base: {name} {value}", soft_wrap=True)
        if (embeds := base.unet.get("num_class_embeds")) is not None:
            console.print(
                f"it embeds {embeds} classes: run it with --conditioning.num-classes {embeds}, or "
                f"{embeds - 1} if the last one stands for no class",
                soft_wrap=True,
            )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a finished run's experts for diffusers, plain PyTorch and tdc_ray.

    With a model card, and code that needs neither Ray nor tdc_ray.
    """

    run: Positional[Path]
    """The run directory, or its URI."""
    out: Positional[Path]
    """A new folder."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def execute(self, console: Console) -> None:
        """Write the export."""
        from tdc_ray.runs.export.export import export_run

        export_run(self.run, self.out)
        console.print(f"written: {shown(self.out)} (README.md says how to sample)", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample images from the experts of a finished run: a grid and an npz (arr_0, uint8, NHWC)."""

    run: Positional[Path]
    """The run directory, or a folder of experts, or its URI."""
    num_images: int = 64
    """How many images."""
    seed: int = 0
    """Image i of a seed is always the same."""
    num_inference_steps: int | None = None
    """Denoising steps; default: as the run was planned."""
    labels: tuple[int, ...] | None = None
    """Classes, which take turns over the images; default: all that a conditioned model knows."""
    guidance_scale: float | None = None
    """Weight of classifier-free guidance, 1 for none; default: as the run was planned."""
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
    out_dir: Path | None = None
    """Where samples.png and samples.npz go; default: RUN/samples."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            require("sample", self, name, "at least 1", ok=getattr(self, name) >= 1)
        full = self.precision == "fp32"
        require("sample", self, "precision", "fp32 with --winograd", ok=full or not self.winograd)

    def execute(self, console: Console) -> None:
        """Sample and write the images."""
        import numpy as np
        import torch
        from torchvision.utils import save_image

        from tdc_ray.diffusion.pipeline import ProgressivePipeline
        from tdc_ray.diffusion.sampling import image_generators, image_labels
        from tdc_ray.runs.stages.precision import DTYPES, ProbeJob, probe
        from tdc_ray.storage.files import atomic_path

        pipeline = ProgressivePipeline.from_pretrained(
            self.run, offload=self.offload, winograd=self.winograd
        )
        precision = self.precision
        if precision == "auto":
            channels = len(pipeline.experts.for_timestep(0).conv_in.weight)
            job = ProbeJob(channels=channels, size=pipeline.shape[-1], trains=False)
            precision = probe(job, lambda *_: None)["precision"]
            console.print(f"precision auto is {precision} here")
        pipeline.experts.to(DTYPES[precision])
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        pipeline.set_progress_bar_config(disable=not console.is_terminal)
        pixels = []
        classes = torch.tensor(self.labels) if self.labels else None
        for first in range(0, self.num_images, self.batch_size):
            count = min(self.batch_size, self.num_images - first)
            generators = image_generators(self.seed, first, count)
            turns = image_labels(
                pipeline.num_classes if classes is None else len(classes), first, count
            )
            output = pipeline(
                count,
                generators,
                num_inference_steps=self.num_inference_steps,
                output_type="np",
                class_labels=turns if classes is None else classes[turns],
                guidance_scale=self.guidance_scale,
            )
            pixels.append(output.images)
        images = np.concatenate(pixels)
        folder = located(self.out_dir or self.run / "samples")
        with atomic_path(folder / "samples.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, arr_0=images)
        grid = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        with atomic_path(folder / "samples.png") as temporary, temporary.open("wb") as file:
            save_image(grid, file, nrow=max(1, round(len(images) ** 0.5)), format="png")
        name = shown(folder)
        console.print(
            f"written: {name}/samples.npz ({images.shape}), {name}/samples.png", soft_wrap=True
        )


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoder:
    """Train a small first stage for latent diffusion (an AutoencoderKL); needs no Ray.

    The loss is L1 and a small divergence, without discriminator or perceptual loss. Run the same
    command again to go on after a cut.
    """

    config: Annotated[AutoencoderConfig, arg(name="")]
    out: Path
    """Where the model goes, as a diffusers folder, and report.json: what --data.first-stage is."""
    data: str | None = None
    """digits, an npz file, a folder of npz files or of images, or CIFAR-10's; in place of
    --data.source and --data.path."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def execute(self, console: Console) -> None:
        """Train, and print how well it rebuilds images."""
        from tdc_ray.runs.prune_model import data_config
        from tdc_ray.runs.train_autoencoder import REPORT_FILE, train_autoencoder

        config = self.config
        if self.data is not None:
            config = replace(config, data=data_config(self.data, config.data))
        report = train_autoencoder(config, self.out, console)
        errors, out = report["held_out"], shown(self.out)
        console.print(
            f"{errors['num_images']} held-out images: L1 {errors['l1']:.4f}, MSE "
            f"{errors['mse']:.5f} (of [-1, 1]), PSNR {errors['psnr_db']:.1f} dB; latents "
            f"{report['latent_shape']}, scaling_factor {report['scaling_factor']:.4f}\n"
            f"written: {out}/{REPORT_FILE} and the model: --data.first-stage {out}",
            soft_wrap=True,
        )
