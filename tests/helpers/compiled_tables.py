"""What the compiler makes of the kernels, as tables: docs/compiled_kernels.md is printed from here.

    python tests/helpers/compiled_tables.py > docs/compiled_kernels.md

The tests of what is compiled ahead of time compare it with what they compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "kernels"
DOCUMENT = HERE.parents[1] / "docs" / "compiled_kernels.md"
# Mixtral-8x7B on one rank; tokens so that each row of launch.py's tables is met.
MIXTRAL = {"width": 2, "experts": 8, "hidden": 4096, "intermediate": 14336}
MIXTRAL_TOKENS = (1, 80, 160, 480, 8192)
CHIPS = ((9, 0), (10, 0), (8, 0))
ARCH = 90  # of the routing's table

HEAD = """# What the compiler makes of the kernels

Printed by `python tests/helpers/compiled_tables.py`; a test compares them. Compiled ahead of time
with Triton {triton}; nothing of it was run. No kernel spills a register. Instructions are those of
the machine code (SASS).
"""
EXPERTS = """## Experts

bfloat16, SiLU, the shapes of Mixtral-8x7B: {tokens} tokens give 1, 20, 40, 120 and
2048 rows per expert. *Step* is one turn of the loop over K; *around* what a tile has besides: from
the end of the loop to the next tile's first turn. Both as a warp runs through them.
"""
ROUTING = """## Routing

One call of `route_triton` for sm_{arch}, kernel by kernel. The cases are those of
`tests/kernels/routing_aot_worker.py`: tokens T, experts E, top-k k, and what a call in vLLM brings
with it.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def experts_cases() -> list[dict[str, Any]]:
    return [
        {"capability": list(chip), "tokens": tokens, **MIXTRAL}
        for chip in CHIPS
        for tokens in MIXTRAL_TOKENS
    ]


def experts_table(compiled: dict[str, Any]) -> str:
    """compiled: what experts_aot_worker.py says of each case, by the case as JSON."""
    rows = []
    for case in experts_cases():
        found = compiled[json.dumps(case)]
        for kernel in found["kernels"][:2]:
            down = kernel["kernel"] == "down_kernel"
            launch = {**found["config"], **(found["config"]["down"] if down else {})}
            tile = "×".join(str(launch[f"BLOCK_SIZE_{side}"]) for side in "MNK")
            words = [tile, *(w for w, key in WORDS.items() if launch[key])]
            older = "mma.sync" if kernel["mma"] else "tcgen05"
            counts = kernel["instructions"]
            rows.append(
                (
                    "sm_{}{}".format(*case["capability"]),
                    case["tokens"],
                    "down" if down else "gate/up",
                    " ".join(words),
                    kernel["num_warps"],
                    launch["num_stages"],
                    launch["PROGRAMS_PER_SM"],
                    kernel["registers"],
                    round(kernel["shared"] / 1024),
                    *(kernel["wgmma"] or [older]),
                    *(counts[key] for key in ("total", "step", "around")),
                )
            )
    head = ("chip", "tokens", "product", "tile M×N×K", "warps", "stages", "programs per SM")
    head += ("registers", "shared KiB", "instruction", "all", "step", "around")
    return table(head, rows)


WORDS = {"swapped": "SWAP_AB", "flattened": "FLATTEN"}


def routing_table(lines: Iterable[dict[str, Any]]) -> str:
    """lines: what routing_aot_worker.py says of each launch."""
    keys = ("case", "T", "E", "k", "kernel", "warps", "registers", "shared", "instructions")
    head = ("shared bytes" if key == "shared" else key for key in keys)
    return table(list(head), ([line[key] for key in keys] for line in lines))


def run(worker: str, argument: str, **more: str) -> list[dict[str, Any]]:
    """What a worker prints; it needs a process in which Triton compiles. more: environment."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
    environment["PYTHONPATH"] = str(HERE)
    done = subprocess.run(
        [sys.executable, KERNELS / worker, argument],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def fits(text: str) -> bool:
    """Whether the document has these tables; another Triton than the document's makes others."""
    document = DOCUMENT.read_text()
    return f"with Triton {triton.__version__};" not in document or text in document


def main() -> None:
    experts = run("experts_aot_worker.py", json.dumps(experts_cases()))
    routing = run("routing_aot_worker.py", str(ARCH))
    parts = [
        HEAD.format(triton=triton.__version__),
        EXPERTS.format(tokens=", ".join(map(str, MIXTRAL_TOKENS))),
        experts_table({json.dumps(line["case"]): line for line in experts}),
        "",
        ROUTING.format(arch=ARCH),
        routing_table(routing),
    ]
    print("\n".join(parts))


if __name__ == "__main__":
    main()
