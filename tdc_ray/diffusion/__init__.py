"""The noise process: schedule, plan of timestep groups, losses, training, sampling.

``prediction``: what the network predicts; the image or a flow would be rows there.
``samplers``: one row a sampler. ``schedule``, ``samplers`` and ``plan`` need NumPy alone.
May be used by pruning, runs, reporting and cli.
"""
