"""A network for every sampling step within a budget of macs: ``tdc-ray schedule``.

Start at ``schedule.py``; the knapsack itself is ``tdc_ray.diffusion.step_schedule``.
May be used by runs, reporting and the command line.
"""
