"""Importance scores, by which channels and heads of a unit are kept.

One criterion a file, and a registry of them by the names that ``prune.method`` has.
May be used by pruning.
"""
