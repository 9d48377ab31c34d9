"""Importance scores, by which channels and heads of a unit are kept.

A file each; ``registry`` has their rows, by the names that ``prune.method`` has.
May be used by pruning.
"""
