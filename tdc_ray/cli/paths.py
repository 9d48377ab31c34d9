"""Refuses paths that are not there, or of another kind, before anything heavy is imported.

Inside of ``errors_together`` all of them are refused in one error, with the settings.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tdc_ray.config.data import BASE_SAMPLES, BUNDLED, DataConfig
from tdc_ray.config.evaluate import HUB_MODELS, EvaluateConfig
from tdc_ray.config.hub import HUB_NAME, HUB_SECONDS, HubName, hub_base, hub_dataset, not_available
from tdc_ray.config.model import FILE_KINDS, ModelConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.validation import refuse
from tdc_ray.errors import ConfigError
from tdc_ray.storage.object_store import is_remote, resolve_path


def check_input(path: Path | str, kind: str) -> bool:
    """Refuse a path that does not exist, or return whether it does; a URI is not looked for.

    Args:
        path: The path.
        kind: What it must be, in words.

    Raises:
        ConfigError: It does not exist.
    """
    if found := _exists(path):
        return found
    refuse(f"{path} does not exist: name {kind}.")
    return False


def check_base(source: str) -> bool:
    """Refuse a base that is neither here nor may be on the hub, or return whether it may be.

    Raises:
        ConfigError: It does not exist.
    """
    kind, colon, path = source.partition(":")
    if kind in FILE_KINDS and colon:
        if found := _exists(path):
            return found
        refuse(f"{path} does not exist.")
        return False
    if _exists(source):
        return True
    if (hub := hub_base(source)) is not None:
        return _check_on_hub(source, hub, "model")
    refuse(f"{source} does not exist, and is no name on the hub (OWNER/NAME).")
    return False


def check_folder(flag: str, path: Path | str) -> None:
    """Refuse a folder that cannot be one: it, or one that it lies in, is a file.

    Raises:
        ConfigError: There is a file.
    """
    place = _nearest(flag, path)
    if place is not None and not place.is_dir():
        refuse(f"{place} is a file: name a folder by {flag}.")


def check_output_folder(flag: str, path: Path | str) -> None:
    """Refuse a folder that cannot be one, or that cannot be written to.

    Raises:
        ConfigError: It is a file, or lies in one, or may not be written to.
    """
    check_folder(flag, path)
    place = _nearest(flag, path)
    if place is not None and place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
        refuse(f"{place} cannot be written to: name another folder by {flag}.")


def check_output_file(flag: str, path: Path | str) -> None:
    """Refuse a file that cannot be one: it is a folder, or lies in a file.

    Raises:
        ConfigError: There is something else.
    """
    file = resolve_path(path)
    if _nearest(flag, path) == file.absolute() and file.is_dir():
        refuse(f"{file} is a folder: name a file by {flag}.")
    check_output_folder(flag, file.parent)


def check_settings(config: RunConfig) -> None:
    """Refuse settings of a run, checked or not, that name what is not there, or caches as files.

    Raises:
        ConfigError: There is one.
    """
    evaluate = config.evaluate
    check_data(config.data)
    if config.prune.method == "llm":
        _check_named("proxy.replay", config.proxy.replay, "a run directory with transcripts")
    named = "the folder that holds inception-2015-12-05.pt"
    _check_named("evaluate.inception_path", evaluate.inception_path, named)
    check_features_model(evaluate)
    check_folder("--evaluate.cache-dir", evaluate.cache_dir)


def check_config_file(model: ModelConfig) -> None:
    """Refuse a file of a network to train that is not there, unless its content is known.

    Raises:
        ConfigError: There is none.
    """
    if model.network is None:
        _check_named("model.config", model.config, "the config.json of a network, or its folder")


def check_features_model(evaluate: EvaluateConfig) -> None:
    """Refuse features whose library is not installed, or whose network is not there.

    Raises:
        ConfigError: There are such.
    """
    if evaluate.features in HUB_MODELS and find_spec("transformers") is None:
        refuse(
            f"evaluate.features {evaluate.features} needs transformers, which is not installed: "
            "pip install 'tdc-ray[features]', or take other features."
        )
    model, name = evaluate.features_model, "evaluate.features_model"
    if model is not None and not _exists(model, name) and HUB_NAME.fullmatch(model) is None:
        refuse(f"{name} {model} does not exist, and is no name on the hub (OWNER/NAME).")


def check_named_data(flag: str, source: str | None) -> bool:
    """Refuse data that a flag names and that cannot be had, or return whether it may be.

    Raises:
        ConfigError: It is neither here nor bundled nor a name on the hub.
    """
    known = (*BUNDLED, BASE_SAMPLES)
    if source is None or source in known or _exists(source, flag):
        return True
    hub = hub_dataset(source)
    if hub is None:
        refuse(
            f"{flag} {source} does not exist, and is none of {', '.join(known)}, nor a data set "
            "on the Hugging Face hub (OWNER/NAME, OWNER/NAME@REVISION or OWNER/NAME:CONFIG)."
        )
        return False
    if find_spec("datasets") is None:
        refuse(
            f"{flag} {source} does not exist here. If it is a data set on the Hugging Face hub, "
            "the library datasets is needed: pip install 'tdc-ray[datasets]'."
        )
        return False
    return _check_on_hub(f"{flag} {source}", hub, "dataset")


def check_data(data: DataConfig) -> None:
    """Refuse settings of the data, checked or not, that name what is not there.

    Raises:
        ConfigError: There is one, or a cache that is a file.
    """
    path, is_drawn = data.path, data.source == BASE_SAMPLES  # which are drawn again, if need be
    is_on_hub = data.source == "datasets" and path is not None and hub_dataset(path) is not None
    if path is not None and not (is_drawn or is_on_hub or _exists(path, "data.path")):
        refuse(
            f"data.path {path} does not exist (data.source {data.source}). Set --data.path to "
            "where the images are."
        )
    _check_named("data.prompts", data.prompts, "a text file of prompts")
    _check_named("data.text_encoder", data.text_encoder, "the folder of a diffusers pipeline")
    named = "the folder of a diffusers VQModel, AutoencoderKL or AutoencoderDC"
    _check_named("data.first_stage", data.first_stage, named)
    check_folder("--data.cache-dir", data.cache_dir)


def _check_on_hub(named: str, hub: HubName, kind: Literal["model", "dataset"]) -> bool:
    """Refuse what neither the hub nor its cache here has, or return whether one may have it."""
    from huggingface_hub import HfApi, constants

    try:
        HfApi().repo_info(
            hub.repository, revision=hub.revision, repo_type=kind, timeout=HUB_SECONDS
        )
    except Exception as error:  # noqa: BLE001  # of requests or httpx, by its version
        caches = {
            Path(constants.HF_HUB_CACHE): f"{kind}s--{hub.repository.replace('/', '--')}",
            _datasets_cache(Path(constants.HF_HOME)): f"{hub.repository.partition('/')[0]}___*",
        }
        if any(any(cache.expanduser().glob(name)) for cache, name in caches.items()):
            return True
        refuse(not_available(named, kind, error))
        return False
    return True


def _datasets_cache(home: Path) -> Path:
    """Return where the library ``datasets`` keeps what it made."""
    return Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))


def _check_named(setting: str, path: str | None, kind: str) -> None:
    """Refuse a path that a setting names and that does not exist."""
    if path is not None and not _exists(path, setting):
        refuse(f"{setting} {path} does not exist. Name {kind}.")


def _exists(path: Path | str, name: str = "") -> bool:
    resolved = resolve_path(path)
    if is_remote(resolved):
        return True
    with _looking(name, path):
        return resolved.expanduser().exists()


def _nearest(flag: str, path: Path | str) -> Path | None:
    """Return what is there of a path: itself, or the nearest that it lies in; None of a URI."""
    resolved = resolve_path(path)
    if is_remote(resolved):
        return None
    with _looking(flag, path):
        absolute = resolved.expanduser().absolute()
        return next(place for place in (absolute, *absolute.parents) if place.exists())


@contextmanager
def _looking(name: str, path: Path | str) -> Iterator[None]:
    """Refuse a path that cannot be looked for, by the name of its flag or setting, if it has one.

    Raises:
        ConfigError: It lies in a folder that may not be entered, or its name is too long, or
            it begins with the home of a user whom nobody knows.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        text = f"{name} {path}".strip()
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise ConfigError(f"{text} cannot be looked for: {reason}.") from error
