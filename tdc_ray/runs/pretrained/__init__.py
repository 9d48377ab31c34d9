"""Bases that are given: where they come from, what they tell, their import.

``sources`` resolves folders, hub names and checkpoints; ``settings`` applies what they tell.
May be used by runs and cli.
"""
