"""Settings: one file for each prefix of flags, frozen dataclasses that refuse wrong values.

``run.RunConfig`` composes them, ``presets`` has complete ones. No framework is imported here.
May be used by every package above storage; only ``cli`` and ``runs`` take a whole ``RunConfig``.
"""
