"""The goals of README.md, judged from the rows of one card and one state of the code.

    python -m gpu.report FILE.csv [CODE]

PASS and FAIL are said only where every row that a goal needs was measured; FAIL also where a row of
ours is wrong, failed, hung or died, or where what was measured already misses the goal. WAITS
otherwise, with the number of rows that are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import _tables
from gpu.items import GOAL_SHAPES, TOKENS
from gpu.record import BAD, ENDS, KEY

Row = dict[str, str]
Point = tuple[str, int]
FINE = GOAL_SHAPES[1:]


class Rows:
    """Rows by step, shape, tokens, part and who."""

    def __init__(self, rows: list[Row], code: str) -> None:
        self.rows = [row for row in rows if row["code"] == code]
        self.by_key = {tuple(row[name] for name in KEY): row for row in self.rows}

    def get(self, point: Point, part: str, who: str) -> Row | None:
        shape, tokens = point
        return self.by_key.get(("time", shape, str(tokens), part, who))

    def number(self, point: Point, part: str, who: str, column: str = "ms") -> float | None:
        row = self.get(point, part, who)
        return float(row[column]) if row and row["status"] == "ok" else None

    def ratio(self, point: Point, over: tuple[str, str], under: tuple[str, str]) -> float | None:
        a, b = self.number(point, *over), self.number(point, *under)
        return a / b if a is not None and b is not None else None

    def roof(self, column: str) -> float | None:
        row = self.by_key.get(("time", "-", "0", "roofs", "ours"))
        return float(row[column]) if row and row["status"] == "ok" else None

    def share(self, point: Point, column: str) -> float | None:
        roof, found = self.roof(column), self.number(point, "experts", "ours", column)
        return found / roof if roof and found is not None else None

    def bad(self, point: Point, part: str) -> str:
        """What is wrong with our own row of a part, in its smoke test or when it was timed."""
        parts = ("experts", "routing", "layer") if part == "layer" else (part,)
        for step in ("compile", "smoke", "time"):
            for one in parts:
                row = self.by_key.get((step, point[0], str(point[1]), one, "ours"))
                if row and row["status"] in (ENDS if step == "compile" else BAD):
                    return f"{'/'.join(row[name] for name in KEY)} {row['status']}"
        return ""


def judge(
    rows: Rows,
    text: str,
    part: str,
    points: list[Point],
    value: Callable[[Point], float | None],
    least: float,
    reduce: Callable[[list[float]], float] = min,
) -> str:
    """One line: PASS, FAIL or WAITS, the goal, what was measured."""
    found = [v for v in map(value, points) if v is not None]
    broken = [b for b in (rows.bad(point, part) for point in points) if b]
    whole = len(found) == len(points)
    result = reduce(found) if found else None
    missed = result is not None and result < least
    failed = broken or (missed and (whole or reduce is min))
    word = "FAIL" if failed else "PASS" if whole else "WAITS"
    shown = "-" if result is None else f"{result:.3f}"
    named = f"; {', '.join(broken)}" if broken else ""
    return f"{word:5} {text}: {shown} ({len(found)} of {len(points)} rows{named})"


def goals(rows: Rows) -> list[str]:
    """Every goal that step `time` decides."""
    everywhere = [(shape, tokens) for shape in GOAL_SHAPES for tokens in sorted(TOKENS)]
    large = [point for point in everywhere if point[1] >= 1024]
    few = [point for point in everywhere if point[1] <= 16]
    last = [(shape, 8192) for shape in GOAL_SHAPES]
    layer, vllm_layer = ("layer", "ours"), ("layer", "vllm")
    ours, vllm, limit = ("routing", "ours"), ("routing", "vllm"), ("limit", "ours")

    def over(a: tuple[str, str], b: tuple[str, str]) -> Callable[[Point], float | None]:
        return lambda point: rows.ratio(point, a, b)

    def share(column: str) -> Callable[[Point], float | None]:
        return lambda point: rows.share(point, column)

    faster, geo = over(vllm_layer, layer), _tables.geomean
    text = "vLLM's layer over ours, dropless, routing included"
    bf16, copy = "share of the bf16 roof, Mixtral, T = 8192", "share of the copy roof"
    routing = "vLLM's top-k and alignment over our routing"
    coarse, fine = ([p for p in few if (p[0] in FINE) == is_fine] for is_fine in (False, True))
    return [
        judge(rows, f"{text}, T >= 1024, geomean >= 1.3", "layer", large, faster, 1.3, geo),
        judge(rows, f"{text}, any T, min >= 1.0", "layer", everywhere, faster, 1.0),
        judge(rows, f"{bf16}, >= 0.80", "experts", last[:1], share("tflops"), 0.80),
        judge(
            rows, f"{copy}, Mixtral, T <= 16, min >= 0.88", "experts", coarse, share("gbps"), 0.88
        ),
        judge(
            rows,
            f"{copy}, fine experts, T <= 16, min >= 0.80",
            "experts",
            fine,
            share("gbps"),
            0.80,
        ),
        judge(rows, f"{routing}, T = 8192, min >= 1.0", "routing", last, over(vllm, ours), 1.0),
        judge(
            rows,
            f"{routing} with a limit, T = 8192, min >= 0.833",
            "limit",
            last,
            over(vllm, limit),
            1 / 1.2,
        ),
    ]


def figures(rows: Rows) -> list[str]:
    """Times of every point, and the choices of step `ab`."""
    lines = []
    for shape in GOAL_SHAPES:
        for tokens in sorted(TOKENS):
            cells = []
            for part, who in (
                *(("experts", "ours"), ("experts", "vllm"), ("experts", "loop")),
                *(("experts", "grouped"), ("routing", "ours"), ("routing", "vllm")),
                *(("limit", "ours"), ("layer", "ours"), ("layer", "vllm")),
            ):
                row = rows.get((shape, tokens), part, who)
                if row is not None:
                    cells.append(f"{part} {who} {row['ms'] or row['status']}")
            if cells:
                lines.append(f"      {shape} T={tokens}, ms: {', '.join(cells)}")
    for row in rows.rows:
        if row["step"] == "ab" and row["status"] == "ok":
            lines.append(
                f"      {row['who']} at {row['shape']} T={row['tokens']}: "
                f"{row['base_over_this']} times as fast as the heuristics"
            )
    return lines


def summary(rows: list[Row], code: str) -> list[str]:
    """What costs a row, the goals, the figures."""
    found = Rows(rows, code)
    counts: dict[str, dict[str, int]] = {}
    for row in found.rows:
        step = counts.setdefault(row["step"], {})
        step[row["status"]] = step.get(row["status"], 0) + 1
    lines = [
        f"{step}: {', '.join(f'{n} {status}' for status, n in by_status.items())}"
        for step, by_status in counts.items()
    ]
    for row in found.rows:
        if row["status"] in BAD:
            name = "/".join(row[column] for column in KEY)
            lines.append(f"######## {row['status'].upper()}: {name}: {row['why'][:200]}")
    return [*lines, *goals(found), *figures(found)]


if __name__ == "__main__":
    table = _tables.read_table(Path(sys.argv[1]))[1]
    print("\n".join(summary(table, sys.argv[2] if len(sys.argv) > 2 else table[-1]["code"])))
