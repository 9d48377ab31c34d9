"""Prompts for a base conditioned on text, and the states that its text encoder makes of them."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tdc_ray.config.data import DataConfig
from tdc_ray.data.tensor_shards import named, unnamed, write_tensors
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.models.labels import Captions, map_captions
from tdc_ray.models.text_encoder import PromptStates, check_text_encoder, prompt_parts
from tdc_ray.storage.digest import json_digest
from tdc_ray.storage.files import atomic_path, exists, fetch, remove
from tdc_ray.storage.object_store import display_path, resolve_path

BUNDLED = Path(__file__).with_name("prompts.txt")

STATES_FILE = "prompt_states.safetensors"
"""File beside images, or latents, of the states of their prompts, and of the empty one."""


def negative_file(negative_prompt: str) -> str:
    """Return the name of the file beside it of what a negative prompt is to the network."""
    return f"negative_prompt-{json_digest(negative_prompt)[:16]}.safetensors"


def read_prompts(path: str | None, setting: str = "data.prompts") -> tuple[str, ...]:
    """Read the prompts of a file, one a line, or those that come along.

    Args:
        path: The file. None means those that come along.
        setting: What named it, for errors.

    Raises:
        ConfigError: The file is missing, is no text, or holds no prompt.
    """
    file = BUNDLED if path is None else resolve_path(path)
    if not exists(file):
        flag = setting.replace("_", "-")
        raise ConfigError(f"{setting} {path} does not exist. Set --{flag} to a file.")
    try:
        lines = fetch(file).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{setting} must be a text file in UTF-8, one prompt a line, got "
            f"{display_path(file)}: {error}."
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(
            f"{setting} must hold a prompt a line, got {display_path(file)}, which has none."
        )
    return prompts


def prompts_named(given: Sequence[str], setting: str) -> tuple[str, ...]:
    """Return prompts that are given as they are, or as text files of one a line.

    What has the suffix ``.txt``, or a path's separator and exists, is a file.

    Args:
        given: Prompts, and paths.
        setting: What named them, for errors.

    Raises:
        ConfigError: A file is missing, is no text, or holds no prompt.
    """
    prompts = list[str]()
    for one in given:
        is_file = one.endswith(".txt") or _is_file(one)
        prompts += read_prompts(one, setting) if is_file else [one]
    return tuple(prompts)


def _is_file(text: str) -> bool:
    try:
        return os.sep in text and resolve_path(text).is_file()
    except (OSError, ValueError, StorageError):  # too long, or no path at all
        return False


@functools.lru_cache(maxsize=1)
def load_states(folder: Path, negative_prompt: str | None = None) -> PromptStates:
    """Map the states in a folder, with what guidance leads away from: by default ""."""
    tensors = load_file(fetch(folder / STATES_FILE))
    negative = unnamed("empty", tensors)
    if negative_prompt is not None:
        negative = unnamed("empty", load_file(fetch(folder / negative_file(negative_prompt))))
    return PromptStates(unnamed("prompts", tensors), negative)


def empty_prompt(folder: Path) -> Captions:
    """Load the states of the empty prompt alone, without batch."""
    with safe_open(fetch(folder / STATES_FILE), framework="pt") as file:
        names = [name for name in file.keys() if name.partition(".")[0] == "empty"]  # noqa: SIM118
        return unnamed("empty", {name: file.get_tensor(name) for name in names})


def states_of_images(states: PromptStates, first: int, count: int) -> Captions:
    """Return those of the images ``first`` to ``first + count - 1``: of prompt i mod N."""
    numbers = torch.arange(first, first + count) % states.num_prompts
    return map_captions(lambda tensor: tensor[numbers], states.prompts)


def conditions_of_images(states: PromptStates, first: int, count: int) -> dict[str, Captions]:
    """Return what a ``ProgressivePipeline`` is called with for some images.

    Those are the images ``first`` to ``first + count - 1``, whose prompts take turns.
    """
    prompts = states_of_images(states, first, count)
    negative = {name: states.negative[name].expand_as(one) for name, one in prompts.items()}
    return {"prompt_embeds": prompts, "negative_prompt_embeds": negative}


@dataclass(frozen=True, slots=True)
class EncodePromptsJob:
    """Encode prompts by a pipeline's text encoder into a file of states."""

    pipeline: Path
    prompts: tuple[str, ...]
    size: tuple[int, int]
    path: Path
    negative_prompt: str | None = None
    """None means what guidance leads away from by default."""


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """How many prompts were encoded."""

    num_prompts: int


def prompt_encodings(
    key: str,
    prompts: Sequence[str],
    data: DataConfig,
    folder: Path,
    negative_prompt: str | None = None,
) -> list[WorkItem[EncodePromptsJob, EncodedPrompts]]:
    """Return the work of encoding what is missing in a folder: prompts, and a negative one.

    Args:
        key: Of the work.
        prompts: The prompts.
        data: Names the pipeline that has the text encoder, and the size of the images.
        folder: Gets the states.
        negative_prompt: What guidance leads away from; None means the default, which is beside
            the prompts in any case.
    """
    wanted: dict[str, tuple[str, Sequence[str], str | None]] = {STATES_FILE: (key, prompts, None)}
    if negative_prompt is not None:
        name = negative_file(negative_prompt)
        wanted[name] = (f"{key}, negative", prompts[:1], negative_prompt)
    paths = {folder / name: what for name, what in wanted.items()}
    return [_encoding(data, path, *what) for path, what in paths.items() if not exists(path)]


def _encoding(
    data: DataConfig, path: Path, key: str, prompts: Sequence[str], negative_prompt: str | None
) -> WorkItem[EncodePromptsJob, EncodedPrompts]:
    pipeline, size = check_text_encoder(data.text_encoder), (data.height, data.width)
    result_path = path.with_suffix(".json")
    remove(result_path)  # without the states it is no result
    return WorkItem(
        key=key,
        function=encode_into,
        job=EncodePromptsJob(pipeline, tuple(prompts), size, path, negative_prompt),
        result_path=result_path,
        cost=float(len(prompts)),
        files=(path,),
        result_type=EncodedPrompts,
    )


def encode_into(job: EncodePromptsJob, report: Report) -> EncodedPrompts:
    """Encode prompts into a file, which appears when it is whole."""
    parts = prompt_parts(job.pipeline, job.prompts, job.size, worker_device(), job.negative_prompt)
    negative, count = named("empty", next(parts)), len(job.prompts)
    with atomic_path(job.path) as temporary:
        write_tensors(temporary, negative, count, (named("prompts", part) for part in parts))
    report({}, 1)
    return EncodedPrompts(count)
