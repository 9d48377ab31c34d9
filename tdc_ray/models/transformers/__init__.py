"""What transformers have in common: layers and units of their blocks, and these as steps.

``layers`` imports no torch, so that planning stays quick. May be used by models.
"""
