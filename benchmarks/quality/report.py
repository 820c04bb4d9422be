"""Tables (Markdown, CSV) and plots of what `run.py` measured.

Every figure is paired: the same sequences with a setting and without a limit. Δ nll is in nats a
token, in brackets its standard error over sequences, in units of the last digit. Only sequences
that a setting and no limit both have count; the report says how many tokens that are.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections import defaultdict
from pathlib import Path

from _tables import read_table
from report_tasks import answers_section, choice_section
from settings import AGAIN, NONE, RULES, Setting, auto_keep, decode_setting, rule, tables

TITLES = {
    "rules": "Rules, by γ",
    "metrics": "Whom an overloaded expert keeps, by γ: Token Drop",
    "curve": "Rules over γ",
    "candidates": "Extra candidates (m) and the cap of Expanded Drop, γ = 1",
    "scope": "Limits over the step, or over each request, γ = 1",
    "renormalised": "Kept weights rescaled to sum to one, or not, γ = 1",
}
Part = tuple[str, int]  # model, requests of a decode step (0: prompts)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a setting costs against no limit.

    delta, error: nats per token and its standard error over sequences. kl: nats per token.
    agree: share of positions with the same best token. dropped: share of the assignments.
    lost: share of the gate mass. held: assignments held over chosen. peak: busiest expert's load
    over the mean load of the chosen, before -> after. active: experts with tokens, mean over
    layers and steps. tokens: predicted tokens compared.
    """

    delta: float
    error: float
    kl: float
    agree: float
    dropped: float
    lost: float
    held: float
    peak_before: float
    peak: float
    active: float
    tokens: int

    @property
    def short(self) -> str:
        return f"{self.delta:.4f} ({self.error * 1e4:.0f})"


