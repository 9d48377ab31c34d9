"""The noise process: schedule, plan of timestep groups, losses, training, sampling.

``prediction``: what the network predicts; the image or a flow would be rows there.
``samplers``: any scheduler of diffusers, imported when it is made; else ``schedule``,
``samplers`` and ``plan`` need NumPy alone.
May be used by pruning, runs, reporting and cli.
"""
