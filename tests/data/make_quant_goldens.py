#!/usr/bin/env python3
"""Writes quant_goldens.json: blocks of every quantised type with the values that ggml's Python package reads in them.

    pip install gguf==0.19.0
    python tests/data/make_quant_goldens.py

The blocks are random bytes except for their f16 scales, which are drawn small and finite, so that every bit pattern of
the packed parts can occur. Values are written as the hexadecimal bits of an f32: the test asks for equality.
"""

import json
from pathlib import Path

import gguf
import numpy as np

BLOCKS = 2
# Byte offsets of the f16 scales in a block.
SCALES = {
    "F16": [0],
    "BF16": [],
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    # Last, so that the random numbers of those above stay what they were.
    "Q2_K": [80, 82],
    "Q3_K": [108],
}


def main() -> None:
    rng = np.random.default_rng(20240)
    goldens = {}
    for name, scales in SCALES.items():
        ty = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[ty]
        blocks = BLOCKS if elements > 1 else 16
        data = rng.integers(0, 256, size=(blocks, size), dtype=np.uint8)
        if name == "BF16":
            data = (rng.standard_normal(blocks).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            data = data.view(np.uint8).reshape(blocks, size)
        for at in scales:
            scale = (rng.standard_normal(blocks) * 0.05).astype(np.float16)
            data[:, at : at + 2] = scale.view(np.uint8).reshape(blocks, 2)
        values = gguf.dequantize(data.reshape(1, -1), ty).astype(np.float32).ravel()
        assert values.size == blocks * elements and np.isfinite(values).all()
        goldens[name] = {"bytes": data.tobytes().hex(), "values": values.astype(">f4").tobytes().hex()}
    path = Path(__file__).with_name("quant_goldens.json")
    path.write_text(json.dumps(goldens, indent=0) + "\n")


if __name__ == "__main__":
    main()
