"""The command line: arguments to a command, a command to its job, errors to exit codes.

One file a command; its fields are its flags. Used by nobody.
Attaches what shows a run (``reporting``) to the run itself (``runs``).
"""
