"""Files: how they are read and written, locally or in an object store.

``object_store`` has the table of backends by URI scheme; run directories, leases, logs and digests
are here too. Knows nothing of diffusion, Ray or settings.
May be used by every other package; uses none of them.
"""
