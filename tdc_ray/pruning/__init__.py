"""One group's sub-model: the search, what it measures, and what proposes schemes.

``proxy``: what a proxy is asked and what it returns. ``search`` is a chain of work items: it runs
the same on Ray, in one process and in simulation.
May be used by runs, reporting and cli.
"""
