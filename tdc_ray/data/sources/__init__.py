"""One file for each kind of images on disk; ``data.load`` has the table of them.

Each has ``open(config)``, which returns an ``ImageDataset`` (``data.dataset``): images are decoded
when they are fetched, and no file is memory-mapped (``npz_files`` has the figures).
May be used by data.load.
"""
