"""Whether a base predicts what it is said to: no file of weights says so."""

import math

import torch

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import blank_labels
from tdc_ray.models.labels import conditions
from tdc_ray.models.network_config import image_size

_NUMBERS = 2048
"""Least numbers of noise that are looked at: a chance correlation of them is below 0.1."""

_LEAST = 0.5
"""Of epsilon. A trained network's is above 0.9, that of one that predicts the image near 0."""


@torch.inference_mode()
def prediction_doubt(unet: Denoiser, diffusion: DiffusionConfig) -> str | None:
    """Compare what a network outputs for pure noise with the noise; return a doubt in words.

    At the last timestep there is nothing but noise: a network that predicts epsilon outputs its
    input again, rectified flow's something near it, and others something else.

    Args:
        unet: The network, in eval mode.
        diffusion: What it is said to predict, and its timesteps.
    """
    channels, last = unet.config["in_channels"], diffusion.num_timesteps - 1
    shape = (channels, *image_size(unet.config))
    count = math.ceil(_NUMBERS / math.prod(shape))
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    timesteps = noise_schedule(diffusion).model_timesteps(torch.full((count,), last))
    told = conditions(blank_labels(unet, count))
    output = unet(noise, timestep=timesteps, **told).sample[:, :channels]
    correlation = torch.corrcoef(torch.stack([noise.flatten(), output.flatten()]))[0, 1].item()
    has_noise = diffusion.prediction_type in ("epsilon", "flow_prediction")
    has_noise = has_noise and not diffusion.is_edm  # whose output there is the image
    if (correlation >= _LEAST) == has_noise:
        return None
    return (
        f"its output for pure noise at timestep {last} correlates with that noise by "
        f"{correlation:.2f}, and of a trained network that predicts {diffusion.prediction_type} "
        f"this is {'near 1' if has_noise else 'far below 1'}. Check "
        "--diffusion.prediction-type, timesteps, heads and --model.use-new-attention-order, if "
        "its samples are no images"
    )
