"""What capacity did, counted layer by layer: on the device, without reading anything back.

Counters only ever grow, so that readers (Prometheus, the log, tests) take differences at their own
pace. `COUNTERS` of the contract says what a step adds to each, `TABLE` what is published of them.
Readers reach them through `collective_rpc`, see rpc.py.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capmoe_kernels.contract import COUNTERS, TOTALS, Selection
from vllm_capmoe.ranking import MASS_BITS
from vllm_capmoe.unlimited import Held, count_steps

MAX_RECORDS = 100_000
MAX_LATER = 2048  # rows of steps that wait to be counted

Layer = dict[str, Any]  # the counters of a layer as plain numbers, see `LayerStats.counters`


@dataclass(frozen=True)
class Counter:
    """A number that is counted in every layer.

    key: its name in a layer's counters and in `totals` (if it has a `series`): one of `COUNTERS`,
        or, with `layer`, what follows from these.
    series, labels, help: its Prometheus series, `vllm:moe_capacity_{series}_total`, if it has one,
        with its labels beside `model_name`, and what the series says of itself. Counters of one
        series have the same labels with different values.
    unit: what 1 stands for in the series, for fixed point numbers.
    """

    key: str
    layer: Callable[[Layer], float] | None = None
    series: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    help: str = ""
    unit: float = 1.0

    def of(self, layer: Layer) -> float:
        """What a layer has counted."""
        return float(self.layer(layer)) if self.layer else layer[self.key]


def _mean(loads: Sequence[int]) -> float:
    return sum(loads) / len(loads)


_PEAK = "Load of the busiest expert, added up over layers and steps."
_MEAN = "Mean load of the experts, added up over layers and steps."
_LAYER_STEPS = "Steps with prompt tokens and without, in each layer."
_ACTIVE = "Experts with a load, added up over layers and steps with prompt tokens and without."
_BEFORE, _AFTER = {"when": "before"}, {"when": "after"}


TABLE = (
    Counter(
        "dropped",
        series="dropped_assignments",
        help="Assignments that capacity dropped.",
    ),
    Counter(
        "expanded",
        series="expanded_assignments",
        help="Assignments outside of a token's top-k: what Expanded Drop or reroute gave.",
    ),
    Counter(
        "left_without",
        series="tokens_without_expert",
        help="Tokens that lost all their experts in a layer.",
    ),
    Counter("max_before", None, "peak_load", _BEFORE, _PEAK),
    Counter("max_after", None, "peak_load", _AFTER, _PEAK),
    Counter(
        "mass",
        series="gate_mass",
        help="Gate mass, the sum of the scores of the assignments that the models' routers made.",
        unit=2.0**-MASS_BITS,
    ),
    Counter(
        "lost",
        series="lost_gate_mass",
        help="Gate mass of those of these assignments that are not held.",
        unit=2.0**-MASS_BITS,
    ),
    Counter(
        "prompt_steps",
        series="layer_steps",
        labels={"step": "prompt"},
        help=_LAYER_STEPS,
    ),
    *(
        Counter(
            f"{step}_active_{when}",
            series="active_experts",
            labels={"step": step, "when": when},
            help=_ACTIVE,
        )
        for step in ("prompt", "decode")
        for when in ("before", "after")
    ),
    Counter(
        "decode_steps",
        layer=lambda counted: counted["steps"] - counted["prompt_steps"],
        series="layer_steps",
        labels={"step": "decode"},
        help=_LAYER_STEPS,
    ),
    Counter(
        "assignments",
        layer=lambda counted: sum(counted["load_before"]),
        series="assignments",
        help="Token-expert assignments that the models' routers made.",
    ),
    Counter("mean_before", lambda c: _mean(c["load_before"]), "mean_load", _BEFORE, _MEAN),
    Counter("mean_after", lambda c: _mean(c["load_after"]), "mean_load", _AFTER, _MEAN),
)
_READ = ("load_before", "load_after", "kept", "left_without", "mass", "lost", "prompts")


@dataclass
class LayerStats:
    """Counters of one layer.

    summed: int64 [2 * E + len(TOTALS)]: assignments per expert before capacity, those after, and
        the totals in the order of `TOTALS`; `max_before` and `max_after` add up the largest load of
        each step, the number that a step waits for under expert parallelism. As the routing kernel
        adds a step to it by itself. Readers take `counts`.
    part: which part of the engine's tokens this worker routes: its tensor parallel rank under
        sequence parallelism; 0 where all workers of the engine route all tokens, and count alike.
    records: the routing of every step, kept only while `recording` is on (tests and traces);
        without what belongs to single tokens unless `recording_rows`.
    later: steps that are counted when somebody reads, or when they have become many.
    """

    name: str
    summed: Tensor
    part: int = 0
    recording: bool = False
    recording_rows: bool = True
    records: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_RECORDS))
    later: deque[Held] = field(default_factory=deque)
    rows_later: int = 0

    @classmethod
    def allocate(
        cls, name: str, num_experts: int, device: torch.device, part: int = 0
    ) -> "LayerStats":
        size = 2 * num_experts + len(TOTALS)
        return cls(name, torch.zeros(size, dtype=torch.int64, device=device), part)

    @property
    def counts(self) -> Tensor:
        """`summed`, with all steps that have been decided."""
        if self.later:
            self._count()
        return self.summed

    def reset(self) -> None:
        """Forget what was counted, in place: a captured graph goes on counting here."""
        self.counts.zero_()

    def add(self, selection: Selection) -> None:
        """Count one step of plain torch: on the CPU, where numpy's calls cost the least."""
        self._add(replace(selection, **{name: getattr(selection, name).numpy() for name in _READ}))

    def add_later(self, step: Held) -> None:
        """Count a step without a limit, together with those that follow."""
        self.later.append(step)
        self.rows_later += len(step.models_TK)
        if self.rows_later > MAX_LATER:
            self._count()

    def _count(self) -> None:
        steps = [self.later.popleft() for _ in range(len(self.later))]
        self.rows_later = 0
        if steps:
            counts = count_steps(steps, (self.summed.numel() - len(TOTALS)) // 2)
            self._add(SimpleNamespace(**counts, dropped=0, expanded=0))

    def _add(self, counted: Any) -> None:
        totals = [int(np.sum(step(counted))) for step in COUNTERS.values()]
        loads = (np.atleast_2d(s).sum(axis=0) for s in (counted.load_before, counted.load_after))
        self.summed.numpy()[:] += np.concatenate([*loads, totals])

    def record(self, selection: Selection, **tokens: Tensor | None) -> None:
        """Keep one step: the decision, and what `tokens` says of its rows (tensors [T, ...]).

        `digest` is one number for who holds what: equal on two workers if they decided alike.
        """
        experts = selection.experts.cpu()
        digest = hashlib.blake2b(experts.numpy().tobytes(), digest_size=6).digest()
        step: dict[str, Any] = {
            "layer": self.name,
            "load_before": selection.load_before.tolist(),
            "load_after": selection.load_after.tolist(),
            "capacity": selection.capacity.tolist(),
            "digest": int.from_bytes(digest),
        }
        if self.recording_rows:
            step["experts"] = experts.tolist()
            step |= {name: None if rows is None else rows.tolist() for name, rows in tokens.items()}
        self.records.append(step)

    def counters(self, numbers: list[int] | None = None) -> Layer:
        """All counters as plain numbers, keys as `TOTALS`, with the loads by expert beside.

        numbers: the counts, where they are on the host already.
        """
        numbers, E = numbers or self.counts.tolist(), (self.counts.numel() - len(TOTALS)) // 2
        totals = dict(zip(TOTALS, numbers[2 * E :], strict=True))
        counts = {"load_before": numbers[:E], "load_after": numbers[E : 2 * E], **totals}
        return {"layer": self.name, "part": self.part, **counts}


def read(layers: Sequence[LayerStats], started: bool = True) -> list[Layer]:
    """The counters of several layers, by one copy from the device.

    started: whether a real step has come; until then the counts are those of dummy runs, and all
        numbers here are 0.
    """
    if not layers:
        return []
    counts = torch.cat([layer.counts for layer in layers])
    found = iter((counts if started else torch.zeros_like(counts, device="cpu")).tolist())
    return [layer.counters(list(islice(found, layer.counts.numel()))) for layer in layers]


def by_layer(engines: Iterable[Iterable[Iterable[Layer]]]) -> list[Layer]:
    """The counters of each layer once, over all tokens, in the order in which they come.

    engines: the counters of every worker of each engine. Workers of an engine count alike, but for
    those that route different parts of its tokens.
    """
    found: dict[str, Layer] = {}
    for workers in engines:
        parts = {(each["layer"], each["part"]): each for own in workers for each in own}
        for (name, _), counted in parts.items():
            new = {key: value for key, value in counted.items() if key not in ("layer", "part")}
            old = found.get(name)
            found[name] = (
                {"layer": name, **new}
                if old is None
                else {"layer": name} | {key: _plus(old[key], value) for key, value in new.items()}
            )
    return list(found.values())


def _plus(left: Any, right: Any) -> Any:
    if isinstance(left, list):
        return [a + b for a, b in zip(left, right, strict=True)]
    return left + right


def totals(layers: Iterable[Layer]) -> dict[str, float]:
    """What the layers have counted together, for every counter that has a series."""
    layers = list(layers)
    return {each.key: sum(each.of(layer) for layer in layers) for each in TABLE if each.series}
