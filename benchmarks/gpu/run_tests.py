"""A share of the kernels' tests in one process, each told before it begins and after it has ended.

    echo '{"files": [...], "shard": 0, "shards": 8, "skip": [...]}' | python -m gpu.run_tests

One JSON line each: {"test"}, then {"test", "status", "ms", "why"}; at the end {"over": true}.
Neither this repository's pytest configuration nor its plugins are needed, and no pytest plugin: the
time limit of a test is kept from outside, since nothing inside ends a kernel that hangs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from gpu.worker import protocol


class Told:
    """The pytest plugin."""

    def __init__(self, options: dict[str, Any], answers: Any) -> None:
        self.options, self.answers = options, answers
        self.results: dict[str, Any] = {}  # by test: status, milliseconds, why

    def tell(self, **values: Any) -> None:
        print(json.dumps(values), file=self.answers)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        mine = items[self.options["shard"] :: self.options["shards"]]
        skip = set(self.options["skip"])
        items[:] = [item for item in mine if item.nodeid not in skip]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.options["shard"] == 0:
            why = str(report.longrepr)[-300:]
            self.tell(test=report.nodeid, status="failed", ms=0, why=why)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.results[nodeid] = ["ok", 0.0, ""]
        self.tell(test=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        result = self.results[report.nodeid]
        result[1] += 1e3 * report.duration
        if report.failed:
            result[0], result[2] = "failed", str(report.longrepr)[-300:]
        elif report.skipped:
            result[0], result[2] = "skipped", str(report.longrepr)[-300:]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        status, ms, why = self.results[nodeid]
        self.tell(test=nodeid, status=status, ms=ms, why=why)


def main() -> None:
    answers = protocol()
    import pytest

    options = json.loads(sys.stdin.readline())
    told = Told(options, answers)
    bare = ["-c", "/dev/null", "--rootdir", options["root"], "--import-mode=importlib"]
    quiet = ["-p", "no:cacheprovider", "-q", "-W", "ignore::pytest.PytestUnknownMarkWarning"]
    pytest.main([*bare, *quiet, *options["files"]], plugins=[told])
    told.tell(over=True)


if __name__ == "__main__":
    main()
