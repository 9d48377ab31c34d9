"""``tdc-ray train-autoencoder``."""

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from tdc_ray.cli.paths import check_data, check_folder, check_named_data, check_output_folder
from tdc_ray.config.autoencoder import AutoencoderConfig
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderCommand:
    """Train a small first stage for latent diffusion (an AutoencoderKL); needs no Ray.

    The loss is L1 and a small divergence, without discriminator or perceptual loss. Run the same
    command again to resume after an interruption.
    """

    config: Annotated[AutoencoderConfig, arg(name="")]
    out: Path
    """Where the model goes, as a diffusers folder, and report.json: what --data.first-stage is."""
    data: str | None = None
    """digits, photos, or a path of images, as of tdc-ray run --data; in place of --data.source and
    --data.path."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_output_folder("--out", self.out)
        check_named_data("--data", self.data)
        if self.data is None:
            check_data(self.config.data)
        else:  # in place of the path in the settings
            check_folder("--data.cache-dir", self.config.data.cache_dir)

    def execute(self, console: Console) -> None:
        """Train, and print the reconstruction error on held-out images."""
        from tdc_ray.data.detect import data_config
        from tdc_ray.reporting.sinks import default_sinks
        from tdc_ray.runs.train_autoencoder import REPORT_FILE, train_autoencoder

        config = self.config
        if self.data is not None:
            config = replace(config, data=data_config(self.data, config.data))
        sinks = default_sinks(RunDir(resolve_path(self.out)), console)
        report = train_autoencoder(config, self.out, sinks)
        errors, out = report["held_out"], display_path(self.out)
        console.print(
            f"{errors['num_images']} held-out images: L1 {errors['l1']:.4f}, MSE "
            f"{errors['mse']:.5f} (of [-1, 1]), PSNR {errors['psnr_db']:.1f} dB; latents "
            f"{report['latent_shape']}, scaling_factor {report['scaling_factor']:.4f}\n"
            f"written: {out}/{REPORT_FILE} and the model: --data.first-stage {quote(out)}",
            soft_wrap=True,
        )
