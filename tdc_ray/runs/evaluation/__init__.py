"""Scores: sampling for them, feature extractors, Frechet distances.

A metric has the name of its features; nothing here calls a classifier's distance FID.
May be used by runs and experiments.
"""
