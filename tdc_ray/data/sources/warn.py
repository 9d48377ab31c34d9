"""Warnings about data, which is opened more than once: each is logged once in a process."""

import logging
from functools import cache

logger = logging.getLogger(__name__)


@cache
def warn_once(text: str) -> None:
    """Log a warning, unless it was logged before."""
    logger.warning("%s", text)
