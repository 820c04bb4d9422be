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

    load_E: int64 [2, E], assignments per expert, before capacity and after.
    totals: int64 [6], in the order of `TOTALS`; `max_before` and `max_after` add up the largest
        load of each step, the number that a step waits for under expert parallelism.
    part: which part of the engine's tokens this worker routes: its tensor parallel rank under
        sequence parallelism; 0 where all workers of the engine route all tokens, and count alike.
    records: the routing of every step, kept only while `recording` is on (tests and traces);
        without what belongs to single tokens unless `recording_rows`.
    """

    name: str
    load_E: Tensor
    totals: Tensor
    part: int = 0
    recording: bool = False
    recording_rows: bool = True
    records: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_RECORDS))

    @classmethod
    def allocate(
        cls, name: str, num_experts: int, device: torch.device, part: int = 0
    ) -> "LayerStats":
        return cls(
            name,
            torch.zeros(2, num_experts, dtype=torch.int64, device=device),
            torch.zeros(len(TOTALS), dtype=torch.int64, device=device),
            part,
        )

    def reset(self) -> None:
        """Forget what was counted, in place: a captured graph goes on counting here."""
        self.load_E.zero_()
        self.totals.zero_()

    def add(self, selection: Selection) -> None:
        """Count one step."""
        load_E = torch.stack((selection.load_before, selection.load_after))
        self.load_E += load_E
        before, after = load_E.amax(1).unbind()
        self.totals += torch.stack(
            (
                (before > 0).to(torch.int64),  # a dummy step has no tokens
                selection.dropped,
                selection.expanded,
                selection.left_without,
                before,
                after,
            )
        )

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
        before, after = self.load_E.tolist()
        totals = dict(zip(TOTALS, self.totals.tolist(), strict=True))
        counts = {"load_before": before, "load_after": after, **totals}
        return {"layer": self.name, "part": self.part, **counts}
