"""Gradient training: ``--base.*``, ``--finetune.*`` and an autoencoder's ``--train.*``."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict

from tdc_ray.config.validation import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    require,
)

FixedPrecision = Literal["fp32", "bf16", "fp16"]
Precision = Literal["auto", FixedPrecision]
Compile = Literal["none", "default", "reduce-overhead"]
LossWeight = Literal["constant", "min-snr", "p2"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]
OptimizerState = Literal["new", "base"]
Allocation = Literal["equal", "timesteps", "excess"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Gradient training, of the base or of an expert."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", revalidate_instances="always")

    num_steps: NonNegativeInt = 2000
    """Optimizer steps."""

    batch_size: PositiveInt = 64
    """Images per optimizer step, over all workers."""

    micro_batch_size: PositiveInt | None = None
    """Images per forward pass of one worker; gradients are accumulated. None means the whole
    share."""

    learning_rate: PositiveFloat = 1e-3
    """AdamW's learning rate after the warm-up."""

    num_warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""

    lr_schedule: LearningRateSchedule = "constant"
    """What the learning rate does after the warm-up: constant stays, linear and cosine
    (arXiv:1608.03983) fall to 0 at `num_steps`."""

    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""

    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are clipped to this norm; None means never."""

    ema_decay: Share = 0.9999
    """Decay of the exponential moving average of the weights, in [0, 1)."""

    ema_warmup: bool = False
    """Let the decay rise as 1 - (1 + step)^(-2/3) until it reaches `ema_decay`."""

    loss_weight: LossWeight = "constant"
    """Weight of a timestep's L_simple: constant is 1, min-snr min(snr, gamma) / snr
    (arXiv:2303.09556), p2 1 / (1 + snr)^gamma (arXiv:2204.00227). L_vlb of a learned variance and
    the losses that pruning measures have no weight."""

    loss_weight_gamma: PositiveFloat | None = None
    """gamma of `loss_weight`; None means the papers' 5 for min-snr, 1 for p2."""

    input_perturbation: NonNegativeFloat = 0.0
    """gamma of the normal noise that is added to the noise in the denoiser's input and not to what
    it is to predict (arXiv:2301.11706, where it is 0.1): a sampler's inputs are a little off, too.
    0: none."""

    precision: Precision = "fp32"
    """fp32, or autocast to bf16 or fp16 (the latter with a gradient scaler). auto: bf16 where a
    short probe on a worker, kept in the run directory, finds it faster, else fp32."""

    compile: Compile = "none"
    """torch.compile's mode for the denoiser, which takes minutes before the first step; none: not
    at all. reduce-overhead uses CUDA graphs, for steps so short that launching them counts."""

    log_every: PositiveInt = 50
    """Steps between two reports of the loss."""

    checkpoint_every: PositiveInt = 1000
    """Steps between two checkpoints, from which an interrupted run resumes."""

    keep_checkpoints: PositiveInt = 2
    """How many checkpoints of the base are kept; an expert keeps one until it is done."""

    def check(self, stage: str) -> None:
        """Refuse settings that disagree, under the stage's name, which only the caller knows.

        Raises:
            ConfigError: Two settings disagree.
        """
        plain = self.loss_weight_gamma is None or self.loss_weight != "constant"
        require(stage, self, "loss_weight_gamma", "None with loss_weight constant", ok=plain)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(TrainConfig):
    """Gradient training of an expert, which starts from the base, pruned and refitted."""

    average_with_start: Share = 0.0
    """Share of the weights that the fine-tune began with, of the pruned and refitted base, in the
    average that is saved as the expert, in [0, 1) (WiSE-FT, arXiv:2109.01903). It takes no
    training; 0: the fine-tuned weights as they are."""

    timestep_margin: Share = 0.0
    """Timesteps beyond the group's that are drawn too, on either side, as a share of the number of
    its own; 0: none."""

    allocation: Allocation = "equal"
    """How the fine-tunes of all groups, `num_steps` each on average, share their steps. equal:
    alike; timesteps: by the number of a group's timesteps; excess: by that times what its limit
    adds to its loss, as a quadratic model predicts: a group that is not pruned gets none."""

    distillation_share: Share = 0.0
    """Share of what the unpruned base predicts in the target, in [0, 1), the rest is the noise
    itself: distillation (arXiv:1503.02531), whose forward pass of the base counts among the
    training macs. 0: none."""

    optimizer_state: OptimizerState = "new"
    """AdamW's moments and count of steps before the first step: new has none, base those of stage
    1's last checkpoint, pruned as the weights are. The warm-up is the same for both."""

    @classmethod
    def of(cls, train: TrainConfig) -> Self:
        """Return the fine-tune that trains as a base does."""
        values: dict[str, Any] = {one.name: getattr(train, one.name) for one in fields(train)}
        return cls(**values)
