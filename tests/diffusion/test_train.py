import copy
import itertools
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from tdc_ray.config.data import DataConfig
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.model import ModelConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import LearningRateSchedule, TrainConfig
from tdc_ray.data.batches import batches, held_out_split
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.loss import loss_weights
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.train import TrainState, start_state, train
from tdc_ray.errors import CheckpointError, NonFiniteLossError
from tdc_ray.execution.device import WorkerRank
from tdc_ray.models.unet2d.unet import build_unet
from tdc_ray.runs.stages.base_worker import sample_grid, train_base
from tests.small import TINY, assert_same, output_of, random_unet, small_config

ALONE = WorkerRank(0, 1, torch.device("cpu"))
NUM_STEPS = 6

Metrics = list[tuple[int, dict[str, float]]]


def config_of(*, dropout: float = 0.0, **base: Any) -> RunConfig:
    """Six steps of 16 images, reported at each, with a checkpoint after every second."""
    steps = {"num_steps": NUM_STEPS, "batch_size": 16, "checkpoint_every": 2, "log_every": 1}
    return small_config(model={"dropout": dropout}, base={**steps, "num_warmup_steps": 3, **base})


def run_base(
    config: RunConfig, *, resume_from: Path | None = None, folder: Path | None = None
) -> tuple[TrainState, Metrics]:
    """Train; checkpoints go into ``folder`` under their step."""
    metrics: Metrics = []

    def save(state: TrainState) -> None:
        if folder is not None:
            state.save(folder / f"{state.step}.pt")

    state = train_base(
        config,
        ALONE,
        resume_from=resume_from,
        wrap=lambda unet: unet,
        report=lambda found, step: metrics.append((step, dict(found))),
        save=save,
    )
    return state, metrics


def without_speed(metrics: Metrics) -> Metrics:
    return [
        (step, {name: value for name, value in found.items() if name != "images_per_second"})
        for step, found in metrics
    ]


def losses_of(metrics: Metrics) -> list[float]:
    return [found["loss"] for _, found in metrics]


KINDS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "accumulation-and-dropout": {"dropout": 0.3, "micro_batch_size": 5},
    "no-clipping-no-ema-warmup": {"max_grad_norm": None, "ema_warmup": False},
    "decaying-rate": {"lr_schedule": "cosine", "num_warmup_steps": 1},
    "perturbed": {"input_perturbation": 0.1, "micro_batch_size": 5},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "batch_size": 2, "num_steps": 4},  # slow on CPUs
}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_any_checkpoint_and_resumed_equals_not_stopped(tmp_path, kind):
    config = config_of(**KINDS[kind])
    whole, metrics = run_base(config, folder=tmp_path)
    steps = range(2, config.base.num_steps, 2)
    assert {path.name for path in tmp_path.iterdir()} >= {f"{step}.pt" for step in steps}
    for step in steps:
        torch.manual_seed(step)  # the state of the global generator must not matter
        resumed, rest = run_base(config, resume_from=tmp_path / f"{step}.pt")
        assert_same(resumed.state_dict(), whole.state_dict())
        assert without_speed(rest) == without_speed(metrics[step:])


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As the base of digits is trained."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow  # threads wait long for each other on busy cores
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("two_threads")
def test_a_resumed_training_equals_one_that_was_not_stopped_on_two_threads_too(tmp_path):
    config = replace(config_of(num_steps=4), model=ModelConfig(architecture="digits"))
    whole, _ = run_base(config, folder=tmp_path)
    resumed, _ = run_base(config, resume_from=tmp_path / "2.pt")
    assert_same(resumed.state_dict(), whole.state_dict())


def test_training_twice_is_the_same_and_another_seed_is_another_training():
    one, metrics = run_base(config_of(dropout=0.1))
    torch.manual_seed(9)
    again, same = run_base(config_of(dropout=0.1))
    assert_same(again.state_dict(), one.state_dict())
    assert without_speed(same) == without_speed(metrics)
    _, others = run_base(replace(config_of(dropout=0.1), seed=1))
    assert losses_of(others) != losses_of(metrics)


def test_a_finished_training_is_given_back_as_it_is(tmp_path):
    config = config_of()
    whole, _ = run_base(config, folder=tmp_path)
    again, metrics = run_base(config, resume_from=tmp_path / "6.pt")
    assert_same(again.state_dict(), whole.state_dict())
    assert metrics == []


