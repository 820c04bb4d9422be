"""Values that nobody would give on purpose, and what a refusal must look like."""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Callable
from typing import Any

from vllm_capmoe.config import OPTIONS

WORDS = sorted(
    {word for option in OPTIONS for word in option.choices or ()}
    | {option.key for option in OPTIONS}
    | {option.flag for option in OPTIONS}
    | {"inf", "-inf", "nan", "Infinity", "1e400", "0x10", "1_000", "٣", "true", "None", "null"}
    | {"none", "all", "auto", "off", "on", "OFF", " off", "off\n", "", "-", "@", "@/", "@.", "{}"}
)
NUMBERS: list[int | float] = [
    *(0, 1, 2, 3, 4, 8, -1, 2**31, 2**63, 2**64, -(2**70), 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.1, 1.5, 1e-320, 1e299, 1e308, 1e-9, math.inf, -math.inf, math.nan),
]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON or YAML may bring."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind in (3, 4):
        return rng.choice(WORDS)
    if kind == 5:
        letters = rng.choice([string.printable, "aé\u0000\u202e\ud800😀", "0123456789.-e"])
        return "".join(rng.choice(letters) for _ in range(rng.choice([1, 3, 20, 2000])))
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(WORDS)): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def accepted_value(rng: random.Random, key: str) -> Any:
    """One that the option takes, most of the time."""
    option = next(option for option in OPTIONS if option.key == key)
    if option.choices:
        return rng.choice(option.choices)
    if key == "layers":
        entry = {rng.choice(["factor", "mode", "metric"]): rng.choice([2, 0.5, "drop", "score"])}
        return {rng.choice(["0", "1-3", "7"]): entry}
    return rng.choice([option.default, 1, 2, 4, "auto", "off", "none", "all", 0.75, True, False])


def settings(rng: random.Random) -> dict[str, Any]:
    """Keys of `additional_config["moe_capacity"]`, most of them right."""
    found = {}
    for option in rng.sample(OPTIONS, rng.randrange(5)):
        good = rng.random() < 0.8
        found[option.key] = accepted_value(rng, option.key) if good else value(rng)
    if rng.random() < 0.1:
        found[str(rng.choice(WORDS))] = value(rng)
    return found


def spoiled(rng: random.Random, text: str) -> str:
    """A text with some characters gone, doubled, or others."""
    letters = list(text)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(letters) + 1)
        letters[at : at + rng.randrange(3)] = rng.choices('{}[]":,0-9 @\\e\n', k=rng.randrange(3))
    return "".join(letters)


def refusal(call: Callable[[], Any]) -> str | None:
    """What a call says when it refuses, which must be one sentence; None where it accepts.

    Any other error than a ValueError goes through.
    """
    try:
        call()
    except ValueError as error:
        sentence = str(error)
        assert sentence.endswith(".") and "\n" not in sentence, sentence
        assert " but " in sentence or "accepted" in sentence, sentence
        assert 20 < len(sentence) < 700, f"{len(sentence)}: {sentence[:300]}"
        sentence.encode()  # can be written to a log
        return sentence
    return None


def is_json(values: Any) -> bool:
    """Whether values go through JSON and come back the same."""
    return bool(json.loads(json.dumps(values, allow_nan=False)) == values)
