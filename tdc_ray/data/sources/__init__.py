"""One file for each kind of images on disk; ``data.load`` has the table of them.

Each has ``open(config)``, which returns an ``ImageDataset`` (``data.dataset``): images are decoded
when they are fetched, and no file is memory-mapped (``npz_files`` has the figures).
``image_file`` decodes one file, ``walk`` finds those of a folder, ``encoded`` is what folders and
``shards`` have in common, and ``npz_files`` and ``npz_labels`` read what an npz file may hold.
Only modules of data, and what finds out ``--data PATH``, use them.
"""
