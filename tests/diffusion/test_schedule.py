from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.schedule import MAX_BETA, NoiseProcess, betas, recognise, snr
from tdc_ray.errors import ScheduleError

SCHEDULES = [
    pytest.param("linear", 1000, 1e-4, 0.02, id="linear"),
    pytest.param("scaled_linear", 1000, 0.0015, 0.0195, id="scaled_linear"),
    pytest.param("squaredcos_cap_v2", 4000, 1e-4, 0.02, id="cosine"),
]


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize(("name", "num_timesteps", "start", "end"), SCHEDULES)
def test_betas_are_those_of_diffusers(scheduler_class, name, num_timesteps, start, end):
    scheduler = scheduler_class(num_timesteps, beta_start=start, beta_end=end, beta_schedule=name)
    ours = betas(name, num_timesteps, beta_start=start, beta_end=end)
    assert ours.dtype == np.float64
    assert ours.shape == (num_timesteps,)
    np.testing.assert_allclose(ours, scheduler.betas.numpy(), rtol=2e-6, atol=1e-8)
    np.testing.assert_allclose(
        NoiseProcess.from_betas(ours).alphas_cumprod,
        scheduler.alphas_cumprod.numpy(),
        rtol=1e-4,
        atol=1e-7,
    )


def test_float64_gives_what_diffusers_gives_for_trained_betas():
    ours = betas("squaredcos_cap_v2", 4000, beta_start=1e-4, beta_end=0.02)
    scheduler = DDIMScheduler(4000, trained_betas=ours)
    np.testing.assert_array_equal(scheduler.betas, torch.tensor(ours, dtype=torch.float32))


def test_linear_betas_start_and_end_where_they_are_told_to():
    values = betas("linear", 5, beta_start=0.1, beta_end=0.5)
    np.testing.assert_allclose(values, [0.1, 0.2, 0.3, 0.4, 0.5])
    left = NoiseProcess.from_betas(values).alphas_cumprod
    np.testing.assert_allclose(left, [0.9, 0.72, 0.504, 0.3024, 0.1512])


def test_cosine_betas_are_capped_and_ignore_start_and_end():
    values = betas("squaredcos_cap_v2", 100, beta_start=0.3, beta_end=0.4)
    assert values.max() == values[-1] == MAX_BETA
    np.testing.assert_array_equal(
        values, betas("squaredcos_cap_v2", 100, beta_start=1e-4, beta_end=0.02)
    )


def test_snr_in_decibels_is_ten_log10_of_the_odds():
    left = np.array([10 / 11, 0.5, 1 / 101])  # 10 log10(10), 10 log10(1), 10 log10(1 / 100)
    process = NoiseProcess.from_betas(1 - left / np.append(1, left[:-1]))
    np.testing.assert_allclose(process.snr_db, [10, 0, -20], atol=1e-12)


@given(st.integers(2, 300), st.floats(1e-5, 0.1), st.floats(0, 0.1))
def test_snr_falls_with_every_timestep(num_timesteps, start, width):
    values = betas("linear", num_timesteps, beta_start=start, beta_end=start + width)
    falling = NoiseProcess.from_betas(values).snr_db
    assert falling.shape == (num_timesteps,)
    assert np.all(np.diff(falling) < 0)


@pytest.mark.parametrize("num_timesteps", [-3, 0, 1])
def test_fewer_than_two_timesteps_are_no_schedule(num_timesteps):
    with pytest.raises(ScheduleError, match=f"at least 2, got {num_timesteps}"):
        betas("linear", num_timesteps, beta_start=1e-4, beta_end=0.02)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.02), (-0.1, 0.02), (0.5, 1.0), (0.5, 2.0)])
def test_betas_outside_zero_to_one_are_refused_with_their_range(start, end):
    with pytest.raises(ScheduleError, match=rf"inside \(0, 1\), got \[{start}, {end}\]"):
        betas("linear", 10, beta_start=start, beta_end=end)


@pytest.mark.parametrize("values", [[1.0, 0.5], [0.0, 0.5], [1.5, 0.5], [0.5, float("nan")]])
def test_alphas_cumprod_outside_zero_to_one_have_no_snr(values):
    with pytest.raises(ScheduleError, match=r"alphas_cumprod must lie inside \(0, 1\)"):
        snr(np.array(values))


@pytest.mark.parametrize("values", [[0.5, 0.5], [0.5, 0.9], [0.9, 0.2, 0.3]])
def test_alphas_cumprod_that_do_not_fall_have_no_snr(values):
    with pytest.raises(ScheduleError, match="must strictly decrease"):
        snr(np.array(values))


def test_signal_that_is_used_up_before_the_end_is_refused():
    vanishing = betas("linear", 2000, beta_start=0.5, beta_end=0.9)
    with pytest.raises(ScheduleError, match="alphas_cumprod"):
        NoiseProcess.from_betas(vanishing)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "num_timesteps", "start", "end"), SCHEDULES)
def test_betas_tell_their_schedule(name, num_timesteps, start, end, dtype):
    values = betas(name, num_timesteps, beta_start=start, beta_end=end).astype(dtype)
    found = recognise(values.astype(np.float64))
    assert found is not None
    assert found[0] == name
    if name != "squaredcos_cap_v2":
        assert found[1:] == (start, end)


@pytest.mark.parametrize(
    "values", [[0.1], [0.1, 0.3, 0.2], [0.0, 0.1], np.geomspace(1e-4, 0.02, 100)], ids=str
)
def test_other_betas_are_of_no_schedule(values):
    assert recognise(np.asarray(values)) is None


# --- zero terminal SNR -----------------------------------------------------------------------

NO_SIGNAL = DiffusionConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_rescaled_betas_are_those_of_the_paper_and_of_diffusers(name):
    process = NoiseProcess.of(replace(NO_SIGNAL, beta_schedule=name))
    ours = process.alphas_cumprod
    theirs = DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=True).alphas_cumprod
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    plain = NoiseProcess.of(DiffusionConfig(beta_schedule=name)).alphas_cumprod
    assert ours[-1] == 0
    assert ours[0] == pytest.approx(plain[0])
    steps = np.diff(np.sqrt(ours)) / np.diff(np.sqrt(plain))
    np.testing.assert_allclose(steps, np.full(999, steps[0]), rtol=1e-6)  # shifted and scaled


def test_a_timestep_without_signal_has_an_snr_of_0_and_finite_decibels():
    process = NoiseProcess.of(NO_SIGNAL)
    assert process.snr[-1] == 0
    assert not process.has_signal
    assert np.isfinite(process.snr_db).all()
    assert (np.diff(process.snr_db) < 0).all()
    known = NoiseProcess.of(DiffusionConfig()).snr_db
    assert NoiseProcess.of(DiffusionConfig()).has_signal
    np.testing.assert_array_equal(known, 10 * np.log10(NoiseProcess.of(DiffusionConfig()).snr))
