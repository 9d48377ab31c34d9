"""The text encoders of a diffusers pipeline: what networks read of prompts."""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from tdc_ray.errors import CheckpointError, ConfigError, is_from_outside
from tdc_ray.models.diffusers_folder import MALFORMED
from tdc_ray.models.encoding import Encoding
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.labels import Captions, join_captions
from tdc_ray.models.network_config import STATES, CaptionShapes
from tdc_ray.models.transformers.table import TRANSFORMERS
from tdc_ray.storage.digest import cached_file_digest, json_digest
from tdc_ray.storage.files import exists, fetch, listing, read_json
from tdc_ray.storage.object_store import display_path, resolve_path

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""What the names of a pipeline's parts begin with that prompts go through."""

INDEX_FILE = "model_index.json"

AT_ONCE = 16
"""Prompts that are encoded at once."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptStates:
    """What a pipeline's text encoders make of prompts; float32, on the CPU."""

    prompts: Captions

    negative: Captions
    """Of what guidance leads away from, such as the empty prompt: without batch."""

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        return len(self.prompts[STATES])


_DEFAULT = Encoding({STATES: (0, 1)})

_ENCODINGS: Mapping[str, Encoding] = {
    "StableDiffusionXL": Encoding({STATES: (0, 1), "text_embeds": (2, 3)}, ("time_ids",)),
    **{kind: one for network in TRANSFORMERS.values() for kind, one in network.encodings.items()},
}
"""By what the name of a pipeline's class begins with; others are as Stable Diffusion's."""


_OF_CALL = (
    "prompt_2",
    "prompt_3",
    "clean_caption",
    "max_sequence_length",
    "complex_human_instruction",
)
"""Arguments of ``encode_prompt`` that a pipeline hands on from its call, by the defaults there."""


WIDTHS = ("hidden_size", "d_model")
"""Settings that say how wide a text encoder's states are: CLIP's and Gemma's, and T5's."""


def _encoding_of(name: str) -> Encoding:
    return next((one for kind, one in _ENCODINGS.items() if name.startswith(kind)), _DEFAULT)


def check_text_encoder(pipeline: str | None, setting: str = "data.text_encoder") -> Path:
    """Check that there are text encoders, and the library that reads them; return their pipeline.

    Args:
        pipeline: Has the text encoders.
        setting: What named it, for errors.

    Raises:
        ConfigError: One of them is missing.
    """
    flag = setting.replace("_", "-")
    if pipeline is None:
        raise ConfigError(
            f"{setting} must be given for a base conditioned on text that lies in no pipeline: "
            f"set --{flag} to the folder of one, as diffusers saves it."
        )
    folder = resolve_path(pipeline)
    if not exists(folder):
        raise ConfigError(
            f"{setting} {pipeline} is not there. Name it by --{flag}, or text_encoder= in Python."
        )
    for name in dict.fromkeys([TEXT_ENCODER, *_parts(folder, TEXT_ENCODER)]):
        if not listing(folder / name, "*.safetensors"):
            raise ConfigError(
                f"{setting} {pipeline} must be the folder of a pipeline, as diffusers saves it: "
                f"its {name} has no safetensors."
            )
    needed = ["transformers"]
    for name in _parts(folder, TOKENIZER):
        if exists(folder / name / "spiece.model") and not exists(folder / name / "tokenizer.json"):
            needed = ["transformers", "sentencepiece", "google.protobuf"]
    if missing := [name for name in needed if not _is_installed(name)]:
        raise ConfigError(
            f"the text encoder of {pipeline} needs {' and '.join(missing)}: "
            "pip install 'tdc-ray[text]'."
        )
    return folder


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even what it lies in
        return False


