"""The results of run_gpu.py: one table per card, a row for every item, measured or not.

A row says which card and which state of the code (`code`: a hash of the kernels' sources) it is of.
Rows of another card are in another file, and rows of other code neither count as done nor are
reported: a kernel that was mended is measured again. A second file says which items were begun; one
that was begun twice, and whose run never came to its end, is left out as "interrupted".
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import _tables
from gpu.items import Item

KEY = ("step", "shape", "tokens", "part", "who")
COLUMNS = (
    *("time", "card", "code", *KEY, "status"),
    *("ms", "timer", "gate", "repeats", "tflops", "gbps", "base_ms", "base_over_this", "why"),
)
BAD = ("wrong", "failed", "hung", "died", "interrupted")  # what costs a row
ENDS = ("hung", "died", "interrupted")  # of them, what ends a process
ROOT = Path(__file__).resolve().parents[2]


def code_id() -> str:
    """Eight digits that change with the kernels."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels" / "capmoe_kernels").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class Record:
    """The table of one card in a folder, continued where it exists."""

    def __init__(self, folder: Path, slug: str, header: list[str]) -> None:
        self.path, self.begun = folder / f"{slug}.csv", folder / f"{slug}.begun"
        self.card, self.code = slug, code_id()
        self.lock = threading.Lock()
        if self.path.exists():
            text = self.path.read_text()
            whole = text[: text.rfind("\n") + 1]  # a row may be cut off where a run was killed
            self.path.write_text(whole + "".join(f"{line}\n" for line in header))
        else:
            self.path.write_text("\n".join([*header, ",".join(COLUMNS), ""]))
        self.rows = _tables.read_table(self.path)[1]
        other = {row["card"] for row in self.rows} - {slug}
        if other:
            raise ValueError(f"{self.path} has rows of {other.pop()}, but only {slug} is accepted.")
        self.done = {self._key(row): row for row in self.rows if row["code"] == self.code}
        begun = self.begun.read_text().splitlines() if self.begun.exists() else []
        for line in dict.fromkeys(begun):
            if line.startswith(self.code) and begun.count(line) > 1:
                item = Item(*json.loads(line.removeprefix(self.code)))
                if not self.has(item):
                    self.end(item, {"status": "interrupted", "why": "begun twice, and never ended"})

    @staticmethod
    def _key(row: Any) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in KEY)

    def row_of(self, item: Item) -> dict[str, str] | None:
        return self.done.get(self._key(vars(item)))

    def has(self, item: Item) -> bool:
        return self.row_of(item) is not None

    def blocker(self, item: Item) -> str:
        """The row because of which an item isn't run, or nothing.

        A compilation that only failed is no such row: the smoke test says what comes of it.
        """
        earlier: list[tuple[str, str, tuple[str, ...]]] = [
            ("compile", item.who if item.step == "ab" else "ours", ENDS)
        ]
        if item.step in ("time", "ab"):
            earlier.append(("smoke", "ours", (*BAD, "left-out")))
        parts = ("experts", "routing") if item.part == "layer" else (item.part,)
        if item.step == "compile" or (item.step == "time" and item.who != "ours"):
            return ""
        for step, who, statuses in earlier:
            for part in parts:
                row = self.row_of(Item(step, item.shape, item.tokens, part, who))
                if row and row["status"] in statuses:
                    return f"{'/'.join(row[name] for name in KEY)}: {row['status']}"
        return ""

    def begin(self, item: Item) -> None:
        with self.lock, self.begun.open("a") as file:
            file.write(f"{self.code} {json.dumps(list(vars(item).values()))}\n")

    def end(self, item: Item, answer: dict[str, Any]) -> None:
        """Write the row of an item, and say on standard output what came of it."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        values = vars(item) | answer | {"time": now, "card": self.card, "code": self.code}
        row = {name: _tables.text(values.get(name, "")).replace("\n", " ") for name in COLUMNS}
        with self.lock:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
            self.rows.append(row)
            self.done[self._key(row)] = row
            if item.step == "tests" and row["status"] in ("ok", "skipped"):
                return
            ms = f"{row['ms']} ms" if row["ms"] else ""
            print(f"{row['status']:12} {item} {ms} {row['why'][:160]}".rstrip(), flush=True)
