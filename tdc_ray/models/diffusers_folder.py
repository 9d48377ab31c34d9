"""Networks as diffusers saves them: a config, and weights in safetensors."""

from pathlib import Path

from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging

from tdc_ray.errors import CheckpointError, is_from_outside
from tdc_ray.storage.files import fetch
from tdc_ray.storage.object_store import display_path

diffusers_logging.disable_progress_bar()


def load_pretrained(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    """Load a model of one of diffusers' classes, in eval mode, on the CPU.

    Raises:
        CheckpointError: The folder does not hold it, in safetensors, with all of its weights.
    """
    place = display_path(folder)
    try:
        model, info = kind.from_pretrained(
            fetch(folder),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # True needs accelerate, and warns without it
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if is_from_outside(error):
            raise
        raise CheckpointError(
            f"{place} holds no {kind.__name__} in safetensors, or a damaged one: {error} (Weights "
            f"in a .bin file that you trust are brought over by {kind.__name__}.from_pretrained("
            "FOLDER, use_safetensors=False).save_pretrained(OTHER).)"
        ) from error
    if missing := info["missing_keys"]:  # diffusers leaves these random
        raise CheckpointError(f"{place} lacks the weights {', '.join(sorted(missing))}.")
    return model.eval()
