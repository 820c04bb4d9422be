"""A plan as text for the terminal and as plain numbers for JSON."""

from collections.abc import Iterable, Sequence
from typing import Any

from vllm_capmoe.planner.counts import Observation
from vllm_capmoe.planner.grid import FACTORS, MODES
from vllm_capmoe.planner.verdict import DecodeAdvice, Verdict


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.ljust(widths[0]) if at == 0 else cell.rjust(widths[at])
                          for at, cell in enumerate(row))  # fmt: skip
        return "  ".join([first, *others]).rstrip()

    return "\n".join(
        [line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])]
    )


def _share(value: float) -> str:
    return f"{100 * value:.2f}%"


def by_factor(observation: Observation) -> str:
    """Each mode at each factor, the same in all layers."""
    rows = []
    for mode in MODES:
        for factor in FACTORS:
            counts = observation.over_layers(f"{mode} {factor:g}")
            rows.append((
                mode, f"{factor:g}", _share(counts.dropped_share), _share(counts.lost_share),
                _share(counts.missing_share),
                f"{counts.rank_ratio:.2f}x", str(counts.left_without),
            ))  # fmt: skip
    head = ("mode", "factor", "dropped", "mass lost", "mass missing", "MoE bound", "without expert")
    return table(head, rows)


def by_layer(observation: Observation, verdict: Verdict) -> str:
    """The layers: how uneven, and what the verdict gives each."""
    rows = []
    for layer in observation.layers:
        factor = verdict.limits.factors[layer.number]
        tried = f"{verdict.limits.mode} {factor:g}" if factor else None
        counts = layer.prompt[tried] if tried else None
        rows.append((
            str(layer.number), str(layer.experts), f"{layer.imbalance():.2f}",
            f"{factor:g}" if factor else "no limit",
            _share(counts.dropped_share) if counts else "-",
            f"{counts.rank_ratio:.2f}x" if counts else "-",
        ))  # fmt: skip
    return table(("layer", "experts", "max/mean load", "factor", "dropped", "MoE bound"), rows)


def decode_table(advice: DecodeAdvice) -> str:
    """Decode keep: experts that a layer loads in a step, by what a token keeps; what was timed."""

    def timed(keep: int) -> list[str]:
        if keep not in advice.measured:
            return ["-", "-"]
        active, ratio = advice.measured[keep]
        return [f"{active:.1f}", f"{ratio:.2f}"]

    rows = [["off", f"{advice.before:.1f}", "-", "-", *timed(advice.top_k)]]
    for keep, (after, missing) in sorted(advice.rows.items(), reverse=True):
        fewer = 1 - after / advice.before if advice.before else 0.0
        rows.append([str(keep), f"{after:.1f}", _share(fewer), _share(missing), *timed(keep)])
    head = ("decode keep", "active experts", "fewer", "mass missing", "active, timed", "time")
    return table(head, rows)


def text(observation: Observation, verdict: Verdict, decode: Sequence[DecodeAdvice]) -> str:
    """The whole plan for a terminal."""
    found = observation
    parts = [
        f"{found.model}: {found.prompts} prompts ({found.left_out} more are longer than it takes), "
        f"{found.prompt_tokens} prompt tokens, "
        f"{found.output_tokens} generated, {len(found.layers)} MoE layers, "
        f"{found.ep_size} expert parallel ranks",
        "Every limit, the same in all layers (steps with prompt tokens):",
        by_factor(found),
        f"By layer, {verdict.limits.mode} within the budget:",
        by_layer(found, verdict),
    ]
    for advice in decode:
        parts += [f"Decode keep, {advice.requests} requests a step:", decode_table(advice)]
    advised = f"turn on {verdict.limits.mode}" if verdict.worth else "not worth it"
    parts.append(f"Verdict: {advised}: {verdict.reason}")
    for advice in decode:
        advised = f"turn on decode keep {advice.keep}" if advice.worth else "not worth it"
        parts.append(f"Verdict for decode: {advised}: {advice.reason}")
    return "\n\n".join(parts)


def plain(
    observation: Observation, verdict: Verdict, decode: Sequence[DecodeAdvice]
) -> dict[str, Any]:
    """The plan as JSON values."""
    limits, counts = verdict.limits, verdict.limits.counts
    return {
        "model": observation.model,
        "ep_size": observation.ep_size,
        "prompts": observation.prompts,
        "left_out": observation.left_out,
        "prompt_tokens": observation.prompt_tokens,
        "output_tokens": observation.output_tokens,
        "verdict": {
            "worth": verdict.worth,
            "reason": verdict.reason,
            "mode": limits.mode,
            "layers": limits.settings(),
            "predicted": {
                "moe_layers_speed_bound": limits.speed,
                "dropped": counts.dropped,
                "dropped_share": counts.dropped_share,
                "mass_lost_share": counts.lost_share,
                "mass_missing_share": counts.missing_share,
                "peak_load": counts.peak_after,
                "rank_load": counts.rank_after,
            },
        },
        "by_factor": {
            f"{mode} {factor:g}": {
                "dropped_share": tried.dropped_share,
                "mass_lost_share": tried.lost_share,
                "moe_layers_speed_bound": tried.rank_ratio,
            }
            for mode in MODES
            for factor in FACTORS
            for tried in [observation.over_layers(f"{mode} {factor:g}")]
        },
        "layers": [
            {
                "layer": layer.number,
                "experts": layer.experts,
                "imbalance": layer.imbalance(),
                "factor": limits.factors[layer.number],
            }
            for layer in observation.layers
        ],
        "decode": [
            {
                "requests": advice.requests,
                "worth": advice.worth,
                "reason": advice.reason,
                "keep": advice.keep,
                "active_before": advice.before,
                "tried": {
                    str(keep): {"active": after, "mass_missing_share": missing}
                    for keep, (after, missing) in advice.rows.items()
                },
                "timed": {
                    str(keep): {"active": active, "time": ratio}
                    for keep, (active, ratio) in advice.measured.items()
                },
            }
            for advice in decode
        ],
    }
