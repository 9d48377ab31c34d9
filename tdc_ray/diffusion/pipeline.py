"""The experts as one diffusers pipeline, which switches experts as t falls. Needs no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel

from tdc_ray.config.conditioning import null_class
from tdc_ray.config.train import Compile
from tdc_ray.data.prompts import conditions_of_images
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.expert_set import ExpertSet, OffloadedExperts
from tdc_ray.diffusion.pipeline_index import (
    EXPERTS_FILE,
    INDEX_FILE,
    PipelineIndex,
    experts_folder,
)
from tdc_ray.diffusion.samplers import (
    begins_near_the_end,
    checked_timesteps,
    make_scheduler,
    nearest_steps,
    set_timesteps,
    timesteps_of,
)
from tdc_ray.diffusion.sampling import (
    SamplingSpec,
    image_generators,
    image_labels,
    sample,
    to_uint8,
)
from tdc_ray.diffusion.schedule import as_seen
from tdc_ray.errors import ConfigError
from tdc_ray.models.compiled import CompiledDenoiser
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import captions_read
from tdc_ray.models.first_stage import FirstStage, load_first_stage
from tdc_ray.models.labels import Captions
from tdc_ray.models.network_config import STATES, CaptionShapes, num_class_embeds
from tdc_ray.models.saved_expert import SavedExpert, save_expert
from tdc_ray.models.text_encoder import (
    PromptStates,
    check_captions_read,
    check_text_encoder,
    encode_prompts,
)
from tdc_ray.storage.files import atomic_path, exists, fetch, listing
from tdc_ray.storage.object_store import display_path, is_remote, resolve_path

OUTPUT_TYPES = ("pil", "np", "pt")


class ProgressivePipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Image generation, unconditional, by classes or text, with an expert per group of timesteps.

    ``pipeline.scheduler`` may be any diffusers scheduler of the experts' prediction type and noise
    process; ``DDPMScheduler.from_config(pipeline.scheduler.config)`` makes one.
    """

    _optional_components: ClassVar[list[str]] = ["first_stage"]
    """Which components may be None, by diffusers' convention."""

    def __init__(
        self,
        denoiser: ExpertDenoiser | OffloadedExperts,
        scheduler: SchedulerMixin,
        first_stage: FirstStage | None = None,
        *,
        shape: tuple[int, int, int] = (3, 32, 32),
        num_inference_steps: int = 50,
        eta: float = 0.0,
        num_classes: int | None = None,
        guidance_scale: float = 1.0,
        use_clipped_model_output: bool = False,
        text_encoder: str | None = None,
        negative_prompt: str | None = None,
    ) -> None:
        """Create a pipeline.

        Args:
            denoiser: The experts, which other pipelines of diffusers take, too; or experts that
                are read from disk when they are used.
            scheduler: The diffusers scheduler.
            first_stage: Decodes what the experts output, where that is latents.
            shape: ``(C, H, W)`` of what the experts output.
            num_inference_steps: Denoising steps when a call names none.
            eta: Stochasticity of DDIM when a call names none.
            num_classes: Classes that the experts are conditioned on, without the null class; None
                means unconditional.
            guidance_scale: Weight of classifier-free guidance when a call names none; 1 means
                none.
            use_clipped_model_output: Whether DDIM derives epsilon anew from the clipped image when
                a call does not say.
            text_encoder: Folder of a diffusers pipeline that encodes prompts, for experts that are
                conditioned on text; read when it is needed. None means that calls are given
                states.
            negative_prompt: What guidance leads away from when a call names nothing; None means
                the default of the pipeline that encodes prompts, such as the empty one.
        """
        super().__init__()
        if isinstance(denoiser, ExpertDenoiser) and denoiser.offload:
            raise ConfigError(
                "denoiser must be without offload in this pipeline: from_pretrained(offload=True) "
                "of the pipeline itself reads experts from disk when they are used."
            )
        self.register_modules(denoiser=denoiser, scheduler=scheduler, first_stage=first_stage)
        self.shape = shape
        self.num_inference_steps, self.eta = num_inference_steps, eta
        self.num_classes, self.guidance_scale = num_classes, guidance_scale
        self.use_clipped_model_output = use_clipped_model_output
        self.text_encoder, self.negative_prompt = text_encoder, negative_prompt
        self.winograd = False
        self.compile_mode: Compile = "none"
        self._compiled: dict[tuple[Denoiser, Compile], CompiledDenoiser] = {}
        self._loaded: _Loaded | None = None
        self.register_to_config(  # by which diffusers tells settings from components
            shape=shape,
            num_inference_steps=num_inference_steps,
            eta=eta,
            num_classes=num_classes,
            guidance_scale=guidance_scale,
            use_clipped_model_output=use_clipped_model_output,
            text_encoder=text_encoder,
            negative_prompt=negative_prompt,
        )

    @property
    def experts(self) -> ExpertSet | OffloadedExperts:
        """The networks, each for a range of timesteps."""
        denoiser = self.denoiser
        return denoiser.experts if isinstance(denoiser, ExpertDenoiser) else denoiser

    @property
    def timestep_scale(self) -> float:
        """What a timestep is multiplied with before a network sees it."""
        scale: float = self.denoiser.timestep_scale
        return scale

    @cached_property
    def _of_experts(self) -> tuple[int | None, CaptionShapes]:
        """What the first one that is used says of all: null class, and what it reads of text."""
        network = self.experts.for_timestep(self.experts.spans[-1][1])
        null = null_class(num_class_embeds(network.config), self.num_classes)
        return null, captions_read(network)

    @property
    def null_class(self) -> int | None:
        """The class that stands for none, where the experts embed one."""
        return self._of_experts[0]

    @property
    def reads_prompts(self) -> bool:
        """Whether the experts are conditioned on text."""
        return bool(self._of_experts[1])

    def encode_prompts(
        self,
        prompts: Sequence[str],
        device: torch.device | None = None,
        negative_prompt: str | None = None,
    ) -> PromptStates:
        """Return what the experts read of prompts, by the text encoder of their base's pipeline.

        Args:
            prompts: The prompts.
            device: What computes; None means what the experts are on.
            negative_prompt: What guidance leads away from; None means as planned.

        Raises:
            ConfigError: The experts are not conditioned on text, or their text encoder is not
                known, not there, or another network's.
            CheckpointError: It is malformed.
        """
        if not self.reads_prompts:
            raise ConfigError(
                "prompts go with experts that are conditioned on text, got them with experts that "
                "are not. Leave them out."
            )
        self._check_named()
        folder = check_text_encoder(self.text_encoder, "text_encoder")
        check_captions_read(folder, self._of_experts[1], "text_encoder")
        factor = 1 if self.first_stage is None else self.first_stage.factor
        _, height, width = self.shape
        size = factor * height, factor * width
        negative = self.negative_prompt if negative_prompt is None else negative_prompt
        return encode_prompts(folder, prompts, size, device or self.device, negative)

    def _check_named(self) -> None:
        """Refuse a URI that the folder alone names: it would be read with the user's keys."""
        named = self.text_encoder
        if self._loaded is None or named is None or named != self._loaded.text_encoder:
            return
        if is_remote(resolve_path(named)):
            raise ConfigError(
                f"text_encoder {named} must be named by you, as it is a URI that {INDEX_FILE} "
                "brings along: set --text-encoder, or from_pretrained's text_encoder, to it if "
                "you trust it, or to a folder."
            )

    @torch.inference_mode()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        *,
        seed: int = 0,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: torch.Tensor | Captions | None = None,
        negative_prompt_embeds: torch.Tensor | Captions | None = None,
        use_clipped_model_output: bool | None = None,
    ) -> ImagePipelineOutput:
        """Sample images.

        Args:
            batch_size: Number of images.
            generator: One per image, or one for all; None means created from ``seed``.
            num_inference_steps: Denoising steps; None means as planned.
            eta: Stochasticity of DDIM; None means as planned.
            output_type: ``pil``, ``np`` (uint8, ``(B, H, W, C)``) or ``pt`` (in [-1, 1],
                ``(B, C, H, W)``).
            seed: Image ``i`` of a seed is the same in every batch.
            class_labels: One class per image, or one for all, for experts that are conditioned on
                classes; None means that image ``i`` is of class ``i`` modulo their number.
            guidance_scale: Weight of classifier-free guidance, at least 0; 1 means none, None as
                planned.
            prompt: One for each image, or one for all, for experts that are conditioned on text;
                their text encoder is read anew in every call (:meth:`encode_prompts`).
            negative_prompt: What guidance leads away from with ``prompt``, for all images; None
                means as planned.
            prompt_embeds: In place of it states of prompts, as the ``encode_prompt`` of the base's
                own pipeline returns them, ``(B, S, C)``; for experts that read more, a dictionary
                by the names of their arguments, such as ``encoder_hidden_states`` and
                ``text_embeds``.
            negative_prompt_embeds: The same of what guidance leads away from, such as "".
            use_clipped_model_output: Whether DDIM derives epsilon anew from the clipped image;
                None means as planned.

        Returns:
            An object with ``images``.

        Raises:
            ConfigError: An argument is out of its range, or does not fit the experts.
        """
        generators = self._generators(generator, seed, batch_size)
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(
                f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type}."
            )
        labels = self._labels(class_labels, batch_size)
        spec = self._spec(num_inference_steps, eta, guidance_scale)
        is_guided = spec.guidance_scale != 1
        leads_away = prompt is not None and negative_prompt_embeds is None and is_guided
        if negative_prompt is not None and not leads_away:
            raise ConfigError(
                "negative_prompt must come with prompt, without negative_prompt_embeds and with a "
                f"guidance_scale other than 1, got {negative_prompt!r}. Leave it out."
            )
        if prompt is not None:
            if prompt_embeds is not None:
                raise ConfigError("prompt must be None with prompt_embeds: leave one of them out.")
            embeds = self._encoded(prompt, batch_size, negative_prompt)
            prompt_embeds = embeds["prompt_embeds"]
            if negative_prompt_embeds is None:
                negative_prompt_embeds = embeds["negative_prompt_embeds"]
        prompts = self._prompts(prompt_embeds, batch_size, needed=True)
        negative = self._prompts(negative_prompt_embeds, batch_size, needed=is_guided)
        if use_clipped_model_output is not None:
            spec = replace(spec, use_clipped_model_output=use_clipped_model_output)
        self._check_compile()
        set_timesteps(self.scheduler, spec.num_inference_steps)
        if num_inference_steps is not None:
            self._check_start(spec.num_inference_steps)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            images = sample(
                self._denoiser_for,
                self.scheduler,
                spec,
                generators,
                class_labels=labels,
                prompts=prompts,
                negative_prompts=negative,
                on_step=bar.update,
            )
        if self.first_stage is not None:
            images = self.first_stage.decode(images)
        if output_type == "pt":
            return ImagePipelineOutput(images=images)
        pixels = to_uint8(images).numpy()
        if output_type == "np":
            return ImagePipelineOutput(images=pixels)
        return ImagePipelineOutput(images=self.numpy_to_pil(pixels / 255.0))

    def _denoiser_for(self, timestep: float) -> Denoiser | CompiledDenoiser:
        """Return the expert that serves a timestep, compiled where that is asked for."""
        network: Denoiser = self.experts.for_timestep(timestep)
        if self.compile_mode == "none":
            return network
        key = (network, self.compile_mode)
        if key not in self._compiled:
            self._compiled[key] = CompiledDenoiser(*key)
        return self._compiled[key]

    def _check_compile(self) -> None:
        """Refuse to compile what would not stay compiled."""
        if self.compile_mode == "none":
            return
        for name, asked in (
            ("offload", isinstance(self.experts, OffloadedExperts)),
            ("winograd", self.winograd),
        ):
            if asked:
                raise ConfigError(
                    f"compile_mode must be none with {name}, got {self.compile_mode}: leave one "
                    "of them out."
                )

    def _generators(
        self,
        generator: torch.Generator | list[torch.Generator] | None,
        seed: int,
        batch_size: int,
    ) -> list[torch.Generator]:
        """Return one generator per image: those given, or seeded by the one given or the seed."""
        if generator is None:
            return image_generators(seed, 0, batch_size)
        if isinstance(generator, torch.Generator):
            seeds = torch.randint(
                2**31, (batch_size,), generator=generator, device=generator.device
            )
            return [torch.Generator().manual_seed(value) for value in seeds.tolist()]
        if len(generator) != batch_size:
            raise ConfigError(
                f"generator must be one, or one per image: got {len(generator)} for batch_size "
                f"{batch_size}."
            )
        return generator

    def _spec(
        self, num_inference_steps: int | None, eta: float | None, guidance_scale: float | None
    ) -> SamplingSpec:
        """Replace the planned settings by those that a call names."""
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        longest = self.scheduler.config["num_train_timesteps"]
        if not 1 <= steps <= longest:
            raise ConfigError(f"num_inference_steps must be in [1, {longest}], got {steps}.")
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        null = self.null_class
        can_guide = null is not None or self.reads_prompts
        if scale < 0 or (scale != 1 and not can_guide):
            rule = "at least 0" if can_guide else "1 for experts without a null class"
            raise ConfigError(f"guidance_scale must be {rule}, got {scale}.")
        return SamplingSpec(
            shape=self.shape,
            num_inference_steps=steps,
            eta=self.eta if eta is None else eta,
            use_clipped_model_output=self.use_clipped_model_output,
            timestep_scale=self.timestep_scale,
            guidance_scale=scale,
            null_class=null,
            device=self.device,
            dtype=self.experts.dtype,
            winograd=self.winograd,
        )

    def _encoded(
        self, prompt: str | Sequence[str], batch_size: int, negative_prompt: str | None
    ) -> dict[str, Captions]:
        """Encode a call's prompts to one for each image."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if len(prompts) not in (1, batch_size):
            raise ConfigError(
                f"prompt must be one, or one per image: got {len(prompts)} for batch_size "
                f"{batch_size}."
            )
        states = self.encode_prompts(prompts, negative_prompt=negative_prompt)
        return conditions_of_images(states, 0, batch_size)

    def _prompts(
        self, given: torch.Tensor | Captions | None, batch_size: int, *, needed: bool
    ) -> Captions | None:
        """Return what experts read of prompts, by name; refuse what is missing or too much."""
        names = self._of_experts[1]
        if not names:
            if given is not None:
                raise ConfigError(
                    "prompt_embeds must be None: the experts are not conditioned on text."
                )
            return None
        if given is None and not needed:
            return None
        states = {STATES: given} if isinstance(given, torch.Tensor) else given or {}
        counts = {name: len(states[name]) for name in names if name in states}
        if counts != dict.fromkeys(names, batch_size):
            raise ConfigError(
                "prompt_embeds, and with guidance negative_prompt_embeds, must be one per image, "
                f"with {' and '.join(names)}, got {counts or 'none'} for batch_size {batch_size}: "
                "the encode_prompt of the base's own pipeline makes them. Or give prompt, or put "
                "tdc_ray.ExpertDenoiser into that pipeline as its unet or transformer, which then "
                "takes words."
            )
        return {name: states[name] for name in names}

    def _check_start(self, steps: int) -> None:
        """Refuse steps that begin with noise where the scheduler expects an image.

        Those of the plan are checked there.
        """
        config, first = self.scheduler.config, timesteps_of(self.scheduler)[0]
        if config.get("timestep_spacing") == "quadratic":
            return
        total = config["num_train_timesteps"]
        if not begins_near_the_end(total, steps, first):
            raise ConfigError(
                f"num_inference_steps must be {nearest_steps(total, steps)}, got {steps}: of "
                f"{total} timesteps it would begin at {first:g}, with pure noise. Or give the "
                "scheduler the spacing trailing."
            )

    def _labels(
        self, class_labels: int | Sequence[int] | torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        """Expand a call's labels to one per image, ``(B,)``."""
        if self.num_classes is None:
            if class_labels is not None:
                raise ConfigError("class_labels must be None: the experts are unconditional.")
            return None
        if class_labels is None:
            return image_labels(self.num_classes, 0, batch_size)
        labels = torch.as_tensor(class_labels)
        if labels.ndim == 0:
            labels = labels.expand(batch_size)
        if labels.shape != (batch_size,):
            raise ConfigError(
                f"class_labels must be one, or one per image: got {labels.tolist()} for "
                f"batch_size {batch_size}."
            )
        for label in labels.tolist():
            if label not in range(self.num_classes):
                raise ConfigError(f"class_labels must be in [0, {self.num_classes}), got {label}.")
        return labels

    def save_pretrained(self, save_directory: str | Path, **options: object) -> None:
        """Save the experts as they are, into a folder that :meth:`from_pretrained` loads.

        What it loads draws the same images, bit for bit, unless it is told to differ there
        (``winograd``). ``tdc-ray export`` writes folders that diffusers itself loads.

        Args:
            save_directory: A new or empty folder, or one of experts without their base, which is
                replaced.
            options: None: diffusers' are refused.

        Raises:
            ConfigError: The pipeline was not loaded by :meth:`from_pretrained`, or the folder
                cannot hold what was changed since: the scheduler, the first stage, the precision,
                or the widths of an expert.
        """
        if self._loaded is None or options:
            reason = ", ".join(options) or "a pipeline that from_pretrained did not load"
            raise ConfigError(
                f"save_pretrained cannot save {reason}: tdc-ray export writes the experts of a "
                "run into a folder that diffusers loads."
            )
        self._check_unchanged(self._loaded)
        folder, index = resolve_path(save_directory), self._loaded.index
        if exists(folder / EXPERTS_FILE):
            raise ConfigError(
                "save_pretrained needs a new folder, or one of experts alone, got "
                f"{display_path(folder)}, which has their base and {EXPERTS_FILE}, too, and would "
                "lose them. Name another."
            )
        if listing(folder, "*") and not exists(folder / INDEX_FILE):
            raise ConfigError(
                f"save_pretrained needs a new folder, or one of experts, got "
                f"{display_path(folder)}, which has other things in it. Name another."
            )
        sampler = replace(
            index.sampler,
            num_inference_steps=self.num_inference_steps,
            eta=self.eta,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
        )
        index = index.model_copy(update={"text_encoder": self.text_encoder})
        if self.use_clipped_model_output != sampler.clips_epsilon:
            clips = self.use_clipped_model_output
            sampler = replace(sampler, use_clipped_model_output=clips)
        with atomic_path(folder) as temporary:
            seen = [first for first, _ in as_seen(index.diffusion, index.spans)]
            for entry, first, place in zip(index.experts, seen, self._loaded.folders, strict=True):
                unet = self.experts.for_timestep(first)
                saved = SavedExpert.load(fetch(place))
                if _shapes(unet) != _shapes(saved.build()):
                    raise ConfigError(
                        f"{entry.folder} has other widths than when it was loaded: "
                        "models.saved_expert.save_expert saves it with those that are kept."
                    )
                save_expert(temporary / entry.folder, unet, saved.unet, saved.kept)
            index.model_copy(update={"sampler": sampler}).save(temporary)

    def _check_unchanged(self, loaded: "_Loaded") -> None:
        """Refuse what the index cannot describe."""
        index = loaded.index
        planned = make_scheduler(index.diffusion, index.sampler)
        for what, fits in (
            ("precision", self.experts.dtype == torch.float32),
            ("scheduler", _settings(self.scheduler) == _settings(planned)),
            ("first_stage", self.first_stage is loaded.first_stage),
            ("shape", tuple(self.shape) == index.shape),
            ("timestep_scale", self.timestep_scale == index.diffusion.timestep_scale),
            ("num_classes", self.num_classes == index.num_classes),
        ):
            if not fits:
                raise ConfigError(
                    f"save_pretrained cannot save another {what} than that of the folder which "
                    "was loaded, in float32: save before it is changed."
                )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        offload: bool = False,
        winograd: bool = False,
        compile_mode: Compile = "none",
        sampler: Mapping[str, Any] | None = None,
        text_encoder: str | None = None,
    ) -> "ProgressivePipeline":
        """Load the experts of a run: its ``experts`` folder, or the run directory itself.

        Args:
            path: The folder, or its URI, such as ``s3://bucket/run``.
            torch_dtype: Precision of the experts' weights; a first stage keeps its own.
            offload: Keep at most two experts in memory: the one in use, and the next, which is
                read meanwhile.
            winograd: On CPUs, in float32: 3 x 3 convolutions by Winograd's algorithm. Wide experts
                take less time by it, and their images differ by rounding; a first stage's own
                convolutions stay. The attribute ``winograd`` may be set later, too.
            compile_mode: torch.compile's mode for the experts (``none``: not at all), each of
                which is compiled before its first step. The attribute ``compile_mode`` may be set
                later, too.
            sampler: Fields of ``SamplerConfig`` in place of the run's own, such as
                ``{"scheduler": "EulerDiscreteScheduler"}``.
            text_encoder: Folder of the pipeline that encodes prompts; None means that of the base,
                where it was, unless that is a URI.

        Raises:
            CheckpointError: The folder holds no experts, or one of another format.
            ConfigError: There is no such sampler.
        """
        folder = experts_folder(resolve_path(path))
        index = PipelineIndex.load(folder)
        if sampler and "compile" in sampler:
            raise ConfigError(
                f"sampler must be without compile, got {sampler['compile']}: give compile_mode."
            )
        if sampler:
            own = replace(index.sampler, **sampler)
            checked_timesteps(index.diffusion, own)
            index = index.model_copy(update={"sampler": own})
        if text_encoder is not None:
            index = index.model_copy(update={"text_encoder": text_encoder})
        folders = [folder / expert.folder for expert in index.experts]
        if offload:
            spans, scale = as_seen(index.diffusion, index.spans), index.diffusion.timestep_scale
            pipeline = _assemble(OffloadedExperts(folders, spans, scale), index, folder)
        else:
            pipeline = _assemble(ExpertDenoiser.from_pretrained(folder), index, folder)
        pipeline.experts.to(torch_dtype)
        pipeline.winograd, pipeline.compile_mode = winograd, compile_mode
        stage = index.first_stage
        named = None if stage is None else display_path(folder / stage)
        pipeline._loaded = _Loaded(
            index.model_copy(update={"first_stage": named}),
            folders,
            pipeline.first_stage,
            index.text_encoder if text_encoder is None else None,
        )
        return pipeline


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a pipeline was loaded from."""

    index: PipelineIndex
    """With the path of its first stage."""

    folders: Sequence[Path]
    """Where the expert of each range of timesteps is."""

    first_stage: FirstStage | None
    text_encoder: str | None
    """That the folder itself names; None where the user named one, or there is none."""


def _shapes(unet: UNet2DModel) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in unet.state_dict().items()}


def _settings(scheduler: SchedulerMixin) -> tuple[str, dict[str, object]]:
    """Return all that decides how a scheduler steps."""
    public = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
    return type(scheduler).__name__, public


def base_pipeline(unet: UNet2DModel, index: PipelineIndex) -> ProgressivePipeline:
    """Create a pipeline whose only expert is the base, which serves every timestep."""
    whole = (0, index.diffusion.num_timesteps - 1)
    return _of_networks([unet], [whole], index)


def swapped_pipeline(
    unet: UNet2DModel, expert: UNet2DModel, span: tuple[int, int], index: PipelineIndex
) -> ProgressivePipeline:
    """Create a pipeline of a base that an expert replaces on its timesteps."""
    (first, last), end = span, index.diffusion.num_timesteps - 1
    parts = [(unet, (0, first - 1)), (expert, span), (unet, (last + 1, end))]
    serving = [part for part in parts if part[1][0] <= part[1][1]]
    return _of_networks([network for network, _ in serving], [one for _, one in serving], index)


def _of_networks(
    networks: Sequence[UNet2DModel], spans: Sequence[tuple[int, int]], index: PipelineIndex
) -> ProgressivePipeline:
    """Create a pipeline of networks that are in memory, each for a range of timesteps."""
    seen, scale = as_seen(index.diffusion, spans), index.diffusion.timestep_scale
    return _assemble(ExpertDenoiser(networks, seen, timestep_scale=scale), index, Path())


def _assemble(
    denoiser: ExpertDenoiser | OffloadedExperts, index: PipelineIndex, folder: Path
) -> ProgressivePipeline:
    stage = index.first_stage
    return ProgressivePipeline(
        denoiser,
        make_scheduler(index.diffusion, index.sampler),
        None if stage is None else load_first_stage(folder / stage),
        shape=index.shape,
        num_inference_steps=index.sampler.num_inference_steps,
        eta=index.sampler.eta,
        num_classes=index.num_classes,
        guidance_scale=index.sampler.guidance_scale,
        use_clipped_model_output=index.sampler.clips_epsilon,
        text_encoder=index.text_encoder,
        negative_prompt=index.sampler.negative_prompt,
    )
