"""The planner's page in a real browser: it is drawn, and nothing is asked of the network."""

import http.server
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from planned import DECODE, FOUND, VERDICT

from vllm_capmoe.planner import page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian: chromium-headless-shell)")
def test_the_browser_draws_the_plots_and_asks_for_the_page_only(tmp_path: Path) -> None:
    asked: list[str] = []

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.html(FOUND, VERDICT, DECODE).encode())

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
        frame.write_text(
            page.html(FOUND, VERDICT, DECODE).replace(
                "</body>", f"<script>{measure}</script></body>"
            )
        )
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
    assert done[0].count("<svg") == 6
    drawn = done[1].split('data-drawn="')[1].split('"')[0].split()
    assert len(drawn) == 6
    assert all(int(side) > 0 for size in drawn for side in size.split("x"))
