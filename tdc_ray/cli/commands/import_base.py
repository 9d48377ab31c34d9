"""``tdc-ray import``."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from tdc_ray.cli.commands.settings import Settings
from tdc_ray.cli.paths import check_output_folder
from tdc_ray.errors import StorageError
from tdc_ray.storage.object_store import display_path, is_remote, resolve_path


@dataclass(frozen=True, kw_only=True)
class ImportCommand:
    """Bring a base into diffusers' format, with the noise process that it was trained with.

    tdc-ray run --base DIR starts from it, and so it does from the base itself.
    """

    source: Positional[str]
    """A base as --base takes it, such as openai:FILE.pt or compvis:FILE.ckpt."""
    out: Positional[Path]
    """A new folder."""
    config: Settings
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_output_folder("OUT", self.out)

    def execute(self, console: Console) -> None:
        """Write the base, and print the settings that it leaves open."""
        from tdc_ray.models.network_config import num_class_embeds
        from tdc_ray.models.structure import network_structure
        from tdc_ray.runs.pretrained.importer import import_base
        from tdc_ray.runs.pretrained.notes import base_notes
        from tdc_ray.runs.pretrained.settings import missing_settings
        from tdc_ray.runs.pretrained.sources import resolve_base
        from tdc_ray.storage.files import exists

        out = resolve_path(self.out)
        if exists(out) and (is_remote(out) or not out.is_dir() or any(out.iterdir())):
            raise StorageError(
                f"{display_path(out)} must be a new or an empty folder: choose another."
            )
        base = resolve_base(self.source, self.config.diffusion.prediction_type)
        structure = network_structure(import_base(base, self.config, out))
        console.print(
            f"written: {display_path(out)} ({base.weights} weights, "
            f"{structure.num_params / 1e6:.2f} M parameters, {structure.macs / 1e9:.2f} G macs)",
            soft_wrap=True,
        )
        for note in base_notes(base, self.config.diffusion, self.config.sampler):
            console.print(f"note: {note}", soft_wrap=True)
        for name in missing_settings(base.settings):
            stage, _, setting = name.partition(".")
            value = getattr(getattr(self.config, stage), setting)
            console.print(f"from the settings, not the base: {name} {value}", soft_wrap=True)
        if (embeds := num_class_embeds(base.unet)) is not None:
            console.print(
                f"it embeds {embeds} classes: run it with --conditioning.num-classes {embeds}, or "
                f"{embeds - 1} if the last one stands for no class",
                soft_wrap=True,
            )