def test_what_save_does_with_the_state_does_not_change_the_training():
    config, grids = config_of(dropout=0.2), []

    def save(state: TrainState) -> None:
        torch.rand(3)
        with state.ema_weights() as unet:
            grids.append(sample_grid(unet, config, num_images=2))

    state = train_base(
        config, ALONE, resume_from=None, wrap=lambda u: u, report=lambda *_: None, save=save
    )
    assert_same(state.state_dict(), run_base(config)[0].state_dict())
    assert [(grid.shape, grid.dtype) for grid in grids] == [((2, 8, 8, 1), torch.uint8)] * 3


def test_dropout_is_at_work_while_training():
    dropped, plain = run_base(config_of(dropout=0.5))[1], run_base(config_of())[1]
    assert losses_of(dropped)[0] != losses_of(plain)[0]


def gradient_of_first_step(**base: Any) -> tuple[dict[str, Tensor], float]:
    """AdamW's first average of the gradient is a tenth of the gradient itself."""
    state, metrics = run_base(config_of(num_steps=1, max_grad_norm=None, **base))
    found = state.optimizer.state_dict()["state"]
    return {key: values["exp_avg"] for key, values in found.items()}, metrics[0][1]["loss"]


@pytest.mark.parametrize("micro_batch_size", [1, 4, 5, 16, 100])
def test_accumulation_gives_the_gradient_and_loss_of_the_whole_batch(micro_batch_size):
    whole, loss = gradient_of_first_step()
    parts, same_loss = gradient_of_first_step(micro_batch_size=micro_batch_size)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)
    assert same_loss == pytest.approx(loss, rel=1e-5)


def test_a_denoiser_is_compiled_where_that_is_asked_for_and_trains_the_same(monkeypatch):
    plain, metrics = run_base(config_of())
    modes = []

    def compiled(model: nn.Module, mode: str) -> nn.Module:
        modes.append(mode)
        return _Compiled(model)

    monkeypatch.setattr(torch, "compile", compiled)
    found, same = run_base(config_of(compile="reduce-overhead"))
    assert modes == ["reduce-overhead"]
    assert_same(found.state_dict(), plain.state_dict())
    assert without_speed(same) == without_speed(metrics)


