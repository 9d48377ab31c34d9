"""Seeds for everything random: they differ by purpose, and are the same in every process."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**31) that depends on all parts, and on nothing else.

    Torch's CPU generator uses no more than 32 bits of a seed, so parts are hashed, not shifted.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
