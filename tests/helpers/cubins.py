"""What is in a compiled kernel: registers, memory and instructions, by NVIDIA's own tools."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")  # sm_80, sm_90, sm_100


def dump(cubin: bytes, option: str) -> str:
    """What cuobjdump prints of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a kernel. Spills are on the stack."""
    text = dump(cubin, "--dump-resource-usage")
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


@dataclass(frozen=True)
class Instruction:
    """name: such as "BRA". to: where a branch goes, as a place in the list; None of others."""

    name: str
    to: int | None = None


def instructions(cubin: bytes) -> list[Instruction]:
    """The machine code (SASS) in its order, without what only fills up the end."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)\S*([^;]*);")
    found = [(int(at, 16), name, rest) for at, name, rest in line.findall(dump(cubin, "-sass"))]
    while found and found[-1][1] in ("NOP", "BRA"):  # what follows the last EXIT
        found.pop()
    place = {at: index for index, (at, _, _) in enumerate(found)}
    made = []
    for _, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name == "BRA" else None
        made.append(Instruction(name, None if target is None else place.get(int(target[1], 16))))
    return made


class Counts(NamedTuple):
    """Instructions that a warp runs through. total: of the kernel. step: of one turn of the loop
    with the matrix instructions. around: of what a loop around that adds for a tile; or of the
    large block that most turns of the one loop jump over. 0 where there is no such thing.
    """

    total: int
    step: int = 0
    around: int = 0


def count(code: list[Instruction]) -> Counts:
    """Where the loops are is read from the branches that go back."""
    matrix = {at for at, each in enumerate(code) if each.name in MATRIX}
    back = [(each.to, at) for at, each in enumerate(code) if each.to is not None and each.to < at]
    loops = sorted(
        ((first, last) for first, last in back if matrix & set(range(first, last + 1))),
        key=lambda span: span[1] - span[0],
    )
    if not loops:
        return Counts(len(code))
    first, last = loops[0]
    size = last + 1 - first
    over = [
        each.to - at - 1
        for at, each in enumerate(code[first:last], first)
        if each.to is not None and at < each.to <= last and not matrix & set(range(at, each.to))
    ]
    skipped = max([length for length in over if length >= LARGE], default=0)
    if skipped:
        return Counts(len(code), size - skipped, skipped)
    outer = [b - a + 1 - size for a, b in loops[1:] if a <= first and last <= b]
    return Counts(len(code), size, min(outer, default=0))


LARGE = 100  # instructions of a block that is more than a guarded load