class _Compiled(nn.Module):
    """Holds a module as torch.compile does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, *inputs, **named):
        return self._orig_mod(*inputs, **named)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_full_precision(precision):
    steps = {"num_steps": 3, "batch_size": 4}
    full = losses_of(run_base(config_of(**steps))[1])
    state, metrics = run_base(config_of(precision=precision, **steps))
    assert losses_of(metrics) == pytest.approx(full, rel=0.02)
    assert losses_of(metrics) != full
    assert all(parameter.dtype == torch.float32 for parameter in state.unet.parameters())
    assert all(parameter.isfinite().all() for parameter in state.unet.parameters())


def test_the_scale_of_fp16_gradients_is_part_of_a_checkpoint(tmp_path):
    config = config_of(precision="fp16").base
    state, loaded = (start_state(build_unet(TINY), config) for _ in range(2))
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 128.0})
    state.save(tmp_path / "state.pt")
    loaded.load(tmp_path / "state.pt")
    assert loaded.scaler.get_scale() == 128.0


def test_the_loss_falls():
    metrics = run_base(config_of(num_steps=40, log_every=10, checkpoint_every=40))[1]
    losses = losses_of(metrics)
    assert losses[-1] < 0.7 * losses[0]


def test_metrics_are_reported_as_often_as_asked_and_at_checkpoints_and_the_end():
    steps = [step for step, _ in run_base(config_of(num_steps=7, log_every=3))[1]]
    assert steps == [2, 3, 4, 6, 7]
    every = run_base(config_of())[1]
    seldom = run_base(config_of(log_every=100, checkpoint_every=3))[1]
    assert [step for step, _ in seldom] == [3, 6]
    assert losses_of(seldom) == pytest.approx(
        [sum(losses_of(every)[:3]) / 3, sum(losses_of(every)[3:]) / 3]
    )
    assert all(found["images_per_second"] > 0 for _, found in seldom)


def test_the_learning_rate_rises_over_the_warmup_and_stays():
    config = config_of(learning_rate=0.004, num_warmup_steps=4)
    rates = [found["learning_rate"] for _, found in run_base(config)[1]]
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004, 0.004])
    flat = config_of(learning_rate=0.004, num_warmup_steps=0)
    assert [found["learning_rate"] for _, found in run_base(flat)[1]] == [0.004] * NUM_STEPS


@pytest.mark.parametrize("name", get_args(LearningRateSchedule))
def test_after_the_warmup_the_learning_rate_is_that_of_diffusers(name):
    config = config_of(learning_rate=0.004, num_warmup_steps=2, num_steps=9, lr_schedule=name)
    rates = [found["learning_rate"] for _, found in run_base(config)[1]]
    assert rates[:2] == pytest.approx([0.002, 0.004])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.004)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=7)
    for rate in rates[2:]:
        assert rate == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_the_reported_learning_rate_is_the_one_that_is_used():
    config = config_of(learning_rate=0.004, num_warmup_steps=4, num_steps=1)
    torch.manual_seed(0)
    state, _ = run_base(config)
    start, _ = run_base(replace(config, base=replace(config.base, num_steps=0)))
    moved = state.unet.conv_in.weight - start.unet.conv_in.weight
    # AdamW's first step moves every weight by the learning rate, whatever its gradient.
    assert moved.abs().max().item() == pytest.approx(0.001, rel=1e-3)


def test_gradients_are_clipped_to_the_norm_asked_for():
    free, clipped = config_of(num_steps=1, max_grad_norm=None), config_of(num_steps=1)
    clipped = replace(clipped, base=replace(clipped.base, max_grad_norm=0.01))

    def averages(config: RunConfig) -> tuple[Tensor, float]:
        state, metrics = run_base(config)
        found = state.optimizer.state_dict()["state"].values()
        return torch.cat([v["exp_avg"].flatten() for v in found]), metrics[0][1]["grad_norm"]

    (all_of_it, norm), (cut, same_norm) = averages(free), averages(clipped)
    assert norm == same_norm  # reported as it was before clipping
    assert float(all_of_it.norm()) == pytest.approx(0.1 * norm, rel=1e-4)
    assert float(cut.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("held_out_of_base", [False, True])
def test_stage_1_leaves_out_the_images_that_are_held_out_where_asked(tmp_path, held_out_of_base):
    images = load_dataset(DataConfig()).images[:40, 0].numpy()
    prune = {"held_out_of_base": held_out_of_base}
    base = {"num_steps": 3, "batch_size": 16}
    found = []
    for name in ("same", "other"):
        path = tmp_path / f"{name}.npz"
        config = small_config(data={"source": "npz", "path": str(path)}, prune=prune, base=base)
        _, held_out = held_out_split(images, config.prune.held_out_share, config.seed)
        if name == "other":
            images[held_out] = 255 - images[held_out]
        np.savez(path, images=images)
        state, _ = run_base(config)
        found.append(state.unet.state_dict())
    same = all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert same == held_out_of_base


def averages_by_step(**base: Any) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Weights and averaged weights after each step."""
    found: list[tuple[list[Tensor], list[Tensor]]] = []

    def save(state: TrainState) -> None:
        weights = [parameter.detach().clone() for parameter in state.unet.parameters()]
        found.append((weights, copy.deepcopy(state.ema.shadow_params)))

    config = config_of(checkpoint_every=1, **base)
    train_base(
        config, ALONE, resume_from=None, wrap=lambda u: u, report=lambda *_: None, save=save
    )
    return found


def assert_decays(steps: list[tuple[list[Tensor], list[Tensor]]], decays: list[float]) -> None:
    for ((_, before), (weights, after)), decay in zip(
        itertools.pairwise(steps), decays, strict=True
    ):
        expected = [
            decay * old + (1 - decay) * new for old, new in zip(before, weights, strict=True)
        ]
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)


def test_the_average_decays_as_asked_after_the_first_step():
    steps = averages_by_step(ema_decay=0.75, ema_warmup=False)
    assert_decays(steps, [0.75] * (NUM_STEPS - 1))


def test_with_a_warmup_the_decay_rises_to_what_was_asked_for():
    steps = averages_by_step(ema_decay=0.6, ema_warmup=True)
    rising = [1 - (1 + step) ** (-2 / 3) for step in range(1, NUM_STEPS)]
    assert rising[1] < 0.6 < rising[3]
    assert_decays(steps, [min(decay, 0.6) for decay in rising])


