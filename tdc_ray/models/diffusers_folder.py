"""Networks as diffusers saves them: a config, and weights in safetensors."""

import re
from pathlib import Path

from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging

from tdc_ray.errors import CheckpointError, is_from_outside
from tdc_ray.models.checkpoints.state_dicts import listed
from tdc_ray.storage.files import exists, fetch, listing
from tdc_ray.storage.object_store import display_path

diffusers_logging.disable_progress_bar()

MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,  # UNet2DModel leaves a variable unset for an unknown time_embedding_type
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors of diffusers for values of a wrong type or that contradict each other."""


_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors"
)
"""Names of files of weights; a group is the variant, such as fp16, before or after the shard."""


OWN_WEIGHTS_FILE = "tdc_unet.safetensors"
"""Weights of a network that diffusers would build otherwise of its config: under a name that
diffusers refuses to load."""


def weight_files(folder: Path, kind: str = "model") -> tuple[str | None, list[Path]]:
    """Return the safetensors that are loaded, and the variant that they are of.

    Those without a variant are, as in diffusers, or those for this package alone; a variant, such
    as fp16, where a folder has no others.

    Args:
        folder: The folder of a model.
        kind: The model's class, for the error.

    Raises:
        CheckpointError: There are none, or several variants alone.
    """
    if exists(own := folder / OWN_WEIGHTS_FILE):
        return None, [own]
    found: dict[str | None, list[Path]] = {}
    for path in listing(folder, "*.safetensors"):
        if (name := _WEIGHTS.fullmatch(path.name)) is not None:
            found.setdefault(name[1] or name[2], []).append(path)
    if not found:
        raise CheckpointError(
            f"{display_path(folder)} holds no {kind} in safetensors. (Weights in a .bin file that "
            "you trust are brought over by diffusers' from_pretrained(FOLDER, "
            "use_safetensors=False).save_pretrained(OTHER).)"
        )
    if None not in found and len(found) > 1:
        names = sorted(filter(None, found))
        raise CheckpointError(
            f"{display_path(folder)} holds only variants of its weights, {', '.join(names)}: save "
            f'the one to take by diffusers\' from_pretrained(FOLDER, variant="{names[0]}")'
            ".save_pretrained(OTHER), and give that folder."
        )
    variant = None if None in found else next(iter(found))
    return variant, found[variant]


def load_pretrained(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    """Load a model of one of diffusers' classes, in float32 and eval mode, on the CPU.

    Raises:
        CheckpointError: The folder does not hold it, in safetensors, with all of its weights.
    """
    place = display_path(folder)
    variant, _ = weight_files(folder, kind.__name__)
    try:
        model, info = kind.from_pretrained(
            fetch(folder),
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # True needs accelerate, and warns without it
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if is_from_outside(error):
            raise
        raise CheckpointError(
            f"{place} holds no {kind.__name__} in safetensors, or a damaged one: {error}"
        ) from error
    if missing := info["missing_keys"]:  # diffusers leaves these random
        raise CheckpointError(f"{place} lacks the weights {listed(sorted(missing))}.")
    if unknown := info["unexpected_keys"]:  # and these out
        raise CheckpointError(
            f"{place} holds the weights {listed(sorted(unknown))}, which the network of its "
            "config.json does not have: mend that, or remove them."
        )
    return model.float().eval()
