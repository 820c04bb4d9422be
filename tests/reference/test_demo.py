"""What the demo makes of the loads that a server says. `make demo` runs the whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LAYER = {
    "load_before": [6, 1, 1, 0],
    "load_after": [3, 2, 2, 1],
    "max_before": 7,
    "max_after": 3,
    "dropped": 3,
    "expanded": 3,
    "left_without": 1,
}


@pytest.fixture(scope="module")
def demo(repo_root: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root / "examples"))
        import demo

        yield demo


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that says what it is told to; its address, and what it says and was asked."""
    said: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said["asked"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said["answer"]).encode())

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", said
        http.shutdown()
        thread.join()


def test_loads_are_read_by_layer(demo: ModuleType, server: tuple[str, dict[str, Any]]) -> None:
    url, said = server
    said["answer"] = {"results": [[LAYER, {**LAYER, "dropped": 0}]]}
    first, second = demo.fetch_loads(url)
    assert said["asked"] == {"method": "moe_capacity_counters"}
    # Busiest over mean: 7 / (8 / 4) and 3 / (8 / 4).
    assert first == demo.LoadRow(0, 3.5, 1.5, 3, 3, 1)
    assert (second.layer, second.dropped) == (1, 0)
    said["answer"] = {"results": []}
    with pytest.raises(demo.DemoError, match="the loads could not be read"):
        demo.fetch_loads(url)


def test_a_limit_that_does_nothing_fails_the_demo(
    demo: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    good = demo.LoadRow(0, 3.5, 1.5, 3, 3, 1)
    demo.show_loads([good])
    assert "3.50" in capsys.readouterr().out
    for rows, message in (
        ([], "no loads"),
        ([demo.LoadRow(0, 3.5, 3.5, 0, 0, 0)], "dropped nothing"),
        ([good, demo.LoadRow(1, 1.5, 2.5, 3, 3, 1)], r"layers \[1\] less balanced"),
    ):
        with pytest.raises(demo.DemoError, match=message):
            demo.show_loads(rows)
