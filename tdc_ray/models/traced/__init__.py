"""Networks of diffusers' other classes: units that Torch-Pruning's dependency graph finds.

May be used by models.
"""
