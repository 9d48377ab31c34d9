"""Seeds for everything random: told apart by what they are for, the same in every process."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Give a seed in [0, 2**31) that depends on all parts, and on nothing else.

    Torch's CPU generator heeds no more than 32 bits of a seed, so parts are hashed, not shifted.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
