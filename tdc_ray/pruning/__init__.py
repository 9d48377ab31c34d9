"""One group's sub-model: the search, what it measures, and what proposes schemes.

A search is a chain of work items: it runs the same on Ray, in one process and in simulation.
May be used by runs, reporting and cli.
"""