def check_captions_read(
    pipeline: Path, shapes: CaptionShapes, setting: str = "data.text_encoder"
) -> None:
    """Check that a pipeline hands to its network what another reads of captions.

    Args:
        pipeline: Has the text encoders.
        shapes: What the network reads (``structure.caption_shapes``).
        setting: What named the pipeline, for errors.

    Raises:
        ConfigError: It does not.
    """
    flag = setting.replace("_", "-")
    name = str(_index(pipeline).get("_class_name"))
    encoding = _encoding_of(name)
    if missing := [one for one in shapes if one not in (*encoding.outputs, *encoding.sizes)]:
        raise ConfigError(
            f"{setting} must be the folder of a pipeline for networks that read "
            f"{' and '.join(missing)}, as this base does, got {display_path(pipeline)}, a {name}. "
            f"Set --{flag} to that of the base's own."
        )
    width = _states_width(pipeline, encoding)
    if width is not None and STATES in shapes and width != shapes[STATES][-1]:
        raise ConfigError(
            f"{setting} must be of states {shapes[STATES][-1]} wide, which this base "
            f"reads, got {display_path(pipeline)}, a {name}, whose are {width} wide. Set "
            f"--{flag} to the pipeline of the base's own."
        )


def _states_width(pipeline: Path, encoding: Encoding) -> int | None:
    """Return how wide a pipeline's states are, by its encoders' configs; None if unknown."""
    index, total = _index(pipeline), 0
    for name in _parts(pipeline, TEXT_ENCODER):
        if encoding.states_of in (None, name):
            path = pipeline / name / "config.json"
            config = read_json(fetch(path)) if exists(path) else {}
            known = str(index[name][-1]).startswith(("CLIPText", "T5Encoder", "Gemma2"))
            widths = [config[key] for key in WIDTHS if key in config] if known else []
            if not (widths and isinstance(widths[0], int)):
                return None
            total += widths[0]
    return total or None


def text_encoder_digest(pipeline: Path) -> str:
    """Return a digest of a pipeline's text encoders and tokenizers."""
    words = [cached_file_digest(fetch(path)) for path in listing(pipeline / TOKENIZER, "*")]
    document: list[Any] = [weights_digest(pipeline / TEXT_ENCODER), words]
    name = str(_index(pipeline).get("_class_name"))
    if _encoding_of(name) is not _DEFAULT:  # two of a kind may differ in how many tokens they take
        document.append(name)
    others = (*_parts(pipeline, f"{TEXT_ENCODER}_"), *_parts(pipeline, f"{TOKENIZER}_"))
    if others:
        files = [path for name in others for path in listing(pipeline / name, "*")]
        index = _index(pipeline).items()
        settings = {k: v for k, v in index if k[0] != "_" and not isinstance(v, list)}
        document += [[cached_file_digest(fetch(path)) for path in files], settings]
    return json_digest(document)


def encode_prompts(
    pipeline: Path,
    prompts: Sequence[str],
    size: tuple[int, int],
    device: torch.device | None = None,
    negative_prompt: str | None = None,
) -> PromptStates:
    """Return what prompts are to a network, all of them in memory (:func:`prompt_parts`)."""
    negative, *parts = prompt_parts(pipeline, prompts, size, device, negative_prompt)
    return PromptStates(join_captions(parts), negative)


