import pytest

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.structure import network_structure
from tests.models.captioned import UNET


def test_what_is_not_known_is_refused():
    for changes in ({"class_embed_type": "timestep"}, {"down_block_types": ["KDownBlock2D"]}):
        with pytest.raises(UnsupportedModelError, match="is not supported; known are"):
            network_structure({**UNET, **changes})
