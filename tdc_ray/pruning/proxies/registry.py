"""The proxies by the names that ``prune.method`` has."""

from collections.abc import Mapping

from tdc_ray.config.prune import ProxyMethod
from tdc_ray.pruning.proxies.language_model import language_model_proxy
from tdc_ray.pruning.proxies.offline import offline_proxy
from tdc_ray.pruning.proxy import Proxy

PROXIES: Mapping[ProxyMethod, Proxy] = {"offline": offline_proxy, "llm": language_model_proxy}
