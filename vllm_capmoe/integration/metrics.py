"""What an operator sees: Prometheus series on vLLM's `/metrics` and a line in its periodic log.

The counters live in the workers (see stats.py). vLLM's front end logs its statistics every
VLLM_LOG_STATS_INTERVAL seconds; we ask the workers at that occasion, add what is new to the
series, and log one line if anything happened. The steps themselves are not touched.

The imbalance over any interval, weighted by the size of the steps, is the ratio of two rates:

    rate(vllm:moe_capacity_peak_load_total{when="before"}[5m])
      / rate(vllm:moe_capacity_mean_load_total{when="before"}[5m])
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_capmoe.integration.compat import Function, Patch

_HELP = {
    "assignments": "Token-expert assignments that the models' routers made.",
    "dropped_assignments": "Assignments that capacity dropped.",
    "expanded_assignments": "Assignments outside of a token's top-k that Expanded Drop added.",
    "tokens_without_expert": "Tokens that lost all their experts in a layer.",
    "peak_load": "Load of the busiest expert, added up over layers and steps.",
    "mean_load": "Mean load of the experts, added up over layers and steps.",
}


@dataclass(frozen=True)
class Summary:
    """Counters added up over layers; all grow with time."""

    assignments: int = 0
    dropped: int = 0
    expanded: int = 0
    left_without: int = 0
    peak_before: int = 0
    peak_after: int = 0
    mean_before: float = 0.0
    mean_after: float = 0.0

    @classmethod
    def of(cls, layers: Iterable[dict[str, Any]]) -> "Summary":
        """From the layers' counters (`LayerStats.counters`)."""
        total = cls()
        for layer in layers:
            before, after = layer["load_before"], layer["load_after"]
            total = cls(
                total.assignments + sum(before),
                total.dropped + layer["dropped"],
                total.expanded + layer["expanded"],
                total.left_without + layer["left_without"],
                total.peak_before + layer["max_before"],
                total.peak_after + layer["max_after"],
                total.mean_before + sum(before) / len(before),
                total.mean_after + sum(after) / len(after),
            )
        return total

    def __sub__(self, other: "Summary") -> "Summary":
        return Summary(*(getattr(self, f) - getattr(other, f) for f in self.__dataclass_fields__))

    def __str__(self) -> str:
        share = 100.0 / max(1, self.assignments)
        return (
            f"assignments {self.assignments}, dropped {self.dropped * share:.1f}%, "
            f"expanded {self.expanded * share:.1f}%, tokens without expert {self.left_without}, "
            f"load max/mean {self.peak_before / max(1e-9, self.mean_before):.2f} -> "
            f"{self.peak_after / max(1e-9, self.mean_after):.2f}"
        )


def layers_of(engines: Iterable[list[list[dict[str, Any]]]]) -> Iterable[dict[str, Any]]:
    """The layers' counters of all data-parallel engines; every engine answers worker by worker.

    Within an engine each layer is taken once, since its tensor parallel ranks all count the same
    tokens; under sequence parallelism once for each part of the tokens.
    """
    for workers in engines:
        counted = {(layer["layer"], layer["part"]): layer for each in workers for layer in each}
        yield from counted.values()


class Series:
    """The Prometheus series of one engine, and how far they have been advanced."""

    def __init__(self, model_name: str):
        from prometheus_client import Counter

        def counter(name: str, *labels: str) -> Any:
            return Counter(f"vllm:moe_capacity_{name}", _HELP[name], ["model_name", *labels])

        self.seen = Summary()
        self.assignments = counter("assignments").labels(model_name)
        self.dropped = counter("dropped_assignments").labels(model_name)
        self.expanded = counter("expanded_assignments").labels(model_name)
        self.left_without = counter("tokens_without_expert").labels(model_name)
        peak, mean = counter("peak_load", "when"), counter("mean_load", "when")
        self.peak_before = peak.labels(model_name, "before")
        self.peak_after = peak.labels(model_name, "after")
        self.mean_before = mean.labels(model_name, "before")
        self.mean_after = mean.labels(model_name, "after")

    def advance(self, now: Summary) -> Summary:
        """Add what is new since the last call, and return it."""
        new = now - self.seen
        self.seen = now
        for name in Summary.__dataclass_fields__:
            getattr(self, name).inc(max(0, getattr(new, name)))
        return new


_series: dict[str, Series] = {}


def patches() -> list[Patch]:
    """What publishes with every periodic log of the front end.

    vllm.v1.engine.async_llm.AsyncLLM.do_log_stats. It can go once workers can add to vLLM's
    SchedulerStats.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    return [Patch(AsyncLLM, "do_log_stats", _publish_too, ("self",))]


def _publish_too(original: Function) -> Function:
    async def do_log_stats(self: Any) -> None:
        await original(self)
        from vllm.logger import init_logger

        from vllm_capmoe.integration.engine_args import capacity_config

        client = self.engine_core
        enabled = capacity_config(self.vllm_config.additional_config).enabled
        if not enabled or client.client_index != 0:  # one of several API servers speaks for all
            return
        logger = init_logger("vllm.capmoe")
        try:
            engines = await client.call_utility_all_async(
                "collective_rpc", "moe_capacity_counters", None, (), {}
            )
        except Exception:  # statistics must not take a server down; the engine reports its own end
            logger.exception("MoE capacity: the workers' counters could not be read")
            return
        name = self.vllm_config.model_config.served_model_name
        name = name if isinstance(name, str) else name[0]
        if name not in _series:
            _series[name] = Series(name)
        new = _series[name].advance(Summary.of(layers_of(engines)))
        if new.assignments:
            logger.info("MoE capacity: %s", new)

    return do_log_stats
