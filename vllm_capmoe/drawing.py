"""Drawings and pages without anything from the network: SVG inside of one HTML file."""

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
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


def heatmap(rows: Sequence[tuple[str, Sequence[float], Sequence[str]]], full: float = 3.0) -> str:
    """Rows of cells as SVG.

    rows: of each, its name, its numbers, and what a cell says when it is pointed at. full: the
        number of the darkest colour.
    """
    height, cells = 16, []
    for at, (name, numbers, said) in enumerate(rows):
        width = (_WIDTH - 70) / max(1, len(numbers))
        for place, (number, text) in enumerate(zip(numbers, said, strict=True)):
            shade = min(1.0, number / full)
            colour = (
                f"rgb({int(245 - 50 * shade)},{int(245 - 170 * shade)},{int(245 - 220 * shade)})"
            )
            cells.append(
                f'<rect x="{50 + place * width:.2f}" y="{at * height}" width="{width:.2f}" '
                f'height="{height - 1}" fill="{colour}"><title>{escape(text)}</title></rect>'
            )
        cells.append(f'<text x="44" y="{at * height + 12}" text-anchor="end">{escape(name)}</text>')
    size = len(rows) * height
    return (
        f'<svg viewBox="0 0 {_WIDTH} {size}" role="img" font-size="11" font-family="sans-serif">'
        + "".join(cells)
        + "</svg>"
    )


def figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def document(title: str, body: str) -> str:
    """A whole page; body is HTML, title is text."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{body}</body></html>\n"
    )
