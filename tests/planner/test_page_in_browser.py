"""Our pages in a real browser: they are drawn, and nothing is asked of the network."""

import http.server
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from planned import DECODE, FOUND, VERDICT

from vllm_capmoe.control import picture
from vllm_capmoe.planner import page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


COUNTED = {
    "number": 3,
    "load_before": [9, 3, 0, 0],
    "load_after": [6, 3, 2, 0],
}
WATCHED = {
    "now": {"mode": "drop", "factor": 1.5},
    "since_start": {"seconds": 7.0, "layers": [COUNTED]},
}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian: chromium-headless-shell)")
@pytest.mark.parametrize(
    ("content", "plots"),
    [
        (page.html(FOUND, VERDICT, DECODE), 6),
        (picture.page(WATCHED, "http://localhost:8000"), 2),
    ],
    ids=["plan", "watch"],
)
def test_the_browser_draws_the_plots_and_asks_for_the_page_only(
    tmp_path: Path, content: str, plots: int
) -> None:
    asked: list[str] = []

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_: object) -> None:
            pass

    # Adds the drawn size of every plot to the document, for --dump-dom to show.
    measure = (
        "document.body.dataset.drawn = [...document.querySelectorAll('svg')].map(s => "
        "Math.round(s.getBoundingClientRect().width) + 'x' + "
        "Math.round(s.getBoundingClientRect().height)).join(' ')"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/plan"
        frame = tmp_path / "measure.html"
        frame.write_text(content.replace("</body>", f"<script>{measure}</script></body>"))
        done = [
            subprocess.run(
                [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", where],
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            ).stdout
            for where in (url, frame.as_uri())
        ]
        server.shutdown()
    assert set(asked) <= {"/plan", "/favicon.ico"} and "/plan" in asked
    assert done[0].count("<svg") == plots
    drawn = done[1].split('data-drawn="')[1].split('"')[0].split()
    assert len(drawn) == plots
    assert all(int(side) > 0 for size in drawn for side in size.split("x"))
