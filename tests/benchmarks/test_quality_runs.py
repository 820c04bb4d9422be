"""`make quality` on very little text: and every measure means something."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from engines import environment

pytestmark = [pytest.mark.engine, pytest.mark.cpu, pytest.mark.slow]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_quality_runs(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality.csv"
    command = [sys.executable, str(repo_root / "benchmarks" / "quality" / "run.py"), "--quick"]
    command += ["--models", "16-peaked", "--keep", "2", "--out", str(out), "--threads", "1"]
    subprocess.run(command, env=environment(), check=True, timeout=500)
    measured = {row["setting"]: row for row in rows_of(tmp_path / "quality-summary.csv")}
    free, again = measured.pop("drop inf"), measured.pop("drop inf metric=order")
    for row in (free, again):
        assert float(row["delta"]) == float(row["dropped"]) == float(row["lost"]) == 0.0
        assert float(row["agree"]) == float(row["held"]) == 1.0
        assert abs(float(row["kl"])) < 1e-6 and row["peak"] == row["peak_before"]
    assert len(measured) == 2
    drop = measured["drop 1"]
    assert float(drop["held"]) == pytest.approx(1 - float(drop["dropped"]), abs=1e-4)
    assert 0 < float(drop["lost"]) < float(drop["dropped"])  # what scores least is dropped
    assert 1.0 <= float(drop["peak"]) < 1.04 < float(drop["peak_before"])
    for row in measured.values():
        assert float(row["delta"]) != 0 and float(row["kl"]) > 1e-4
    assert "### Rules, by γ" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000
    kept, shared = rows_of(tmp_path / "quality_decode-summary.csv")
    assert [kept["setting"], shared["setting"]] == ["drop inf", "drop inf decode_keep=2"]
    assert float(kept["delta"]) == 0 != float(shared["delta"])
    # Four requests of four experts each: from 4 to 16 different ones.
    assert 4 <= float(shared["active"]) < float(kept["active"]) <= 16
    assert float(shared["held"]) == 1.0
    # Eight questions and four instructions, without a limit, again, and with one.
    for what, last in (("choice", "drop 1"), ("answers", "drop inf decode_keep=2")):
        free, again, ours = rows_of(tmp_path / f"quality_{what}-summary.csv")
        assert free["setting"] == "drop inf" and ours["setting"] == last
        assert {**again, "setting": ""} == {**free, "setting": ""}
    free, _, ours = rows_of(tmp_path / "quality_choice-summary.csv")
    assert (free["questions"], free["shift"]) == ("8", "0")
    assert float(ours["shift"]) > 0.01
    free, _, ours = rows_of(tmp_path / "quality_answers-summary.csv")
    assert (free["equal"], free["agree"], free["right"], free["known"]) == ("4", "1", "2", "2")
    assert float(ours["agree"]) < 1


def test_groups_of_a_decode_step_are_steps_of_their_own(repo_root: Path) -> None:
    script = repo_root / "tests" / "benchmarks" / "grouped_decode.py"
    done = subprocess.run(
        [sys.executable, str(script), str(repo_root)],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=500,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["apart"] < 1e-3 < min(found["all_eight"], found["free"])
    assert found["calls"] == {"4": 2 * 16 * 7, "8": 16 * 7}  # 7 steps of 16 layers
    assert 4 <= found["active"] < found["active_free"]["4"] < found["active_free"]["8"] <= 16