def test_averaged_lends_the_average_and_gives_the_weights_back():
    state, _ = run_base(config_of(ema_decay=0.75, ema_warmup=False))
    weights = [parameter.detach().clone() for parameter in state.unet.parameters()]
    with state.ema_weights() as unet:
        assert not unet.training
        assert_same([p.detach() for p in unet.parameters()], state.ema.shadow_params)
    assert state.unet.training
    assert_same([parameter.detach() for parameter in state.unet.parameters()], weights)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights, state.ema.shadow_params, strict=True)
    )


def test_averaged_lends_a_share_of_the_start_where_that_was_kept(tmp_path):
    config = config_of(ema_decay=0.5, ema_warmup=False).base
    state = start_state(random_unet(), config, keep_start=True)
    start = [parameter.detach().clone() for parameter in state.unet.parameters()]
    train_own(state, state.unet, config)
    trained = [parameter.clone() for parameter in state.ema.shadow_params]
    expected = [0.25 * old + 0.75 * new for old, new in zip(start, trained, strict=True)]
    with state.ema_weights(0.25) as unet:
        torch.testing.assert_close([p.detach() for p in unet.parameters()], expected)
    assert_same(state.ema.shadow_params, trained)
    state.save(tmp_path / "state.pt")
    loaded = start_state(random_unet(seed=1), config, keep_start=True)
    loaded.load(tmp_path / "state.pt")
    assert_same(loaded.start, start)


class Recorder(nn.Module):
    """Passes everything on and remembers the timesteps."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.seen: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        self.seen.append(timestep)
        return self.unet(sample, timestep)


def train_own(
    state: TrainState,
    model: nn.Module,
    config: TrainConfig,
    *,
    diffusion: DiffusionConfig | None = None,
    timesteps: range = range(1000),
) -> Metrics:
    run, metrics = small_config(), []
    train(
        state,
        model,
        batches(
            load_dataset(run.data),
            batch_size=config.batch_size,
            seed=0,
            start_step=state.step,
            num_steps=config.num_steps,
        ),
        noise_schedule(diffusion or run.diffusion),
        config,
        run.data,
        timesteps=timesteps,
        seed=0,
        report=lambda found, step: metrics.append((step, dict(found))),
        save=lambda _: None,
    )
    return metrics


def test_a_perturbation_changes_what_the_denoiser_sees_and_no_other_draw():
    plain = run_base(config_of(num_steps=1))[1]
    barely = run_base(config_of(num_steps=1, input_perturbation=1e-6))[1]
    assert losses_of(barely) == pytest.approx(losses_of(plain), rel=1e-4)
    perturbed = run_base(config_of(num_steps=1, input_perturbation=0.5))[1]
    assert abs(losses_of(perturbed)[0] - losses_of(plain)[0]) > 1e-4


@pytest.mark.parametrize("timesteps", [range(1000), range(300, 310), range(999, 1000), range(1)])
def test_only_timesteps_of_the_range_are_drawn_and_all_of_them(timesteps):
    config = replace(config_of().base, num_steps=5, batch_size=64)
    torch.manual_seed(0)
    state = start_state(build_unet(TINY), config)
    recorder = Recorder(state.unet)
    train_own(state, recorder, config, timesteps=timesteps)
    seen = torch.cat(recorder.seen)
    assert len(seen) == 5 * 64
    assert set(seen.tolist()) <= set(timesteps)
    if len(timesteps) <= 10:
        assert set(seen.tolist()) == set(timesteps)
    else:
        assert seen.min() < 50
        assert seen.max() > 950


def test_timesteps_and_noise_differ_from_step_to_step():
    config = replace(config_of().base, num_steps=3)
    state = start_state(build_unet(TINY), config)
    recorder = Recorder(state.unet)
    train_own(state, recorder, config)
    assert len({tuple(seen.tolist()) for seen in recorder.seen}) == 3


def gradient_at(timestep: int, **settings: Any) -> Tensor:
    """A tenth of the first step's gradient, of images noised to one timestep."""
    config = replace(config_of().base, num_steps=1, max_grad_norm=None, **settings)
    torch.manual_seed(0)
    state = start_state(build_unet(TINY), config)
    train_own(state, state.unet, config, timesteps=range(timestep, timestep + 1))
    found = state.optimizer.state_dict()["state"].values()
    return torch.cat([values["exp_avg"].flatten() for values in found])


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize(("loss_weight", "gamma"), [("min-snr", None), ("p2", 0.5)])
def test_training_weighs_timesteps_as_asked(loss_weight, gamma, micro_batch_size):
    weights = loss_weights(noise_schedule(small_config().diffusion), loss_weight, gamma)
    settings = {"loss_weight": loss_weight, "loss_weight_gamma": gamma}
    weighted = gradient_at(100, micro_batch_size=micro_batch_size, **settings)
    plain = gradient_at(100, micro_batch_size=micro_batch_size)
    assert 0 < weights[100] < 0.8
    torch.testing.assert_close(weighted, weights[100] * plain, rtol=1e-3, atol=1e-7)


