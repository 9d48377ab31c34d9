"""The one training loop, for the base and for the experts."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tdc_ray.config.data import DataConfig
from tdc_ray.config.train import LearningRateSchedule, TrainConfig
from tdc_ray.data.batches import augment, to_minus_one_one
from tdc_ray.data.dataset import ImageBatch
from tdc_ray.diffusion.loss import Teacher, denoising_loss, loss_weights
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.diffusion.sharding import gathered, shard, shard_like
from tdc_ray.errors import CheckpointError, NonFiniteLossError, is_from_outside
from tdc_ray.execution.device import worker_rank
from tdc_ray.execution.item import Report
from tdc_ray.models.checkpoints.state_dicts import UNREADABLE
from tdc_ray.models.families import labels_for
from tdc_ray.models.labels import CaptionDropout, Captions, Labels, map_labels
from tdc_ray.models.network_config import num_class_embeds
from tdc_ray.models.precision import autocast, in_layout
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import atomic_path, fetch
from tdc_ray.storage.object_store import display_path

_PARTS = ("unet", "ema", "optimizer", "scaler")
"""The parts of a training that have a state, under a checkpoint's keys."""

DECAYS: Mapping[LearningRateSchedule, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""The learning rate's share that is left, by the share of the steps after the warm-up that are
done: diffusers' schedules of these names (whose warm-up would begin at 0)."""


@dataclass(slots=True)
class TrainState:
    """All that changes while training, and so all that a checkpoint holds."""

    unet: UNet2DModel
    ema: EMAModel
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    step: int = 0
    start: list[Tensor] | None = None
    """The weights before the first step, where they are needed after the last."""

    structure: UNet2DModel | None = None
    """Where ranks share the weights (`sharding`): the network as it is without, its weights on the
    meta device. None where every rank holds all."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.unet.parameters()).device
        return device

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors, sharded ones if ranks share them, and plain values."""
        states = {name: getattr(self, name).state_dict() for name in _PARTS}
        start = {} if self.start is None else {"start": self.start}
        return states | {"step": self.step} | start

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        if self.structure is None:
            self._bring_moments_into_layout()
        self.ema.to(self.device)
        self.step = state["step"]
        if self.start is not None:
            for weights, saved in zip(self.start, state["start"], strict=True):
                weights.copy_(saved)

    def _bring_moments_into_layout(self) -> None:
        """Copy moments whose memory is ordered otherwise than the weights'.

        Those of ranks that share the state, or of another device, are; AdamW's fused kernels pair
        numbers by their place in memory.
        """
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)

    def save(self, path: Path) -> None:
        """Write a checkpoint file, atomically: every rank calls it, the first one writes.

        It is of one format whether or not ranks share the state, so that any number of ranks
        resumes from it, sharing it or not.
        """
        state = gathered(self.state_dict())
        if worker_rank().rank == 0:
            with atomic_path(path) as temporary:
                torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Read a checkpoint file; it is never unpickled.

        Raises:
            CheckpointError: It cannot be read or does not fit the model.
        """
        with reading_checkpoint(path):
            if self.structure is None:
                state = torch.load(fetch(path), map_location=self.device, weights_only=True)
            else:  # mapped, as a rank needs but its share of every tensor
                state = torch.load(fetch(path), map_location="cpu", mmap=True, weights_only=True)
                self._shard(state)
            self.load_state_dict(state)

    def _shard(self, state: dict[str, Any]) -> None:
        """Replace the tensors of a checkpoint by this rank's shards."""
        weights, parameters = self.unet.state_dict(), list(self.unet.parameters())
        for name, value in state["unet"].items():
            state["unet"][name] = shard_like(value, weights.get(name))
        moments = state["optimizer"]["state"]
        for number, values in moments.items():
            for name, value in values.items():
                values[name] = shard_like(value, parameters[number])
        for holder, name in ((state["ema"], "shadow_params"), (state, "start")):
            if name in holder:
                pairs = zip(holder[name], parameters, strict=True)
                holder[name] = [shard_like(value, parameter) for value, parameter in pairs]

    @contextlib.contextmanager
    def ema_weights(self, start_share: float = 0.0) -> Iterator[UNet2DModel]:
        """Yield the UNet with its averaged weights (EMA), in eval mode.

        Where ranks share the weights all of them enter: the first gets a whole copy with the
        averages, the others the sharded UNet, which a rank cannot run alone.

        Args:
            start_share: Share of the weights before the first step in those that are yielded: both
                are interpolated linearly (WiSE-FT, arXiv:2109.01903, equation 1).
        """
        if self.structure is not None:
            yield self._whole_average(self.structure, start_share)
            return
        parameters = list(self.unet.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        if start_share:
            assert self.start is not None, "start_state(keep_start=True) keeps them"
            with torch.no_grad():
                for parameter, start in zip(parameters, self.start, strict=True):
                    parameter.lerp_(start, start_share)
        self.unet.eval()
        try:
            yield self.unet
        finally:
            self.ema.restore(parameters)
            self.unet.train()

    def _whole_average(self, structure: UNet2DModel, start_share: float) -> UNet2DModel:
        """Gather averaged weights that ranks share, for the first."""
        averages = gathered(self.ema.shadow_params)
        starts = gathered(self.start) if start_share else averages
        if worker_rank().rank != 0:
            return self.unet
        network = copy.deepcopy(structure)
        weights = {
            name: average.lerp(start, start_share)
            for (name, _), average, start in zip(
                network.named_parameters(), averages, starts, strict=True
            )
        }
        network.load_state_dict(weights, strict=False, assign=True)  # its buffers are there
        return network.to(self.device).eval()


@contextlib.contextmanager
def reading_checkpoint(path: Path) -> Iterator[None]:
    """Translate the errors of a block that reads a checkpoint file.

    Raises:
        CheckpointError: It cannot be read or does not fit the model.
    """
    try:
        yield
    except UNREADABLE as error:
        if is_from_outside(error):
            raise
        raise CheckpointError(
            f"{display_path(path)} is no checkpoint of this model: {error}"
        ) from error


def start_state(
    unet: UNet2DModel,
    config: TrainConfig,
    *,
    keep_start: bool = False,
    mesh: DeviceMesh | None = None,
) -> TrainState:
    """Prepare a UNet, already on its device unless there is a mesh, for its first step.

    Args:
        unet: What is trained.
        config: How.
        keep_start: Keep the weights that it starts from, which :meth:`TrainState.ema_weights` can
            then average with.
        mesh: The ranks that share the weights, and all that the state holds of them, all of which
            call this with the same UNet. None means that each holds everything.
    """
    structure = None
    if mesh is None:
        in_layout(unet, config.precision)
    else:  # FSDP gathers contiguous weights alone
        structure = cast(UNet2DModel, shard(unet, mesh, config.precision))
    parameters = list(unet.parameters())
    device = parameters[0].device
    return TrainState(
        unet=unet.train(),
        ema=EMAModel(
            parameters,
            decay=config.ema_decay,
            # Without a minimum decay diffusers warms up by (1 + step) / (10 + step), and without
            # the -1 the average starts from the weights after the first step, not before it.
            min_decay=0.0 if config.ema_warmup else config.ema_decay,
            update_after_step=0 if config.ema_warmup else -1,
            use_ema_warmup=config.ema_warmup,
            foreach=mesh is None,  # it copies no shards
        ),
        optimizer=torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        start=[one.detach().clone() for one in parameters] if keep_start else None,
        structure=structure,
    )


def train(
    state: TrainState,
    model: nn.Module,
    images: Iterable[ImageBatch],
    schedule: NoiseSchedule,
    config: TrainConfig,
    data: DataConfig,
    *,
    timesteps: range,
    seed: int,
    rank: int = 0,
    label_dropout: float = 0.0,
    caption_dropout: CaptionDropout | None = None,
    teacher: Teacher | None = None,
    report: Report,
    save: Callable[[TrainState], None],
) -> None:
    """Train from ``state.step`` to ``config.num_steps`` on noise of ``timesteps`` alone.

    All that is random follows from ``(seed, rank, step)``: a run that resumes from a checkpoint
    ends with the weights, bit for bit, of one that was not interrupted.

    Args:
        state: What is trained; holds the bare UNet.
        model: The same UNet, wrapped for data parallel training where there are several ranks
            that do not share its weights.
        images: The rank's batches, from ``state.step`` on.
        schedule: The noise schedule, on the device of the model.
        config: Steps, learning rate, precision.
        data: Augmentation flags.
        timesteps: The contiguous timesteps to draw from.
        seed: Seed of noise, timesteps, augmentation and dropout.
        rank: The rank among the workers.
        label_dropout: Share of labels that a UNet conditioned on classes sees as its last class.
        caption_dropout: The same of captions; None means that none is replaced.
        teacher: Whose predictions are part of the target; None means nobody's.
        report: Gets ``loss`` (weighted, mean since the last report), ``grad_norm``,
            ``learning_rate`` and ``images_per_second`` (of this rank) every ``config.log_every``
            steps.
        save: Called every ``config.checkpoint_every`` steps and after the last one, on every rank.

    Raises:
        NonFiniteLossError: The loss became NaN or infinite.
    """
    device, losses = state.device, LossWindow(state.step)
    weights = loss_weights(schedule, config.loss_weight, config.loss_weight_gamma)
    if config.compile != "none":
        torch.compiler.reset()  # of the models before, whose other widths count as recompilations
        model = cast(nn.Module, torch.compile(model, mode=config.compile))
    for pixels, labels in images:
        seed_parts = (seed, rank, state.step)
        torch.manual_seed(derive_seed(*seed_parts, "dropout"))  # dropout takes no generator
        generator = torch.Generator(device).manual_seed(derive_seed(*seed_parts, "noise"))
        augment_generator = torch.Generator().manual_seed(derive_seed(*seed_parts, "augment"))
        augmented = augment(pixels, data, augment_generator)
        x_0 = to_minus_one_one(augmented.to(device, non_blocking=True))
        batch = NoisedBatch(
            x_0,
            epsilon=torch.randn(x_0.shape, generator=generator, device=device),
            timesteps=schedule.draw_timesteps(len(x_0), timesteps, generator),
            labels=_labels(state.unet, labels, label_dropout, caption_dropout, seed_parts),
        )
        if gamma := config.input_perturbation:  # drawn last: without it nothing else changes
            noise = torch.randn(x_0.shape, generator=generator, device=device)
            batch = replace(batch, perturbation=gamma * noise)
        losses.add(_backward(state, model, schedule, config, batch, weights, teacher))
        grad_norm = update(state, config)
        last = state.step == config.num_steps
        checkpoint = last or state.step % config.checkpoint_every == 0
        if checkpoint or state.step % config.log_every == 0:
            loss, steps_per_second = losses.take()
            metrics = {
                "loss": loss,
                "grad_norm": float(grad_norm),
                "learning_rate": learning_rate_at(config, state.step - 1),
                "images_per_second": steps_per_second * len(x_0),
            }
            report(metrics, state.step)
        if checkpoint:
            save(state)


def _labels(
    unet: UNet2DModel,
    labels: Tensor | Captions,
    label_dropout: float,
    caption_dropout: CaptionDropout | None,
    seed_parts: tuple[int, int, int],
) -> Labels:
    """Replace some labels, at random, by the null class or the empty prompt.

    None for a UNet that reads no labels.
    """
    num_classes = num_class_embeds(unet.config)
    generator = torch.Generator().manual_seed(derive_seed(*seed_parts, "labels"))
    if not isinstance(labels, Tensor):
        if caption_dropout is not None:
            labels = caption_dropout.apply(labels, generator)
    elif label_dropout and num_classes is not None:
        dropped = torch.rand(len(labels), generator=generator) < label_dropout
        labels = labels.masked_fill(dropped, num_classes - 1)
    return map_labels(lambda tensor: tensor.to(unet.device), labels_for(unet, labels))


def _backward(
    state: TrainState,
    model: nn.Module,
    schedule: NoiseSchedule,
    config: TrainConfig,
    batch: NoisedBatch,
    weights: Tensor | None,
    teacher: Teacher | None,
) -> Tensor:
    """Accumulate the gradients of all micro-batches; return the mean loss, on the device."""
    num_images = len(batch.x_0)
    total = torch.zeros((), device=state.device)
    parts = list(batch.split(config.micro_batch_size or num_images))
    for number, part in enumerate(parts, start=1):
        last = number == len(parts)
        with _gradient_sync(model, last=last), autocast(config.precision, state.device):
            losses = denoising_loss(model, schedule, part, weights=weights, teacher=teacher)
            loss = losses.sum() / num_images
            state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def _gradient_sync(model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """Let ranks exchange gradients with the last micro-batch alone."""
    model = getattr(model, "_orig_mod", model)  # behind torch.compile
    if not last and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def update(state: TrainState, config: TrainConfig) -> Tensor:
    """Run an optimizer step, and clear the gradients; return their norm before clipping.

    The average of the weights and the count of steps are updated too.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(config, state.step)
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.unet.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # a rank has the norm of its shards
        norm = norm.full_tensor()
    if config.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(state.unet.parameters(), config.max_grad_norm, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.step(state.unet.parameters())
    state.step += 1
    return norm


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Compute the learning rate of a step, counted from 0.

    It follows from the step alone, so a checkpoint needs none of it.
    """
    if step < config.num_warmup_steps:
        return config.learning_rate * (step + 1) / config.num_warmup_steps
    decay = DECAYS[config.lr_schedule]
    done = (step - config.num_warmup_steps) / max(1, config.num_steps - config.num_warmup_steps)
    return config.learning_rate * decay(done)


class LossWindow:
    """Losses since the last report, left on the device so that no step waits for it."""

    def __init__(self, first_step: int) -> None:
        self._first_step = first_step
        self._losses: list[Tensor] = []
        self._since = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step, ``()``."""
        self._losses.append(loss)

    def take(self) -> tuple[float, float]:
        """Return the mean loss and the steps per second, and start over.

        Raises:
            NonFiniteLossError: A loss is NaN or infinite.
        """
        values = torch.stack(self._losses).tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFiniteLossError(self._first_step + offset + 1, value)
        now = time.perf_counter()
        steps_per_second = len(values) / (now - self._since)
        self._first_step += len(values)
        self._losses, self._since = [], now
        return sum(values) / len(values), steps_per_second
