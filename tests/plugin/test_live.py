"""A router whose numbers change between two steps, a worker's methods, and who may ask for them."""

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from routers import MIXTRAL, E, K, T, forward_context, make, prompt_of_one_request
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context

from vllm_capmoe import CapacityConfig, route
from vllm_capmoe.integration import endpoint, live_engine, live_worker
from vllm_capmoe.integration.live_worker import LiveWorker
from vllm_capmoe.integration.stats import by_layer
from vllm_capmoe.plan import resolve

LOGITS = torch.randn(T, E, generator=torch.Generator().manual_seed(3))
WIDE = {"mode": "expanded", "factor": 0.5, "min_capacity": 1, "max_experts": "none"}


def worker_of(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    layers: int = 3,
    graphs: CUDAGraphMode = CUDAGraphMode.NONE,
    ranks: int = 1,
) -> tuple[LiveWorker, list[Any]]:
    """A worker of some layers, and their routers."""
    config = CapacityConfig(**settings)
    routers = []
    for number in range(layers):
        router, own = make(MIXTRAL, prompt_of_one_request(), **settings), config.for_layer(number)
        router.plan = resolve(own, num_experts=E, top_k=K, renormalize=True)
        routers.append(router)
    parallel = SimpleNamespace(moe_parallel_config=SimpleNamespace(dp_size=ranks, sp_size=1))
    found = [
        SimpleNamespace(layer_name=f"model.layers.{n}.mlp.experts", router=r, moe_config=parallel)
        for n, r in enumerate(routers)
    ]
    monkeypatch.setattr(live_worker, "moe_layers", lambda _: found)
    monkeypatch.setattr(live_worker, "get_tensor_model_parallel_rank", lambda: 0)
    vllm_config: Any = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=graphs))
    return LiveWorker(config, vllm_config), routers


