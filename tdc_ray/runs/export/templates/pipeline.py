"""Samples from experts by timestep; diffusers loads it as a custom pipeline.

From tdc_ray (Apache-2.0), which is not needed to run this.
"""

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class ProgressivePipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Image generation with one expert per group of timesteps."""

    _optional_components: ClassVar[list[str]] = ["first_stage"]

    def __init__(
        self,
        experts: Any,
        scheduler: Any,
        first_stage: Any = None,
        *,
        channels: int = 3,
        height: int = 32,
        width: int = 32,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        timestep_scale: float = 1.0,
        num_classes: int | None = None,
        null_class: int | None = None,
        guidance_scale: float = 1.0,
        use_clipped_model_output: bool = False,
    ) -> None:
        """Create a pipeline; channels, height and width are those of the experts."""
        super().__init__()
        self.register_modules(experts=experts, scheduler=scheduler, first_stage=first_stage)
        settings: dict[str, Any] = {
            "channels": channels,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "eta": eta,
            "timestep_scale": timestep_scale,
            "num_classes": num_classes,
            "null_class": null_class,
            "guidance_scale": guidance_scale,
            "use_clipped_model_output": use_clipped_model_output,
        }
        self.register_to_config(**settings)
        self.settings = settings

    @torch.inference_mode()
    def __call__(
        self,
        batch_size: int = 1,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        class_labels: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Sample images.

        Args:
            batch_size: Number of images; image ``i`` of a seed is the same in every batch.
            seed: Of the noise.
            num_inference_steps: Denoising steps; None means as planned.
            eta: Stochasticity of DDIM; None means as planned.
            class_labels: One class per image; None means that image ``i`` is of class ``i`` modulo
                their number, where the experts know classes.
            guidance_scale: Weight of classifier-free guidance; 1 means none, None as planned.
            output_type: ``pil``, ``np`` (uint8, ``(B, H, W, C)``) or ``pt`` (in [-1, 1],
                ``(B, C, H, W)``).

        Returns:
            An object with ``images``.
        """
        config, device = self.settings, self.experts.device
        steps = num_inference_steps or config["num_inference_steps"]
        scale = config["guidance_scale"] if guidance_scale is None else guidance_scale
        labels, copies = self._labels(class_labels, batch_size), 1
        if labels is not None and scale != 1.0:
            if config["null_class"] is None:
                raise ValueError("guidance_scale must be 1: these experts have no null class.")
            labels, copies = torch.cat([labels, torch.full_like(labels, config["null_class"])]), 2
        told = {} if labels is None else {"class_labels": labels}
        first = int.from_bytes(hashlib.sha256(f"{seed}/images".encode()).digest()[:4]) >> 1
        generators = [torch.Generator().manual_seed(first + i) for i in range(batch_size)]
        channels = config["channels"]
        shape = (batch_size, channels, config["height"], config["width"])
        x = randn_tensor(shape, generator=generators, device=device)
        self._set_timesteps(steps)
        self._check_start(num_inference_steps)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching has none
        scaled_input = getattr(self.scheduler, "scale_model_input", lambda x, _: x)
        extra = self._step_arguments(config["eta"] if eta is None else eta, generators)
        for step in self.progress_bar(list(self.scheduler.timesteps)):
            timestep = step.item()
            unet = self.experts.for_timestep(timestep)
            inputs = scaled_input(x, step).to(self.experts.dtype)
            if config["timestep_scale"] != 1.0:
                timestep *= config["timestep_scale"]
            seen = torch.full((copies * len(x),), timestep)
            inputs = torch.cat([inputs] * copies)
            output = unet(inputs, seen.to(device), **told).sample.float()
            if copies == 2:
                given, without = output.chunk(2)
                guided = without + scale * (given - without)
                output = torch.cat([guided[:, :channels], given[:, channels:]], dim=1)
            if not self._learns_variance():
                output = output[:, :channels]
            x = self.scheduler.step(output, step, x, **extra).prev_sample
        if self.first_stage is not None:
            stage = self.first_stage.config
            x = x / stage["scaling_factor"] + (stage.get("shift_factor") or 0.0)
            x = self.first_stage.decode(x.to(self.first_stage.dtype)).sample.float()
        if output_type == "pt":
            return ImagePipelineOutput(images=x)
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        images = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return ImagePipelineOutput(images=images)
        return ImagePipelineOutput(images=self.numpy_to_pil(images / 255.0))

    def _labels(self, labels: Sequence[int] | None, batch_size: int) -> torch.Tensor | None:
        classes = self.settings["num_classes"]
        if classes is None:
            if labels is not None:
                raise ValueError("class_labels must be None: the experts are unconditional.")
            return None
        found = torch.arange(batch_size) % classes if labels is None else torch.tensor(labels)
        if found.shape != (batch_size,) or not 0 <= int(found.min()) <= int(found.max()) < classes:
            raise ValueError(f"class_labels must be {batch_size} of [0, {classes}), got {labels}.")
        return found.to(self.experts.device)

    def _set_timesteps(self, steps: int) -> None:
        """Set the scheduler, which by itself cannot space quadratically (as DDIM's code does)."""
        config = self.scheduler.config
        if config.get("timestep_spacing") != "quadratic":
            self.scheduler.set_timesteps(steps)
            return
        roots = np.linspace(0, np.sqrt(config["num_train_timesteps"] * 0.8), steps)
        squares = np.unique((roots**2).astype(int)) + config.get("steps_offset", 0)
        self.scheduler.set_timesteps(timesteps=squares[::-1].tolist())

    def _check_start(self, steps: int | None) -> None:
        """Refuse a call's steps that begin with noise where the scheduler expects an image."""
        if self.scheduler.config.get("timestep_spacing") == "quadratic":
            return
        total, first = self.scheduler.config["num_train_timesteps"], self.scheduler.timesteps[0]
        if steps is not None and total - 1 - float(first) > total / steps:
            raise ValueError(
                f"num_inference_steps must divide {total}, got {steps}: it would begin at "
                f"{float(first):g}, with pure noise."
            )

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refuse, as diffusers keeps no widths of pruned UNets."""
        raise ValueError("diffusers cannot save these experts: copy the folder that has them.")

    def _learns_variance(self) -> bool:
        setting = inspect.signature(type(self.scheduler)).parameters.get("variance_type")
        learned = str(self.scheduler.config.get("variance_type")).startswith("learned")
        return learned and setting is not None and isinstance(setting.default, str)

    def _step_arguments(self, eta: float, generators: list[torch.Generator]) -> dict[str, Any]:
        clips = self.settings["use_clipped_model_output"]
        wanted = {"eta": eta, "use_clipped_model_output": clips, "generator": generators}
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in wanted.items() if name in accepted}
