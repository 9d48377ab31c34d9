"""Prompts that a base conditioned on text is told, and the states that its text encoder makes."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tdc_ray.config.data import BASE_SAMPLES, DataConfig
from tdc_ray.errors import ConfigError
from tdc_ray.storage.files import exists, fetch
from tdc_ray.storage.object_store import display_path, resolve_path

BUNDLED = Path(__file__).with_name("prompts.txt")

STATES_FILE = "prompt_states.safetensors"
"""File beside the base's samples: ``prompts``, ``(N, S, C)``, and ``empty``, ``(S, C)``."""


@dataclass(frozen=True, slots=True)
class PromptStates:
    """What a text encoder makes of prompts."""

    prompts: Tensor
    """``(N, S, C)``, float32."""

    empty: Tensor
    """Of the empty prompt, which guidance leads away from, ``(S, C)``."""

    def of_images(self, first: int, count: int) -> Tensor:
        """Return those of the images ``first`` to ``first + count - 1``: i mod N."""
        return self.prompts[torch.arange(first, first + count) % len(self.prompts)]


def read_prompts(path: str | None) -> tuple[str, ...]:
    """Read the prompts of a file, one a line, or those that come along.

    Raises:
        ConfigError: The file is missing, is no text, or holds no prompt.
    """
    file = BUNDLED if path is None else resolve_path(path).expanduser()
    if not exists(file):
        raise ConfigError(f"data.prompts {path} does not exist. Set --data.prompts to a file.")
    try:
        lines = fetch(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.prompts must be a text file in UTF-8, one prompt a line, got "
            f"{display_path(file)}: {error}."
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(
            f"data.prompts must hold a prompt a line, got {display_path(file)}, which has none."
        )
    return prompts


def prompt_states(data: DataConfig) -> PromptStates | None:
    """Return the states of the prompts that images were drawn for.

    None means that they are no samples of a base that is conditioned on text.
    """
    if data.source != BASE_SAMPLES or data.path is None:
        return None
    folder = resolve_path(data.path)
    return load_states(folder) if exists(folder / STATES_FILE) else None


@functools.lru_cache(maxsize=1)
def load_states(folder: Path) -> PromptStates:
    """Load the states that lie beside a base's samples."""
    return PromptStates(**load_file(fetch(folder / STATES_FILE)))
