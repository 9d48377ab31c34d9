"""The ``UNet2DConditionModel`` family (Stable Diffusion 1, 2, XL): layers, units and steps.

``layers`` imports no torch, so that planning stays quick. May be used by models.
"""
