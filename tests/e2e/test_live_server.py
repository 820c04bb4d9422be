"""Live control over HTTP, with other requests running: `curl`-like calls to a real server."""

import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from engines import VLLM, environment, serve

pytestmark = pytest.mark.engine

KEY = "a-secret"
PROMPT = "Experts that are overloaded drop the tokens that they need least. " * 8


@pytest.fixture(scope="module")
def server(example_model, tmp_path_factory) -> Iterator:
    """Compiled, with prefix caching: as vLLM has them by default."""
    arguments = ["--moe-capacity-mode", "drop", "--moe-capacity-factor", "1.0", "--api-key", KEY]
    folder = tmp_path_factory.mktemp("live")
    plugins = {"VLLM_PLUGINS": "capmoe,capmoe_control"}
    with serve(example_model, folder, *arguments, **plugins) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=120, max_retries=0)


def call(server: Any, body: Any = None, key: str = KEY, **headers: str) -> tuple[int, Any]:
    """GET, or with a body (JSON, or bytes as they are) POST: the status and the answer."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"{server.url}/v1/moe-capacity", data, sent)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def started(server) -> None:
    """What the server was started with is in effect."""
    status, answer = call(server, {"mode": "drop", "factor": 1.0, "observe": False})
    assert status == 200, answer


def cache_hits(server: Any) -> float:
    """Tokens that vLLM has found in its cache of prefixes."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=120) as answer:
        lines = answer.read().decode().splitlines()
    name = "vllm:prefix_cache_hits_total{"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def logprobs(client: openai.OpenAI, salt: str | None) -> list[float]:
    """Of an answer; with a salt no cached prefix is used."""
    answer = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=PROMPT * 3,  # several blocks of the cache
        max_tokens=8,
        temperature=0,
        logprobs=1,
        extra_body={"cache_salt": salt} if salt else {},
    )
    return answer.choices[0].logprobs.token_logprobs


def sums(answer: dict[str, Any]) -> dict[str, Any]:
    """The counts of all layers since the start."""
    layers = answer["since_start"]["layers"]
    keys = ("dropped_assignments", "lost_gate_mass")
    return {key: sum(layer[key] for layer in layers) for key in keys} | {
        when: [load for layer in layers for load in layer[when]]
        for when in ("load_before", "load_after")
    }


def test_settings_and_counts_are_shown(server, client, started):
    logprobs(client, None)
    status, answer = call(server)
    assert status == 200
    assert answer["started"]["mode"] == "drop" and answer["started"]["factor"] == 1.0
    assert answer["now"] == {
        "mode": "drop", "factor": 1.0, "decode_keep": "off", "observe": False
    }  # fmt: skip
    layers = answer["since_start"]["layers"]
    assert [layer["number"] for layer in layers] == [0, 1, 2, 3]
    for layer in layers:
        assert len(layer["load_before"]) == len(layer["load_after"]) == 8
        lost = sum(layer["load_before"]) - sum(layer["load_after"])
        assert lost == layer["dropped_assignments"] > 0
        assert 0 < layer["lost_gate_mass"] < layer["gate_mass"]
        assert layer["peak_load_before"] > layer["peak_load_after"]
    assert answer["window"]["layers"][0]["steps"] <= layers[0]["steps"]


@pytest.mark.timing
def test_off_under_load_is_the_top_k_from_then_on_and_back(server, client, started):
    """No request is lost on the way, and the counters say when capacity was on."""
    stop, answers, errors = threading.Event(), [], []
    model = client.models.list().data[0].id

    def ask(number: int) -> None:
        while not stop.is_set():
            try:
                parts = client.completions.create(
                    model=model,
                    prompt=f"{number} {len(answers)} {PROMPT}",
                    max_tokens=6,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                answers.append(list(parts)[-1].usage.completion_tokens)
            except Exception as error:
                errors.append(error)
                return

    def served(more: int) -> None:
        end = len(answers) + more
        while len(answers) < end and not errors:
            time.sleep(0.05)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        served(6)
        status, off = call(server, {"mode": "off"})
        assert status == 200 and off["now"]["mode"] == "off"
        before = sums(call(server)[1])
        served(12)
        after = sums(call(server)[1])
        status, on = call(server, {"mode": "drop", "factor": 0.5})
        assert status == 200 and on["now"]["factor"] == 0.5
        served(12)
        end = sums(call(server)[1])
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=120)
    assert not errors and set(answers) == {6}
    assert after["dropped_assignments"] == before["dropped_assignments"] > 0
    new = {
        w: [a - b for a, b in zip(after[w], before[w], strict=True)]
        for w in ("load_before", "load_after")
    }
    assert new["load_before"] == new["load_after"] and sum(new["load_before"]) > 0
    assert end["dropped_assignments"] > after["dropped_assignments"]


