"""The settings of each stage: frozen dataclasses that refuse wrong values when they are made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tdc_ray.diffusion.schedule import BetaSchedule
from tdc_ray.errors import ConfigError

FixedPrecision = Literal["fp32", "bf16", "fp16"]
Precision = Literal["auto", FixedPrecision]
Compile = Literal["none", "default", "reduce-overhead"]
FlopsSchedule = Literal["snr", "constant", "uni-increasing", "uni-decreasing"]
LossWeight = Literal["constant", "min-snr", "p2"]
Sampler = Literal["ddim", "ddpm", "pndm"]


def require(stage: str, config: object, name: str, rule: str, *, ok: bool) -> None:
    """Refuse a setting that breaks its rule."""
    if not ok:
        raise ConfigError(f"{stage}.{name} must be {rule}, got {getattr(config, name)}.")


def at_least(least: int, stage: str, config: object, *names: str) -> None:
    """Refuse settings below a bound; None is none of them."""
    for name in names:
        value = getattr(config, name)
        require(stage, config, name, f"at least {least}", ok=value is None or value >= least)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images are learnt, and how they are brought into shape."""

    source: Literal["digits", "folder", "npz", "cifar10"] = "digits"
    """digits: scikit-learn's 1,797 images of 8x8; folder: all images below `path`; npz: a file or
    a folder of files with `images`, `arr_0` or ImageNet-64's `data`; cifar10: as torchvision
    unpacks it."""

    path: str | None = None
    """Where the images are; every source but digits needs it."""

    image_size: int = 8
    """Height and width that images are brought to, in pixels."""

    num_channels: Literal[1, 3] = 1
    """Grey (1) or colour (3)."""

    horizontal_flip: bool = False
    """Mirror half of the training images at random."""

    crop_padding: int = 0
    """Pad by this many pixels (reflected) and crop at random; 0 leaves images as they are."""

    num_workers: int = 0
    """Processes that load and decode images beside each trainer."""

    labels_from_folders: bool = False
    """An image's class is the subfolder of `path` that it lies in (source folder); classes are
    counted from 0 in the order of their names."""

    max_corrupt: int = 10
    """Most corrupt files that a process and its loader processes leave out, each named in a
    warning. The next image takes an image's place; an npz file, however many images it holds,
    counts as one, and its images are missing altogether."""

    cache_dir: str = "~/.cache/tdc_ray"
    """Where npz files too large for memory are unpacked, or noted as whole, once. On a cluster
    either a place that all nodes see, or each node fills its own."""

    first_stage: str | None = None
    """Folder of a diffusers VQModel or AutoencoderKL: the denoisers then learn its latents."""

    def __post_init__(self) -> None:
        at_least(4, "data", self, "image_size")
        at_least(0, "data", self, "crop_padding", "num_workers", "max_corrupt")
        rule = f"below data.image_size = {self.image_size}"
        require("data", self, "crop_padding", rule, ok=self.crop_padding < self.image_size)
        if self.source != "digits" and self.path is None:
            raise ConfigError(
                f"data.path must be given for data.source {self.source}: where are the images? "
                "Set --data.path."
            )
        if self.source == "digits" and self.path is not None:
            raise ConfigError(
                f"data.path goes with data.source npz, folder or cifar10, got {self.path} with "
                "digits. Set --data.source, or name a --preset."
            )
        if self.labels_from_folders and self.source != "folder":
            raise ConfigError(
                f"data.labels_from_folders goes with data.source folder, got {self.source}."
            )

    @property
    def name(self) -> str:
        """What results call the dataset: its source, or the name of its file or folder."""
        if self.path is None or self.source == "cifar10":
            return self.source
        stem = Path(self.path).resolve().stem
        return "".join(c if c.isalnum() else "_" for c in stem)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The noise process and what the network predicts of it."""

    num_train_timesteps: int = 1000
    """Number of timesteps T."""

    beta_schedule: BetaSchedule = "linear"
    """The noise schedule, under diffusers' name."""

    beta_start: float = 1e-4
    """First beta of the linear schedules."""

    beta_end: float = 0.02
    """Last beta of the linear schedules."""

    learned_sigma: bool = False
    """The network predicts the variance's place in its range too, and the loss is L_hybrid."""

    vlb_weight: float = 0.001
    """Weight of L_vlb in L_hybrid (Nichol and Dhariwal, arXiv:2102.09672, equation 16)."""

    rescale_timesteps: bool = False
    """Feed the network t * 1000 / T in place of t, as improved-diffusion does."""

    def __post_init__(self) -> None:
        at_least(2, "diffusion", self, "num_train_timesteps")
        at_least(0, "diffusion", self, "vlb_weight")
        require("diffusion", self, "beta_start", "in (0, 1)", ok=0 < self.beta_start < 1)
        rule = f"in [diffusion.beta_start = {self.beta_start}, 1)"
        require("diffusion", self, "beta_end", rule, ok=self.beta_start <= self.beta_end < 1)

    @property
    def timestep_scale(self) -> float:
        """What a timestep is multiplied with before the network sees it."""
        return 1000 / self.num_train_timesteps if self.rescale_timesteps else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """How the timesteps are grouped and what each group may cost."""

    num_groups: int = 10
    """Number of groups before empty ones vanish (the paper's N)."""

    min_macs_share: float = 0.5
    """Share of the base's macs that the easiest timestep gets, in (0, 1] (the paper's k)."""

    schedule: FlopsSchedule = "snr"
    """How the limits move with t (the paper's FLOPs schedule, Table II)."""

    match_snr_mean: bool = False
    """Give a uni-increasing or uni-decreasing schedule the mean limit, over the sampling steps, of
    the SNR schedule, by another least limit."""

    min_group_size: int = 1
    """Groups of fewer timesteps than this join their neighbour."""

    def __post_init__(self) -> None:
        at_least(1, "plan", self, "num_groups", "min_group_size")
        require("plan", self, "min_macs_share", "in (0, 1]", ok=0 < self.min_macs_share <= 1)
        if self.match_snr_mean and self.schedule not in ("uni-increasing", "uni-decreasing"):
            raise ConfigError(
                "plan.match_snr_mean goes with plan.schedule uni-increasing or uni-decreasing, "
                f"got {self.schedule}; constant has the SNR schedule's mean already."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Gradient training, of the base or of an expert."""

    num_steps: int = 2000
    """Optimizer steps."""

    batch_size: int = 64
    """Images per optimizer step, over all workers."""

    micro_batch_size: int | None = None
    """Images per forward pass of one worker; gradients are accumulated. None: the whole share."""

    learning_rate: float = 1e-3
    """AdamW's learning rate after the warm-up."""

    num_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; None: never."""

    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the weights, in [0, 1)."""

    ema_warmup: bool = False
    """Let the decay rise as 1 - (1 + step)^(-2/3) until it reaches `ema_decay`."""

    loss_weight: LossWeight = "constant"
    """Weight of a timestep's L_simple: constant is 1, min-snr min(snr, gamma) / snr
    (arXiv:2303.09556), p2 1 / (1 + snr)^gamma (arXiv:2204.00227). L_vlb of a learned variance and
    the losses that pruning measures have no weight."""

    loss_weight_gamma: float | None = None
    """gamma of `loss_weight`; None: the papers' 5 for min-snr, 1 for p2."""

    precision: Precision = "fp32"
    """fp32, or autocast to bf16 or fp16 (the latter with a gradient scaler). auto: bf16 where a
    short probe on a worker, kept in the run directory, finds it faster, else fp32."""

    compile: Compile = "none"
    """torch.compile's mode for the denoiser, which takes minutes before the first step; none: not
    at all. reduce-overhead uses CUDA graphs, for steps so short that launching them counts."""

    log_every: int = 50
    """Steps between two reports of the loss."""

    checkpoint_every: int = 1000
    """Steps between two checkpoints, from which a run that was cut goes on."""

    keep_checkpoints: int = 2
    """How many checkpoints of the base are kept; an expert keeps one until it is done."""

    def check(self, stage: str) -> None:
        """Refuse wrong values under the name of the stage, which only the whole config knows.

        Raises:
            ConfigError: A value is out of its range.
        """
        positive = ("batch_size", "micro_batch_size", "log_every", "checkpoint_every")
        at_least(1, stage, self, *positive, "keep_checkpoints")
        at_least(0, stage, self, "num_steps", "num_warmup_steps", "weight_decay")
        require(stage, self, "learning_rate", "above 0", ok=self.learning_rate > 0)
        clipped = self.max_grad_norm is None or self.max_grad_norm > 0
        require(stage, self, "max_grad_norm", "above 0, or None", ok=clipped)
        require(stage, self, "ema_decay", "in [0, 1)", ok=0 <= self.ema_decay < 1)
        gamma = self.loss_weight_gamma
        rule = "above 0, or None, and None with loss_weight constant"
        fits = gamma is None or (gamma > 0 and self.loss_weight != "constant")
        require(stage, self, "loss_weight_gamma", rule, ok=fits)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How images are drawn from the model."""

    sampler: Sampler = "ddim"
    """The diffusers scheduler; timesteps are spaced as its `leading`. pndm is PNDM by linear
    multistep alone, without Runge-Kutta steps, as in latent diffusion."""

    num_inference_steps: int = 100
    """Denoising steps; pndm evaluates the network once more, at the second timestep again."""

    eta: float = 0.0
    """Stochasticity of DDIM, in [0, 1]; ddpm and pndm have none to set."""

    guidance_scale: float = 1.0
    """Weight s of classifier-free guidance, unconditional + s (conditional - unconditional), for
    which every step takes two forward passes; 1: none."""

    steps_offset: int = 0
    """Added to every sampled timestep (1 for latent diffusion)."""

    clip_sample: bool = True
    """Clip the predicted image to [-1, 1]; right for pixels, wrong for latents. Not for pndm."""

    set_alpha_to_one: bool = True
    """The step after the last has no noise at all (diffusers' name); with ddpm always so."""

    def __post_init__(self) -> None:
        at_least(1, "sampler", self, "num_inference_steps")
        at_least(0, "sampler", self, "guidance_scale")
        require("sampler", self, "eta", "in [0, 1]", ok=0 <= self.eta <= 1)
        require("sampler", self, "steps_offset", "0 or 1", ok=self.steps_offset in (0, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """How the base and the experts are scored."""

    num_images: int = 50_000
    """Images sampled from each model."""

    batch_size: int = 250
    """Images sampled at once."""

    seed: int = 0
    """Seed of the initial noise, the same for the base and the experts."""

    precision: FixedPrecision = "fp32"
    """Of the denoisers' weights and computation while the images that are scored are sampled; a
    score depends a little on it. Features, a first stage and measured times keep their own."""

    features: Literal["auto", "inception", "classifier"] = "auto"
    """What measures the Frechet distance. auto: Inception where its weights are to be had, else a
    small classifier trained on the data's labels, after which the metric is then named."""

    inception_path: str | None = None
    """The folder that holds inception-2015-12-05.pt; None: the cache, then the network."""

    cache_dir: str = "~/.cache/tdc_ray"
    """Where Inception, trained classifiers and moments of training images are kept for all runs;
    on a cluster it must be a place that all nodes see."""

    reference: str | None = None
    """Name of clean-fid's ready statistics of the training split (cifar10); None: the data."""

    def __post_init__(self) -> None:
        at_least(2, "evaluate", self, "num_images")
        at_least(1, "evaluate", self, "batch_size")
        unread = self.features == "classifier" and self.inception_path is not None
        rule = "left out, or features inception or auto: a classifier does not read it"
        require("evaluate", self, "inception_path", rule, ok=not unread)
