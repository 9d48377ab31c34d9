"""Stage 1 of a run: its base is trained, or taken from what other runs left in a store."""

import logging

from tdc_ray.config.run import RunConfig
from tdc_ray.execution.events import reporter
from tdc_ray.execution.ray.cache_session import CacheSession
from tdc_ray.execution.ray.event_collector import EventCollector
from tdc_ray.runs.stages.base import base_item
from tdc_ray.runs.stages.base_trainer import train_base_on_ray
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir

logger = logging.getLogger(__name__)


def make_base(
    run_dir: RunDir, config: RunConfig, events: EventCollector, sharing: CacheSession
) -> None:
    """Leave the base in the run directory, unless it is there; see :func:`train_base_on_ray`.

    Raises:
        TdcError: The base cannot be trained, or what is in the store cannot be read.
    """
    item = base_item(run_dir, config)
    with (
        events.recording(item.key) as reported,
        sharing.alone(item, reported, reporter(events, item.key)) as is_done,
    ):
        if not is_done:
            logger.info("stage 1: training the base (%s)", display_path(run_dir.base_unet))
            train_base_on_ray(run_dir, config, item.key, events)
            events.forward()  # its last reports
