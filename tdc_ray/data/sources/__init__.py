"""One file for each kind of images on disk; ``data.load`` has the table of them.

Each opens what it finds as a dataset and decodes as images are asked for.
May be used by data.load.
"""
