"""Decode steps of eight sequences, routed four at a time, beside steps of these four alone.

    python grouped_decode.py REPO

Prints the largest difference of hidden states, the largest that decode keep makes, and the loads.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(sys.argv[1])
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks/quality", "benchmarks", "examples")]

from engine import Engine  # noqa: E402
from make_carved import make_carved  # noqa: E402
from settings import NONE, decode_setting  # noqa: E402
from text import sequences  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    engine = Engine(make_carved(Path(folder) / "m", "16-peaked", dtype="float32"), threads=1)
rows = sequences(engine.llm.get_tokenizer(), 8, 16)
engine.set(decode_setting(2))
together = engine.decode_hidden(rows, 8, [4])
active = engine.loads[4].active / engine.loads[4].calls
apart = [*engine.decode_hidden(rows[:4], 8, [4]), *engine.decode_hidden(rows[4:], 8, [4])]
all_eight = engine.decode_hidden(rows, 8, [8])
engine.set(NONE)
free = engine.decode_hidden(rows, 8, [4, 8])


def most(ones: list, others: list) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True))


print(
    json.dumps(
        {
            "apart": most(together, apart),
            "all_eight": most(together, all_eight),
            "free": most(together, free),
            "active": active,
            "active_free": {n: each.active / each.calls for n, each in engine.loads.items()},
            "calls": {n: each.calls for n, each in engine.loads.items()},
        }
    )
)
