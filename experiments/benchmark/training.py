"""Training: the step, its optimizer and EMA alone, and its data."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmark.peers import ExampleTraining, example_loader
from benchmark.timing import Row, SpeedFlags, compared
from tdc_ray.config.data import DataConfig
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.train import Precision, TrainConfig
from tdc_ray.data.batches import augment, batches, to_minus_one_one
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.train import TrainState, start_state, train
from tdc_ray.diffusion.train import update as train_update
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.models.unet2d.unet import build_unet

EXAMPLE = "diffusers' example"
CONFIG = TrainConfig(learning_rate=1e-4, weight_decay=1e-6, max_grad_norm=1.0, ema_warmup=True)
"""The example's, as far as a step's work depends on it."""


def trained_unet(flags: SpeedFlags) -> NetworkConfig:
    """Return the UNet that is trained, without the learned variance that the example lacks."""
    found = architecture("tiny" if flags.smoke else "iddpm-cifar10")
    return {**found, "out_channels": found["in_channels"]}


def random_images(config: NetworkConfig, count: int) -> Tensor:
    """Draw uint8 images of a UNet's size."""
    size = config["sample_size"]
    return torch.randint(0, 256, (count, config["in_channels"], size, size), dtype=torch.uint8)


@dataclass(frozen=True)
class OurTraining:
    """``tdc_ray.diffusion.train`` as the base's training calls it."""

    state: TrainState
    config: TrainConfig = CONFIG

    def step(self, images: Tensor, num_steps: int = 1) -> None:
        """Run some steps on the same images, and read the loss after them."""
        last = self.state.step + num_steps
        labels = torch.full((len(images),), -1)
        size, channels = images.shape[-1], images.shape[1]
        train(
            self.state,
            self.state.unet,
            [(images, labels)] * num_steps,
            noise_schedule(DiffusionConfig()),
            replace(self.config, num_steps=last, batch_size=len(images), log_every=last),
            DataConfig(image_size=size, num_channels=1 if channels == 1 else 3),
            timesteps=range(1000),
            seed=0,
            report=lambda _metrics, _step: None,
            save=lambda _state: None,
        )


def our_training(config: NetworkConfig, precision: Precision = "fp32") -> OurTraining:
    """Return our way of training in a precision."""
    chosen = replace(CONFIG, precision=precision)
    return OurTraining(start_state(build_unet(config), chosen), chosen)


def our_trainings(config: NetworkConfig) -> dict[str, OurTraining]:
    """Return our ways of training; fp32 also in the memory layout that bf16 has."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    found = {f"ours, {precision}": our_training(config, precision) for precision in precisions}
    last = our_training(config)
    unet: Any = last.state.unet
    unet.to(memory_format=torch.channels_last)
    return {**found, "ours, fp32, channels last": last}


def step(flags: SpeedFlags) -> list[Row]:
    """Time training steps."""
    config, batch = trained_unet(flags), 8
    images = random_images(config, batch)
    example = ExampleTraining(config)
    ways = {EXAMPLE: partial(example.step, to_minus_one_one(images))}
    ways |= {name: partial(ours.step, images) for name, ours in our_trainings(config).items()}
    return compared(
        "training step",
        ways,
        flags.repeats,
        against=EXAMPLE,
        batch=batch,
    )


def update(flags: SpeedFlags) -> list[Row]:
    """Time clipping, optimizer and EMA alone, on gradients that are given."""
    config = trained_unet(flags)
    example, ours = ExampleTraining(config), our_training(config)
    gradients = [torch.randn_like(parameter) for parameter in example.unet.parameters()]

    def give(unet: torch.nn.Module) -> None:
        for parameter, gradient in zip(unet.parameters(), gradients, strict=True):
            parameter.grad = gradient

    def as_example() -> None:
        give(example.unet)
        example.update()

    def as_we() -> None:
        give(ours.state.unet)
        train_update(ours.state, ours.config)

    ways = {EXAMPLE: as_example, "ours": as_we}
    return compared("EMA and optimizer", ways, flags.repeats, against=EXAMPLE)


def loading(flags: SpeedFlags) -> list[Row]:
    """Time an epoch of flipped images in [-1, 1], from PNG files and from an npz file."""
    count, batch = (32, 8) if flags.smoke else (2048, 64)
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    with tempfile.TemporaryDirectory() as place:
        folder, npz = Path(place, "folder"), Path(place, "images.npz")
        (folder / "class").mkdir(parents=True)
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(folder / "class" / f"{number:05d}.png")
        np.savez(npz, images=images)
        shape: Mapping[str, Any] = {"image_size": 32, "num_channels": 3, "horizontal_flip": True}
        loader = example_loader(folder, 32, batch)

        def ours(config: DataConfig) -> None:
            generator = torch.Generator().manual_seed(0)
            dataset = load_dataset(config)
            for some, _ in batches(dataset, batch_size=batch, seed=0, num_steps=count // batch):
                to_minus_one_one(augment(some, config, generator))

        sources = {
            "ours, folder": DataConfig(source="folder", path=str(folder), **shape),
            "ours, npz": DataConfig(source="npz", path=str(npz), **shape),
        }
        ways = {"torchvision's ImageFolder": lambda: [None for _ in loader]}
        ways |= {name: partial(ours, config) for name, config in sources.items()}
        return compared(
            "data loading",
            ways,
            flags.repeats,
            against="torchvision's ImageFolder",
            unit="us per image",
            scale=1e6 / count,
            batch=batch,
            precision=lambda _: "",
        )
