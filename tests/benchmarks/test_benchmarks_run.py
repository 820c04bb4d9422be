"""The benchmarks run: small sizes, their own gate, a CSV at the end. No figure is judged."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = {
    "bench_experts_cpu.py": ["--quick", "--threads", "1"],
    "straggler_ranks.py": ["--quick", "--no-plot"],
    "straggler_project.py": ["--quick", "--no-plot"],
}


@pytest.mark.parametrize("script", QUICK)
def test_quick_run_writes_a_table(repo_root: Path, tmp_path: Path, script: str) -> None:
    out = tmp_path / "out.csv"
    done = subprocess.run(
        [sys.executable, str(repo_root / "benchmarks" / script), *QUICK[script], "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = out.read_text().splitlines()
    assert any(line.startswith("# date") for line in lines), "no hardware, versions and date"
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert rows and all(None not in row.values() for row in rows)