def routed(router: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, ids = router.inner._compute_routing(LOGITS, LOGITS, None)
    with override_forward_context(forward_context()):
        return router.route(LOGITS, ids)


def expected(**settings: Any) -> Any:
    scores = LOGITS.softmax(1)
    return route(scores, K, CapacityConfig(**settings), renormalize=True)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_a_changed_factor_is_in_effect_in_the_next_step(monkeypatch, factor):
    worker, (router, *_) = worker_of(monkeypatch, WIDE)
    first = routed(router)
    assert worker.moe_capacity_check({"factor": factor}) == {
        "new": f"factor 0.5 -> {factor}",
        "takes": 3,
        "error": None,
    }
    assert torch.equal(routed(router)[1], first[1]), "a check changes nothing"
    worker.moe_capacity_change({"factor": factor})
    want = expected(**WIDE | {"factor": factor})
    weights, experts = routed(router)
    assert torch.equal(experts, want.experts) and torch.equal(weights, want.weights)
    assert not torch.equal(experts, first[1])


def test_off_is_the_top_k_in_rows_as_wide_as_before_and_on_again_is_as_before(monkeypatch):
    worker, (router, *_) = worker_of(monkeypatch, WIDE | {"decode_keep": 2})
    first = routed(router)
    assert worker.moe_capacity_change({"mode": "off"})["mode"] == "off"
    weights, experts = routed(router)
    plain = expected(mode="off")
    assert experts.shape == first[1].shape and experts.shape[1] > K
    assert torch.equal(experts[:, :K], plain.experts) and (experts[:, K:] == -1).all()
    assert torch.equal(weights[:, :K], plain.weights) and (weights[:, K:] == 0).all()
    assert router.plan.keeps == ()
    worker.moe_capacity_change({"mode": "expanded"})
    assert all(torch.equal(a, b) for a, b in zip(routed(router), first, strict=True))


@pytest.mark.parametrize(
    "settings, decode_from", [(WIDE, T // 2), ({"mode": "drop", "factor": 0.5}, 0)]
)
def test_observing_counts_what_would_be_and_applies_nothing(monkeypatch, settings, decode_from):
    worker, (router, *_) = worker_of(monkeypatch, settings | {"decode_keep": 1})
    router.tokens.is_decode[decode_from:] = True  # decode keep has something to do
    applied = routed(router)
    counted = router.stats.counters()
    worker.moe_capacity_change({"observe": True})
    weights, experts = routed(router)
    plain = expected(mode="off")
    assert torch.equal(experts[:, :K], plain.experts) and torch.equal(weights[:, :K], plain.weights)
    again = router.stats.counters()
    for key, value in counted.items():
        if key not in ("layer", "part"):
            twice = [2 * one for one in value] if isinstance(value, list) else 2 * value
            assert again[key] == twice, key
    assert (counted["dropped"] > 0) == (decode_from > 0) and counted["lost"] > 0
    worker.moe_capacity_change({"observe": False})
    assert torch.equal(routed(router)[1], applied[1])


def test_layers_with_a_factor_of_their_own_keep_it_but_go_off_with_all(monkeypatch):
    settings = {
        "mode": "drop",
        "factor": 1.0,
        "layers": {"1": {"factor": 0.5}, "2": {"mode": "off"}},
    }
    worker, routers = worker_of(monkeypatch, settings)
    assert worker.moe_capacity_check({"factor": 2.0})["takes"] == 1
    worker.moe_capacity_change({"factor": 2.0})
    assert [router.plan.gamma for router in routers] == [2, CapacityConfig(factor=0.5).gamma, None]
    worker.moe_capacity_change({"mode": "off"})
    assert [router.plan.gamma for router in routers] == [None] * 3
    assert worker.moe_capacity_change({"mode": "on"}) == {
        "mode": "drop", "factor": 2.0, "decode_keep": "off", "observe": False
    }  # fmt: skip
    assert [router.plan.gamma for router in routers] == [2, CapacityConfig(factor=0.5).gamma, None]


def test_a_change_that_reaches_no_layer_is_refused(monkeypatch):
    settings = {"mode": "drop", "factor": 1.0, "layers": {"0-2": {"factor": 0.5}}}
    worker, _ = worker_of(monkeypatch, settings)
    with pytest.raises(ValueError, match=r"the change .factor 1.0 -> 2.0. reaches no layer: all"):
        live_engine._refuse_bad([[worker.moe_capacity_check({"factor": 2.0})]])
    for fine in ({"factor": 1.0, "mode": "on"}, {"mode": "off", "factor": 2.0}):
        live_engine._refuse_bad([[worker.moe_capacity_check(fine)]])
    kept, _ = worker_of(monkeypatch, {"decode_keep": K - 1})
    kept.moe_capacity_change({"decode_keep": "off"})
    live_engine._refuse_bad([[kept.moe_capacity_check({"decode_keep": K})]])  # the same as off


@pytest.mark.parametrize(
    "settings, values, sentence",
    [
        (
            WIDE,
            {"factor": 0.75},
            "factor is 0.75, but in mode 'expanded' the buffers of",
        ),
        (WIDE, {"observe": True}, "observe is True, but steps are replayed from the CUDA graphs"),
    ],
)
def test_what_captured_graphs_have_no_room_for_is_refused(monkeypatch, settings, values, sentence):
    worker, _ = worker_of(monkeypatch, settings, graphs=CUDAGraphMode.FULL)
    assert sentence in worker.moe_capacity_check(values)["error"]
    with pytest.raises(ValueError):
        worker.moe_capacity_change(values)
    assert worker.now.to_dict()["factor"] == 0.5
    for fits in ({"factor": 0.25}, {"factor": "inf"}, {"mode": "off"}):
        assert worker.moe_capacity_check(fits)["error"] is None
    assert worker_of(monkeypatch, settings)[0].moe_capacity_check(values)["error"] is None


def test_rows_of_other_ranks_have_no_more_room_than_at_the_start(monkeypatch):
    """Their engines may change later than this one, so what arrives is by the start's factor."""
    worker, (router, *_) = worker_of(monkeypatch, WIDE, ranks=2)
    assert "for rows of several ranks" in worker.moe_capacity_check({"factor": 0.75})["error"]
    most = router.most_held(100, num_local=E // 2, sources=2)
    for fits in ({"factor": 0.25}, {"mode": "off"}):
        worker.moe_capacity_change(fits)
        assert router.most_held(100, num_local=E // 2, sources=2) == most
    alone, (own, *_) = worker_of(monkeypatch, WIDE)
    less = own.most_held(100, num_local=E, sources=1)
    alone.moe_capacity_change({"factor": 1.0})
    assert own.most_held(100, num_local=E, sources=1) > less


def test_a_k0_that_a_layer_has_no_room_for_changes_none(monkeypatch):
    settings = {"mode": "drop", "decode_keep": 2, "layers": {"1": {"decode_keep": K}}}
    worker, routers = worker_of(monkeypatch, settings)
    assert worker.moe_capacity_check({"decode_keep": 1})["takes"] == 2
    everywhere, all_kept = worker_of(monkeypatch, {"mode": "drop", "decode_keep": K})
    error = everywhere.moe_capacity_check({"decode_keep": 1})["error"]
    assert "layer 0 was started with all 4 experts kept" in error
    assert worker.moe_capacity_check({"decode_keep": K + 1})["error"].startswith(
        "--moe-capacity-decode-keep is 5, but a token has 4 experts"
    )
    assert all(router.plan.keeps == () for router in all_kept)


def test_counters_of_ranks_that_count_alike_are_taken_once_and_parts_are_added():
    def counted(layer: str, part: int, steps: int) -> dict[str, Any]:
        return {"layer": layer, "part": part, "steps": steps, "load_before": [steps, 1]}

    alike = [[counted("a", 0, 5), counted("b", 0, 5)]] * 2
    assert by_layer([alike]) == [
        {"layer": "a", "steps": 5, "load_before": [5, 1]},
        {"layer": "b", "steps": 5, "load_before": [5, 1]},
    ]
    parts = [[counted("a", 0, 5)], [counted("a", 1, 3)]]
    assert by_layer([parts, [[counted("a", 0, 2)]]]) == [
        {"layer": "a", "steps": 10, "load_before": [10, 3]}
    ]


@pytest.mark.parametrize(
    "host, uds, keys, environment, answers",
    [
        ("127.0.0.1", None, None, None, True),
        ("::1", None, None, None, True),
        ("localhost", None, None, None, True),
        (None, "/tmp/socket", None, None, True),
        ("0.0.0.0", None, ["secret"], None, True),
        (None, None, None, "secret", True),
        (None, None, None, None, False),
        ("0.0.0.0", None, None, None, False),
        ("192.168.0.7", None, [""], "secret", False),
        ("a.host", None, None, None, False),
    ],
)
def test_without_a_key_only_this_host_is_answered(
    monkeypatch, host, uds, keys, environment, answers
):
    monkeypatch.setattr(endpoint.envs, "VLLM_API_KEY", environment, raising=False)
    on = SimpleNamespace(additional_config={"moe_capacity": {"mode": "drop"}})
    args = SimpleNamespace(host=host, uds=uds, api_key=keys)
    refused = endpoint.closed(on, args)
    assert (refused is None) == answers
    if refused is not None:
        assert refused.status == 403 and "without an API key" in str(refused)
    off = endpoint.closed(SimpleNamespace(additional_config={}), args)
    assert off is not None and off.status == 404 and "--moe-capacity-mode" in str(off)


def test_a_key_that_vllm_does_not_ask_for_is_none(monkeypatch):
    monkeypatch.setattr(endpoint.authenticate, "GUARDED_PREFIX", ("/v2",))
    on = SimpleNamespace(additional_config={"moe_capacity": {"mode": "drop"}})
    refused = endpoint.closed(on, SimpleNamespace(host=None, uds=None, api_key=["secret"]))
    assert refused is not None and refused.status == 403


class Engine:
    """An `AsyncLLM` that writes down what is asked of it. workers: what is in effect in each."""

    def __init__(self, *workers: dict[str, Any], api_servers: int = 1, engines: int = 1):
        self.workers, self.calls = list(workers), []
        self.started = CapacityConfig(mode="drop")
        self.paused, self.fails = False, ""
        self.vllm_config = SimpleNamespace(
            additional_config={"moe_capacity": self.started.to_dict()},
            parallel_config=SimpleNamespace(
                data_parallel_size=2,
                _api_process_count=api_servers,
                distributed_executor_backend="mp",
            ),
        )
        self.engine_core = SimpleNamespace(
            core_engines=[object()] * engines, call_utility_all_async=self.ask
        )

    async def ask(self, _: str, method: str, timeout: None, args: tuple[Any, ...], kwargs: Any):
        self.calls.append(method.removeprefix("moe_capacity_"))
        if method == "moe_capacity_settings":
            return [[{"started": self.started.to_dict(), "now": now}] for now in self.workers]
        if method == "moe_capacity_check":
            return [[{"new": "something", "takes": 1, "error": None}]] * len(self.workers)
        self.workers = [args[0]] * len(self.workers)
        if self.fails == "change":
            raise RuntimeError("a worker failed")
        return [self.workers]

    async def is_paused(self) -> bool:
        return self.paused

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert mode == "keep" and not clear_cache  # not the images' caches, too
        self.calls.append("pause")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def reset_prefix_cache(self, *, reset_running_requests: bool, reset_connector: bool):
        assert reset_running_requests and reset_connector
        self.calls.append("forget")
        if self.fails == "forget":
            raise RuntimeError("a request waits for its cache")
        return self.fails != "connector"


NOW = {"mode": "drop", "factor": 1.5, "decode_keep": "off", "observe": False}
WHOLE = ["settings", "check", "pause", "change", "forget", "resume"]


def change(engine: Engine, values: Any) -> Any:
    return asyncio.run(live_engine.change(engine, values))


def test_all_settings_go_to_all_workers_while_nothing_runs():
    engine = Engine(NOW, NOW, engines=2)
    assert change(engine, {"factor": 2}) == {"now": NOW | {"factor": 2}, "forgotten": True}
    assert engine.calls == WHOLE and engine.workers == [NOW | {"factor": 2}] * 2


def test_workers_that_differ_agree_after_the_next_change():
    engine = Engine(NOW, NOW | {"mode": "off", "factor": 3}, engines=2)
    settings = asyncio.run(live_engine.read_settings(engine))
    assert settings["now"] == NOW and settings["agree"] is False
    change(engine, {"factor": 1.5})  # as the first one has it already
    assert engine.workers == [NOW] * 2
    assert asyncio.run(live_engine.read_settings(engine))["agree"] is True


def test_what_is_so_already_disturbs_nobody():
    engine = Engine(NOW, NOW, engines=2)
    assert change(engine, {"mode": "on", "factor": 1.5})["now"] == NOW
    assert engine.calls == ["settings"]


@pytest.mark.parametrize(
    "values", [{"factor": -1}, {"mode": "\ud800"}, {"factor": 10**400}, {"level": 1}, [], None]
)
def test_a_bad_value_reaches_no_worker(values):
    engine = Engine(NOW, NOW, engines=2)
    with pytest.raises(ValueError, match="accepted|must be|can change"):
        change(engine, values)
    assert engine.calls == ["settings"]


def test_a_number_of_any_length_can_be_sent():
    engine = Engine(NOW, engines=2)
    assert change(engine, {"factor": 10**25})["now"]["factor"] == 1e25
    assert msgspec.msgpack.encode(engine.workers)


@pytest.mark.parametrize("where", [{"engines": 1}, {"engines": 2, "api_servers": 2}])
def test_beside_other_front_ends_nothing_is_paused(where):
    engine = Engine(NOW, **where)
    assert change(engine, {"mode": "off"})["now"]["mode"] == "off"
    assert engine.calls == ["settings", "check", "change", "forget"]
    ray = Engine(NOW, **where)
    ray.vllm_config.parallel_config.distributed_executor_backend = "ray"
    with pytest.raises(ValueError, match="Ray's workers take a change in the middle of a step"):
        change(ray, {"mode": "off"})
    assert ray.calls == ["settings", "check"]


def test_an_engine_that_somebody_has_paused_stays_so():
    engine = Engine(NOW, engines=2)
    engine.paused = True
    change(engine, {"mode": "off"})
    assert engine.calls == WHOLE[:-1]


def test_the_engine_goes_on_whatever_fails():
    engine = Engine(NOW, engines=2)
    engine.fails = "change"
    with pytest.raises(RuntimeError, match="a worker failed"):
        change(engine, {"mode": "off"})
    assert engine.calls[-1] == "resume"
    for fails in ("forget", "connector"):
        engine = Engine(NOW, engines=2)
        engine.fails = fails
        assert change(engine, {"mode": "off"})["forgotten"] is False
        assert engine.calls == WHOLE and engine.workers[0]["mode"] == "off"


@pytest.mark.parametrize(
    "host, key, status",
    [
        ("localhost:8000", False, 200),
        ("127.0.0.1:8000", False, 200),
        ("[::1]:8000", False, 200),
        ("a.page.example:8000", False, 403),  # a name that somebody else made to mean this host
        ("a.service.example", True, 200),
    ],
)
def test_without_a_key_the_host_must_be_asked_by_its_own_name(host, key, status):
    control = endpoint.Control(None, None, key)
    app = SimpleNamespace(state=SimpleNamespace(**{endpoint.STATE: control}))
    scope = {
        "type": "http", "method": "GET", "scheme": "http", "path": endpoint.PATH, "app": app,
        "query_string": b"", "headers": [(b"host", host.encode())], "server": ("127.0.0.1", 8000),
    }  # fmt: skip

    async def shows(control: Any, _: Any) -> dict[str, Any]:
        return {"now": NOW}

    answer = asyncio.run(endpoint._answer(endpoint.Request(scope), shows))
    assert answer.status_code == status
    if status == 403:
        assert b"'a.page.example', but on a server without an API key" in answer.body
