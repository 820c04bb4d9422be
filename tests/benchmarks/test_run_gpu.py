"""benchmarks/run_gpu.py on the CPU, with faults: what goes wrong costs its own row, and no other.

A first run meets kernels that raise, end their process and are wrong, and is itself killed while
one hangs; a second one continues it elsewhere. No time is judged.
"""

from __future__ import annotations

import collections
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT = 30  # seconds for an item: long for what works, and three times waited for what hangs
FAULTS = {
    "compile/tiny/9/experts/ours": "raise",  # says nothing yet: the smoke test runs
    "compile/tiny-fine/9/experts/ours": "kill",
    "smoke/tiny/1/experts/ours": "wrong",
    "smoke/tiny-fine/1/experts/ours": "raise",
    "time/tiny/9/experts/ours": "kill",
    "time/tiny/9/layer/ours": "hang",
    "ab/tiny/9/experts/pdl": "wrong",
}
TESTS = """
import os, signal, time

def test_good(): pass
def test_bad(): assert 1 == 2, "no"
def test_hangs(): time.sleep(1000)
def test_ends_its_process(): os.kill(os.getpid(), signal.SIGKILL)
def test_good_too(): pass
"""
Rows = list[dict[str, str]]


def key(row: dict[str, str]) -> str:
    return "/".join(row[name] for name in ("step", "shape", "tokens", "part", "who"))


def read(path: Path) -> Rows:
    return list(csv.DictReader(x for x in path.read_text().splitlines() if x[0] != "#"))


