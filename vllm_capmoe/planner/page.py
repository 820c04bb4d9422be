"""A plan as one HTML page. Its plots are SVG inside the page; it asks nothing of the network."""

from collections.abc import Mapping, Sequence
from html import escape

from vllm_capmoe.planner import report
from vllm_capmoe.planner.counts import Observation
from vllm_capmoe.planner.grid import FACTORS, MODES
from vllm_capmoe.planner.verdict import DecodeAdvice, Verdict

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 13px }
.verdict { border-left: .4rem solid; padding: .5rem 1rem; background: #f8f8f8 }
.yes { border-color: #2a7d2a } .no { border-color: #b36b00 }
figure { margin: 1.5rem 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
"""
_STROKES = (("#1f6fb4", "none"), ("#c2571a", "9 5"), ("#2a7d2a", "3 4"))
"""Colour and dashes of each curve, so that equal curves are all seen."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 300, 62, 46, 14


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    return [low + (high - low) * at / (count - 1) for at in range(count)]


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, percent: bool = False
) -> str:
    """A line plot as SVG: by name the points (x, y)."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    left, right, top = min(xs), max(xs), max([*ys, 1e-9])
    bottom = min(0.0, *ys)

    def x_at(x: float) -> float:
        return _LEFT + (x - left) / ((right - left) or 1.0) * (_WIDTH - _LEFT - 20)

    def y_at(y: float) -> float:
        return _TOP + (top - y) / ((top - bottom) or 1.0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in _ticks(bottom, top):
        shown = f"{100 * y:.1f}%" if percent else f"{y:.2f}"
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}" '
            f'stroke="#ddd"/><text x="{_LEFT - 6}" y="{y_at(y) + 4:.1f}" text-anchor="end">'
            f"{shown}</text>"
        )
    marks = sorted(set(xs))
    for x in marks if len(marks) <= 12 else _ticks(left, right):
        parts.append(
            f'<text x="{x_at(x):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{x:.4g}</text>'
        )
    for at, (name, points) in enumerate(series.items()):
        colour, dashes = _STROKES[at % len(_STROKES)]
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" '
            f'stroke-dasharray="{dashes}"/>'
            f'<text x="{_WIDTH - 24}" y="{_TOP + 16 * (at + 1)}" text-anchor="end" '
            f'fill="{colour}">{escape(name)}</text>'
        )
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="12" font-family="sans-serif">'
        + "".join(parts)
        + f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>'
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(up)}</text></svg>"
    )


def loads(observation: Observation) -> str:
    """Layers by experts as SVG: load over the mean, averaged over steps; experts by load."""
    height = 16
    rows = []
    for at, layer in enumerate(observation.layers):
        sums = [sum(step) for step in zip(*layer.loads, strict=True)] or [0] * layer.experts
        mean = max(1e-9, sum(sums) / len(sums))
        width = (_WIDTH - 70) / layer.experts
        for place, load in enumerate(sorted(sums, reverse=True)):
            ratio = load / mean
            shade = min(1.0, ratio / 3)
            colour = (
                f"rgb({int(245 - 50 * shade)},{int(245 - 170 * shade)},{int(245 - 220 * shade)})"
            )
            rows.append(
                f'<rect x="{50 + place * width:.2f}" y="{at * height}" width="{width:.2f}" '
                f'height="{height - 1}" fill="{colour}"><title>layer {layer.number}: '
                f"{ratio:.2f} times the mean</title></rect>"
            )
        rows.append(f'<text x="44" y="{at * height + 12}" text-anchor="end">{layer.number}</text>')
    size = len(observation.layers) * height
    return (
        f'<svg viewBox="0 0 {_WIDTH} {size}" role="img" font-size="11" font-family="sans-serif">'
        + "".join(rows)
        + "</svg>"
    )


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def html(observation: Observation, verdict: Verdict, decode: Sequence[DecodeAdvice]) -> str:
    """The page."""

    def curve(mode: str, what: str) -> list[tuple[float, float]]:
        tried = [(f, observation.over_layers(f"{mode} {f:g}")) for f in sorted(FACTORS)]
        return [(factor, getattr(counts, what)) for factor, counts in tried]

    def by_mode(what: str) -> dict[str, list[tuple[float, float]]]:
        return {mode: curve(mode, what) for mode in MODES}

    layers = observation.layers
    uneven = {"all layers": [(float(layer.number), layer.imbalance()) for layer in layers]}
    figures = [
        _figure(
            loads(observation),
            "Load of the experts over the mean, layer by layer, the busiest to the left (before "
            "any limit).",
        ),
        _figure(
            lines(uneven, "layer", "max / mean load"),
            "Load of the busiest expert of a step over the mean, averaged over the steps with "
            "prompt tokens.",
        ),
        _figure(
            lines(by_mode("dropped_share"), "capacity factor", "dropped", percent=True),
            "Share of the top-k assignments that are dropped.",
        ),
        _figure(
            lines(by_mode("lost_share"), "capacity factor", "gate mass lost", percent=True),
            "Share of the gate mass that belongs to dropped assignments.",
        ),
        _figure(
            lines(by_mode("rank_ratio"), "capacity factor", "bound of the speed-up"),
            f"Load of the busiest of {observation.ep_size} ranks without the limit over that with "
            "it: what the MoE layers can gain at most.",
        ),
    ]
    if decode:
        active = {
            f"{advice.requests} requests": [
                *((float(keep), row[0]) for keep, row in sorted(advice.rows.items())),
                (float(advice.top_k), advice.before),
            ]
            for advice in decode
        }
        figures.append(
            _figure(
                lines(active, "experts that a token keeps", "active experts"),
                "Experts that a layer loads in a decode step.",
            )
        )
    verdicts = [(verdict.worth, f"Turn on {verdict.limits.mode}", verdict.reason)]
    for advice in decode:
        verdicts.append((advice.worth, f"Turn on decode keep {advice.keep}", advice.reason))
    title = f"Capacity plan of {escape(observation.model)}"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        + "".join(
            f'<p class="verdict {"yes" if worth else "no"}"><strong>'
            f"{advised if worth else 'Not worth it'}</strong>: {escape(reason)}</p>"
            for worth, advised, reason in verdicts
        )
        + "".join(figures)
        + f"<h2>Figures</h2><pre>{escape(report.text(observation, verdict, decode))}</pre>"
        "</body></html>\n"
    )
