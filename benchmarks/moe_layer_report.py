"""Goals, tables and plots from the CSV of bench_moe_layer.py.

python benchmarks/moe_layer_report.py results/<date>-moe_layer-<device>.csv
"""

from __future__ import annotations

import functools
import operator
import sys
from pathlib import Path

import _tables

Row = dict[str, str]


def _numbers(rows: list[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row[column]]


def goals(rows: list[Row]) -> None:
    """Print the goals of capacities with what was measured; run_gpu.py has the others."""
    routing_goals(rows)
    saved = time_per_work(rows)
    text = "time saved over work saved by a capacity, T >= 1024, geomean >= 0.9"
    _tables.verdict(text, _tables.geomean(saved), lambda v: v >= 0.9, count=len(saved))


def routing_goals(rows: list[Row]) -> None:
    """At T = 8192 and every skew, dropless and with a limit apart: only with one all of it runs."""
    at_8192 = [row for row in rows if row["tokens"] == "8192"]
    for kind, least in (("dropless", 1.0), ("with a limit", 1 / 1.2)):
        limited = kind != "dropless"
        part = [row for row in at_8192 if (row["mode"] != "off") == limited]
        shares = _numbers(part, "route_share")
        text = f"routing's share of the layer, {kind}, T = 8192, max <= 0.05"
        _tables.verdict(text, max(shares, default=0.0), lambda v: v <= 0.05, count=len(shares))
        times = _numbers(part, "vllm_route_over_ours")
        text = f"vLLM's top-k and alignment over our routing, {kind}, T = 8192, min >= {least:.3f}"
        enough = functools.partial(operator.le, least)
        _tables.verdict(text, min(times, default=0.0), enough, count=len(times))


def time_per_work(rows: list[Row]) -> list[float]:
    """(1 - time / dropless time) / (1 - work), where the capacity saves a tenth of the work."""
    dropless = {(r["shape"], r["tokens"], r["skew"]): r for r in rows if r["mode"] == "off"}
    found = []
    for row in rows:
        base = dropless.get((row["shape"], row["tokens"], row["skew"]))
        saved = 1 - float(row["work_share"])
        if row["mode"] == "off" or base is None or int(row["tokens"]) < 1024 or saved < 0.1:
            continue
        time = float(row["experts_ms"]) / float(base["experts_ms"])
        found.append(max(1 - time, 1e-3) / saved)
    return found


def whole_tiles(rows: list[Row]) -> None:
    """What rounding C to whole tiles gives: time, and assignments dropped more or less."""
    by_point: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("shape", "tokens", "skew", "mode", "gamma"))
        by_point.setdefault(key, {})[row["rounding"]] = row
    for rounding in ("up", "down"):
        per_shape: dict[str, list[tuple[float, float]]] = {}
        for key, found in by_point.items():
            if rounding in found and "none" in found:
                plain, other = found["none"], found[rounding]
                time = float(plain["experts_ms"]) / float(other["experts_ms"])
                more = float(other["dropped_share"]) - float(plain["dropped_share"])
                per_shape.setdefault(key[0], []).append((time, more))
        for shape, pairs in per_shape.items():
            faster = _tables.geomean(time for time, _ in pairs)
            more = sum(more for _, more in pairs) / len(pairs)
            print(
                f"C rounded {rounding:4} {shape:18} speed {faster:.3f}, dropped share "
                f"{100 * more:+.2f} points, {len(pairs)} points of the grid"
            )


def plots(path: Path) -> None:
    """PNG files beside the CSV: against vLLM, and against the roofs, by T."""
    _, rows = _tables.read_table(path)
    even = [row for row in rows if row["mode"] == "off" and float(row["skew"]) == 1] or [
        row for row in rows if row["mode"] == "off"
    ]
    for column, label, level in (
        ("vllm_layer_over_ours", "time of vLLM's layer over ours", 1.0),
        ("roof_share", "share of the measured bf16 roof", 0.75),
        ("copy_share", "share of the measured copy roof", 0.85),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in even:
            if row[column]:
                point = (float(row["tokens"]), float(row[column]))
                lines.setdefault(row["shape"], []).append(point)
        if lines:
            target = path.with_name(f"{path.stem}-{column}.png")
            title = f"One MoE layer, no capacity, least skew ({path.stem})"
            _tables.plot_lines(target, title, ("tokens", label), lines, level)
            print(f"wrote {target}")


if __name__ == "__main__":
    csv_path = Path(sys.argv[1])
    all_rows = _tables.read_table(csv_path)[1]
    if any(row["rounding"] != "none" for row in all_rows):
        whole_tiles(all_rows)
    else:
        goals(all_rows)
        plots(csv_path)
