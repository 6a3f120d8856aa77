#!/usr/bin/env python3
"""Draws the divergences by format of the tables in src/docs/driver.md, as an SVG between the marks of that page.

    python3 benches/peers/divergence.py [--check]
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "src/docs/driver.md"
MARKS = "<!-- divergence -->", "<!-- /divergence -->"
LEFT, RIGHT, TOP, STEP = 150, 680, 44, 22
LEAST, MOST = -7, 0
# Each series: its name, and whether its marks are round, and full.
SERIES = [("SmolLM2", True, False), ("SmolLM2, rotated", True, True), ("Gemma-3", False, False), ("Gemma-3, rotated", False, True)]


def tables(text: str) -> list[list[list[str]]]:
    found = re.findall(r"^\| keys and values .*\n\| ---.*\n((?:\|.*\n)+)", text, re.M)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found]


def numbers(text: str) -> dict[str, list[float | None]]:
    """Of each format: bits per element, and the divergence in each series."""
    plain, rotated, smollm, gemma = tables(text)[:4]
    width = int(plain[0][1].split(" / ")[0].replace(",", "")) / 16
    found: dict[str, list[float | None]] = {}
    for name, size, _, divergence, *_ in plain:
        both = [float(x) for x in divergence.split(" / ")]
        found[name] = [int(size.split(" / ")[0].replace(",", "")) / width, both[0], None, both[1], None]
    for name, _, divergence, *_ in rotated:
        found[name][2] = float(divergence.split(" ")[0])
    for table, series in ((smollm, 2), (gemma, 4)):
        for name, _, _, cell, _ in table:
            if name in found:
                found[name][series] = float(cell.split(", ")[1])
    return found


def mark(x: float, y: float, round_: bool, full: bool) -> str:
    look = 'fill="currentColor"' if full else 'fill="none" stroke="currentColor"'
    if round_:
        return f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" {look}/>'
    return f'<path d="M{x:.0f} {y - 5:.0f}l5 9h-10z" {look}/>'


def picture(text: str) -> str:
    rows = numbers(text)
    bottom = TOP + STEP * len(rows)
    at = lambda value: LEFT + (math.log10(value) - LEAST) / (MOST - LEAST) * (RIGHT - LEFT)
    lines = [f'<svg viewBox="0 0 {RIGHT + 20} {bottom + 40}" xmlns="http://www.w3.org/2000/svg" font-size="12" fill="currentColor" '
             'role="img" aria-label="Mean divergence of the next token by format">']
    for i, (name, round_, full) in enumerate(SERIES):
        x = LEFT + i * 135
        lines.append(f'{mark(x, 16, round_, full)}<text x="{x + 9}" y="20">{name}</text>')
    for power in range(LEAST, MOST + 1):
        x = at(10.0**power)
        lines.append(f'<path d="M{x:.0f} {TOP - 12}V{bottom}" stroke="currentColor" opacity=".2"/>'
                     f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">1e{power}</text>')
    for i, (name, (bits, *divergences)) in enumerate(rows.items()):
        y = TOP + i * STEP
        lines.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{name}, {bits:g} bits</text>')
        lines += [mark(at(x), y, *series[1:]) for x, series in zip(divergences, SERIES, strict=True) if x]
    lines.append(f'<text x="{(LEFT + RIGHT) / 2:.0f}" y="{bottom + 34}" text-anchor="middle">mean divergence</text>')
    return "\n".join([*lines, "</svg>"])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    old, after = rest.split(MARKS[1])
    new = f"\n{picture(text)}\n"
    if "--check" in sys.argv[1:]:
        sys.exit("the picture is not of the tables" if old != new else 0)
    PAGE.write_text(f"{before}{MARKS[0]}{new}{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
