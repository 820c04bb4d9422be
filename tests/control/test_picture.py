"""The loads of a server as text and as a page, and what the two commands say."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_capmoe.__main__ import main
from vllm_capmoe.control import picture

NOW = {"mode": "drop", "factor": 1.5, "decode_keep": "off", "observe": False}


def layer(number: int, before: list[int], after: list[int]) -> dict[str, Any]:
    return {
        "layer": f"model.layers.{number}.mlp.experts",
        "number": number,
        "load_before": before,
        "load_after": after,
        "dropped_assignments": sum(before) - sum(after),
        "gate_mass": 8.0,
        "lost_gate_mass": 0.5,
    }


LAYERS = [layer(0, [12, 4, 0, 0], [6, 4, 0, 0]), layer(1, [4, 4, 4, 4], [4, 4, 4, 4])]
ANSWER = {
    "now": NOW,
    "window": {"seconds": 12.3, "layers": LAYERS},
    "since_start": {"seconds": 99.0, "layers": LAYERS},
}


def test_a_row_says_what_a_layer_lost_and_shades_its_experts() -> None:
    head, names, first, second = picture.terminal(ANSWER, "window", 100).splitlines()
    assert head == "mode drop, factor 1.5, decode_keep off, observe False | last 12 s"
    assert names.index("max/mean") == first.index(" 3.0 -> ")
    assert first.split() == ["0", "3.0", "->", "2.4", "37.5%", "6.2%", "█░"]
    assert second.split()[1:5] == ["1.0", "->", "1.0", "0.0%"] and second.endswith("░░░░")


@pytest.mark.parametrize("columns", [44, 60, 80, 200])
def test_rows_fit_their_columns_and_no_busy_expert_is_lost(columns: int) -> None:
    loads = [1] * 256
    loads[200] = 5
    answer = {"now": NOW, "window": {"seconds": 1.0, "layers": [layer(7, loads, loads)]}}
    row = picture.terminal(answer, "window", columns).splitlines()[2]
    assert len(row) <= columns and "█" in row
    shades = picture.cells(loads, columns - 40)
    assert len(shades) == -(-256 // -(-256 // (columns - 40)))


def test_a_server_without_tokens_is_said_to_have_none() -> None:
    idle = {"now": NOW, "window": {"seconds": 1.0, "layers": [layer(0, [0, 0], [0, 0])]}}
    assert picture.terminal(idle, "window", 80).endswith("(no tokens in this time)")
    assert "<svg" in picture.page(idle | {"since_start": idle["window"]}, "http://a")


def test_the_page_has_a_cell_for_each_expert_before_and_after() -> None:
    page = picture.page(ANSWER, "http://<host>:8000")
    assert page.count("<rect") == 2 * 8 and page.count("<svg") == 2
    assert "layer 0, expert 0: 3.00 times the mean" in page
    assert "&lt;host&gt;" in page and "<host>" not in page
    assert "http" not in page.replace("http://&lt;host&gt;", "")


class Answers(http.server.BaseHTTPRequestHandler):
    """A server that says what `answer` has: status, type of content, content."""

    answer: tuple[int, str, bytes] = (200, "application/json", b"{}")
    asked: list[tuple[str, str | None, bytes]] = []

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.asked.append((self.path, self.headers.get("Authorization"), self.rfile.read(length)))
        status, kind, content = self.answer
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Answers.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_is_set_is_sent_and_told(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"before": NOW, "now": NOW | {"factor": 1.2}, "forgotten": True, "seconds": 0.0312}
    Answers.answer = (200, "application/json", json.dumps(said).encode())
    assert main(["set", url + "/", "on", "--factor", "1.2", "--no-observe", "--api-key", "k"]) == 0
    assert capsys.readouterr().out == "changed factor 1.5 -> 1.2 (0.031 s)\n"
    path, key, body = Answers.asked[0]
    assert (path, key) == ("/v1/moe-capacity", "Bearer k")
    assert json.loads(body) == {"mode": "on", "factor": 1.2, "observe": False}
    Answers.answer = (200, "application/json", json.dumps(said | {"now": NOW}).encode())
    assert main(["set", url, "--factor", "inf", "--decode-keep", "off"]) == 0
    assert json.loads(Answers.asked[1][2]) == {"factor": "inf", "decode_keep": "off"}
    assert "changed nothing: it is so already" in capsys.readouterr().out
    Answers.answer = (200, "application/json", json.dumps(said | {"forgotten": False}).encode())
    assert main(["set", url, "off"]) == 0
    assert "; cached prefixes of before stay" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (400, b'{"error": {"message": "factor is 0, but more is accepted."}}', "factor is 0, but"),
        (401, b'{"error": "Unauthorized"}', "wants another API key: --api-key, or VLLM_API_KEY"),
        (404, b'{"detail": "Not Found"}', "was started with VLLM_PLUGINS=capmoe,capmoe_control"),
        (502, b"<html>", "answered with status 502."),
        (200, b"<html>", "can't be asked"),
        (200, b"{}", "its answer is another one than expected"),
        (200, b"3", "can't be asked"),
    ],
)
def test_what_a_server_refuses_is_one_sentence(
    url: str, status: int, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Answers.answer = (status, "application/json", content)
    assert main(["set", url, "off"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("vllm-capmoe set: ") and said in sentence
    assert sentence.count("\n") == 1


def test_watching_once_draws_and_saves(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Answers.answer = (200, "application/json", json.dumps(ANSWER).encode())
    file = tmp_path / "loads.html"
    assert main(["watch", url, "--once", "--since-start", "--html", str(file)]) == 0
    assert "last 99 s" in capsys.readouterr().out
    assert re.search(r"<title>Expert loads of http://127", file.read_text())
    assert main(["watch", url + "x:y", "--once"]) == 2
    assert main(["watch", url, "--once", "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "x.html can't be written (No such file or directory)." in capsys.readouterr().err


@pytest.mark.parametrize("every", ["0", "x", "-1", "nan", "4000"])
def test_a_bad_interval_is_refused(every: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["watch", "http://a", "--every", every])
    assert f"it is {every!r}, but a number from 0.1 to 3600 is accepted" in capsys.readouterr().err
