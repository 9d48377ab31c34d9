"""One file for each command, a dataclass whose fields are its flags.

``execute`` calls one function of ``runs`` or ``reporting`` and prints what it returns.
Used by ``cli.parse`` alone.
"""
