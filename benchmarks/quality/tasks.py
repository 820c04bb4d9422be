"""Tasks with answers: multiple choice, and greedy answers to instructions.

Both are paired with no limit: an answer that changes is a flip, for the better or the worse. The
answers to choose from are scored as text: asked for a letter, so small a model says A to nearly
every question.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from engine import STEP_TOKENS
from settings import AGAIN, NONE, Setting, auto_keep, decode_setting, rule
from text import LETTERS, questions

if TYPE_CHECKING:
    from _tables import Table
    from engine import Engine
    from text import Question

CHOICE_KEY = ("model", "setting", "question")
CHOICE_COLUMNS = (*CHOICE_KEY, "right", "said", *LETTERS)

ANSWER_KEY = ("model", "setting", "question")
ANSWER_COLUMNS = (*ANSWER_KEY, "known", "tokens", "ended")
ANSWER_TOKENS, BESIDE = 128, 16
KNOWN = {
    "What is the capital of {}?": {
        **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin"},
        **{"Japan": "Tokyo", "Egypt": "Cairo", "Russia": "Moscow", "Greece": "Athens"},
        **{"Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Ireland": "Dublin"},
        **{"Norway": "Oslo", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi"},
    },
    "What is the opposite of the word '{}'?": {
        **{"hot": "cold", "big": "small", "day": "night", "up": "down"},
        **{"left": "right", "old": "new", "happy": "sad", "fast": "slow"},
    },
    "What is {}?": {
        **{"2 + 2": "4", "3 + 5": "8", "10 - 4": "6", "2 times 5": "10"},
        **{"6 + 7": "13", "9 - 2": "7", "3 times 3": "9", "20 + 30": "50"},
    },
}
OPEN = {
    "Write a short story about {}.": ("a lighthouse", "a lost dog", "the last train", "a violin"),
    "Explain in simple words how {}.": ("a bee flies", "ice melts", "money works", "a lock opens"),
    "Give me three tips for {}.": ("sleeping well", "learning to swim", "a trip", "a garden"),
    "Describe {} to a child.": ("the moon", "a volcano", "a library", "the sea"),
    "List five things that {}.": ("are round", "need water", "can fly", "are made of wood"),
    "Write a polite letter to {}.": ("a neighbour", "a teacher", "a landlord", "a shop"),
    "What would happen if {}?": ("it never rained", "cars could fly", "bees died", "fish spoke"),
    "Why do people {}?": ("dream", "dance", "travel", "keep cats"),
}


def choice_settings(top_k: int) -> list[Setting]:
    """No limit twice, then each rule, the most telling γ first."""
    names = ("Token Drop", "reroute", "Expanded, uncapped", "Expanded, at most k")
    limits = [rule(name, gamma, top_k) for gamma in (1.0, 0.5, 1.5) for name in names]
    return [NONE, AGAIN, *(setting for setting in limits if setting.known)]


def answer_settings(top_k: int) -> list[Setting]:
    """No limit twice, decode keep, then limits, which touch prompts only."""
    keeps = dict.fromkeys((auto_keep(BESIDE, top_k), 3, 2))
    shared = [decode_setting(k0) for k0 in keeps if k0 < top_k]
    return [*choice_settings(top_k)[:2], *shared, *choice_settings(top_k)[2:]]


def packed(sequences: Sequence[list[int]], limit: int = STEP_TOKENS) -> Iterator[list[list[int]]]:
    """The sequences in their order, in steps of at most so many tokens."""
    part: list[list[int]] = []
    for sequence in sequences:
        if part and sum(map(len, part)) + len(sequence) > limit:
            yield part
            part = []
        part.append(sequence)
    yield part


def measure_choice(name: str, engine: Engine, args: Any, table: Table) -> None:
    """Log-probabilities of the four answers to each question, with every setting."""
    every = questions()
    asked = sorted(range(len(every)), key=lambda number: every[number].characters)
    asked = sorted(asked[: 8 if args.quick else args.questions])
    for setting in choice_settings(engine.top_k)[: args.most and args.most + 1]:
        keys = {"model": name, "setting": setting.name}
        if all(table.has({**keys, "question": number}) for number in asked):
            continue
        started = time.monotonic()
        engine.set(setting)
        scores = scores_of(engine, [every[number] for number in asked])
        for number, each in zip(asked, scores, strict=True):
            said = LETTERS[max(range(len(each)), key=lambda i: each[i])]
            row = {"question": number, "right": LETTERS[every[number].right], "said": said}
            row |= {x: f"{s:.5f}" for x, s in zip(LETTERS, each, strict=True)}
            table.add({**keys, **row})
        print(f"{name}, choice, {time.monotonic() - started:.0f} s: {setting.name}", flush=True)


def scores_of(engine: Engine, asked: Iterable[Question]) -> list[list[float]]:
    """Mean log-probability of the tokens of each answer after the question."""
    tokenizer = engine.llm.get_tokenizer()
    starts, sequences = [], []
    for question in asked:
        start = tokenizer.encode(f"Question: {question.text}\nAnswer:", add_special_tokens=False)
        for answer in question.answers:
            starts.append(len(start))
            sequences.append([*start, *tokenizer.encode(f" {answer}", add_special_tokens=False)])
    hidden = (each for part in packed(sequences) for each in engine.hidden(part))
    found = []
    for start, sequence, rows in zip(starts, sequences, hidden, strict=True):
        logs = torch.cat(list(engine.distributions(rows[start - 1 : -1])))
        wanted = torch.tensor(sequence[start:])[:, None]
        found.append(float(logs.gather(1, wanted).double().mean()))
    return [found[i : i + len(LETTERS)] for i in range(0, len(found), len(LETTERS))]


def instructions() -> list[tuple[str, str]]:
    """Instructions with the word that a right answer has, "" where there is none; mixed."""
    known = [(a.format(b), word) for a, words in KNOWN.items() for b, word in words.items()]
    free = [(a.format(b), "") for a, topics in OPEN.items() for b in topics]
    return [each for pair in zip(known, free, strict=True) for each in pair]


def measure_answers(name: str, engine: Engine, args: Any, table: Table) -> None:
    """Greedy answers to instructions with every setting, `BESIDE` requests at a time."""
    asked = instructions()[: 4 if args.quick else None]
    for setting in answer_settings(engine.top_k)[: args.most and args.most + 1]:
        keys = {"model": name, "setting": setting.name}
        if all(table.has({**keys, "question": number}) for number in range(len(asked))):
            continue
        started = time.monotonic()
        engine.set(setting)
        for first in range(0, len(asked), BESIDE):
            part = asked[first : first + BESIDE]
            answers = engine.answers([text for text, _ in part], 8 if args.quick else ANSWER_TOKENS)
            for number, ((_, word), answer) in enumerate(zip(part, answers, strict=True), first):
                known = "" if not word else int(word.lower() in answer.text.lower())
                row = {"known": known, "tokens": " ".join(map(str, answer.token_ids))}
                row["ended"] = int(answer.finish_reason == "stop")
                table.add({**keys, "question": number, **row})
        took = time.monotonic() - started
        print(f"{name}, answers, {took:.0f} s: {setting.name}", flush=True)
