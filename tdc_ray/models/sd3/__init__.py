"""The ``SD3Transformer2DModel`` family: its layers, prunable units and steps.

``layers`` imports no torch, so that planning stays quick. May be used by models.
"""
