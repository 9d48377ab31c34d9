import pytest
import torch

from tdc_ray.models.compiled import CompiledDenoiser
from tdc_ray.models.forward import predict
from tests.small import TINY, random_unet

WITH_CLASSES = {**TINY, "num_class_embeds": 3}


def batch_of(count: int, timestep: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(timestep)
    x_t = torch.randn(count, 1, 8, 8, generator=generator)
    return x_t, torch.full((count,), timestep), torch.arange(count) % 3


def test_what_is_compiled_sees_one_number_of_images_however_many_there_are(monkeypatch):
    modes, sizes = [], []

    def compiled(function, *, mode, dynamic):
        modes.append((mode, dynamic))

        def run(x_t, timesteps, conditions):
            sizes.append((len(x_t), len(timesteps), len(conditions["class_labels"])))
            return function(x_t, timesteps, conditions)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr("tdc_ray.models.forward.max_batch_size", lambda *_: 4)
    unet = random_unet(WITH_CLASSES)
    denoiser = CompiledDenoiser(unet, "reduce-overhead")
    with torch.inference_mode():
        for count in (9, 4, 2):  # of nine the last one is a part of its own
            found = predict(denoiser, *batch_of(count, 500))
            torch.testing.assert_close(found, predict(unet, *batch_of(count, 500)))
    assert modes == [("reduce-overhead", False)]
    assert sizes == [(4, 4, 4)] * 5


@pytest.mark.slow  # compiles two networks
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_once_each_denoisers_predict_the_same_but_for_rounding():
    torch.compiler.reset()
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            unet = random_unet(WITH_CLASSES, seed=seed)
            denoiser = CompiledDenoiser(unet, "default")
            for count, timestep in ((3, 500), (3, 20), (1, 3)):
                batch = batch_of(count, timestep)
                found = predict(denoiser, *batch, num_channels=1)
                expected = predict(unet, *batch, num_channels=1)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
