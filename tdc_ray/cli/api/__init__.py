"""The Python API, for notebooks and scripts: one file for each thing that it hands out.

Like the commands it makes settings of what people say, and calls the jobs of ``runs``.
Nothing else may use it but the root's table of names.
"""
