"""The experts as one denoiser that takes the place of a network in any pipeline of diffusers."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from tdc_ray.diffusion.expert_set import ExpertSet, Span, load_each_once
from tdc_ray.diffusion.pipeline_index import PipelineIndex, experts_folder
from tdc_ray.diffusion.schedule import as_seen
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.models.network_config import SHAPES, NetworkConfig
from tdc_ray.models.saved_denoiser import (
    SavedDenoiser,
    SavedGroup,
    cast_weights,
    is_denoiser,
    load_denoiser,
    plain_config,
    save_denoiser,
)
from tdc_ray.models.saved_expert import SavedExpert
from tdc_ray.models.shared_weights import share_equal_weights
from tdc_ray.models.units import KeptIndices
from tdc_ray.storage.files import exists, fetch
from tdc_ray.storage.object_store import display_path, resolve_path

_OF_CLASS = (
    "_keep_in_fp32_modules",
    "_repeated_blocks",
    "_skip_keys",
    "_skip_layerwise_casting_patterns",
    "_supports_gradient_checkpointing",
    "_supports_group_offloading",
)
"""What diffusers notes at the classes of its models and reads there."""

_LOADING = ("low_cpu_mem_usage", "offload_state_dict", "use_safetensors", "disable_mmap")
"""Options of diffusers' ``from_pretrained`` about how files are read: nothing changes by them."""

_SAVING = ("is_main_process", "safe_serialization")
"""Options of diffusers' ``save_pretrained`` that are on by default."""


class ExpertDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """Experts behind the interface of the network that they were made of.

    ``pipe.unet = ExpertDenoiser.from_pretrained(...)``, or ``pipe.transformer``, in any pipeline
    of diffusers. ``config`` is the base's. What else is read of the base's class, such as
    ``add_embedding``, is the expert's of the noisiest timesteps; methods of it, such as
    ``set_attn_processor``, are called of every expert. What loads weights into a network (LoRA,
    IP-Adapter) is refused: of pruned experts they do not fit.

    Experts may share parameters (``from_pretrained`` makes them); one that is shared is trained
    for all of them.
    """

    _anchor: Tensor

    def __init__(
        self,
        experts: Sequence[ModelMixin],
        spans: Sequence[Span],
        *,
        kept: Sequence[KeptIndices] | None = None,
        base: NetworkConfig | None = None,
        timestep_scale: float = 1.0,
        offload: bool = False,
    ) -> None:
        """Wrap networks of one class and of equal inputs and outputs, pruned or not.

        Args:
            experts: The networks.
            spans: First and last timestep of each, both included, in order: as the pipeline hands
                them to the network (Flux's are in [0, 1]).
            kept: What is kept of the base in each, by which pruned ones are saved; empty means
                that nothing was pruned.
            base: Config of the network that they were pruned from; None means the experts' own.
            timestep_scale: What a timestep is multiplied with before an expert sees it.
            offload: Leave the experts where they are, and move the weights of the one in use to
                the device of :meth:`to`; for inference.

        Raises:
            ConfigError: They are of several shapes, or take no timestep.
        """
        super().__init__()
        if not len(experts) == len(spans) == len(kept or spans) > 0:
            raise ConfigError(
                f"spans and kept must have one entry for each expert, got {len(experts)} experts, "
                f"{len(spans)} spans and {len(kept or spans)} of kept."
            )
        if any(first > last for first, last in spans) or any(
            before[1] >= after[0] for before, after in pairwise(sorted(spans))
        ):
            raise ConfigError(
                "spans must be first and last timestep of each expert, without an overlap, got "
                f"{list(spans)}."
            )
        self._signature = inspect.signature(type(experts[0]).forward)
        if "timestep" not in self._signature.parameters:
            raise ConfigError(f"experts must take a timestep, got a {type(experts[0]).__name__}.")
        configs = [plain_config(expert) for expert in experts]
        for key in SHAPES:
            if len(found := {str(config.get(key)) for config in configs}) > 1:
                raise ConfigError(f"experts must have one {key}, got {', '.join(sorted(found))}.")
        self.experts = ExpertSet(experts, spans)
        self.kept: Sequence[KeptIndices] = kept or [{}] * len(experts)
        self.base = configs[0] if base is None else base
        self.timestep_scale, self.offload = timestep_scale, offload
        # Where .to() puts what is in use when idle experts stay where they are.
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)
        self._moved: dict[Tensor, Tensor] = {}
        if offload:
            self.requires_grad_(requires_grad=False)
        self._first = max(range(len(spans)), key=lambda index: spans[index])
        self.register_to_config(**experts[self._first].config)
        for name in _OF_CLASS:
            if hasattr(type(experts[0]), name):
                setattr(self, name, getattr(type(experts[0]), name))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._anchor.device if self.offload else super().device
        return device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts that serve the timesteps, with the arguments of the base's class.

        A batch with timesteps of several experts is split: tensors among the arguments, and in
        lists, tuples and dicts of them, whose first dimension is the batch's are split with it.

        Raises:
            ConfigError: No expert serves a timestep, or there is none for each image.
        """
        bound = self._signature.bind(None, *args, **kwargs)
        timestep = bound.arguments.get("timestep")
        if timestep is None:
            raise ConfigError("timestep must be given: it decides which expert is run.")
        if self.timestep_scale != 1.0:
            bound.arguments["timestep"] = timestep * self.timestep_scale
        args, kwargs = bound.args[1:], bound.kwargs
        if not isinstance(timestep, Tensor) or timestep.numel() == 1:
            value = timestep.item() if isinstance(timestep, Tensor) else timestep
            return self._run(self.experts.for_timestep(value), args, kwargs)
        batch_size = len(next(arg for arg in bound.arguments.values() if isinstance(arg, Tensor)))
        if timestep.shape != (batch_size,):
            raise ConfigError(
                f"timestep must be one, or one for each of {batch_size} samples: got a tensor of "
                f"shape {tuple(timestep.shape)}."
            )
        rows: dict[ModelMixin, list[int]] = {}
        for row, value in enumerate(timestep.tolist()):
            rows.setdefault(self.experts.for_timestep(value), []).append(row)
        if len(rows) == 1:
            return self._run(next(iter(rows)), args, kwargs)
        parts = []
        for expert, places in rows.items():
            of_expert = functools.partial(_rows_of, rows=places, batch_size=batch_size)
            parts.append(self._run(expert, of_expert(args), of_expert(kwargs)))
        order = torch.tensor([row for places in rows.values() for row in places]).argsort()
        return _joined(parts, order)

    def _run(self, expert: ModelMixin, args: Any, kwargs: Any) -> Any:
        if not self.offload:
            return expert(*args, **kwargs)
        tensors = dict([*expert.named_parameters(), *expert.named_buffers()])
        wanted = set(tensors.values())
        self._moved = {one: moved for one, moved in self._moved.items() if one in wanted}
        for tensor in wanted - self._moved.keys():
            self._moved[tensor] = tensor.detach().to(self.device)
        moved = {name: self._moved[tensor] for name, tensor in tensors.items()}
        return torch.func.functional_call(expert, moved, args, kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Convert all tensors, as ``to`` does; offloaded experts stay where they are."""
        if not self.offload:
            return cast("Self", super()._apply(fn, recurse))
        self._moved = {}
        self._anchor = fn(self._anchor)
        self.experts._apply(  # type: ignore[no-untyped-call]
            lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype)
        )
        return self

    def __getattr__(self, name: str) -> Any:
        """Return what the base's class has beside this one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts = self.__dict__.get("_modules", {}).get("experts")
            if experts is None:
                raise
            of_class = getattr(type(experts[0]), name, None)
            if getattr(of_class, "__module__", "").startswith("diffusers.loaders"):
                return functools.partial(self._refuse, name)
            if name.startswith("_"):
                raise
        if inspect.isfunction(of_class):
            return functools.partial(self._call_each, name)
        return getattr(experts[self._first], name)

    def _call_each(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of every expert, and return what that of the noisiest timesteps does."""
        results = {}
        for expert in dict.fromkeys(self.experts):
            own = [dict(arg) if isinstance(arg, dict) else arg for arg in args]  # they empty it
            results[expert] = getattr(expert, name)(*own, **kwargs)
        return results[self.experts[self._first]]

    def _refuse(self, name: str, *_: Any, **__: Any) -> None:
        raise ConfigError(
            f"{name} is of one network: experts are several, whose layers may be narrower. Load "
            "the weights into the base, fuse them (pipe.fuse_lora()), and make experts of that."
        )

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Enter the context of this name of every expert, which pipelines of transformers name."""
        experts: Iterable[Any] = dict.fromkeys(self.experts)
        with contextlib.ExitStack() as stack:
            for expert in experts:
                stack.enter_context(expert.cache_context(name))
            yield

    def save_pretrained(
        self, save_directory: str | Path, max_shard_size: int | str = "10GB", **options: Any
    ) -> None:
        """Save it into a folder that :meth:`from_pretrained` loads, equal bit for bit.

        Weights that experts have in common are written once.

        Args:
            save_directory: A new or empty folder, or one that this wrote; or its URI.
            max_shard_size: Weights are split into files of at most this size, such as ``"5GB"``.
            options: diffusers' others, which must be at their defaults.

        Raises:
            ConfigError: An option is not, the folder holds something else, or an expert is
                another network than its config and what is kept describe.
        """
        for name, value in options.items():
            if bool(value) != (name in _SAVING):
                raise ConfigError(f"save_pretrained of experts has no option {name}={value}.")
        groups = [
            SavedGroup(first=first, last=last, kept=dict(kept))
            for (first, last), kept in zip(self.experts.spans, self.kept, strict=True)
        ]
        saved = SavedDenoiser(
            base=dict(self.base), timestep_scale=self.timestep_scale, experts=tuple(groups)
        )
        folder = resolve_path(save_directory)
        save_denoiser(folder, saved, list(self.experts), max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        offload: bool = False,
        **options: Any,
    ) -> Self:
        """Load what :meth:`save_pretrained` saved, a run's experts, or an export; in eval mode.

        Parameters that experts have in common are in memory once.

        Args:
            path: The folder, or its URI.
            subfolder: A folder in it.
            torch_dtype: Precision of the weights; None and ``"auto"`` mean as they were saved.
            offload: Leave the experts on the CPU, and move the weights of the one in use to the
                device; for inference.
            options: Those that diffusers' pipelines hand on, which must be at their defaults.

        Raises:
            CheckpointError: There is no such folder, or no experts in it, or they are malformed.
            ConfigError: An option is not supported.
        """
        for name, value in options.items():
            if value and name not in _LOADING:
                raise ConfigError(f"from_pretrained of experts has no option {name}.")
        if torch_dtype not in (None, "auto") and not isinstance(torch_dtype, torch.dtype):
            raise ConfigError(
                f"torch_dtype must be None, auto or a torch.dtype, got {torch_dtype!r}."
            )
        folder = resolve_path(path) / (subfolder or "")
        if not exists(folder):
            raise CheckpointError(
                f"{display_path(folder)} does not exist. What is on the Hugging Face hub is "
                "downloaded by huggingface_hub.snapshot_download(NAME), which returns its folder."
            )
        if is_denoiser(folder):
            saved, experts = load_denoiser(folder)
            spans: Sequence[Span] = [(group.first, group.last) for group in saved.experts]
            kept: list[KeptIndices] = [group.kept for group in saved.experts]
            base, scale = saved.network, saved.timestep_scale
        else:
            folder = experts_folder(folder)
            index = PipelineIndex.load(folder)
            folders = [folder / entry.folder for entry in index.experts]
            experts, spans = load_each_once(folders), as_seen(index.diffusion, index.spans)
            share_equal_weights(experts)
            described = [SavedExpert.load(fetch(place)) for place in folders]
            kept, base = [one.kept for one in described], described[0].unet
            scale = index.diffusion.timestep_scale
        denoiser = cls(experts, spans, kept=kept, base=base, timestep_scale=scale, offload=offload)
        denoiser.eval()
        if (
            not offload
        ):  # mapped files are not aligned: sums of their numbers may differ by rounding
            for tensor in (*denoiser.parameters(), *denoiser.buffers()):
                tensor.data = tensor.data.clone()
        if isinstance(torch_dtype, torch.dtype):
            cast_weights(denoiser, torch_dtype, denoiser._keep_in_fp32_modules or ())
        denoiser.register_to_config(_name_or_path=display_path(folder))
        return denoiser


def _rows_of(value: Any, *, rows: list[int], batch_size: int) -> Any:
    """Return some rows of every tensor in it whose first dimension is the batch's."""
    of_each = functools.partial(_rows_of, rows=rows, batch_size=batch_size)
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == batch_size else value
    if isinstance(value, dict):
        return {key: of_each(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(of_each, value))
    return value


def _joined(parts: Sequence[Any], order: Tensor) -> Any:
    """Join outputs of diffusers' networks; ``order`` has the place of each row in them."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))[order.to(parts[0].device)]
    if isinstance(parts[0], dict):  # diffusers' outputs are dicts, too
        return type(parts[0])(**{k: _joined([part[k] for part in parts], order) for k in parts[0]})
    if isinstance(parts[0], list | tuple):
        return type(parts[0])(_joined(column, order) for column in zip(*parts, strict=True))
    return parts[0]
