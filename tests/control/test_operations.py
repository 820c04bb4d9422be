"""Alert rules and the dashboard: read by Prometheus's own tool, and of series that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool (Debian: prometheus)")


@pytest.fixture(scope="module")
def folder(repo_root: Path) -> Path:
    return repo_root / "docs" / "operations"


@pytest.fixture(scope="module")
def queries(folder: Path) -> list[str]:
    """Those of the dashboard, as Grafana would send them."""
    panels = json.loads((folder / "dashboard.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    return [each.replace("$model", ".*").replace("$__rate_interval", "5m") for each in found]


def promtool(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [str(PROMTOOL), *words], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_promtool
def test_rules_fire_when_they_must_and_only_then(folder: Path) -> None:
    assert "9 rules found" in promtool("check", "rules", "alerts.yml", cwd=folder)
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml", cwd=folder)


@needs_promtool
def test_prometheus_reads_every_query_of_the_dashboard(queries: list[str], tmp_path: Path) -> None:
    assert len(queries) >= 7
    rules = [{"record": f"q{n}", "expr": query} for n, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "q", "rules": rules}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", "rules.yml", cwd=tmp_path)


def test_series_and_labels_are_those_that_are_published(folder: Path, queries: list[str]) -> None:
    stats = pytest.importorskip("vllm_capmoe.integration.stats")
    labels: dict[str, set[str]] = defaultdict(lambda: {"model_name"})
    for counter in stats.TABLE:
        if counter.series:
            labels[f"vllm:moe_capacity_{counter.series}_total"] |= set(counter.labels)
    for text in [(folder / "alerts.yml").read_text(), *queries]:
        for name in re.findall(r"vllm:moe_\w+", text):
            assert name in labels, f"{name} isn't published"
    for query in queries:
        known: set[str] = set().union(*(labels[n] for n in re.findall(r"vllm:moe_\w+", query)))
        for by in re.findall(r"(?:by|on) \(([^)]*)\)", query):
            assert {each.strip() for each in by.split(",")} <= known, query
    shown = " ".join(queries)
    assert all(name in shown for name in labels), "a series is on no panel"


def test_panels_have_places_of_their_own_and_say_what_they_show(folder: Path) -> None:
    panels: list[dict[str, Any]] = json.loads((folder / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
        assert len(panel["description"]) > 20


def test_the_runbook_has_every_alert(folder: Path) -> None:
    rules, runbook = (folder / "alerts.yml").read_text(), (folder / "README.md").read_text()
    alerts = re.findall(r"alert: (\w+)", rules)
    assert len(alerts) == 5 and all(f"`{alert}`" in runbook for alert in alerts)
