"""Who runs what: work items, chains, the scheduler, the cache of results, the timeline.

Knows nothing of diffusion: an item is a function, its input, and where its result goes.
``cache``: what sweep trials share, by each stage's ``cache_inputs``. ``ray``: items on a cluster.
May be used by data and everything above it; ``models`` and ``execution`` do not know each other.
"""
