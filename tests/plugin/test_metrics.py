"""What the workers count, added up and published beside vLLM's own series."""

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY, Counter
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

from capmoe_kernels.contract import TOTALS
from vllm_capmoe.integration import metrics, rpc
from vllm_capmoe.integration.metrics import PUBLISHED, Publisher
from vllm_capmoe.integration.stats import TABLE, LayerStats, read, totals
from vllm_capmoe.integration.step import StepTokens

CPU = torch.device("cpu")
E = 4


@pytest.fixture
def counted() -> Iterator[None]:
    """Series that begin at nothing, in a registry that is afterwards as it was."""
    before = set(REGISTRY._collector_to_names)
    metrics.series_of.cache_clear()
    yield
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)
    metrics.series_of.cache_clear()


def layer(loads: list[int], after: list[int], part: int = 0, **counts: int) -> LayerStats:
    """One that has counted this."""
    made = LayerStats.allocate("layer", E, CPU, part)
    made.counts[:] = torch.tensor(loads + after + [counts.get(key, 0) for key in TOTALS])
    return made


FIRST = layer(
    [10, 2, 2, 2], [6, 3, 2, 3],
    steps=1, dropped=4, expanded=2, left_without=1, max_before=10, max_after=6, mass=1 << 20,
    lost=1 << 19, prompt_steps=1, prompt_active_before=4, prompt_active_after=4,
)  # fmt: skip
SECOND = layer(
    [1, 2, 3, 2], [1, 2, 3, 2],
    steps=2, max_before=3, max_after=3, mass=2 << 20, decode_active_before=8, decode_active_after=5,
)  # fmt: skip
BOTH = {
    "dropped": 4,
    "expanded": 2,
    "left_without": 1,
    "max_before": 13,
    "max_after": 9,
    "mass": 3 << 20,
    "lost": 1 << 19,
    "prompt_steps": 1,
    "decode_steps": 2,
    "prompt_active_before": 4,
    "prompt_active_after": 4,
    "decode_active_before": 8,
    "decode_active_after": 5,
    "assignments": 24,
    "mean_before": 16 / E + 8 / E,
    "mean_after": 14 / E + 8 / E,
}
SERIES: dict[tuple[str, ...], float] = {  # of twice BOTH, with the values of `when` and `step`
    ("assignments",): 48.0,
    ("dropped_assignments",): 8.0,
    ("expanded_assignments",): 4.0,
    ("tokens_without_expert",): 2.0,
    ("peak_load", "before"): 26.0,
    ("peak_load", "after"): 18.0,
    ("mean_load", "before"): 12.0,
    ("mean_load", "after"): 11.0,
    ("gate_mass",): 6.0,
    ("lost_gate_mass",): 1.0,
    ("layer_steps", "prompt"): 2.0,
    ("layer_steps", "decode"): 4.0,
    ("active_experts", "before", "prompt"): 8.0,
    ("active_experts", "after", "prompt"): 8.0,
    ("active_experts", "before", "decode"): 16.0,
    ("active_experts", "after", "decode"): 10.0,
}


def published(model_name: str) -> dict[tuple[str, ...], float | None]:
    """What is in the registry that vLLM's `/metrics` shows."""
    found: dict[tuple[str, ...], float | None] = {}
    for name, *values in SERIES:
        labels = {("when" if value in ("before", "after") else "step"): value for value in values}
        labels["model_name"] = model_name
        value = REGISTRY.get_sample_value(f"vllm:moe_capacity_{name}_total", labels)
        found[name, *values] = value
    return found


def publisher(model_name: str, *answers: Any) -> Publisher:
    """One whose workers give these answers, one after the other; an Exception is raised."""
    left = iter(answers)

    async def ask() -> Any:
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Publisher(model_name, [Counter], ask)


