"""Refuses paths that are not there, or of another kind, before anything heavy is imported."""

from importlib.util import find_spec
from pathlib import Path

from tdc_ray.config.data import BASE_SAMPLES, BUNDLED, DataConfig, hub_dataset
from tdc_ray.config.evaluate import HUB_MODELS, EvaluateConfig
from tdc_ray.config.model import FILE_KINDS, HUB_NAME
from tdc_ray.config.run import RunConfig
from tdc_ray.errors import CheckpointError, ConfigError, DataError, EvaluationError, StorageError
from tdc_ray.storage.object_store import is_remote, resolve_path


def check_input(path: Path | str, kind: str) -> None:
    """Refuse a path that does not exist; that of a URI is not looked for.

    Args:
        path: The path.
        kind: What it must be, in words.

    Raises:
        StorageError: It does not exist.
    """
    if not _exists(path):
        raise StorageError(f"{path} does not exist: name {kind}.")


def check_base(source: str) -> None:
    """Refuse a base that is neither here nor may be on the hub.

    Raises:
        CheckpointError: It does not exist.
    """
    kind, colon, path = source.partition(":")
    if kind in FILE_KINDS and colon:
        if not _exists(path):
            raise CheckpointError(f"{path} does not exist.")
    elif not _exists(source) and HUB_NAME.fullmatch(source) is None:
        raise CheckpointError(f"{source} does not exist, and is no name on the hub (owner/name).")


def check_output_folder(flag: str, path: Path | str) -> None:
    """Refuse a folder that cannot be one: it, or one that it lies in, is a file.

    Raises:
        StorageError: There is a file.
    """
    folder = resolve_path(path).expanduser()
    if is_remote(folder):
        return
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise StorageError(f"{place} is a file: name a folder by {flag}.")
            return


def check_output_file(flag: str, path: Path | str) -> None:
    """Refuse a file that cannot be one: it is a folder, or lies in a file.

    Raises:
        StorageError: There is something else.
    """
    file = resolve_path(path)
    if not is_remote(file) and file.is_dir():
        raise StorageError(f"{file} is a folder: name a file by {flag}.")
    check_output_folder(flag, file.parent)


def check_settings(config: RunConfig) -> None:
    """Refuse settings of a run that name paths which are not there, or caches that are files.

    Raises:
        TdcError: There is one.
    """
    evaluate = config.evaluate
    check_data(config.data)
    if evaluate.inception_path is not None and not _exists(evaluate.inception_path):
        raise EvaluationError(
            f"evaluate.inception_path {evaluate.inception_path} does not exist. Name the folder "
            "that holds inception-2015-12-05.pt."
        )
    check_features_model(evaluate)
    check_output_folder("--evaluate.cache-dir", evaluate.cache_dir)


def check_features_model(evaluate: EvaluateConfig) -> None:
    """Refuse features whose library is not installed, or whose network is not there.

    Raises:
        TdcError: There are such.
    """
    if evaluate.features in HUB_MODELS and find_spec("transformers") is None:
        raise ConfigError(
            f"evaluate.features {evaluate.features} needs transformers, which is not installed: "
            "pip install 'tdc-ray[features]', or take other features."
        )
    model = evaluate.features_model
    if model is not None and not _exists(model) and HUB_NAME.fullmatch(model) is None:
        raise EvaluationError(
            f"evaluate.features_model {model} does not exist, and is no name on the hub "
            "(owner/name)."
        )


def check_named_data(flag: str, source: str | None) -> None:
    """Refuse data that a flag names and that is neither here nor bundled.

    Raises:
        DataError: It does not exist.
    """
    known = (*BUNDLED, BASE_SAMPLES)
    if source is None or source in known or _exists(source):
        return
    if hub_dataset(source) is None:
        raise DataError(
            f"{flag} {source} does not exist, and is none of {', '.join(known)}, nor a data set "
            "on the Hugging Face hub (OWNER/NAME or OWNER/NAME:CONFIG)."
        )
    if find_spec("datasets") is None:
        raise DataError(
            f"{flag} {source} does not exist here. If it is a data set on the Hugging Face hub, "
            "the library datasets is needed: pip install 'tdc-ray[datasets]'."
        )


def check_data(data: DataConfig) -> None:
    """Refuse settings of the data that name paths which are not there, or a cache that is a file.

    Raises:
        TdcError: There is one.
    """
    is_drawn = data.source == BASE_SAMPLES  # again, if need be
    if data.path is not None and not (is_drawn or data.is_on_hub or _exists(data.path)):
        raise DataError(
            f"data.path {data.path} does not exist (data.source {data.source}). Set --data.path "
            "to where the images are."
        )
    if data.first_stage is not None and not _exists(data.first_stage):
        raise CheckpointError(
            f"data.first_stage {data.first_stage} does not exist. Name the folder of a diffusers "
            "VQModel or AutoencoderKL."
        )
    check_output_folder("--data.cache-dir", data.cache_dir)


def _exists(path: Path | str) -> bool:
    resolved = resolve_path(path)
    return is_remote(resolved) or resolved.expanduser().exists()
