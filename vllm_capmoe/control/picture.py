"""Loads of layers and experts, drawn for a terminal and as a page."""

from collections.abc import Sequence
from typing import Any

from vllm_capmoe.drawing import document, figure, heatmap

SHADES = " ░▒▓█"
FULL = 3.0  # times the mean load: the darkest shade
Layers = list[dict[str, Any]]  # as the route has them


def ratios(loads: Sequence[int]) -> list[float]:
    """Loads over their mean; all 0 where there is none."""
    mean = sum(loads) / max(1, len(loads))
    return [load / mean if mean else 0.0 for load in loads]


def cells(loads: Sequence[int], width: int) -> str:
    """One letter for each expert, or, where they don't fit, for the busiest of some neighbours."""
    numbers = ratios(loads)
    several = -(-len(numbers) // max(1, width))
    groups = [numbers[at : at + several] for at in range(0, len(numbers), several)]
    return "".join(
        SHADES[min(len(SHADES) - 1, round(max(group) / FULL * (len(SHADES) - 1)))]
        for group in groups
    )


def terminal(answer: dict[str, Any], part: str, columns: int) -> str:
    """What the route answered to GET, as text of so many columns.

    part: "window" or "since_start".
    """
    now, counted = answer["now"], answer[part]
    layers: Layers = counted["layers"]
    settings = ", ".join(f"{key} {value}" for key, value in now.items())
    head = f"{settings} | last {counted['seconds']:.0f} s"
    lines = [head[:columns], "layer  max/mean      dropped  lost   load of the experts, before"]
    for layer in layers:
        before, after = (max(ratios(layer[f"load_{w}"]), default=0.0) for w in ("before", "after"))
        share = layer["dropped_assignments"] / max(1, sum(layer["load_before"]))
        lost = layer["lost_gate_mass"] / max(1e-9, layer["gate_mass"])
        row = f"{layer['number']:5d}  {before:4.1f} -> {after:4.1f}  {share:6.1%}  {lost:5.1%}  "
        lines.append(row + cells(layer["load_before"], columns - len(row)))
    if not any(sum(layer["load_before"]) for layer in layers):
        lines.append("(no tokens in this time)")
    return "\n".join(lines)


def page(answer: dict[str, Any], url: str) -> str:
    """The same since the start, as one HTML page that asks nothing of the network."""
    counted = answer["since_start"]
    figures = []
    for when in ("before", "after"):
        rows = []
        for layer in counted["layers"]:
            numbers = ratios(layer[f"load_{when}"])
            said = [
                f"layer {layer['number']}, expert {expert}: {number:.2f} times the mean"
                for expert, number in enumerate(numbers)
            ]
            rows.append((str(layer["number"]), numbers, said))
        caption = f"Load of each expert over the mean of its layer, {when} capacity."
        figures.append(figure(heatmap(rows, FULL), caption))
    settings = ", ".join(f"{key} {value}" for key, value in answer["now"].items())
    body = f"<p>{settings}; the last {counted['seconds']:.0f} seconds.</p>" + "".join(figures)
    return document(f"Expert loads of {url}", body)
