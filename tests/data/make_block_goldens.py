#!/usr/bin/env python3
"""Writes block_goldens.txt: what ggml's reference code makes of blocks of 32 numbers, and reads in blocks.

    pip install numpy==2.4.6 llama-cpp-python==0.3.36
    python tests/data/make_block_goldens.py [libggml-base.so]

The functions are quantize_row_*_ref and dequantize_row_* of ggml's base library, which is compiled for any x86-64 and so without
FMA. Inputs for which they make something undefined (NaN, infinities, factors whose reciprocal overflows, in iq4_nl blocks without
a magnitude of 1e-15) are left out.

Everything is hexadecimal, numbers with the highest byte first. `x` are the numbers of all formats, as bits of f32; `bytes` the
blocks; `random` blocks of random bytes with small finite factors. What is read in `bytes` and then in `random` is recorded as a
hash of each block, and for the last blocks as `values`.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np

# Bytes of a block and byte offsets of its f16 numbers.
FORMATS = {
    "q8_0": (34, [0]),
    "q4_0": (18, [0]),
    "q4_1": (20, [0, 2]),
    "q5_0": (22, [0]),
    "q5_1": (24, [0, 2]),
    "iq4_nl": (18, [0]),
}
N = 32
# Blocks whose values are recorded in full.
FULL = 3


def library() -> ctypes.CDLL:
    if len(sys.argv) > 1:
        return ctypes.CDLL(sys.argv[1])
    package = importlib.util.find_spec("llama_cpp")
    assert package and package.submodule_search_locations, "llama-cpp-python is not installed"
    return ctypes.CDLL(next(Path(package.submodule_search_locations[0]).glob("lib/libggml-base.*")))


def inputs() -> np.ndarray:
    """Blocks whose largest magnitude is from 1e-14 to 1e30."""
    rng = np.random.default_rng(20261)
    blocks = [np.zeros(N), np.full(N, -0.0), np.full(N, 0.75), np.full(N, -3.5)]
    blocks += [rng.standard_normal(N) * 10.0**e for e in (-14, -8, -6, -5, -3, -2, 0, 0, 0, 1, 3, 5, 6, 8, 15, 18)]
    # Outliers, one at each end of the block, and of either sign in the middle.
    for at, value in ((0, 90.0), (31, -90.0), (15, 7.0), (16, -7.0)):
        block = rng.standard_normal(N) * 0.3
        block[at] = value
        blocks.append(block)
    # Two elements of the same magnitude, of which the first decides the sign of the factor.
    for signs in ((1, -1), (-1, 1)):
        block = rng.uniform(-1, 1, N)
        block[7], block[20] = 2 * signs[0], 2 * signs[1]
        blocks.append(block)
    # Ties: halves of a unit of each format, for both signs of the largest element.
    for units in (127, 8, 16, 15, 31):
        for sign in (1, -1):
            block = (rng.integers(0, units, N) + 0.5) * rng.choice([-1, 1], N)
            block[5] = sign * units
            blocks.append(block)
            block = rng.integers(0, units, N) + 0.5
            block[3], block[4] = 0, units
            blocks.append(sign * block)
    # Half way between values of iq4_nl's table.
    table = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
    block = np.resize((table[1:] + table[:-1]) / 2, N)
    block[31] = -127
    blocks += [block, -block]
    # Positive and negative alone: the minimum of q4_1 and q5_1 is not 0.
    blocks += [rng.uniform(3, 4, N), rng.uniform(-4, -3, N)]
    # A minimum of zero, of either sign.
    for zero in (0.0, -0.0):
        block = rng.uniform(0.1, 1, N)
        block[[4, 9]] = zero, -zero
        blocks.append(block)
    # Factors that are subnormal in f16, 0 there, and infinite.
    blocks += [rng.uniform(-1, 1, N) * scale for scale in (1e-5, 3e-6, 1e-7, 9e6, 1e7, 6e5, 1e6)]
    return np.array(blocks, dtype=np.float32)


def fnv(data: bytes) -> int:
    """FNV-1a of 32 bits."""
    state = 0x811C9DC5
    for byte in data:
        state = (state ^ byte) * 0x01000193 & 0xFFFFFFFF
    return state


def main() -> None:
    ggml = library()
    rng = np.random.default_rng(20262)
    x = inputs()
    lines = [f"x {x.astype('>f4').tobytes().hex()}"]

    def call(name: str, src: np.ndarray, dst: np.ndarray, n: int) -> None:
        getattr(ggml, name)(src.ctypes.data_as(ctypes.c_void_p), dst.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(n))

    for name, (size, halves) in FORMATS.items():
        blocks = np.zeros((len(x), size), dtype=np.uint8)
        for row, block in zip(x, blocks):
            # The first two blocks are zeros, of which the reference for iq4_nl makes nothing definite.
            if name == "iq4_nl" and np.abs(row).max() < 1e-15:
                block[2:] = 0x88
                continue
            call(f"quantize_row_{name}_ref", row, block, N)
        # The sign of a factor of infinity - infinity is that of the CPU.
        nan = np.isnan(blocks[:, :2].copy().view(np.float16)[:, 0])
        blocks[nan, :2] = np.array([np.nan], np.float16).view(np.uint8)
        random = rng.integers(0, 256, size=(6, size), dtype=np.uint8)
        for at in halves:
            factor = (rng.standard_normal(len(random)) * 0.05).astype(np.float16)
            factor[4:] = [5e-7, -3e-5]
            random[:, at : at + 2] = factor.view(np.uint8).reshape(-1, 2)
        everything = np.concatenate([blocks, random])
        values = np.zeros((len(everything), N), dtype=np.float32)
        call(f"dequantize_row_{name}", everything, values, values.size)
        # NaN has many patterns.
        values[np.isnan(values)] = np.nan
        bits = values.astype(">f4")
        hashes = np.array([fnv(row.tobytes()) for row in bits], dtype=">u4")
        for what, data in (("bytes", blocks), ("random", random), ("values", bits[-FULL:]), ("hashes", hashes)):
            lines.append(f"{name}.{what} {data.tobytes().hex()}")
    path = Path(__file__).with_name("block_goldens.txt")
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
