"""A plan as one HTML page. Its plots are SVG inside the page; it asks nothing of the network."""

from collections.abc import Sequence
from html import escape

from vllm_capmoe.drawing import document, figure, heatmap, lines
from vllm_capmoe.planner import report
from vllm_capmoe.planner.counts import Observation
from vllm_capmoe.planner.grid import FACTORS, MODES
from vllm_capmoe.planner.verdict import DecodeAdvice, Verdict


def loads(observation: Observation) -> str:
    """Layers by experts as SVG: load over the mean, averaged over steps; experts by load."""
    rows = []
    for layer in observation.layers:
        sums = [sum(step) for step in zip(*layer.loads, strict=True)] or [0] * layer.experts
        mean = max(1e-9, sum(sums) / len(sums))
        ratios = [load / mean for load in sorted(sums, reverse=True)]
        said = [f"layer {layer.number}: {ratio:.2f} times the mean" for ratio in ratios]
        rows.append((f"{layer.number}", ratios, said))
    return heatmap(rows)


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
        figure(
            loads(observation),
            "Load of the experts over the mean, layer by layer, the busiest to the left (before "
            "any limit).",
        ),
        figure(
            lines(uneven, "layer", "max / mean load"),
            "Load of the busiest expert of a step over the mean, averaged over the steps with "
            "prompt tokens.",
        ),
        figure(
            lines(by_mode("dropped_share"), "capacity factor", "dropped", percent=True),
            "Share of the top-k assignments that are dropped.",
        ),
        figure(
            lines(by_mode("lost_share"), "capacity factor", "gate mass lost", percent=True),
            "Share of the gate mass that belongs to dropped assignments.",
        ),
        figure(
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
            figure(
                lines(active, "experts that a token keeps", "active experts"),
                "Experts that a layer loads in a decode step.",
            )
        )
    verdicts = [(verdict.worth, f"Turn on {verdict.limits.mode}", verdict.reason)]
    for advice in decode:
        verdicts.append((advice.worth, f"Turn on decode keep {advice.keep}", advice.reason))
    body = (
        "".join(
            f'<p class="verdict {"yes" if worth else "no"}"><strong>'
            f"{advised if worth else 'Not worth it'}</strong>: {escape(reason)}</p>"
            for worth, advised, reason in verdicts
        )
        + "".join(figures)
        + f"<h2>Figures</h2><pre>{escape(report.text(observation, verdict, decode))}</pre>"
    )
    return document(f"Capacity plan of {observation.model}", body)
