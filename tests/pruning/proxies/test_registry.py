from typing import get_args

from tdc_ray.config.prune import ProxyMethod
from tdc_ray.pruning.proxies.registry import PROXIES


def test_the_rows_are_the_names_of_the_setting():
    assert tuple(PROXIES) == get_args(ProxyMethod)
