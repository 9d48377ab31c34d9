"""What a user would run instead, written as its own project writes it.

The training step is that of diffusers' examples/unconditional_image_generation: AdamW and EMA with
the settings of its command line, ``DDPMScheduler.add_noise``, the cosine learning rate, clipping
to 1, and the loss read at every step for the progress bar. Left out are accelerate, which only
forwards calls in one process without mixed precision, and the bar and trackers themselves. Data
loading is torchvision's ``ImageFolder`` in place of the ``datasets`` package, with the example's
transforms and DataLoader.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tdc_ray.diffusion.loss import loss_per_image
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.diffusion.sampling import image_generators
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.unet import build_unet


class ExampleTraining:
    """Training as in diffusers' unconditional example."""

    def __init__(self, config: NetworkConfig) -> None:
        self.unet = build_unet(config).train()
        self.ema = EMAModel(
            self.unet.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=3 / 4,
            model_cls=UNet2DModel,
            model_config=self.unet.config,
        )
        self.noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.lr_scheduler = get_scheduler(
            "cosine", optimizer=self.optimizer, num_warmup_steps=500, num_training_steps=100_000
        )

    def step(self, clean_images: Tensor) -> float:
        """Run one step; return the loss."""
        noise = torch.randn(clean_images.shape, device=clean_images.device)
        num_timesteps = self.noise_scheduler.config.num_train_timesteps
        shape = (len(clean_images),)
        timesteps = torch.randint(0, num_timesteps, shape, device=clean_images.device)
        noisy_images = self.noise_scheduler.add_noise(clean_images, noise, timesteps)
        output = self.unet(noisy_images, timesteps).sample
        loss = torch.nn.functional.mse_loss(output.float(), noise.float())
        loss.backward()
        self.update()
        return loss.detach().item()

    def update(self) -> None:
        """Clip, step, clear the gradients and average the weights."""
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())


def example_loader(folder: Path, image_size: int, batch_size: int) -> DataLoader[list[Tensor]]:
    """Load images as diffusers' unconditional example does, with random flips."""
    steps = [
        transforms.Resize(image_size, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(image_size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
    dataset = ImageFolder(str(folder), transforms.Compose(steps))
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=0)


def ddim_pipeline(unet: UNet2DModel, scheduler: DDIMScheduler) -> DDIMPipeline:
    """Return the part of a UNet that diffusers' pipeline can use.

    It supports no learned variance: of twice as many outputs as inputs it uses the first half, by
    a last convolution without the others.
    """
    channels = unet.config["in_channels"]
    half = UNet2DModel.from_config({**unet.config, "out_channels": channels})
    state = unet.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = state[name][:channels]
    half.load_state_dict(state)
    pipeline = DDIMPipeline(half.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ddim_images(pipeline: DDIMPipeline, num_images: int, steps: int) -> Tensor:
    """Sample with diffusers' pipeline: ``(B, C, H, W)`` in [0, 1], from the noise of seed 0.

    Clipped outputs are used, as in improved-diffusion and here.
    """
    images = pipeline(
        num_images,
        image_generators(0, 0, num_images),
        num_inference_steps=steps,
        use_clipped_model_output=True,
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@torch.no_grad()
def plain_loss(
    unet: UNet2DModel, batches: Sequence[NoisedBatch], schedule: NoiseSchedule
) -> float:
    """Measure the mean loss as a script would: the whole network on all images, nothing shared."""
    losses = [loss_per_image(schedule, batch.predict(unet, schedule), batch) for batch in batches]
    return float(torch.cat(losses).double().mean())
