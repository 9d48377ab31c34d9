"""Pretrained bases: where they come from, the settings that they bring, their import.

``sources`` resolves folders, hub names and checkpoints; ``settings`` applies what a base says.
May be used by runs and cli.
"""
