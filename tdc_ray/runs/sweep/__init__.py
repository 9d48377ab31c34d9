"""Sweeps by Ray Tune and Optuna: every trial is a whole run.

What trials share is computed once (``execution.cache``). Reports read rows and study without Ray.
May be used by reporting, cli and experiments.
"""
