"""The soak: half a minute against a real server, and that every one of its checks can fail."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CALM = {
    "tokens": 100,
    "most_peak": 300,
    "gained": {
        "before": 800,
        "after": 700,
        "dropped": 100,
        "expanded": 0,
        "peak_before": 400,
        "peak_after": 290,
    },
}
FINE: dict[str, Any] = {
    "outcomes": {
        "chat": {"answer": 10},
        "abort": {"left": 3},
        "too long": {"400": 2},
        "change": {"200": 4},
    },
    "calm before": CALM,
    "calm after": CALM,
    "memory": {"begin": 1000.0, "end": 1010.0},
    "killed": {"hung": 0, "ended": 64, "left": 0},
}


@pytest.fixture(scope="module")
def soak(repo_root: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root / "benchmarks"))
        return importlib.import_module("soak")


def test_a_run_in_which_all_holds_passes(soak: Any) -> None:
    assert all(holds for holds, _ in soak.judge(FINE))


FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "chat: 11 requests": lambda r: r["outcomes"]["chat"].update({"APITimeoutError": 1}),
    "abort: 4 requests": lambda r: r["outcomes"]["abort"].update({"InternalServerError 500": 1}),
    "too long: 3 requests": lambda r: r["outcomes"]["too long"].update({"200": 1}),
    "change: 5 requests": lambda r: r["outcomes"]["change"].update({"500": 1}),
    "calm before: 801 assign": lambda r: r["calm before"]["gained"].update(before=801),
    "calm after: 99 of them": lambda r: r["calm after"]["gained"].update(dropped=99),
    "calm after: loads": lambda r: r["calm after"]["gained"].update(peak_after=301),
    "memory: +6.0%": lambda r: r["memory"].update(end=1060.0),
    "killed: 63 requests ended, 1": lambda r: r["killed"].update(hung=1, ended=63),
    "killed: 1 processes left": lambda r: r["killed"].update(left=1),
}


@pytest.mark.parametrize("said", FAULTS)
def test_each_fault_fails(soak: Any, said: str) -> None:
    report = copy.deepcopy(FINE)
    FAULTS[said](report)
    failed = [sentence for holds, sentence in soak.judge(report) if not holds]
    assert failed and any(sentence.startswith(said) for sentence in failed), failed


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.timing
def test_half_a_minute(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    script = repo_root / "benchmarks" / "soak.py"
    words = ["--minutes", "0.4", "--clients", "16", "--kill", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(script), *words],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert report["outcomes"]["change"] == {"200": sum(report["outcomes"]["change"].values())}
    assert sum(report["outcomes"]["change"].values()) >= 3
    assert len(report["outcomes"]) >= 6 and report["killed"]["ended"] == 64
