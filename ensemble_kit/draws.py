"""The uniform numbers that members sample with outside training."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def draw_numbers(name: str, *, repeats: int, num_frames: int) -> NDArray[np.float32]:
    """Return the fixed uniform numbers of a member.

    The same name gives the same numbers on every machine: they are the raw stream of the counter
    based generator Philox (Salmon et al., 2011), keyed by the SHA-256 of the name. The first rows
    of a larger table are those of a smaller one. Each member has its own stream, because a shared
    draw would correlate the members.

    Args:
        name: The member's name.
        repeats: R, rows of the table.
        num_frames: N, draws in a row.

    Returns:
        ``(R, N)``, float32 in [0, 1).
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    uniform = uniform_numbers(np.random.Philox(key=key), repeats * num_frames)
    return uniform.reshape(repeats, num_frames)


def uniform_numbers(generator: np.random.Philox, count: int) -> NDArray[np.float32]:
    """Return a generator's next raw numbers as uniform ones in [0, 1): the first 24 bits of each.

    24 bits are what float32 holds exactly, so no number is rounded up to 1.
    """
    raw = generator.random_raw(count)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def draws_name(member: str) -> str:
    """Return the name of the buffer, initialiser or input that holds a member's numbers."""
    return f"draws_{member}"
