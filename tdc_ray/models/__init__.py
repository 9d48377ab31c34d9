"""Networks: how they are built, what of them can be pruned, how they run and are saved.

A UNet class has a folder, such as ``unet2d``, and a row in each of two tables: ``structure``,
which imports no torch, so that planning stays quick, and ``families``, which does.
May be used by data, diffusion and everything above it.
"""
