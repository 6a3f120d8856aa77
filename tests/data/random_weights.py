"""Weights that any language can make again: they depend on a tensor's name and nothing else.

Element i of a tensor is `q * scale`, and q is an integer from -7 to 7: splitmix64's output for the seed FNV-1a(name), modulo
15, less 7. With a power of two as the scale every element is exact in f32, f16, bf16, int8 and Q4_0. `tests/original/mod.rs`
has the same definition.
"""

import numpy as np

MASK = (1 << 64) - 1


def integers(name: str, shape) -> np.ndarray:
    """Integers from -7 to 7."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & MASK
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z % np.uint64(15)).astype(np.int64).reshape(shape) - 7


def matrix(name: str, shape, scale: float) -> np.ndarray:
    """A matrix in f32."""
    return (integers(name, shape) * scale).astype(np.float32)


def norm(name: str, size: int) -> np.ndarray:
    """Weights of a norm, from 9/16 to 23/16."""
    return (1 + integers(name, (size,)) / 16).astype(np.float32)
