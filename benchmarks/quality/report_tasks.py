"""Tables of `tasks.py`: answers with a setting beside those without a limit, one by one."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path

from settings import NONE

Rows = list[dict[str, str]]

CHOICE_TEXT = """Scored is the mean log-probability of each answer's tokens after the question.
Flips: questions whose answer is another than without a limit; of these lost (right before) and won
(right now). Δ: accuracy less that without a limit, in brackets its standard error over questions,
in units of the last digit. Shift: mean change of an answer's log-probability, either way."""

ANSWERS_TEXT = """Greedy answers, 16 requests side by side, at most 128 tokens each. Equal: answers
that are the same to the last token. Agree: share of the answer without a limit that comes before
the first difference, mean over answers. Right: of the instructions with one known word, those whose
answer has it. Ended: answers that came to their end. Limits touch prompts only, since generated
tokens are protected; decode keep touches generated tokens only."""


def by_model(rows: Rows) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """Model -> setting -> question -> its row."""
    found: dict[str, dict[str, dict[str, dict[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        found[row["model"]][row["setting"]][row["question"]] = row
    return found


def choice_section(rows: Rows, summary: Path) -> list[str]:
    """Multiple choice: one table for each model; the same as CSV in `summary`."""
    text, lines = [CHOICE_TEXT, ""], []
    for model, settings in by_model(rows).items():
        free = settings[NONE.name]
        text += [f"## {model}: {len(free)} questions", ""]
        text += ["| setting | accuracy | Δ | flips | lost | won | shift |", "|---" * 7 + "|"]
        for setting, ours in settings.items():
            if set(ours) != set(free):
                continue  # not yet complete
            pairs = [(ours[number], free[number]) for number in free]
            right = [one["said"] == one["right"] for one, _ in pairs]
            before = [other["said"] == other["right"] for _, other in pairs]
            gains = [int(now) - int(then) for now, then in zip(right, before, strict=True)]
            error = statistics.stdev(gains) / math.sqrt(len(gains))
            flips = sum(one["said"] != other["said"] for one, other in pairs)
            shift = statistics.fmean(
                abs(float(one[x]) - float(other[x])) for one, other in pairs for x in "ABCD"
            )
            delta = statistics.fmean(gains)
            figures = [statistics.fmean(right), delta, error, flips, gains.count(-1)]
            figures += [gains.count(1), shift]
            lines.append([model, setting, len(free), *figures])
            text.append(
                f"| {setting} | {figures[0]:.3f} | {delta:+.3f} ({error * 1000:.0f}) | {flips} "
                f"| {gains.count(-1)} | {gains.count(1)} | {shift:.3f} |"
            )
        text.append("")
    head = ["model", "setting", "questions", "accuracy", "delta", "error", "flips"]
    write(summary, [*head, "lost", "won", "shift"], lines)
    return text


def answers_section(rows: Rows, summary: Path) -> list[str]:
    """Generated answers: one table for each model; the same as CSV in `summary`."""
    text, lines = [ANSWERS_TEXT, ""], []
    for model, settings in by_model(rows).items():
        free = settings[NONE.name]
        text += [f"## {model}: {len(free)} instructions", ""]
        text += ["| setting | equal | agree | right | tokens an answer | longest change | ended |"]
        text += ["|---" * 7 + "|"]
        for setting, ours in settings.items():
            if set(ours) != set(free):
                continue
            pairs = [(ours[number], free[number]) for number in free]
            tokens = [(one["tokens"].split(), other["tokens"].split()) for one, other in pairs]
            equal = sum(one == other for one, other in tokens)
            agree = statistics.fmean(common(*both) / max(1, len(both[1])) for both in tokens)
            known = [int(one["known"]) for one, _ in pairs if one["known"]]
            length = statistics.fmean(len(one) for one, _ in tokens)
            change = max((len(one) - len(other) for one, other in tokens), key=abs)
            ended = sum(int(one["ended"]) for one, _ in pairs)
            lines.append(
                [model, setting, len(free), equal, agree, sum(known), len(known), length, change]
                + [ended]
            )
            text.append(
                f"| {setting} | {equal} | {agree:.3f} | {sum(known)} of {len(known)} "
                f"| {length:.1f} | {change:+d} | {ended} |"
            )
        text.append("")
    head = ["model", "setting", "instructions", "equal", "agree", "right", "known", "length"]
    write(summary, [*head, "longest_change", "ended"], lines)
    return text


def common(ours: list[str], free: list[str]) -> int:
    """Tokens before the first difference."""
    for number, (one, other) in enumerate(zip(ours, free, strict=False)):
        if one != other:
            return number
    return min(len(ours), len(free))


def write(path: Path, head: list[str], lines: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(
            [f"{value:.6g}" if isinstance(value, float) else value for value in line]
            for line in lines
        )
