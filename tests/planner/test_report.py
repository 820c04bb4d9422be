"""The plan as text, JSON and a page, and the comparison of two runs."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from planned import DECODE, FOUND, VERDICT

from vllm_capmoe.planner import check, page, report
from vllm_capmoe.planner.counts import Counts
from vllm_capmoe.planner.grid import MODES


def test_the_text_has_the_figures() -> None:
    text = report.text(FOUND, VERDICT, DECODE)
    rows = {tuple(line.split()[:2]): line.split() for line in text.splitlines()}
    # gamma = 1: 200 of 1600 assignments; 50 of a mass of 800; the busiest ranks 600 -> 400.
    assert rows["drop", "1"] == ["drop", "1", "12.50%", "6.25%", "6.25%", "1.50x", "0"]
    assert "Verdict: turn on" in text and VERDICT.worth
    assert rows["1", "3.0"] == ["1", "3.0", "25.00%", "5.00%", "3.0", "0.80"]
    assert "Verdict for decode: turn on decode keep 1: at 8 requests, keeping 1 of 2 loads" in text


def test_json_has_the_same_figures() -> None:
    plain = json.loads(json.dumps(report.plain(FOUND, VERDICT, DECODE), allow_nan=False))
    assert plain["by_factor"]["drop 1"]["dropped_share"] == 0.125
    assert plain["layers"][0]["imbalance"] == 2.0
    assert plain["verdict"]["worth"] is True
    (decode,) = plain["decode"]
    assert (decode["requests"], decode["keep"], decode["worth"]) == (8, 1, True)
    assert decode["tried"]["1"] == {"active": 3.0, "mass_missing_share": 0.05}
    assert decode["timed"]["1"] == {"active": 3.0, "time": 0.8}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_has_plots_and_asks_nothing_of_the_network() -> None:
    html = page.html(FOUND, VERDICT, DECODE)
    parser = Tags()
    parser.feed(html)
    assert not {tag for tag, _ in parser.seen} & {"script", "link", "img", "iframe"}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in parser.seen)
    assert "url(" not in html and "@import" not in html
    drawings = [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", html, re.S)]
    assert len(drawings) == 6
    cells = [cell for cell in drawings[0] if cell.tag == "rect"]
    assert [cell[0].text for cell in cells][:2] == [
        "layer 0: 2.00 times the mean",
        "layer 0: 1.00 times the mean",
    ]
    for drawing in drawings[2:5]:
        assert len(drawing.findall("polyline")) == len(MODES)
    for drawing in drawings[1:]:
        for curve in drawing.findall("polyline"):
            points = [
                tuple(map(float, point.split(","))) for point in curve.get("points", "").split()
            ]
            assert len(points) >= 1
            assert all(0 <= x <= 640 and 0 <= y <= 300 for x, y in points)
    assert "a &lt;model&gt;" in html and "<model>" not in html


COUNTED = dict(
    assignments=40, dropped=10, mass=16.0, lost=2.0, peak_before=8, peak_after=4
)  # in a second, in one layer


def chunk(seconds: float, *answers: tuple[str, list[float]]) -> dict[str, object]:
    """answers: the text, and the probability of "1" at each position, whose token is "1"."""
    return {
        "seconds": seconds,
        "layers": {"3": {key: count * seconds for key, count in COUNTED.items()}},
        "answers": [
            {
                "text": text,
                "tokens": len(text),
                "positions": [
                    {
                        "token": 1,
                        "logprob": math.log(p),
                        "top": {"1": math.log(p), "2": math.log(1 - p)},
                    }
                    for p in likely
                ],
            }
            for text, likely in answers
        ],
    }


def test_the_comparison_of_two_runs() -> None:
    predicted = Counts(assignments=80, dropped=21, mass=32, lost=4, peak_before=16, peak_after=7)
    without = [chunk(2.0, ("yes", [0.5, 0.8])), chunk(2.0, ("no", [0.6]))]
    limited = [chunk(1.0, ("yes", [0.5, 0.4])), chunk(1.0, ("never", [0.6]))]
    found = check.compare(without, limited, {3: predicted})
    assert found.tokens == 3
    assert found.delta_nll == pytest.approx(math.log(2) / 3)
    assert found.kl == pytest.approx((0.8 * math.log(2) + 0.2 * math.log(0.2 / 0.6)) / 3)
    assert found.agreement == pytest.approx(2 / 3)
    assert [(c.prompt, c.before, c.after) for c in found.changed] == [(1, "no", "never")]
    assert found.speed == pytest.approx((5 + 8) / 2.0 / ((5 + 5) / 4.0))
    # Prompt by prompt beyond the mean: +-(log 2)/3 of two prompts.
    assert found.standard_error == pytest.approx(2 * math.log(2) / 3 / 3)
    (layer,) = found.layers
    assert layer.layer == 3 and layer.measured == {key: 2 * n for key, n in COUNTED.items()}
    assert layer.predicted == {key: getattr(predicted, key) for key in COUNTED}
    assert "assignments dropped 26.25% -> 25.00%, gate mass lost 12.50% -> 12.50%" in found.text()
    assert "load of the busiest expert 43.75% -> 50.00%" in found.text()
    assert "no" in found.text() and "never" in found.text()


def test_equal_runs_differ_in_nothing() -> None:
    run = [chunk(1.0, ("yes", [0.5, 0.8]))]
    found = check.compare(run, run, {3: Counts()})
    assert (found.delta_nll, found.standard_error, found.kl, found.agreement) == (0, 0, 0, 1)
    assert found.changed == []
