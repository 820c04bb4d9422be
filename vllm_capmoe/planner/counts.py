"""What an observed run counted: plain numbers by layer and trial, added up over steps.

`Observation.of_chunks` reads what the engine's process wrote.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Counts:
    """One trial in one layer, or added up over layers. Sums over the steps of one kind.

    steps: steps with real tokens. assignments: those of the model's top-k; dropped: those of them
    not held; added: held ones outside of the top-k. left_without: tokens without any expert.
    mass: gate mass of the top-k (sum of S); lost: of those not held; missing: what a token holds
    less than that in the end, when other experts have taken over, added up over tokens.
    peak_before, peak_after: largest load of an expert; rank_before, rank_after: of a rank.
    active_before, active_after: experts with a token.
    """

    steps: int = 0
    assignments: int = 0
    dropped: int = 0
    added: int = 0
    left_without: int = 0
    mass: float = 0.0
    lost: float = 0.0
    missing: float = 0.0
    peak_before: int = 0
    peak_after: int = 0
    rank_before: int = 0
    rank_after: int = 0
    active_before: int = 0
    active_after: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def dropped_share(self) -> float:
        """Of the top-k assignments (the paper's figures 7, 17 to 20)."""
        return self.dropped / max(1, self.assignments)

    @property
    def lost_share(self) -> float:
        """Gate mass of dropped assignments over that of the top-k."""
        return self.lost / self.mass if self.mass > 0 else 0.0

    @property
    def missing_share(self) -> float:
        """Gate mass that is missing in the end over that of the top-k."""
        return self.missing / self.mass if self.mass > 0 else 0.0

    @property
    def rank_ratio(self) -> float:
        """Load of the busiest rank without the limit over that with it: the bound of the speed-up
        of a layer whose time follows its busiest rank.
        """
        return self.rank_before / self.rank_after if self.rank_after else 1.0


def total(parts: Iterable[Counts]) -> Counts:
    return sum(parts, Counts())


@dataclass(frozen=True)
class Layer:
    """What was counted in one layer.

    number: of the decoder layer, as `--moe-capacity-layers` names it. experts: E. top_k: k.
    loads: per step with prompt tokens the load of every expert, before any limit.
    prompt, decode: the trials by name, over steps with prompt tokens, and over those without.
    """

    number: int
    experts: int
    top_k: int
    loads: list[list[int]]
    prompt: dict[str, Counts]
    decode: dict[str, Counts]

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Layer":
        """From the plain numbers of `moe_capacity_tried`."""

        def counts(by_trial: dict[str, dict[str, Any]]) -> dict[str, Counts]:
            return {name: Counts(**sums) for name, sums in by_trial.items()}

        return cls(
            number=found["number"],
            experts=found["experts"],
            top_k=found["top_k"],
            loads=found["loads"],
            prompt=counts(found["prompt"]),
            decode=counts(found["decode"]),
        )

    def __add__(self, other: "Layer") -> "Layer":
        """The same layer over the steps of both."""

        def sums(left: dict[str, Counts], right: dict[str, Counts]) -> dict[str, Counts]:
            none = Counts()
            return {
                name: left.get(name, none) + right.get(name, none)
                for name in dict.fromkeys([*left, *right])
            }

        return replace(
            self,
            loads=self.loads + other.loads,
            prompt=sums(self.prompt, other.prompt),
            decode=sums(self.decode, other.decode),
        )

    def imbalance(self) -> float:
        """Load of the busiest expert over the mean, averaged over steps (figures 2, 13 to 16)."""
        ratios = [max(step) * len(step) / sum(step) for step in self.loads if sum(step)]
        return sum(ratios) / len(ratios) if ratios else 1.0


@dataclass(frozen=True)
class Observation:
    """An observed run.

    prompts, prompt_tokens, output_tokens: what ran. left_out: prompts longer than the model takes.
    ep_size: the ranks that were assumed.
    """

    model: str
    ep_size: int
    prompts: int
    left_out: int
    prompt_tokens: int
    output_tokens: int
    layers: list[Layer]

    @classmethod
    def of_chunks(cls, model: str, ep_size: int, chunks: list[dict[str, Any]]) -> "Observation":
        """Of an observed run's result, which came in chunks of prompts."""
        layers: dict[int, Layer] = {}
        for chunk in chunks:
            for found in chunk["layers"]:
                layer = Layer.of(found)
                before = layers.get(layer.number)
                layers[layer.number] = layer if before is None else before + layer
        return cls(
            model=model,
            ep_size=ep_size,
            prompts=sum(chunk["prompts"] - chunk["left_out"] for chunk in chunks),
            left_out=sum(chunk["left_out"] for chunk in chunks),
            prompt_tokens=sum(chunk["prompt_tokens"] for chunk in chunks),
            output_tokens=sum(chunk["output_tokens"] for chunk in chunks),
            layers=sorted(layers.values(), key=lambda layer: layer.number),
        )

    def over_layers(self, trial: str, kind: str = "prompt") -> Counts:
        """A trial, added up over the layers. kind: "prompt" or "decode"."""
        return total(getattr(layer, kind).get(trial, Counts()) for layer in self.layers)
