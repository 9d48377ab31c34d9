"""The noise process: schedule, plan of timestep groups, losses, training, sampling.

``schedule``, ``samplers`` and ``plan`` need NumPy alone; the pipeline switches experts as t falls.
May be used by pruning, runs, reporting and cli.
"""
