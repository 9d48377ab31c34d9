"""The ``DiTTransformer2DModel`` family: its layers, prunable units and steps.

``config_file`` and ``layers`` import no torch, so that planning stays quick.
May be used by models.
"""