def test_layers_are_read_and_added_up():
    first, second = read([FIRST, SECOND])
    assert first == FIRST.counters() and second == SECOND.counters()
    assert (first["load_after"], second["steps"]) == ([6, 3, 2, 3], 2)
    assert totals([first, second]) == BOTH
    assert set(BOTH) == {counter.key for counter in PUBLISHED}
    assert len({counter.key for counter in TABLE}) == len(TABLE)


def test_the_line_of_the_log() -> None:
    line = metrics.as_text(BOTH)
    assert line == (
        "assignments 24, dropped 16.7%, expanded 8.3%, tokens without expert 1, "
        "load max/mean 2.17 -> 1.64, gate mass lost 16.7%, "
        "experts active in prompt steps 4.0 -> 4.0, experts active in decode steps 4.0 -> 2.5"
    )
    assert metrics.as_text({**BOTH, "prompt_steps": 0}).count("experts active") == 1


def test_what_is_new_is_added_to_the_series(counted):
    """Two engines, one of two workers; then nothing new; then as much again."""
    nothing = dict.fromkeys(BOTH, 0)
    one = [[nothing, BOTH], [nothing]]
    two = [[BOTH, nothing], [BOTH]]
    made = publisher("model", one, one, two)
    for _ in range(3):
        asyncio.run(made.publish())
    assert published("model") == SERIES


def test_engines_of_one_name_and_of_two(counted, example_model):
    """vLLM clears its registry whenever it makes an engine: its own series come back, ours stay."""
    config = EngineArgs(model=str(example_model)).create_engine_config()
    PrometheusStatLogger(config, [0])
    first = publisher("model", [[BOTH]], [[BOTH]])
    asyncio.run(first.publish())
    PrometheusStatLogger(config, [0])
    assert published("model")["assignments",] == 24.0
    asyncio.run(first.publish())
    asyncio.run(publisher("other", [[BOTH], [BOTH]]).publish())
    assert published("other") == SERIES
    asyncio.run(publisher("model", [[BOTH]]).publish())
    assert published("model") == SERIES


def test_counters_that_cannot_be_read_are_one_line(counted, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(metrics.logger, "warning", lambda text, *args: lines.append(text % args))
    failure = RuntimeError("the engine is gone")
    made = publisher("model", failure, failure, failure, [[BOTH]], failure, [[{}]], [[BOTH]])
    for _ in range(7):
        asyncio.run(made.publish())
    line = "MoE capacity: the workers' counters could not be read: RuntimeError('the engine is gone"
    assert [text[: len(line)] for text in lines] == [line, line]
    assert published("model")["assignments",] == 24.0


@pytest.mark.timing
def test_publishing_ends_with_the_engine(counted):
    """Also while its workers are being asked, who don't answer any more."""
    asked = 0

    async def run() -> set[Any]:
        async def ask() -> Any:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0 if asked < 3 else 3600)
            return [[BOTH]]

        engine = asyncio.ensure_future(asyncio.sleep(3600))
        made = Publisher("model", [Counter], ask)
        publishing = asyncio.ensure_future(made.publish_while(engine, 0.01))
        while asked < 3:
            await asyncio.sleep(0.01)
        engine.cancel()
        await asyncio.wait_for(publishing, 30)
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(run()) == set()
    assert published("model")["assignments",] == 24.0


@pytest.mark.parametrize(
    ("change", "publishes"),
    [({}, True), ({"mode": "off"}, False), ({"stats": False}, False), ({"client": 1}, False)],
    ids=str,
)
def test_who_publishes(counted, example_model, change, publishes):
    """One API server, of an engine with a mode, where vLLM keeps statistics itself."""
    mode = change.get("mode", "drop")
    more = {"additional_config": {"moe_capacity": {"mode": mode}}}
    config = EngineArgs(model=str(example_model), **more).create_engine_config()
    manager = StatLoggerManager(config, enable_default_loggers=False)

    async def run() -> tuple[bool, bool]:
        engine = SimpleNamespace(
            engine_core=SimpleNamespace(client_index=change.get("client", 0)),
            vllm_config=config,
            logger_manager=manager if change.get("stats", True) else None,
            output_handler=None,
        )

        def listen(self: Any) -> None:
            self.output_handler = self.output_handler or asyncio.ensure_future(asyncio.sleep(0))

        patched = metrics._publish_too(listen)
        patched(engine)
        task = getattr(engine, "moe_capacity_publishing", None)
        patched(engine)  # vLLM does it with every request
        again = getattr(engine, "moe_capacity_publishing", None)
        if task:
            await task
        return task is not None, task is again

    assert asyncio.run(run()) == (publishes, True)