def command(repo_root: Path, out: Path, *options: str) -> list[str]:
    faults = [f"{kind}@{item}" for item, kind in FAULTS.items()]
    script = str(repo_root / "benchmarks" / "run_gpu.py")
    given = ["--dry-run", "--out", str(out), "--limit", str(LIMIT), "--seconds", "500"]
    return [sys.executable, script, *given, *options, "--processes", "2", "--fault", *faults]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")}


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(c) for t in threads for c in (t / "children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait(condition: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def runs(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Rows of the first run, when it was killed, and of both; what the second one printed."""
    folder = tmp_path_factory.mktemp("gpu")
    first, second, tests = folder / "first", folder / "second", folder / "test_faults.py"
    tests.write_text(TESTS)
    (folder / "h200").mkdir()
    (folder / "h200" / "h200.csv").write_text("# another card\n")
    begun = first / "interpreter.begun"
    hanging = json.dumps(["time", "tiny", 9, "layer", "ours"])
    log = folder / "log"
    other = ["--continue", str(folder / "h200")]
    with log.open("w") as output:
        running = subprocess.Popen(
            command(repo_root, first, "--steps", "compile,smoke,time", *other),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        try:
            wait(lambda: begun.exists() and hanging in begun.read_text(), 400)
            processes = children(running.pid)
            time.sleep(1)
        finally:
            running.send_signal(signal.SIGKILL)
            running.wait()
    wait(lambda: not any(map(alive, processes)), 20)
    rows = read(first / "interpreter.csv")
    with (first / "interpreter.csv").open("a") as cut:
        cut.write("2026-01-01,interpreter,half a ro")
    done = subprocess.run(
        command(
            *(repo_root, second, "--steps", "compile,smoke,time,ab,tests,tiles,sanitize"),
            *("--continue", str(first), "--tests", str(tests)),
        ),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment(),
    )
    return {
        "processes": processes,
        "first_output": log.read_text(),
        "first": rows,
        "both": read(second / "interpreter.csv"),
        "done": done,
        "out": second,
    }


def status_of(rows: Rows, item: str) -> str:
    found = [row["status"] for row in rows if key(row) == item]
    assert len(found) == 1, f"{item}: {found}"
    return found[0]


@pytest.mark.timeout(1200)  # the first test waits for both runs
@pytest.mark.slow
def test_a_fault_costs_its_own_rows_and_is_named(runs: dict) -> None:
    rows, done = runs["both"], runs["done"]
    assert done.returncode == 1, done.stdout + done.stderr
    expected = {
        "smoke/tiny/9/experts/ours": "ok",
        "smoke/tiny-fine/9/experts/ours": "left-out",
        "time/tiny-fine/9/experts/ours": "left-out",
        "smoke/tiny/1/experts/ours": "wrong",
        "time/tiny/1/experts/ours": "left-out",
        "time/tiny/1/layer/ours": "left-out",
        "smoke/tiny-fine/1/experts/ours": "failed",
        "time/tiny-fine/1/experts/ours": "left-out",
        "time/tiny/9/experts/ours": "died",
        "time/tiny/9/layer/ours": "hung",
        "ab/tiny/9/experts/pdl": "wrong",
        "ab/tiny-fine/9/experts/pdl": "left-out",
    }
    assert {item: status_of(rows, item) for item in expected} == expected
    compiled = [row["status"] for row in rows if key(row) == "compile/tiny/9/experts/ours"]
    assert set(compiled) == {"failed"}
    why = {key(row): row["why"] for row in rows}
    assert "worst in row 0" in why["smoke/tiny/1/experts/ours"]
    assert "the kernel raises" in why["smoke/tiny-fine/1/experts/ours"]
    assert "-9" in why["time/tiny/9/experts/ours"]
    # What shares neither shape and tokens nor the kernel is measured, after its own gate.
    for shape in ("tiny", "tiny-fine"):
        for tokens in ("9", "1"):
            for part, who in (("routing", "ours"), ("limit", "ours"), ("experts", "loop")):
                assert status_of(rows, f"time/{shape}/{tokens}/{part}/{who}") == "ok"
            for part in ("experts", "layer", "routing"):
                assert status_of(rows, f"time/{shape}/{tokens}/{part}/vllm") == "missing"
    for item in expected:
        if expected[item] not in ("ok", "left-out"):
            assert f"######## {expected[item].upper()}: {item}" in done.stdout
    summary = (runs["out"] / "interpreter-summary.txt").read_text()
    assert summary in done.stdout


@pytest.mark.slow
def test_no_figure_without_a_gate(runs: dict) -> None:
    timed = [row for row in runs["both"] if row["ms"] and row["step"] in ("time", "ab")]
    assert len(timed) > 10
    assert all(row["status"] == "ok" and row["gate"] for row in timed)
    smoked = [r for r in runs["both"] if r["step"] == "smoke" and r["status"] == "ok"]
    assert smoked and all(row["gate"] and int(row["repeats"]) > 0 for row in smoked)


@pytest.mark.slow
def test_a_killed_run_is_continued(runs: dict) -> None:
    """Its processes end with it; what it measured or saw fail isn't run again, the rest is."""
    assert len(runs["processes"]) == 2
    first, both = runs["first"], runs["both"]
    assert both[: len(first)] == first and len(first) > 10
    counts = collections.Counter(key(row) for row in both if row["step"] != "compile")
    assert set(counts.values()) == {1}
    ended = [r for r in first if r["step"] == "compile" and r["status"] == "died"]
    assert [key(row) for row in ended] == ["compile/tiny-fine/9/experts/ours"]
    assert [key(row) for row in both].count("compile/tiny-fine/9/experts/ours") == 1
    assert "has no results of interpreter (of h200): none taken" in runs["first_output"]
    assert {row["card"] for row in both} == {"interpreter"}


@pytest.mark.slow
def test_tests_go_on_after_one_that_hangs(runs: dict) -> None:
    found = {
        row["part"].rpartition("::")[2]: row["status"]
        for row in runs["both"]
        if row["step"] == "tests"
    }
    assert found == {
        "test_good": "ok",
        "test_bad": "failed",
        "test_hangs": "hung",
        "test_ends_its_process": "died",
        "test_good_too": "ok",
    }


@pytest.mark.slow
def test_scripts_are_steps_too(runs: dict) -> None:
    output = runs["done"].stdout
    assert "== tiles: done" in output and "== sanitize: left out" in output
    assert (runs["out"] / "interpreter-scripts.tgz").exists()


# --- the parts, alone ---------------------------------------------------------------------------


def run_code(repo_root: Path, code: str, *args: str, **more: str) -> str:
    """The output of Python code that imports from benchmarks/."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment() | {"PYTHONPATH": str(repo_root / "benchmarks")} | more,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rows_of_another_card_or_other_code_don_t_count(repo_root: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from gpu import record
from gpu.items import Item
folder, item = Path(sys.argv[1]), Item("time", "olmoe", 16, "layer")
record.Record(folder, "h100", ["# a"]).end(item, {"status": "ok", "ms": 1.5})
again = record.Record(folder, "h100", ["# b"])
assert again.has(item) and again.row_of(item)["ms"] == "1.5"
for begun in range(2):  # cut off once it is tried again, twice it is left out
    other = record.Record(folder, "h100", [])
    assert not other.has(Item("smoke", "-", 0, "x|y"))
    other.begin(Item("smoke", "-", 0, "x|y"))
last = record.Record(folder, "h100", [])
assert last.row_of(Item("smoke", "-", 0, "x|y"))["status"] == "interrupted"
record.code_id = lambda: "othercode"
assert not record.Record(folder, "h100", []).has(item)
(folder / "h100.csv").rename(folder / "h200.csv")
try:
    record.Record(folder, "h200", [])
except ValueError as error:
    print(error)
"""
    output = run_code(repo_root, code, str(tmp_path))
    assert "h200.csv has rows of h100, but only h200 is accepted." in output


def test_goals_are_judged(repo_root: Path) -> None:
    code = """
from gpu import report
from gpu.items import GOAL_SHAPES, TOKENS
KEY = ("step", "shape", "tokens", "part", "who")
def row(item, ms, status="ok", code="now", **more):
    named = dict(zip(KEY, item.split("/")))
    return {"tflops": "", "gbps": "", "why": "", "base_over_this": "", "code": code, **named,
            "ms": ms, "status": status, **more}
full = [row("time/-/0/roofs/ours", "", tflops="800", gbps="3000")]
for shape in GOAL_SHAPES:
    for tokens in TOKENS:
        at = f"time/{shape}/{tokens}"
        full += [row(f"{at}/experts/ours", "1", tflops="650", gbps="2700"),
                 row(f"{at}/layer/ours", "1"), row(f"{at}/layer/vllm", "1.35"),
                 row(f"{at}/routing/ours", "0.1"), row(f"{at}/routing/vllm", "0.1"),
                 row(f"{at}/limit/ours", "0.13")]
def words(rows):
    return [line.split()[0] for line in report.goals(report.Rows(rows, "now"))]
print(words(full))
print(words([r for r in full if r["who"] != "vllm"]))
print(words([{**r, "code": "before"} for r in full]))
print(words([*full, row("time/olmoe/64/layer/vllm", "0.9")]))
print(words([*full, row("smoke/olmoe/1024/routing/ours", "", "hung")]))
less = [r for r in full if (r["shape"], r["tokens"]) != ("olmoe", "8192")]
print(words([*less, row("time/olmoe/8192/layer/vllm", "1", "missing")]))
print(report.summary([row("smoke/olmoe/16/experts/ours", "", "wrong")], "now")[1])
"""
    lines = run_code(repo_root, code).splitlines()
    judged = [json.loads(line.replace("'", '"')) for line in lines[:6]]
    whole = ["PASS"] * 6 + ["FAIL"]
    assert judged[0] == whole
    assert judged[1] == ["WAITS", "WAITS", *["PASS"] * 3, "WAITS", "WAITS"]
    assert judged[2] == ["WAITS"] * 7
    assert judged[3] == ["PASS", "FAIL", *whole[2:]]
    assert judged[4] == ["FAIL", "FAIL", *whole[2:]]  # no time, so no goal of the layer is met
    assert judged[5] == ["WAITS", "WAITS", "PASS", "PASS", "PASS", "WAITS", "FAIL"]
    assert lines[6].startswith("######## WRONG: smoke/olmoe/16/experts/ours")


def test_order_has_something_of_everything_first(repo_root: Path) -> None:
    code = """
from gpu.items import CHOICES, GOAL_SHAPES, Grid, TIMES
grid = Grid.of(False)
timed = grid.time()
assert timed[0].part == "roofs"
first = timed[1:1 + len(GOAL_SHAPES) * len(TIMES)]
assert {i.tokens for i in first} == {8192} and {i.shape for i in first} == set(GOAL_SHAPES)
assert len(set(timed)) == len(timed) == 1 + 24 * len(TIMES)
compiled = grid.compiled([*grid.smoke(), *timed, *grid.ab()])
assert len(set(compiled)) == len(compiled)
needed = {(i.shape, i.tokens, i.part) for i in grid.smoke()}
assert needed <= {(i.shape, i.tokens, i.part) for i in compiled}
assert {i.who for i in grid.ab()} == set(CHOICES)
"""
    run_code(repo_root, code)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

loaded, launched = [], []

class Launcher:
    def __init__(self, src, metadata): pass
    def __call__(self, *args): launched.append(args)

class Card:  # stands in for Triton's driver of an H100, on which nothing may run
    launcher_cls = Launcher
    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})
        @staticmethod
        def load_binary(name, binary, shared, device):
            assert binary[:4] == b"\\x7fELF", name
            loaded.append(name)
            return object(), 0, 0, 0, 1024
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Card())
from gpu.worker import Worker, compile_only
from capmoe_kernels import experts, routing
experts.check.devices = lambda *tensors, **options: None  # tensors of the CPU will do
routing.INTERPRETED = True
compile_only()
worker = Worker({"interpret": True, "compile": True, "vllm": False, "faults": {}, "seconds": 0})
item = {"step": "compile", "shape": "tiny", "tokens": 9, "who": "ours"}
for part in ("experts", "limit"):
    answer = worker.answer({**item, "part": part})
    assert answer["status"] == "ok", answer
assert not launched
print(*sorted(loaded))
"""


@pytest.mark.slow
def test_compiling_ahead_launches_nothing(repo_root: Path, tmp_path: Path) -> None:
    """The real calls, compiled for Hopper with a driver that only counts."""
    output = run_code(repo_root, COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    experts = ["combine_kernel", "down_kernel", "gate_up_kernel"]
    routing = ["choose_kernel", "limit_kernel", "pack_kernel", "seats_kernel"]
    assert set(output.split()) >= {*experts, *routing}


def test_bad_options_are_named(repo_root: Path) -> None:
    script = str(repo_root / "benchmarks" / "run_gpu.py")
    for options, words in (
        (["--steps", "smoke,nonsense"], "'nonsense', but one of compile"),
        (["--dry-run", "--fault", "melt@x"], "'melt@x', but KIND@ITEM"),
        (["--fault", "hang@x"], "--fault is for --dry-run"),
    ):
        done = subprocess.run(
            [sys.executable, script, *options],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )
        assert done.returncode == 2 and words in done.stderr, done.stderr
