"""All GPU benchmarks, by one command: what tells most first, whatever goes wrong.

    python benchmarks/run_gpu.py                                # a first call of 560 seconds
    python benchmarks/run_gpu.py --continue FOLDER              # the next call goes on from there
    python benchmarks/run_gpu.py --continue FOLDER --steps capacity,tune,tuned,engine
    python benchmarks/run_gpu.py --dry-run                      # tiny, under Triton's interpreter

Steps, in this order; each gets its share of the time that is left:

    compile  what the next steps launch, in several processes at once; nothing runs
    smoke    every shape in a process of its own: all rows against cuBLAS, repeats equal to the bit
    time     round-robin over token counts and shapes, ours and the opponents
    ab       a fixed list of choices against what the heuristics choose
    tests    the kernels' tests, each with a time limit, to the end
    capacity, tune, tuned, engine, decode, ep, tiles, sanitize: scripts of their own, only when
             asked for

An item (a row: `gpu/items.py`) that raises, hangs, is wrong or ends its process costs its own row,
is recorded, and isn't run again while the kernels are the same. A time is only taken right after
the gate of that very contender, on all rows. Every row is written when it is measured.

Left in the folder, by card, so that cards never mix: CARD.csv, CARD.begun, CARD.log,
CARD-summary.txt (what costs a row; the goals as PASS, FAIL or WAITS; the figures), and
CARD-scripts.tgz. Results of this card that are there already are continued.

Exit status: 0; 1 where an item is wrong, failed, hung or died; 2 for bad options; 3 without a card.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import queue
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import _tables
from gpu import faults, report
from gpu.items import STEPS, Grid, Item
from gpu.processes import START, Asked, CardGone, Lines, end_all
from gpu.record import BAD, ROOT, Record
from gpu.scripts import SCRIPTS, Scripts

WEIGHTS = {"compile": 80, "smoke": 60, "time": 250, "ab": 90, "tests": 80}
WEIGHTS |= {name: script.weight for name, script in SCRIPTS.items()}
LIMITS = {"compile": 150.0, "smoke": 40.0, "time": 40.0, "ab": 40.0, "tests": 60.0}  # of an item
TESTS = ("test_experts.py", "test_routing.py", "test_seats.py")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=560, help="for everything together")
    parser.add_argument("--steps", default=",".join(STEPS), help="a list, of all that are above")
    parser.add_argument("--continue", dest="earlier", type=Path, help="folder of an earlier call")
    parser.add_argument("--out", type=Path, help="$OUT, or benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU: times mean nothing")
    parser.add_argument("--processes", type=int, default=min(12, max(1, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--limit", type=float, help="seconds for an item, instead of its step's")
    parser.add_argument("--tests", type=Path, nargs="+", help="files for the step of that name")
    parser.add_argument(
        "--fault", nargs="+", default=[], metavar="KIND@ITEM", help="with --dry-run: gpu/faults.py"
    )
    args = parser.parse_args()
    args.steps = args.steps.split(",")
    for step in args.steps:
        if step not in WEIGHTS:
            parser.error(f"step is {step!r}, but one of {', '.join(WEIGHTS)} is accepted.")
    if args.fault and not args.dry_run:
        parser.error("--fault is for --dry-run")
    try:
        args.fault = faults.parse(args.fault)
    except ValueError as error:
        parser.error(str(error))
    args.out = (args.out or _tables.output_folder()).resolve()
    folder = ROOT / "tests" / "kernels"
    args.tests = [path.resolve() for path in args.tests or [folder / name for name in TESTS]]
    return args


def environment(dry: bool) -> dict[str, str]:
    """That of all processes: this repository is on the path, nothing of it need be installed."""
    paths = [ROOT, ROOT / "kernels", ROOT / "benchmarks", ROOT / "tests" / "helpers"]
    site = [os.environ[n] for n in ("VLLM_SITE", "PYTHONPATH") if os.environ.get(n)]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *site]),
        "PYTHONUNBUFFERED": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    env.pop("TRITON_INTERPRET", None)
    if dry:
        env["TRITON_INTERPRET"] = "1"
    return env


class Run:
    """One call: its processes, its table, its time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.end = args, time.monotonic() + args.seconds
        self.grid = Grid.of(args.dry_run)
        self.env = environment(args.dry_run)
        self.scratch = Path(tempfile.mkdtemp(prefix="run_gpu-"))
        self.log = self.scratch / "log"
        self.notes: list[str] = []
        self.workers = {shape: self.worker() for shape in self.grid.shapes}

    @property
    def first(self) -> Asked:
        return next(iter(self.workers.values()))

    def worker(self, compile_only: bool = False) -> Asked:
        options = {
            "interpret": self.args.dry_run,
            "compile": compile_only,
            "vllm": not compile_only and not self.args.dry_run,
            "faults": self.args.fault,
            "seconds": 0.12,  # of one timing
        }
        return Asked(options, self.env, self.log)

    def say(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def limit(self, step: str) -> float:
        return self.args.limit or LIMITS[step]

    def open(self) -> None:
        """Find the card, and its earlier results."""
        for worker in self.workers.values():  # all at once
            worker.start()
        hello = self.first.greet(self.left())
        slug, out = hello["slug"], self.args.out
        out.mkdir(parents=True, exist_ok=True)
        log = out / f"{slug}.log"
        with log.open("a") as kept:
            kept.write(self.log.read_text())
        for worker in self.workers.values():
            worker.log = log  # of those that start from now on
        self.say(f"run_gpu: {slug}, {self.args.seconds:.0f} s, steps {' '.join(self.args.steps)}")
        self.log = log
        earlier = self.args.earlier
        if earlier is not None and earlier.resolve() != out:
            names = [path.stem for path in earlier.glob("*.csv")]
            if slug not in names:
                found = ", ".join(names) or "none"
                self.say(f"######## {earlier} has no results of {slug} (of {found}): none taken")
            for name in (f"{slug}.csv", f"{slug}.begun", f"{slug}-scripts.tgz"):
                if (earlier / name).exists() and not (out / name).exists():
                    shutil.copyfile(earlier / name, out / name)
        if hello["no_vllm"]:
            self.say(f"######## no opponent vllm: {hello['no_vllm']}")
        self.no_vllm = bool(hello["no_vllm"])
        self.record = Record(out, slug, hello["header"])
        self.scripts = Scripts(out, slug, self.scratch)

    # --- steps ----------------------------------------------------------------------------------

    def todo(self, step: str) -> list[Item]:
        items = getattr(self.grid, step)()
        return [item for item in items if not self.record.has(item)]

    def steps(self) -> None:
        wanted = self.args.steps
        for index, step in enumerate(wanted):
            share = WEIGHTS[step] / sum(WEIGHTS[name] for name in wanted[index:])
            seconds = self.left() * share
            if seconds < 3:
                self.say(f"== {step}: no time left")
                continue
            self.say(f"== {step}: {seconds:.0f} s")
            until = time.monotonic() + seconds
            if step == "compile":
                self.compile(until)
            elif step == "tests":
                self.tests()
            elif step in SCRIPTS:
                self.script(step, seconds)
            else:
                self.items(step, until)
            self.summarize()

    def one(self, worker: Asked, item: Item, until: float) -> None:
        """Run an item, unless something says that it would fail again."""
        if reason := self.record.blocker(item):
            self.record.end(item, {"status": "left-out", "why": reason})
            return
        worker.greet(self.left())
        if item.step != "compile":  # its steps compile what is missing themselves
            self.record.begin(item)
        answer = worker.ask(vars(item), self.limit(item.step), until - time.monotonic())
        if answer["status"] == "interrupted":
            print(f"{answer['status']:12} {item}: {answer['why']}", flush=True)
        else:
            self.record.end(item, answer)

    def items(self, step: str, until: float) -> None:
        for item in self.todo(step):
            if time.monotonic() > until:
                self.say(f"== {step}: its time is over; --continue goes on")
                return
            self.one(self.workers.get(item.shape, self.first), item, self.end)

    def compile(self, until: float) -> None:
        """What the items need that are still to come, unless it ended a process before."""
        later = [item for step in ("smoke", "time", "ab") for item in self.todo(step)]
        pending: queue.SimpleQueue[Item] = queue.SimpleQueue()
        items = [
            item
            for item in self.grid.compiled(later)
            if (row := self.record.row_of(item)) is None or row["status"] in ("ok", "failed")
        ]
        for item in items:
            pending.put(item)
        workers = [self.worker(True) for _ in range(min(self.args.processes, len(items)))]
        for worker in workers:  # by this thread: a process ends with the thread that started it
            worker.start()

        def take(worker: Asked) -> None:
            try:
                while time.monotonic() < until:
                    self.one(worker, pending.get_nowait(), min(self.end, until + 20))
            except (queue.Empty, CardGone) as error:
                if isinstance(error, CardGone):
                    self.say(f"######## compile: {error}")
            finally:
                worker.close()

        with concurrent.futures.ThreadPoolExecutor(max(1, len(workers))) as pool:
            for job in [pool.submit(take, worker) for worker in workers]:
                job.result()

    def tests(self) -> None:
        shards = self.args.processes
        with concurrent.futures.ThreadPoolExecutor(shards) as pool:
            jobs = [pool.submit(self.shard, shard, shards) for shard in range(shards)]
            if not all([job.result() for job in jobs]):
                self.say("== tests: their time is over; --continue goes on")

    def shard(self, shard: int, shards: int) -> bool:
        """A share of the tests, in a new process after each that hung or ended it; True: all."""
        while self.left() > 0:
            mine = [row for row in self.record.done.values() if row["step"] == "tests"]
            lines = Lines([sys.executable, "-m", "gpu.run_tests"], self.env, self.log)
            lines.send(
                {
                    **{"root": str(ROOT), "files": list(map(str, self.args.tests))},
                    **{"shard": shard, "shards": shards},
                    "skip": [row["part"] for row in mine],
                }
            )
            running: Item | None = None
            while True:  # until one hangs, or its process ends
                limit = START if running is None else self.limit("tests")
                answer = lines.receive(min(limit, self.left()))
                if answer.get("over"):
                    return True
                if "test" not in answer:  # hung or died
                    lines.kill()
                    if answer["status"] == "hung" and self.left() <= 0:
                        return False
                    if running is None:
                        self.say(f"######## tests: a process {answer['status']}: {answer['why']}")
                        return False
                    self.record.end(running, answer)
                    break
                item = Item("tests", "-", 0, answer["test"], "-")
                if "status" in answer:
                    self.record.end(item, answer)
                    running = None
                else:
                    self.record.begin(item)
                    running = item
        return False

    def script(self, step: str, seconds: float) -> None:
        if SCRIPTS[step].vllm and self.no_vllm and not self.args.dry_run:
            self.say(f"== {step}: left out, no vLLM")
            return
        result = self.scripts.run(step, seconds, self.env, self.args.dry_run)
        self.say(f"== {step}: {result}")
        for line in self.scripts.goals(step):
            self.say(line)

    # --- the end --------------------------------------------------------------------------------

    def summarize(self) -> list[str]:
        """Write the summary; its lines."""
        record = self.record
        lines = [*self.notes, *report.summary(record.rows, record.code)]
        path = self.args.out / f"{record.card}-summary.txt"
        path.write_text("\n".join([*lines, ""]))
        return lines

    def close(self) -> None:
        end_all()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def ended_from_outside(self, number: int, _: object) -> None:
        """At once, whatever other threads wait for."""
        if hasattr(self, "record"):
            self.say(f"== ended from outside by signal {number}")
            self.summarize()
        self.close()
        os._exit(128 + number)


def main() -> None:
    args = parse_args()
    run = Run(args)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, run.ended_from_outside)
    status = 0
    try:
        try:
            run.open()
        except CardGone as error:
            log = run.log.read_text()[-2000:] if run.log.exists() else ""
            print(f"{log}\nrun_gpu: {error}", file=sys.stderr)
            sys.exit(3)
        try:
            run.steps()
        except CardGone as error:
            run.say(f"######## {error}: nothing more is measured")
            status = 3
        bad = [r for r in run.record.rows if r["code"] == run.record.code and r["status"] in BAD]
        status = status or int(bool(bad))
    finally:
        if hasattr(run, "record"):
            print("\n".join(run.summarize()), flush=True)
        run.close()
    sys.exit(status)


if __name__ == "__main__":
    main()