def test_cached_prefixes_are_forgotten(server, client, started):
    """The same prompt again is computed with the new settings, its cached beginning too."""
    with_limit, before = logprobs(client, "with a limit"), cache_hits(server)
    assert logprobs(client, None) and logprobs(client, None)
    deadline = time.monotonic() + 60
    while cache_hits(server) == before:
        assert time.monotonic() < deadline, "nothing is cached: the test says nothing"
        time.sleep(0.5)
    assert call(server, {"mode": "off"})[0] == 200
    without = logprobs(client, None)
    assert without == logprobs(client, "without one") != with_limit
    assert call(server, {"mode": "drop"})[0] == 200
    assert logprobs(client, None) == logprobs(client, "a limit again") == with_limit


@pytest.mark.parametrize(
    "body, status, sentence",
    [
        ({"factor": 0}, 400, "--moe-capacity-factor is 0, but it must be a number > 0 or inf."),
        ({"mode": "off", "factor": "much"}, 400, "--moe-capacity-factor is 'much', but"),
        ({"mode": "expanded"}, 400, "mode is 'expanded', but this engine was started with 'drop'"),
        ({"metric": "random"}, 400, "the change has 'metric', but mode, factor, decode_keep, obs"),
        ({"decode_keep": 1}, 400, "decode_keep is 1, but this engine was started with 'off'"),
        ({"observe": "yes"}, 400, "--moe-capacity-observe is 'yes', but it must be true or false"),
        ({}, 400, "the change is {}, but an object with some of"),
        (b'{"factor": 1, "factor": 2}', 400, "'factor' stands in it twice"),
        (b"{", 400, "the content isn't JSON"),
    ],
)
def test_a_bad_change_is_one_sentence_and_changes_nothing(server, started, body, status, sentence):
    before = call(server)[1]["now"]
    got, answer = call(server, body)
    assert got == status and sentence in answer["error"]["message"]
    assert answer["error"]["code"] == status
    assert call(server)[1]["now"] == before


def test_only_who_has_the_key_and_says_json_is_heard(server, started):
    for body in (None, {"mode": "off"}):
        assert call(server, body, key="a guess") == (401, {"error": "Unauthorized"})
    status, answer = call(server, b'{"mode": "off"}', **{"Content-Type": "text/plain"})
    assert status == 415 and "application/json is accepted" in answer["error"]["message"]
    assert call(server)[1]["now"]["mode"] == "drop"


def test_the_commands_of_an_operator(server, client, started, tmp_path):
    """`watch` draws what the server counts, `set` changes it, each in a process of its own."""

    def command(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [VLLM.with_name("vllm-capmoe"), *words],
            env=environment(VLLM_API_KEY=KEY),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    logprobs(client, None)
    page = tmp_path / "loads.html"
    drawn = command("watch", server.url, "--once", "--since-start", "--html", str(page))
    head, _, *rows = drawn.splitlines()
    assert head.startswith("mode drop, factor 1.0, ") and len(rows) == 4
    assert all(float(row.split()[1]) > float(row.split()[3]) >= 1 for row in rows)
    assert page.read_text().count("<rect") == 2 * 4 * 8
    assert command("set", server.url, "off").startswith("changed mode drop -> off (")
    assert "mode off -> drop, factor 1.0 -> 1.2" in command(
        "set", server.url, "on", "--factor", "1.2"
    )
    assert call(server)[1]["now"]["factor"] == 1.2
    said = command("set", server.url, "--decode-keep", "1", status=2)
    assert said.startswith("vllm-capmoe set: decode_keep is 1, but this engine was started with")