@torch.inference_mode()
def prompt_parts(
    pipeline: Path,
    prompts: Sequence[str],
    size: tuple[int, int],
    device: torch.device | None = None,
    negative_prompt: str | None = None,
) -> Iterator[Captions]:
    """Yield what prompts are to a network, by the pipeline's own ``encode_prompt``.

    First comes what guidance leads away from, without batch, then the prompts, some at a time.
    Prompts of more tokens than the encoder takes are cut, as there, and a warning says how many.

    Args:
        pipeline: Has the text encoders.
        prompts: The prompts.
        size: Height and width of the images, in pixels.
        device: What computes; None means the CPU.
        negative_prompt: What guidance leads away from; None means what it does by default, such as
            from the empty prompt.

    Raises:
        CheckpointError: The pipeline's text encoders are missing or malformed.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = device or torch.device("cpu")
    folder = fetch(pipeline)
    # Of a variant alone, as of networks (`diffusers_folder`); diffusers names it after the stem.
    folders = {TEXT_ENCODER, *_parts(folder, TEXT_ENCODER)}
    plain = all(any(map(_is_plain, listing(folder / n, "*.safetensors"))) for n in folders)
    parts = {name for name, value in _index(folder).items() if isinstance(value, list)}
    needed = {*_parts(folder, TEXT_ENCODER), *_parts(folder, TOKENIZER)}
    try:
        loaded = DiffusionPipeline.from_pretrained(
            folder,
            variant=None if plain else "fp16",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,  # of a folder that a downloaded file may name
            low_cpu_mem_usage=False,  # True needs accelerate, and warns without it
            **({"requires_safety_checker": False} if "safety_checker" in parts else {}),
            **dict.fromkeys(parts - needed),
        )
        loaded.to(device, torch.float32)
        if exists(folder / "transformer/config.json"):  # whose widths have zeros in place of T5's
            config = read_json(folder / "transformer/config.json")
            loaded.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        _warn_of_cut(loaded, [*prompts, *([negative_prompt] if negative_prompt else [])])
        negative = _encode(loaded, [""], size, device, 1, negative_prompt)
        yield {name: tensor[0].clone() for name, tensor in negative.items()}
        for first in range(0, len(prompts), AT_ONCE):
            yield _encode(loaded, prompts[first : first + AT_ONCE], size, device, 0)
    except (OSError, *MALFORMED) as error:
        if is_from_outside(error):
            raise
        raise CheckpointError(
            f"{display_path(pipeline)} has no text encoder that can be used: "
            f"{type(error).__name__}: {error}"
        ) from error


def _encode(
    loaded: Any,
    prompts: Sequence[str],
    size: tuple[int, int],
    device: torch.device,
    place: int,
    negative_prompt: str | None = None,
) -> Captions:
    """Encode prompts (place 0), or what guidance leads away from with them (place 1)."""
    encoding = _encoding_of(type(loaded).__name__)
    taken = inspect.signature(loaded.encode_prompt).parameters.keys()
    call = inspect.signature(loaded.__call__).parameters
    outputs = loaded.encode_prompt(
        list(prompts),
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=place == 1,
        **({} if negative_prompt is None else {"negative_prompt": [negative_prompt]}),
        **{name: call[name].default for name in _OF_CALL if name in taken},
    )
    sizes = _sizes(size)
    return {
        **{name: outputs[both[place]].float().cpu() for name, both in encoding.outputs.items()},
        **{name: torch.tensor([sizes[name]] * len(prompts)) for name in encoding.sizes},
    }


def _sizes(size: tuple[int, int]) -> Mapping[str, Sequence[float]]:
    """Return what a network takes of images of a height and a width that nothing is cut off."""
    height, width = map(float, size)
    return {
        "time_ids": (height, width, 0.0, 0.0, height, width),
        "resolution": (height, width),
        "aspect_ratio": (height / width,),
    }


def _index(pipeline: Path) -> Mapping[str, Any]:
    """Return what a pipeline says of its parts; nothing if it does not."""
    path = pipeline / INDEX_FILE
    document = read_json(fetch(path)) if exists(path) else {}
    return document if isinstance(document, dict) else {}


def _parts(pipeline: Path, prefix: str) -> list[str]:
    """Return the parts of a pipeline that are there and whose names begin so."""
    found = _index(pipeline).items()
    return sorted(name for name, kind in found if name.startswith(prefix) and _is_there(kind))


def _is_there(kind: object) -> bool:
    """Whether what a pipeline says of a part is library and class, not null."""
    return isinstance(kind, list) and any(kind)


def _is_plain(path: Path) -> bool:
    return "fp16" not in path.name


def _warn_of_cut(loaded: Any, prompts: Sequence[str]) -> None:
    """Say how many prompts have too many tokens; diffusers would print each of them.

    Of several tokenizers that counts which takes the most.
    """
    diffusers_logging.get_logger("diffusers.pipelines").setLevel(logging.ERROR)
    length = inspect.signature(loaded.__call__).parameters.get("max_sequence_length")
    by_most = {}
    for name in loaded.config:
        if not name.startswith(TOKENIZER):
            continue
        tokenizer = getattr(loaded, name)
        if tokenizer is not None and getattr(loaded, name.replace(TOKENIZER, TEXT_ENCODER)):
            most = tokenizer.model_max_length
            by_most[min(most, length.default) if length else most] = tokenizer  # that of T5
    most = max(by_most)
    num_cut = sum(len(ids) > most for ids in by_most[most](list(prompts)).input_ids)
    if num_cut:
        logger.warning("%d of %d prompts are cut to %d tokens", num_cut, len(prompts), most)
