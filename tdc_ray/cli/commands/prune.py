"""``tdc-ray prune``."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from tdc_ray.cli.commands.settings import Settings
from tdc_ray.cli.paths import check_output_folder, check_settings
from tdc_ray.config.prune import SearchMethod
from tdc_ray.config.validation import errors_together, refuse, require
from tdc_ray.errors import ConfigError
from tdc_ray.storage.object_store import display_path


@dataclass(frozen=True, kw_only=True)
class PruneCommand:
    """Prune a saved UNet2DModel, UNet2DConditionModel or DiT to a share of its macs or to a time.

    What was pruned is refitted.

    No gradient step, no Ray.

    Run the same command again to resume after an interruption. The language model (--method llm)
    needs OPENAI_API_KEY, and OPENAI_BASE_URL for servers other than OpenAI's.
    """

    model_dir: Positional[Path]
    """Folder of a diffusers UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel, or of a
    pipeline with one, or a run directory; or its URI."""
    config: Settings
    out: Path
    """Where the pruned model and report.json go."""
    macs: float | None = None
    """Most macs of the pruned model, as a share of the model's, in (0, 1]; default: 0.7, unless
    there is a limit in milliseconds."""
    milliseconds: float | None = None
    """Most time of a forward pass of --prune.latency-batch-size images on this device, in place of
    macs."""
    method: SearchMethod | None = None
    """Who proposes what is pruned; default: prune.method, which is that of the model's run."""
    data: str | None = None
    """digits, photos, or a path of images, as of tdc-ray run --data; base: they are drawn from the
    model itself; default: what the model's run was trained on."""
    timesteps: tuple[int, int] | None = None
    """First and last timestep to prune for; default: all."""
    group: int | None = None
    """A group of the plan (--plan.num-groups and so on) to prune for, in place of timesteps."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    @errors_together()
    def __post_init__(self) -> None:
        share = self.macs
        require("prune", self, "macs", "in (0, 1]", ok=share is None or 0 < share <= 1)
        time = self.milliseconds
        require("prune", self, "milliseconds", "above 0", ok=time is None or 0 < time < math.inf)
        if share is not None and time is not None:
            refuse("give --macs or --milliseconds, not both.")
        if self.timesteps is not None and self.group is not None:
            refuse("give --timesteps or --group, not both.")

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_output_folder("--out", self.out)
        if self.data is None:
            check_settings(self.config)

    def execute(self, console: Console) -> None:
        """Prune, and print the size and the losses of the pruned model."""
        from tdc_ray.diffusion.plan import one_group, plan_groups
        from tdc_ray.models.families import given_config
        from tdc_ray.reporting.console import print_pruned
        from tdc_ray.reporting.sinks import default_sinks
        from tdc_ray.runs.pretrained.settings import missing_settings
        from tdc_ray.runs.pretrained.sources import noise_settings
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
                f"{display_path(self.model_dir)} is in no run directory and does not say what it "
                "was trained on: set --data to digits, an npz file or a folder of images, or to "
                "base, which draws them from the model."
            )
        config = for_unet(self.config, given_config(unet), self.data)
        if self.method is not None:
            config = replace(config, prune=replace(config.prune, method=self.method))
        if self.milliseconds is not None:
            config = replace(config, prune=replace(config.prune, objective="latency"))
        noise = config.diffusion
        known = None if trained else noise_settings(unet, noise.prediction_type)
        if known is not None and (missing := missing_settings(known)):
            names = ", ".join(missing)
            console.print(
                f"{display_path(self.model_dir)} does not say {names}: {noise.beta_schedule} "
                f"betas over {noise.num_train_timesteps} timesteps are taken (--preset, "
                f"--diffusion.*), and that it predicts {noise.prediction_type}",
                soft_wrap=True,
            )
        share = 0.7 if self.macs is None else self.macs
        if self.group is None:
            span = self.timesteps or (0, config.diffusion.num_timesteps - 1)
            group = one_group(config.diffusion, config.sampler, span, share)
        else:
            groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
            if not 0 <= self.group < len(groups):
                raise ConfigError(f"--group must be 0 to {len(groups) - 1}, got {self.group}.")
            group = replace(groups[self.group], limit_share=share)
        sinks_for = partial(default_sinks, console=console)
        report = prune_model(unet, config, group, self.out, self.milliseconds, sinks_for)
        print_pruned(console, report)
        console.print(
            f"written: {display_path(self.out)}/{REPORT_FILE} and the model", soft_wrap=True
        )
