"""Sweeps by Ray Tune and Optuna: every trial is a whole run.

Rows and study are files that reports read without Ray.
May be used by reporting, cli and experiments.
"""
