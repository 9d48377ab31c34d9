"""A run's experts as a folder that diffusers and plain PyTorch load.

``templates`` is code that is copied into the folder and imports nothing of this package.
May be used by cli.
"""
