"""Released checkpoints of other codebases, read as diffusers networks.

One file a codebase; deleting one touches its row in ``runs.pretrained.sources`` alone.
May be used by runs.pretrained.
"""
