import pytest

from tdc_ray.models.structure import network_structure
from tests.models.captioned import SANA


@pytest.mark.parametrize(
    "changes", [{"qk_norm": "rms_norm_across_heads"}, {"guidance_embeds": True}]
)
def test_kinds_that_are_not_described_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        network_structure({**SANA, **changes})
