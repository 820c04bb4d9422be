"""The same prompts with the planned settings and without: what changed. Standard library only."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_capmoe.planner.counts import Counts


@dataclass(frozen=True)
class Changed:
    """An answer that became another one."""

    prompt: int
    before: str
    after: str


@dataclass(frozen=True)
class Measured:
    """A layer under the settings: what the plan says that it counts, and what the run counted.

    Both by the names of `Counts`, those that serving counts too, over all steps. The inputs of the
    first layer with a limit are those that were observed, so its prompt tokens are decided as
    planned; the layers above it get other inputs, and what is generated may differ.
    """

    layer: int
    predicted: dict[str, float]
    measured: dict[str, float]


@dataclass(frozen=True)
class Check:
    """With the settings against without, paired token by token. Prompts count as samples.

    tokens: predicted tokens of prompts. delta_nll: mean rise of the negative log-likelihood of a
    token (nats), standard_error over prompts. kl: mean divergence of the next-token distributions
    (nats; over the most likely tokens of the first, all others as one). agreement: share of the
    positions with the same most likely token. speed: output and prompt tokens per second with
    over without, as it came; the two runs were one after the other. layers: what the limited run
    counted, beside what was predicted.
    """

    prompts: int
    tokens: int
    delta_nll: float
    standard_error: float
    kl: float
    agreement: float
    speed: float
    tokens_before: int
    tokens_after: int
    layers: list[Measured] = field(default_factory=list)
    changed: list[Changed] = field(default_factory=list)

    def text(self, shown: int = 3) -> str:
        """For a terminal, with the first changed answers side by side."""
        parts = [
            f"Checked on {self.prompts} prompts, {self.tokens} predicted tokens: "
            f"nll {self.delta_nll:+.4f} ± {self.standard_error:.4f}, KL {self.kl:.4f}, "
            f"same top token {self.agreement:.2%}, {len(self.changed)} of {self.prompts} answers "
            f"changed (greedy), {self.tokens_before} -> {self.tokens_after} tokens generated, "
            f"{self.speed:.2f} times the speed (one run each).",
        ]
        if self.layers:
            told = [
                f"{what} {self.share(key, of, 0):.2%} -> {self.share(key, of, 1):.2%}"
                for what, key, of in (
                    ("assignments dropped", "dropped", "assignments"),
                    ("gate mass lost", "lost", "mass"),
                    ("load of the busiest expert", "peak_after", "peak_before"),
                )
            ]
            parts.append(f"Predicted -> measured: {', '.join(told)}.")
        for changed in self.changed[:shown]:
            parts.append(
                f"prompt {changed.prompt}\n  without: {changed.before[:300]!r}\n"
                f"  with:    {changed.after[:300]!r}"
            )
        return "\n".join(parts)

    def share(self, key: str, of: str, measured: int) -> float:
        """Of all layers, as predicted (0) or as measured (1)."""
        counts = [(layer.predicted, layer.measured)[measured] for layer in self.layers]
        return sum(each[key] for each in counts) / max(1e-9, sum(each[of] for each in counts))


def compare(
    without: Iterable[dict[str, Any]],
    limited: Iterable[dict[str, Any]],
    predicted: Mapping[int, Counts],
) -> Check:
    """The chunks of two runs of the same prompts (`planner_engine answer`), read side by side.

    predicted: what the limited run should count in each layer, by its number.
    """
    rises: list[tuple[int, float]] = []  # by prompt: tokens, rise of the nll
    kl, agree, prompt_tokens = 0.0, 0, 0
    counted: dict[int, dict[str, float]] = {}
    generated, seconds = [0, 0], [0.0, 0.0]
    changed = []
    for old_chunk, new_chunk in zip(without, limited, strict=True):
        for number, new in new_chunk["layers"].items():
            before = counted.get(int(number), {})
            counted[int(number)] = {key: new[key] + before.get(key, 0) for key in new}
        for at, chunk in enumerate((old_chunk, new_chunk)):
            seconds[at] += chunk["seconds"]
            generated[at] += sum(answer["tokens"] for answer in chunk["answers"])
        for old, new in zip(old_chunk["answers"], new_chunk["answers"], strict=True):
            rise = 0.0
            for left, right in zip(old["positions"], new["positions"], strict=True):
                rise += left["logprob"] - right["logprob"]
                kl += divergence(left["top"], right["top"])
                agree += _best(left["top"]) == _best(right["top"])
            if old["text"] != new["text"]:
                changed.append(Changed(len(rises), old["text"], new["text"]))
            rises.append((len(old["positions"]), rise))
            prompt_tokens += len(old["positions"]) + 1
    tokens = sum(count for count, _ in rises)
    mean = sum(rise for _, rise in rises) / max(1, tokens)
    # Of a ratio of sums: the spread of what each prompt adds beyond the mean.
    spread = sum((rise - mean * count) ** 2 for count, rise in rises)
    error = math.sqrt(spread * len(rises) / max(1, len(rises) - 1)) / max(1, tokens)
    rates = [(prompt_tokens + generated[at]) / max(1e-9, seconds[at]) for at in (0, 1)]
    return Check(
        prompts=len(rises),
        tokens=tokens,
        delta_nll=mean,
        standard_error=error,
        kl=kl / max(1, tokens),
        agreement=agree / max(1, tokens),
        speed=rates[1] / rates[0] if rates[0] else 1.0,
        tokens_before=generated[0],
        tokens_after=generated[1],
        layers=[
            Measured(number, {key: getattr(predicted[number], key) for key in own}, own)
            for number, own in sorted(counted.items())
        ],
        changed=changed,
    )


def divergence(before: dict[str, float], after: dict[str, float]) -> float:
    """KL(before || after) in nats, of log-probabilities by token, all tokens that not both have as
    one.

        >>> round(divergence({"a": math.log(0.5), "b": math.log(0.5)},
        ...                  {"a": math.log(0.25), "b": math.log(0.75)}), 4)
        0.1438
    """
    common = before.keys() & after.keys()
    pairs = [(math.exp(before[token]), math.exp(after[token])) for token in common]
    rest = tuple(max(0.0, 1.0 - sum(pair[at] for pair in pairs)) for at in (0, 1))
    least = 1e-9  # of what rounding leaves of nothing
    return sum(p * math.log(p / max(q, least)) for p, q in [*pairs, rest] if p > least)


def _best(top: dict[str, float]) -> str:
    return max(top, key=lambda token: (top[token], token))
