"""`vllm serve` with a capacity mode, over real HTTP, through the `openai` client."""

import re
import time
from collections.abc import Iterator

import openai
import pytest
import torch
from engines import serve

pytestmark = pytest.mark.engine

PROMPT = "Experts that are overloaded drop the tokens that they need least. " * 8
START_LINE = "MoE capacity: mode={}, factor=1.0, level=expert, scope=batch"


# Compiled and eager; what depends on time is the same in both.
@pytest.fixture(scope="module", params=["expanded", pytest.param("drop", marks=pytest.mark.timing)])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(mode, example_model, tmp_path_factory) -> Iterator:
    # What is asked twice must be computed twice: a cached prefix leaves fewer tokens to compete.
    arguments = ["--no-enable-prefix-caching"]
    arguments += ["--moe-capacity-mode", mode, "--moe-capacity-factor", "1.0"]
    if mode == "drop":
        arguments.append("--enforce-eager")  # expanded runs compiled, vLLM's default
    folder = tmp_path_factory.mktemp(mode)
    with serve(example_model, folder, *arguments, VLLM_LOG_STATS_INTERVAL="1") as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="module")
def model_name(client) -> str:
    return client.models.list().data[0].id


def test_completion(client, model_name):
    answer = client.completions.create(
        model=model_name, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=1
    )
    assert answer.usage.completion_tokens == 12
    assert len(answer.choices[0].logprobs.tokens) == 12
    again = client.completions.create(model=model_name, prompt=PROMPT, max_tokens=12, temperature=0)
    assert again.choices[0].text == answer.choices[0].text


def test_chat_and_its_stream_agree(client, model_name):
    messages = [{"role": "user", "content": "Name a river."}]
    settings = {"model": model_name, "max_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(messages=messages, **settings)
    parts = client.chat.completions.create(messages=messages, stream=True, **settings)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == streamed != ""


def test_start_line(server, mode):
    text = server.text()
    assert START_LINE.format(mode) in text
    backend = "triton" if torch.cuda.is_available() else "torch"
    assert "layers=4" in text and f"backend={backend} (auto)" in text
    assert "without expert parallelism" in text
    if mode == "expanded":
        assert "candidates=global (auto), expanded_experts=2 (auto)" in text
        assert "fill=busiest (auto), max_experts=2 (auto)" in text


def test_metrics_count_what_was_dropped(server, client, model_name, mode):
    before = server.metrics()
    client.completions.create(model=model_name, prompt=PROMPT[:-9], max_tokens=4, temperature=0)
    label = f'{{model_name="{model_name}"}}'
    deadline = time.monotonic() + 240  # many intervals, on however slow a machine
    while True:
        after = server.metrics()
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        # Not assignments: the first that are published may be an earlier request's last ones.
        if grown.get(f"vllm:moe_capacity_dropped_assignments_total{label}"):
            break
        assert time.monotonic() < deadline, f"nothing dropped: {after}"
        time.sleep(0.5)

    def series(name: str, labels: str = label) -> float:
        return grown[f"vllm:moe_capacity_{name}_total{labels}"]

    def imbalance(when: str) -> float:
        labels = f'{{model_name="{model_name}",when="{when}"}}'
        return series("peak_load", labels) / series("mean_load", labels)

    assert (series("expanded_assignments") > 0) == (mode == "expanded")
    assert 0 < series("dropped_assignments") < series("assignments")
    assert imbalance("before") > imbalance("after") >= 1.0
    assert 0 < series("lost_gate_mass") < series("gate_mass") < series("assignments")
    kind = f'{{model_name="{model_name}",step="prompt"'
    steps = series("layer_steps", f"{kind}}}")
    assert steps >= 4 and steps % 4 == 0  # layers
    for when in ("before", "after"):
        assert steps < series("active_experts", f'{kind},when="{when}"}}') <= 8 * steps
    line = re.compile(
        r"MoE capacity: assignments .*, gate mass lost [1-9].* active in prompt steps"
    )
    assert line.search(server.text())
