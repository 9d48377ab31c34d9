"""The work of a search on workers: job, cache key, function and item together.

One file for each: scores, sensitivities, candidates.
May be used by pruning, and by runs/simulation.py.
"""
