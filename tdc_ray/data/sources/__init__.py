"""One file for each kind of images on disk; ``data.load`` has the table of them.

Each has ``open(config)``, which returns a dataset that decodes images when they are fetched.
May be used by data.load.
"""