def test_weights_of_1_are_the_training_without_weights_bit_for_bit():
    above_every_snr = {"loss_weight": "min-snr", "loss_weight_gamma": 1e5}
    (one, losses), (other, same) = run_base(config_of()), run_base(config_of(**above_every_snr))
    assert_same(other.state_dict(), one.state_dict())
    assert without_speed(same) == without_speed(losses)
    assert losses_of(run_base(config_of(loss_weight="p2"))[1]) != losses_of(losses)


def test_a_network_that_learns_the_variance_trains_by_the_hybrid_loss():
    config = replace(config_of().base, num_steps=40, log_every=10, checkpoint_every=40)
    torch.manual_seed(0)
    state = start_state(build_unet({**TINY, "out_channels": 2}), config)
    before = copy.deepcopy(state.unet.conv_out)
    diffusion = DiffusionConfig(learned_sigma=True)
    losses = losses_of(train_own(state, state.unet, config, diffusion=diffusion))
    assert losses[-1] < 0.7 * losses[0]
    moved = (state.unet.conv_out.weight - before.weight).abs().amax(dim=(1, 2, 3))
    assert moved.shape == (2,)
    assert (moved > 1e-4).all()  # epsilon's channel and the variance's


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_is_an_error_that_names_its_step(log_every, tmp_path):
    config = config_of(
        learning_rate=1e30, num_warmup_steps=0, max_grad_norm=None, log_every=log_every
    )
    with pytest.raises(NonFiniteLossError, match=r"is (nan|inf) at step 2\. Lower") as raised:
        run_base(config, folder=tmp_path)
    assert raised.value.step == 2  # the first step's weights are sound
    assert list(tmp_path.iterdir()) == []  # no checkpoint of what is spoilt
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value)


def test_a_checkpoint_loads_without_unpickling(tmp_path):
    whole, _ = run_base(config_of(), folder=tmp_path)
    state = torch.load(tmp_path / "6.pt", weights_only=True)
    assert state.keys() == {"unet", "ema", "optimizer", "scaler", "step"}
    assert state["step"] == NUM_STEPS
    assert_same(state["unet"], whole.unet.state_dict())


def test_a_checkpoint_brings_back_every_part(tmp_path):
    config = config_of()
    whole, _ = run_base(config, folder=tmp_path)
    torch.manual_seed(5)
    loaded = start_state(build_unet(TINY), config.base)
    loaded.load(tmp_path / "6.pt")
    assert_same(loaded.state_dict(), whole.state_dict())
    with loaded.ema_weights() as one, whole.ema_weights() as other:
        assert_same(output_of(one), output_of(other))


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def remove(path: Path) -> None:
    path.unlink()


def widen(path: Path) -> None:
    wide = start_state(build_unet({**TINY, "block_out_channels": (16, 48)}), TrainConfig())
    wide.save(path)


def forget(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({"unet": state["unet"], "ema": state["ema"]}, path)


class Stranger:
    """Not among what a checkpoint may hold."""


def smuggle(path: Path) -> None:
    torch.save({"unet": Stranger()}, path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_text(path: Path) -> None:
    path.write_text("this is no checkpoint")


def hold_a_list(path: Path) -> None:
    torch.save([1, 2, 3], path)


@pytest.mark.parametrize(
    "harm", [tear, remove, widen, forget, smuggle, empty, replace_by_text, hold_a_list]
)
def test_a_spoilt_checkpoint_is_an_error_that_names_it(tmp_path, harm):
    config = config_of(num_steps=1)
    run_base(config, folder=tmp_path)
    harm(tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=str(tmp_path / "1.pt")):
        run_base(config, resume_from=tmp_path / "1.pt")
