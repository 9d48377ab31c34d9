"""The noise process: schedule, plan of timestep groups, losses, training, sampling.

``schedule`` and ``plan`` need NumPy alone; the pipeline samples by switching experts.
May be used by pruning, runs, reporting and cli.
"""
