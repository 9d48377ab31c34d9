"""The UNet2DModel family: its architectures, layers, prunable units and surgery.

``architectures``, ``layers`` and ``units`` import no torch, so that planning stays quick.
May be used by models and, for its networks' configs and weights, by everything above.
"""
