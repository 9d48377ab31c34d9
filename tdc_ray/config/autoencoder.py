"""A first stage and its training: the flags of ``tdc-ray train-autoencoder``."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from tdc_ray.config.data import DataConfig
from tdc_ray.config.image_size import size_text
from tdc_ray.config.train import TrainConfig
from tdc_ray.config.validation import NonNegativeFloat, PositiveInt, refuse, require, settings

EightChannels = Annotated[int, Field(ge=8, multiple_of=8)]
"""GroupNorm has 8 groups."""


@settings()
class AutoencoderConfig:
    """A small AutoencoderKL, and how it is trained."""

    seed: int = 0
    """Seed of everything random."""

    data: DataConfig = field(
        default_factory=lambda: DataConfig(source="npz", path="mnist.npz", image_size=32)
    )
    """The images."""

    block_out_channels: Annotated[tuple[EightChannels, ...], Field(min_length=1)] = (16, 32, 64)
    """Channels at each resolution; each but the first halves height and width of the latents."""

    layers_per_block: PositiveInt = 1
    """Residual blocks at each resolution."""

    latent_channels: PositiveInt = 4
    """Channels of the latents."""

    loss: Literal["l1", "mse"] = "l1"
    """How far a reconstruction is off, summed over an image's pixels."""

    kl_weight: NonNegativeFloat = 1e-3
    """Weight of the posterior's divergence from a standard normal, summed over the latents."""

    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the images that no step sees and that the reconstruction error is measured on."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            num_steps=1000,
            batch_size=32,
            learning_rate=1e-3,
            num_warmup_steps=50,
            ema_decay=0.995,
            ema_warmup=True,
            checkpoint_every=100,
        )
    )
    """Optimizer steps; the averaged weights are what is saved."""

    def __post_init__(self) -> None:
        self.train.check("train")
        whole = self.train.micro_batch_size is None
        require("train", self.train, "micro_batch_size", "None for an autoencoder", ok=whole)
        known, plain = self.train.precision != "auto", self.train.compile == "none"
        require(
            "train", self.train, "precision", "fp32, bf16 or fp16 for an autoencoder", ok=known
        )
        require("train", self.train, "compile", "none for an autoencoder", ok=plain)
        factor = self.downsampling
        if self.data.height % factor or self.data.width % factor:
            refuse(
                f"data.image_size must be a multiple of {factor} for block_out_channels "
                f"{self.block_out_channels}, got {size_text(self.data.image_size)}."
            )
        if self.data.first_stage is not None:
            refuse(
                "data.first_stage must be None where a first stage is trained, got "
                f"{self.data.first_stage}."
            )

    @property
    def downsampling(self) -> int:
        """How many times smaller the latents are than the images."""
        return 1 << len(self.block_out_channels) - 1
