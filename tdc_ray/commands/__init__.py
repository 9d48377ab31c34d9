"""The commands: each a dataclass, whose fields are its flags, that knows how to execute itself."""
