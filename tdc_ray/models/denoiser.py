"""What the rest of the package needs of a network, whatever its class."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from tdc_ray.models.network_config import NetworkConfig, num_class_embeds


class DenoiserOutput(Protocol):
    """What a network outputs."""

    sample: Tensor
    """The predicted noise, ``(B, C, H, W)``; with variances ``(B, 2C, H, W)``."""


class Denoiser(Protocol):
    """A network that predicts the noise of images; diffusers' ``UNet2DModel`` is one.

    Beside the call and ``config`` these are members of ``torch.nn.Module``.
    """

    config: NetworkConfig
    """The arguments that it was built with, before pruning."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, sample: Tensor, *, timestep: Tensor, **conditions: Any) -> DenoiserOutput:
        """Predict the noise of images ``(B, C, H, W)`` at timesteps ``(B,)``.

        What else it takes is named by ``labels.conditions``.
        """

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over its weights."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over its weights and their names."""

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its dotted name."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return its weights by name."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object:
        """Load weights by name; all must be there, in their shapes."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over its modules."""

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002
        """Clear the gradients."""

    def eval(self) -> Self:
        """Switch to inference: no dropout."""

    def float(self) -> Self:
        """Bring the weights to float32."""

    def to(self, device: torch.device) -> Self:
        """Move it to a device."""


def has_classes(network: Denoiser) -> bool:
    """Whether a network is conditioned on classes."""
    return num_class_embeds(network.config) is not None


def count_params(module: nn.Module) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
