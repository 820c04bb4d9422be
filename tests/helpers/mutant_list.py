"""The list of mutants, tests/mutants/mutants.toml, as objects."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "tests" / "mutants" / "mutants.toml"


class StaleError(Exception):
    """The text of a mutant isn't in its file exactly once."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    breaks: what is wrong with the code then, in a few words. file: from the root of the repository.
    find, replace: texts; `find` stands in the file exactly once.
    tests: arguments of pytest, a string for each run, the cheapest first.
    survives: why no test can kill it; empty where one must.
    """

    breaks: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    survives: str = ""

    def line(self, root: Path) -> int:
        """The line where its text begins. Raises StaleError."""
        text = (root / self.file).read_text()
        if (count := text.count(self.find)) != 1:
            raise StaleError(f"{self.file} has this text {count} times, not once:\n{self.find}")
        return text[: text.index(self.find)].count("\n") + 1

    def put_into(self, root: Path) -> None:
        """Change the file under `root`. Raises StaleError."""
        self.line(root)
        path = root / self.file
        path.write_text(path.read_text().replace(self.find, self.replace))


def mutants() -> list[Mutant]:
    """All of `mutants.toml`."""
    entries = tomllib.loads(LIST.read_text())["mutant"]
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
