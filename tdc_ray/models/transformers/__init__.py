"""Transformers of diffusers: a file for each class, and what the classes have in common.

A class's file describes it as a :class:`transformer.Transformer`; ``table`` lists these. None of
these files imports torch but inside functions that run a network, so that planning stays quick.
May be used by models.
"""