def test_ray_gets_counters_of_its_own(counted):
    ray_wrappers = pytest.importorskip("vllm.v1.metrics.ray_wrappers")
    counter_cls = ray_wrappers.RayPrometheusStatLogger._counter_cls
    made = metrics.series_of(counter_cls)
    assert {counter.series for counter in PUBLISHED} == set(made)
    labelled = made["peak_load"].labels("model", "before")
    assert labelled.metric.info["name"] == "vllm_moe_capacity_peak_load"
    assert labelled._tags == {"model_name": "model", "when": "before", "ReplicaId": ""}
    both = Publisher("model", [counter_cls, Counter], None)
    both.advance([[BOTH]])
    assert published("model")["assignments",] == 24.0


def test_readers_change_nothing_and_see_nothing_of_the_start(monkeypatch):
    """With Ray's compiled DAG a step may run while another thread reads."""
    tokens = StepTokens.allocate(8, 2, CPU)
    stats = [layer([9] * E, [9] * E, steps=1), layer([9] * E, [9] * E, steps=1)]
    made = [SimpleNamespace(router=SimpleNamespace(stats=s, tokens=tokens)) for s in stats]
    monkeypatch.setattr(rpc, "moe_layers", lambda vllm_config: made)
    monkeypatch.setattr(rpc, "get_tensor_model_parallel_rank", lambda: 0)
    tokens.before_first_step += [each.reset for each in stats]
    assert all(c["load_before"] == [0] * E for c in rpc.moe_capacity_counters(None))
    assert set(rpc.moe_capacity_totals(None).values()) == {0}
    assert len(tokens.before_first_step) == 2
    tokens.begin()
    stats[0].summed += FIRST.counts
    assert rpc.moe_capacity_totals(None)["assignments"] == 16
    tokens.begin()
    assert rpc.moe_capacity_counters(None)[0]["dropped"] == 4


@pytest.mark.parametrize(
    ("rank", "parts", "assignments"), [(0, [0, 0], 24), (1, [0, 0], 0), (1, [1, 0], 16)]
)
def test_one_rank_answers_for_those_that_count_the_same(monkeypatch, rank, parts, assignments):
    """Tensor parallel ranks count alike; under sequence parallelism each its part."""
    tokens = StepTokens.allocate(8, 2, CPU)
    found = []
    for part, each in zip(parts, (FIRST, SECOND), strict=True):
        stats = LayerStats("layer", each.counts, part)
        found.append(SimpleNamespace(router=SimpleNamespace(stats=stats, tokens=tokens)))
    monkeypatch.setattr(rpc, "moe_layers", lambda vllm_config: found)
    monkeypatch.setattr(rpc, "get_tensor_model_parallel_rank", lambda: rank)
    answer = rpc.moe_capacity_totals(None)
    assert answer["assignments"] == assignments and set(answer) == set(BOTH)


def test_the_readme_lists_the_series(repo_root: Path):
    text = (repo_root / "README.md").read_text()
    assert all(f"`{counter.series}`" in text for counter in PUBLISHED)


def test_vllm_starts_listening_within_its_event_loop():
    """The seam: called with no argument, and again with every request."""
    assert list(inspect.signature(AsyncLLM._run_output_handler).parameters) == ["self"]
