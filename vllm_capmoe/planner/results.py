"""The result of an engine's run: JSON lines, one for each chunk of prompts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The chunks that are whole; none where there is no file.

    A last line that was cut short is taken off the file, so that the next one can follow.
    """
    if not path.exists():
        return
    whole = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            yield json.loads(line)
    if whole < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(whole)
