"""What an operator sees: Prometheus series on vLLM's `/metrics` and a line in its log.

The counters live in the workers (see stats.py). Every VLLM_LOG_STATS_INTERVAL seconds the front end
asks the workers for their sums, adds what is new to the series, and logs one line if anything
happened. The steps themselves are not touched.

The series are made of the class of counters that vLLM's own are made of (Ray has one of its own),
once in a process, for all its engines.

The imbalance over any interval, weighted by the size of the steps, is the ratio of two rates:

    rate(vllm:moe_capacity_peak_load_total{when="before"}[5m])
      / rate(vllm:moe_capacity_mean_load_total{when="before"}[5m])
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client import Counter as PrometheusCounter
from vllm.logger import init_logger

from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.live_engine import ask_workers
from vllm_capmoe.integration.settings import capacity_config
from vllm_capmoe.integration.stats import TABLE

logger = init_logger("vllm.capmoe")

PUBLISHED = [counter for counter in TABLE if counter.series]
Totals = dict[str, float]  # by key of `PUBLISHED`


class _Collector:
    """Our series in prometheus_client's registry.

    vLLM takes all collectors whose `_name` begins with "vllm:" out of the registry whenever it
    makes an engine, and makes its own anew. This one has no such name, and stays.
    """

    def __init__(self, series: Iterable[PrometheusCounter]):
        self.series = list(series)

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterable[Any]:
        for each in self.series:
            yield from each.collect()


@functools.cache
def series_of(counter_cls: Any) -> dict[str, Any]:
    """Series -> its counter, which has the label `model_name` before those of `TABLE`."""
    made: dict[str, Any] = {}
    registry = {"registry": None} if counter_cls is PrometheusCounter else {}
    for each in PUBLISHED:
        if each.series not in made:
            name, labels = f"vllm:moe_capacity_{each.series}", ["model_name", *each.labels]
            made[each.series] = counter_cls(name, each.help, labels, **registry)
    if counter_cls is PrometheusCounter:
        REGISTRY.register(_Collector(made.values()))
    return made


class Publisher:
    """Publishes what the workers of one engine count.

    Args:
        model_name: the label of its series.
        counter_classes: those of vLLM's loggers.
        ask: returns what every worker of every engine has counted.
    """

    def __init__(
        self,
        model_name: str,
        counter_classes: Iterable[Any],
        ask: Callable[[], Awaitable[list[list[Totals]]]],
    ):
        self.model_name, self.counter_classes, self.ask = model_name, list(counter_classes), ask
        self.seen: Totals = {}
        self.failing = False

    async def publish(self) -> None:
        """Ask, add what is new to the series, and log it.

        Statistics must not take a server down: what can't be read is one line in the log, and
        another one only after it could be read in between.
        """
        try:
            new = self.advance(await self.ask())
        except Exception as error:
            if not self.failing:
                logger.warning("MoE capacity: the workers' counters could not be read: %r", error)
            self.failing = True
            return
        self.failing = False
        if new["assignments"]:
            logger.info("MoE capacity: %s", as_text(new))

    def advance(self, engines: list[list[Totals]]) -> Totals:
        """Add what is new since the last call to the series, and return it."""
        workers = [worker for engine in engines for worker in engine]
        now = {each.key: sum(worker[each.key] for worker in workers) for each in PUBLISHED}
        new = {key: max(0, value - self.seen.get(key, 0)) for key, value in now.items()}
        for series in map(series_of, self.counter_classes):
            for each in PUBLISHED:
                child = series[each.series].labels(self.model_name, *each.labels.values())
                child.inc(new[each.key] * each.unit)
        self.seen = now
        return new

    async def publish_while(self, engine: "asyncio.Future[Any]", interval: float) -> None:
        """Publish every `interval` seconds until `engine`, vLLM's own task, has ended."""
        while not (await asyncio.wait([engine], timeout=interval))[0]:
            publishing = asyncio.ensure_future(self.publish())
            await asyncio.wait([engine, publishing], return_when=asyncio.FIRST_COMPLETED)
            publishing.cancel()  # a dead engine doesn't answer


def as_text(new: Totals) -> str:
    """The line of the log. Active experts are those of a layer in a step, on average."""
    share = 100.0 / max(1, new["assignments"])
    before, after = (new[f"max_{w}"] / max(1e-9, new[f"mean_{w}"]) for w in ("before", "after"))
    parts = [
        f"assignments {new['assignments']:.0f}, dropped {new['dropped'] * share:.1f}%",
        f"expanded {new['expanded'] * share:.1f}%, tokens without expert {new['left_without']}",
        f"load max/mean {before:.2f} -> {after:.2f}",
        f"gate mass lost {100.0 * new['lost'] / max(1, new['mass']):.1f}%",
    ]
    for step in ("prompt", "decode"):
        if steps := new[f"{step}_steps"]:
            before, after = (new[f"{step}_active_{w}"] / steps for w in ("before", "after"))
            parts.append(f"experts active in {step} steps {before:.1f} -> {after:.1f}")
    return ", ".join(parts)


def patches() -> list[Patch]:
    """What begins to publish when an engine's front end begins to listen to it.

    vllm.v1.engine.async_llm.AsyncLLM._run_output_handler: called before any request, within an
        event loop. It can go once workers can add to vLLM's SchedulerStats.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    return [Patch(AsyncLLM, "_run_output_handler", _publish_too, ("self",))]


def _publish_too(original: Function) -> Function:
    def _run_output_handler(self: Any) -> None:
        listening = self.output_handler is not None
        original(self)
        if not listening:
            _start(self)

    return _run_output_handler


def _start(engine: Any) -> None:
    """Publish for an `AsyncLLM`, if a mode is on and vLLM itself keeps statistics of it."""
    import vllm.envs as envs
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    client, vllm_config = engine.engine_core, engine.vllm_config
    enabled = capacity_config(vllm_config.additional_config).enabled
    # One of several API servers speaks for all.
    if not enabled or engine.logger_manager is None or client.client_index != 0:
        return
    loggers = engine.logger_manager.stat_loggers
    classes = {each._counter_cls for each in loggers if isinstance(each, PrometheusStatLogger)}

    name = vllm_config.model_config.served_model_name
    ask = functools.partial(ask_workers, client, "moe_capacity_totals")
    publisher = Publisher(name if isinstance(name, str) else name[0], classes, ask)
    engine.moe_capacity_publishing = asyncio.create_task(
        publisher.publish_while(engine.output_handler, envs.VLLM_LOG_STATS_INTERVAL)
    )
