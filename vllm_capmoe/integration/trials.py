"""Settings tried on every step beside the real routing, and never applied: what a planner counts.

For each trial the same `route_torch` decides that would decide in earnest, so what is counted is
what a run with that setting does on the same step. Nothing here is meant for serving: every step
waits for the host.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from capmoe_kernels.contract import Plan, Step
from vllm_capmoe.ranking import MASS_BITS, choose_top_k, score_keys
from vllm_capmoe.torch_routing import route_torch

UNIT = 2.0**-MASS_BITS  # of the gate mass that is counted


class LayerTrials:
    """The trials of one layer, and what they have counted.

    plans: by name. rank_E: int64 [E], the rank on which each expert would live.
    loads: the load of every expert in each step with prompt tokens, before any limit.
    counts: by kind of step ("prompt" where it has a prompt token, else "decode"), then by trial,
        the sums that `vllm_capmoe.planner.counts.Counts` names.
    requests: sizes of decode steps. A step without a prompt token is tried in parts of so many
        tokens, as if each were a step; such a trial is called "... at 16".
    """

    def __init__(self, plans: Mapping[str, Plan], rank_E: Tensor, requests: Sequence[int] = ()):
        self.plans, self.rank_E, self.requests = plans, rank_E, requests
        self.loads: list[list[int]] = []
        self.counts: dict[str, dict[str, dict[str, float]]] = {"prompt": {}, "decode": {}}

    def add(self, scores_TE: Tensor, topk_TK: Tensor | None, step: Step) -> None:
        """Try all plans on a step. scores_TE: float32 [T, E]. topk_TK: int [T, k], the model's own.

        The ranks are those that are planned for: no token belongs to one of them.
        """
        plan = next(iter(self.plans.values()))
        topk_TK = choose_top_k(score_keys(scores_TE), plan.top_k, topk_TK)
        real_T, prompt_T = _masks(scores_TE, step["is_padding_T"], step["is_decode_T"])
        if not bool(real_T.any()):
            return
        step = {**step, "device_E": self.rank_E, "token_device_T": None}
        if bool(prompt_T.any()):
            self.loads.append(_loads(topk_TK, real_T, plan.num_experts).tolist())
            self._try("prompt", "", scores_TE, topk_TK, real_T, step)
            return
        self._try("decode", "", scores_TE, topk_TK, real_T, step)
        tokens = real_T.nonzero()[:, 0]
        for size in self.requests:
            for part in tokens.split(size)[: len(tokens) // size]:
                alone: Step = {
                    **step,
                    "is_padding_T": None,
                    "is_decode_T": real_T[part],
                    "request_T": None,
                }
                self._try(
                    "decode", f" at {size}", scores_TE[part], topk_TK[part], real_T[part], alone
                )

    def _try(
        self,
        kind: str,
        size: str,
        scores_TE: Tensor,
        topk_TK: Tensor,
        real_T: Tensor,
        step: Step,
    ) -> None:
        """Count what all plans do; of parts of a step, those without a limit."""
        plan = next(iter(self.plans.values()))
        before_E = _loads(topk_TK, real_T, plan.num_experts)
        mass_T = _mass(scores_TE, topk_TK, real_T[:, None].expand_as(topk_TK))
        for name, tried in self.plans.items():
            if size and tried.mode != "off":
                continue
            selection = route_torch(scores_TE, tried, topk_TK=topk_TK, **step)
            held_TW = selection.experts.long()
            own_TW = (held_TW[:, :, None] == topk_TK[:, None, :]).any(2) & real_T[:, None]
            kept = int(own_TW.sum())
            after_E = selection.load_after
            counted = {
                "steps": 1,
                "assignments": int(before_E.sum()),
                "dropped": int(before_E.sum()) - kept,
                "added": int(after_E.sum()) - kept,
                "left_without": int(selection.left_without),
                "mass": int(selection.mass) * UNIT,
                "lost": int(selection.lost) * UNIT,
                "missing": float((mass_T - _mass(scores_TE, held_TW, held_TW >= 0)).clamp(0).sum()),
                "peak_before": int(before_E.max()),
                "peak_after": int(after_E.max()),
                "rank_before": self._busiest_rank(before_E),
                "rank_after": self._busiest_rank(after_E),
                "active_before": int((before_E > 0).sum()),
                "active_after": int((after_E > 0).sum()),
            }
            sums = self.counts[kind].setdefault(name + size, defaultdict(int))
            for counter, value in counted.items():
                sums[counter] += value

    def _busiest_rank(self, load_E: Tensor) -> int:
        ranks = torch.zeros(int(self.rank_E.max()) + 1, dtype=torch.int64, device=load_E.device)
        return int(ranks.scatter_add_(0, self.rank_E, load_E.long()).max())


def _masks(
    scores_TE: Tensor, is_padding_T: Tensor | None, is_decode_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """bool [T] each: real rows, and those of them that are prompt."""
    real_T = torch.ones(scores_TE.shape[0], dtype=torch.bool, device=scores_TE.device)
    if is_padding_T is not None:
        real_T = ~is_padding_T
    return real_T, real_T if is_decode_T is None else real_T & ~is_decode_T


def _loads(topk_TK: Tensor, real_T: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: the assignments of real tokens."""
    return torch.bincount(topk_TK[real_T].reshape(-1), minlength=num_experts)


def _mass(scores_TE: Tensor, experts_TW: Tensor, counted_TW: Tensor) -> Tensor:
    """float64 [T]: the sum of S over a token's assignments that count."""
    mass_TW = scores_TE.double().gather(1, experts_TW.clamp(min=0))
    return mass_TW.nan_to_num(0.0).where(counted_TW, 0.0).sum(1)
