#!/usr/bin/env python3
"""Counts instructions of the innermost loops of the NEON levels, in the disassembly of a build for AArch64.

    python3 benches/neon_loops.py target/aarch64-unknown-linux-gnu/release/libkvlane.so

NEON kernels cannot be timed without such a CPU, but their bounds can be read from the code: a loop keeps the vector units busy if
it has enough multiply-adds per load and does not spill its accumulators. The loops of attention are recognised by their number of
multiply-adds, which the register tiles fix:

- prefill, six rows by four vectors: 24 accumulators, hence 24 multiply-adds per step (values), or 48 (scores, which take two
  steps per iteration);
- decode, four rows by four keys, a pair of vectors per iteration: 32.

The loops of the level neonbf16 are counted in `bfmmla` instructions. Each is 16 multiply-adds, as many as four `fmla`:

- from packed copies (prefill), six pairs of rows by four pairs of keys or columns: 24 sums, hence 24 per step;
- in place (decode), a pair of rows by eight pairs of keys, two steps per iteration: 16; four pairs of rows by four pairs of keys:
  32; a pair of rows by eight pairs of columns: 8, and 8 more that only detect NaN. These are recognised by the shuffles that bring
  keys into pairs (of 64 bits) or transpose values (of 16).

Those of the level neoni8mm, over int8, in `smmla`, of 32 multiply-adds: four pairs of rows by two pairs of keys, sixteen elements an iteration: 16.

Fails if a kind of loop does not exist, or if the best loop of a kind has fewer multiply-adds per load or more stores to the stack
than its bound.
"""

import re
import subprocess
import sys
from collections import defaultdict

# Multiply-adds per iteration: the loop, its least multiply-adds per load instruction, its most stores to the stack. The loop of
# scores needs 24 sums, 4 keys and elements of two steps of Q: one more than the 32 registers.
KINDS = {
    ("fmla", 24, ""): ("prefill, values: 6 x 4 vectors, a key a turn", 3.2, 0),
    ("fmla", 48, ""): ("prefill, scores: 6 x 4 vectors, two steps a turn", 3.6, 1),
    ("fmla", 32, ""): ("decode, scores: 4 rows x 4 keys, two vectors a turn", 3.6, 0),
    ("bfmmla", 24, ""): ("prefill, both: 6 x 4 pairs, a step a turn", 4.0, 0),
    ("bfmmla", 16, "2d"): ("decode, scores: 1 x 8 pairs, two steps a turn", 0.9, 0),
    ("bfmmla", 32, "2d"): ("decode, scores: 4 x 4 pairs, two steps a turn", 2.6, 0),
    ("bfmmla", 16, "8h"): ("decode, values: 1 x 8 pairs, a step a turn", 2.2, 0),
    ("smmla", 16, "2d"): ("scores of integers: 4 x 2 pairs, sixteen elements a turn", 1.9, 0),
}
LINE = re.compile(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$")


def innermost_loops(library):
    """Mnemonics and operands of every run of instructions that ends in a branch to its start, without a branch in between."""
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", library]
    body = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dump:
        for line in dump.stdout:
            found = LINE.match(line)
            if not found:
                body = []
                continue
            address, name, operands = int(found[1], 16), found[2], found[3]
            body.append((address, name, operands))
            if name == "b" or name.startswith(("b.", "cb", "tb", "ret", "br", "bl")):
                target = re.search(r"\b([0-9a-f]+) <", operands)
                inside = [i for i in body if target and i[0] >= int(target[1], 16)]
                if target and int(target[1], 16) <= address and inside and inside[0][0] == int(target[1], 16):
                    yield inside
                body = []
    if dump.returncode:
        sys.exit(f"{' '.join(command)} failed")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    best = defaultdict(lambda: (0.0, 0, 0, 0))
    for loop in innermost_loops(sys.argv[1]):
        names = [name for _, name, _ in loop]
        loads = sum(name.startswith("ld") and name != "ldrb" for name in names)
        spills = sum(name.startswith("st") and "[sp" in operands for _, name, operands in loop)
        shuffle = next((operands.split(",")[0].split(".")[-1] for _, name, operands in loop if name == "zip1"), "")
        for instruction in ("fmla", "bfmmla", "smmla"):
            kind = (instruction, names.count(instruction), shuffle)
            if kind in KINDS:
                best[kind] = max(best[kind], (kind[1] / max(loads, 1), -spills, loads, len(loop)))
    failed = 0
    for kind, (what, least, most) in KINDS.items():
        ratio, spills, loads, length = best[kind]
        good = ratio >= least and -spills <= most
        failed += not good
        print(
            f"{what}: {kind[1]} {kind[0]}, {loads} loads, {length} instructions, {-spills} stores to the stack; "
            f"{ratio:.2f} a load, at least {least}: {'ok' if good else 'FAILED'}"
        )
    print(f"{len(KINDS) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