def costs(rows: list[dict[str, str]]) -> dict[Part, dict[str, Cost]]:
    """(model, requests) -> name of the setting -> cost."""
    found: dict[Part, dict[str, dict[tuple[str, str], dict[str, str]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        part = row["model"], int(row["requests"])
        found[part][row["setting"]][row["seed"], row["sequence"]] = row
    return {
        part: {
            name: cost([(ours[key], free[key]) for key in sorted(ours) if key in free])
            for name, ours in by_setting.items()
        }
        for part, by_setting in sorted(found.items())
        if (free := by_setting.get(NONE.name))
    }


def cost(pairs: list[tuple[dict[str, str], dict[str, str]]]) -> Cost:
    """pairs: rows of a sequence with the setting and without a limit."""
    ours = [one for one, _ in pairs]

    def total(name: str) -> float:
        return math.fsum(float(row[name] or 0) for row in ours)

    tokens = total("predicted")
    deltas = [
        (float(one["nll"]) - float(other["nll"])) / float(one["predicted"]) for one, other in pairs
    ]
    spread = statistics.stdev(deltas) if len(deltas) > 1 else math.nan
    return Cost(
        delta=statistics.fmean(deltas),
        error=spread / math.sqrt(len(deltas)),
        kl=total("kl") / tokens,
        agree=total("agree") / tokens,
        dropped=total("dropped") / total("chosen"),
        lost=total("lost") / total("mass"),
        held=total("held") / total("chosen"),
        peak_before=total("peak_before") / total("mean"),
        peak=total("peak_after") / total("mean"),
        active=total("active") / total("calls"),
        tokens=round(tokens),
    )


def grid(cells: dict[tuple[str, str], Setting], found: dict[str, Cost]) -> list[str]:
    """A Markdown table of Δ nll, without rows and columns in which nothing was measured."""
    there = [place for place, setting in cells.items() if setting.name in found]
    rows = list(dict.fromkeys(row for row, _ in there))
    columns = list(dict.fromkeys(column for _, column in there))

    def cell(row: str, column: str) -> str:
        setting = cells.get((row, column))
        return found[setting.name].short if setting and setting.name in found else ""

    lines = [[cell(row, column) for column in columns] for row in rows]
    return [
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {row} | " + " | ".join(line) + " |" for row, line in zip(rows, lines, strict=True)),
    ]


def details(found: dict[str, Cost]) -> list[str]:
    """A Markdown table of all figures of all settings."""
    lines = [
        "| setting | Δ nll | KL | top-1 agreement | dropped | gate mass lost | held | peak/mean "
        "| tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, c in found.items():
        lines.append(
            f"| {name} | {c.short} | {c.kl:.4f} | {c.agree:.3f} | {c.dropped:.3f} | {c.lost:.3f} "
            f"| {c.held:.3f} | {c.peak_before:.2f} → {c.peak:.2f} | {c.tokens} |"
        )
    return lines


def top_k_of(model: str) -> int:
    return 8 if model.startswith("64") else 4


def prompt_section(model: str, found: dict[str, Cost]) -> list[str]:
    """What the report says of a model's prompts."""
    fewest = min(c.tokens for c in found.values())
    text = [f"## {model}", "", f"{fewest} predicted tokens or more for each setting."]
    if AGAIN.name in found:
        again = found[AGAIN.name]
        text += [f"No limit once more: Δ nll {again.short}, KL {again.kl:.1e}: the noise."]
    shown: set[str] = set()
    for table, cells in tables(top_k_of(model)).items():
        measured = {setting.name for setting in cells.values()} & set(found)
        if measured - shown:  # else it would only repeat what stands above
            text += ["", f"### {TITLES[table]}", "", *grid(cells, found)]
        shown |= measured
    return [*text, "", "### Everything", "", *details(found), ""]


def decode_section(model: str, every: dict[Part, dict[str, Cost]]) -> list[str]:
    """Decode keep: experts active per layer and step, and Δ nll, by k0 and requests in a step."""
    top_k = top_k_of(model)
    text = [f"## {model}: active experts per layer and step, and what they cost", ""]
    text += ["| requests | k0 | active experts | fewer | Δ nll | KL | top-1 agreement | tokens |"]
    text += ["|---" * 8 + "|"]
    for (name, requests), found in every.items():
        if name != model:
            continue
        free = found[NONE.name]
        for k0 in range(top_k, 0, -1):
            c = free if k0 == top_k else found.get(decode_setting(k0).name)
            if c:
                word = f"{k0} (`auto`)" if k0 == auto_keep(requests, top_k) else f"{k0}"
                text.append(
                    f"| {requests} | {word} | {c.active:.1f} | {1 - c.active / free.active:.1%} "
                    f"| {c.short} | {c.kl:.4f} | {c.agree:.3f} | {c.tokens} |"
                )
    return [*text, ""]


def report(path: Path, what: str) -> None:
    """Write PATH's Markdown, summary CSV and plots beside it. what: one of `run.KINDS`."""
    head, rows = read_table(path)
    text = [f"# {path.stem}", "", *(line.removeprefix("# ") + "  " for line in head), ""]
    if what in ("choice", "answers"):
        section = choice_section if what == "choice" else answers_section
        summary = path.with_name(path.stem + "-summary.csv")
        path.with_suffix(".md").write_text("\n".join([*text, *section(rows, summary), ""]))
        print(f"Wrote {path.with_suffix('.md')} and its summary.")
        return
    text += [(__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    every = costs(rows)
    models = list(dict.fromkeys(model for model, _ in every))
    for model in models:
        decode = what == "decode"
        text += decode_section(model, every) if decode else prompt_section(model, every[model, 0])
    path.with_suffix(".md").write_text("\n".join(text))
    with path.with_name(path.stem + "-summary.csv").open("w", newline="") as file:
        names = [field.name for field in dataclasses.fields(Cost)]
        writer = csv.writer(file)
        writer.writerow(["model", "requests", "setting", *names])
        for part, found in every.items():
            for name, c in found.items():
                writer.writerow([*part, name, *(f"{getattr(c, n):.6g}" for n in names)])
    if what == "prompts":
        plot(path, {model: every[model, 0] for model in models})
    print(f"Wrote {path.with_suffix('.md')} and what belongs to it.")


def plot(path: Path, every: dict[str, dict[str, Cost]]) -> None:
    """Δ nll over γ (figure 12 of the paper), and dropped share and lost gate mass (figure 7)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(every), figsize=(5 * len(every), 8), squeeze=False)
    for column, (model, found) in enumerate(every.items()):
        top_k = top_k_of(model)
        upper, lower = axes[0][column], axes[1][column]
        for name in RULES:
            points = []
            for gamma in sorted({dict(c.keys)["factor"] for c in tables(top_k)["curve"].values()}):
                setting = rule(name, gamma, top_k)
                if setting.name in found:
                    points.append((gamma, found[setting.name]))
            if not points:
                continue
            gammas = [gamma for gamma, _ in points]
            deltas, errors = [c.delta for _, c in points], [c.error for _, c in points]
            upper.errorbar(gammas, deltas, errors, marker="o", markersize=3, capsize=2, label=name)
            if name in ("Token Drop", "reroute"):
                lower.plot(gammas, [c.lost for _, c in points], marker="o", label=f"{name}: mass")
            if name == "Token Drop":
                lower.plot(gammas, [c.dropped for _, c in points], "--", label=f"{name}: dropped")
        upper.axhline(0, color="grey", linewidth=1)
        upper.set(title=model, xlabel="γ", ylabel="Δ nll, nats per token")
        upper.set_yscale("symlog", linthresh=0.01)
        lower.set(xlabel="γ", ylabel="share lost")
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
            if axis.has_data():
                axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
