"""Whole jobs, and what they write: a run, a pruned model, a sweep, an export.

``run`` is algorithm 1, read from top to bottom; each stage gets its part of the settings.
May be used by reporting and cli.
"""
