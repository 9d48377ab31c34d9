"""Files: how they are read and written, locally or in an object store.

Run directories, leases, logs and digests are here. Knows nothing of diffusion, Ray or settings.
May be used by every other package; uses none of them.
"""
