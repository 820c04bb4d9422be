"""The benchmarks run: small sizes, their own gate, a CSV at the end. No figure is judged."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = {
    "bench_experts_cpu.py": ["--quick", "--threads", "1"],
    "bench_decode.py": ["--quick"],
    "bench_routing_cpu.py": ["--quick"],
    "straggler_ranks.py": ["--quick", "--no-plot"],
    "straggler_project.py": ["--quick", "--no-plot"],
}
VERSIONS = re.compile(
    r"# date \d{4}-\d\d-\d\d, python 3\S+, torch \d\S+, (no triton|triton \d\S+), "
    r"vllm(-cpu)? \d\S+, revision \S+"
)
DEVICE = re.compile(r"# device CPU \S.*, \d+ cores")


ENGINES = {"bench_decode.py", "straggler_ranks.py"}  # take half a minute each


@pytest.mark.cpu
@pytest.mark.parametrize(
    "script",
    [pytest.param(name, marks=pytest.mark.slow if name in ENGINES else ()) for name in QUICK],
)
def test_quick_run_writes_a_table(repo_root: Path, tmp_path: Path, script: str) -> None:
    out = tmp_path / "out.csv"
    done = subprocess.run(
        [sys.executable, str(repo_root / "benchmarks" / script), *QUICK[script], "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    output = done.stdout + done.stderr
    if done.returncode and re.search(r"no prepacked bfloat16|can't pack bfloat16", output):
        pytest.skip("oneDNN has no prepacked product for bfloat16 here")
    assert done.returncode == 0, output
    lines = out.read_text().splitlines()
    assert VERSIONS.fullmatch(lines[0]), lines[0]
    assert DEVICE.fullmatch(lines[1]), lines[1]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert rows and all(None not in row.values() for row in rows)


def test_revision_says_what_is_changed_but_for_results(repo_root: Path, tmp_path: Path) -> None:
    """A benchmark whose results lie there uncommitted doesn't mark the next one's as changed."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "_tables.py").write_bytes((repo_root / "benchmarks" / "_tables.py").read_bytes())

    def out(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def revision() -> str:
        return out(sys.executable, "-B", "-c", "import _tables; print(_tables.revision())")

    out("git", "init", "-q", "..")
    out("git", "add", ".")
    out("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "c")
    commit = out("git", "rev-parse", "--short", "HEAD")
    (folder / "results").mkdir()
    (folder / "results" / "t.csv").write_text("a\n")
    assert revision() == commit
    (tmp_path / "other.py").write_text("")
    assert revision() == commit + "+"
