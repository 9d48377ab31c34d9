"""Importance scores, by which channels and heads of a unit are kept.

A file each; ``registry`` has their rows, by the names of ``prune.method`` (``reconstruction``,
which the searches of proxies use, has none). May be used by pruning.
"""
