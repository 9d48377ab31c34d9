"""Code that an exported folder brings along.

Copied as text: it imports torch and diffusers, nothing of this package.
Used by ``runs.export.export`` alone.
"""
