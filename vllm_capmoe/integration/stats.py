"""What capacity did, counted layer by layer: on the device, without reading anything back.

Counters only ever grow, so that readers (Prometheus, the log, tests) take differences at their own
pace. A reader gets them through `collective_rpc("moe_capacity_counters")`, which vLLM runs on
every worker between two steps.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_capmoe.reference import Selection

TOTALS = ("steps", "dropped", "expanded", "left_without", "max_before", "max_after")
MAX_RECORDS = 100_000


@dataclass
class LayerStats:
    """Counters of one layer.

    counts: int64 [2 * E + 6]: assignments per expert before capacity, those after, and the totals
        in the order of `TOTALS`; `max_before` and `max_after` add up the largest load of each step,
        the number that a step waits for under expert parallelism. As the routing kernel adds a
        step to it by itself.
    part: which part of the engine's tokens this worker routes: its tensor parallel rank under
        sequence parallelism; 0 where all workers of the engine route all tokens, and count alike.
    records: the routing of every step, kept only while `recording` is on (tests and traces);
        without what belongs to single tokens unless `recording_rows`.
    """

    name: str
    counts: Tensor
    part: int = 0
    recording: bool = False
    recording_rows: bool = True
    records: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_RECORDS))

    @classmethod
    def allocate(
        cls, name: str, num_experts: int, device: torch.device, part: int = 0
    ) -> "LayerStats":
        size = 2 * num_experts + len(TOTALS)
        return cls(name, torch.zeros(size, dtype=torch.int64, device=device), part)

    def reset(self) -> None:
        """Forget what was counted, in place: a captured graph goes on counting here."""
        self.counts.zero_()

    def add(self, selection: Selection) -> None:
        """Count one step."""
        before, after = selection.load_before, selection.load_after
        totals = (
            before.amax() > 0,  # a dummy step has no tokens
            selection.dropped,
            selection.expanded,
            selection.left_without,
            before.amax(),
            after.amax(),
        )
        self.counts += torch.cat((before, after, torch.stack([n.long() for n in totals])))

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

    def counters(self) -> dict[str, Any]:
        """All counters as plain numbers, keys as `TOTALS`, with the loads by expert beside."""
        numbers, E = self.counts.tolist(), (self.counts.numel() - len(TOTALS)) // 2
        totals = dict(zip(TOTALS, numbers[2 * E :], strict=True))
        counts = {"load_before": numbers[:E], "load_after": numbers[E : 2 * E], **totals}
        return {"layer": self.name, "part": self.part, **counts}
