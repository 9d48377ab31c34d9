from dataclasses import replace

import pytest
import torch

from tdc_ray.diffusion.process import NoisedBatch
from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.families import family_of
from tdc_ray.models.structure import network_structure
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.pruning.refit.error_weights import error_weights
from tdc_ray.pruning.refit.refit import refit
from tdc_ray.pruning.space import space_of
from tests.models.captioned import CASES, SD3
from tests.small import assert_same, random_kept

CASE = CASES["sd3.5"]


def test_a_refit_from_the_disk_is_the_same(monkeypatch):
    base, units, batches = CASE.network(), space_of(CASE.config).units, [CASE.noised(8)]
    weights, kept = error_weights(base, batches, CASE.schedule), random_kept(units, 4)
    found = []
    for size in (2**20, 0):
        monkeypatch.setattr("tdc_ray.pruning.spill.BYTES_IN_MEMORY", size)
        pruned = family_of(base).cut(base, units, kept)
        refit(base, pruned, kept_outputs(base, units, kept), batches, CASE.schedule, weights)
        found.append(pruned.state_dict())
    assert_same(*found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_projection_dim": 32}, "caption_projection_dim must be .* 48, got 32"),
        ({"pos_embed_max_size": 3}, "sample_size must be at most .* 6, got 8"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
    ],
)
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        network_structure({**SD3, **changes})


def test_captions_are_split_and_joined_with_their_images():
    batch = CASE.noised(5)
    again = NoisedBatch.join([*batch.split(2)]).labels
    assert again.keys() == batch.labels.keys()
    for name, tensor in batch.labels.items():
        assert torch.equal(again[name], tensor)


def test_without_captions_it_is_not_run():
    with pytest.raises(UnsupportedModelError, match="SD3Transformer2DModel reads captions"):
        CASE.by_steps(CASE.network(), replace(CASE.noised(2), labels=None))
