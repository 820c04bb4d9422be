"""Goals, tables and plots from the CSV of bench_moe_layer.py.

python benchmarks/moe_layer_report.py results/<date>-moe_layer-<device>.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import _common as common

Row = dict[str, str]


def _numbers(rows: list[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row[column]]


def goals(rows: list[Row]) -> None:
    """Print each goal with what was measured; none is assumed."""
    dropless = [row for row in rows if row["mode"] == "off"]
    large = [row for row in dropless if int(row["tokens"]) >= 1024]
    few = [row for row in dropless if int(row["tokens"]) <= 16]
    at_8192 = [row for row in dropless if row["tokens"] == "8192"]
    mixtral = [r for r in at_8192 if r["shape"] == "mixtral-8x7b" and float(r["skew"]) == 1]

    def goal(text: str, values: list[float], reduce: str, least: float) -> None:
        value = {"geomean": common.geomean, "min": min}[reduce](values) if values else 0.0
        common.verdict(
            f"{text}, {reduce} >= {least}", value, lambda v: v >= least, count=len(values)
        )

    layer, experts = "vllm_layer_over_ours", "vllm_experts_over_ours"
    goal("vLLM's layer over ours, dropless, T >= 1024", _numbers(large, layer), "geomean", 1.2)
    goal("vLLM's layer over ours, dropless, any T", _numbers(dropless, layer), "min", 0.97)
    goal("vLLM's experts over ours, dropless, T >= 1024", _numbers(large, experts), "geomean", 1.2)
    goal("vLLM's experts over ours, dropless, any T", _numbers(dropless, experts), "min", 0.97)
    goal("share of the bf16 roof, Mixtral, T = 8192", _numbers(mixtral, "roof_share"), "min", 0.75)
    goal("share of the copy roof, T <= 16", _numbers(few, "copy_share"), "min", 0.85)
    routing_goals(rows)
    routes = _numbers(dropless, "vllm_route_over_ours")
    goal("vLLM's top-k and alignment over our routing, dropless, any T", routes, "min", 1.0)
    saved = time_per_work(rows)
    goal("time saved over work saved by a capacity, T >= 1024", saved, "geomean", 0.9)
    for name in ("loop", "grouped"):
        values = _numbers(large, f"{name}_over_ours")
        print(f"      {name} over ours, dropless, T >= 1024, geomean: {common.geomean(values):.3f}")


def routing_goals(rows: list[Row]) -> None:
    """At T = 8192, dropless and with a limit apart: only with a limit all of the routing runs."""
    at_8192 = [row for row in rows if row["tokens"] == "8192"]
    for kind, limited in (("dropless", False), ("with a limit", True)):
        part = [row for row in at_8192 if (row["mode"] != "off") == limited]
        shares = _numbers(part, "route_share")
        text = f"routing's share of the layer, {kind}, T = 8192, max <= 0.05"
        common.verdict(text, max(shares, default=0.0), lambda v: v <= 0.05, count=len(shares))
        times = _numbers(part, "vllm_route_over_ours")
        text = f"vLLM's top-k and alignment over our routing, {kind}, T = 8192, min >= 1.0"
        common.verdict(text, min(times, default=0.0), lambda v: v >= 1.0, count=len(times))


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
            faster = common.geomean(time for time, _ in pairs)
            more = sum(more for _, more in pairs) / len(pairs)
            print(
                f"C rounded {rounding:4} {shape:18} speed {faster:.3f}, dropped share "
                f"{100 * more:+.2f} points, {len(pairs)} points of the grid"
            )


def plots(path: Path) -> None:
    """PNG files beside the CSV: against vLLM, and against the roofs, by T."""
    _, rows = common.read_table(path)
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
            common.plot_lines(target, title, ("tokens", label), lines, level)
            print(f"wrote {target}")


if __name__ == "__main__":
    csv_path = Path(sys.argv[1])
    all_rows = common.read_table(csv_path)[1]
    if any(row["rounding"] != "none" for row in all_rows):
        whole_tiles(all_rows)
    else:
        goals(all_rows)
        plots(csv_path)
