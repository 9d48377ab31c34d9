"""Networks: how they are built, what of them can be cut, how they run and are saved.

``structure`` and ``units`` import no torch, so that planning stays quick. What differs by a
network's class is in its family (``unet2d``), which ``structure`` and ``families`` look up.
May be used by data, diffusion and everything above it.
"""
